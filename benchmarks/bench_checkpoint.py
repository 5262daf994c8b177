"""What a checkpoint takes: bytes, and the time to write and to read it."""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hybridcore import HybridTrainerConfig
from hybridcore_torch import HybridTrainer


class Checkpoint:
    """A run of the default engine, saved after 400 steps, flushed to the disk.

    The model is logistic regression, so that nearly all of it is the engine's, without its
    snapshots, or one of a million parameters with all snapshots of it.
    """

    params = ("engine", "million parameters, all snapshots")
    param_names = ("holds",)
    timeout = 300

    def setup(self, holds):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        x, y = torch.randn(256, 64), torch.randint(0, 10, (256,))
        self.small = holds == "engine"
        layers = [nn.Linear(64, 10)]
        if not self.small:
            layers = [nn.Linear(64, 1000), nn.Tanh(), nn.Linear(1000, 930), nn.Linear(930, 10)]
        self.model = nn.Sequential(*layers)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3)
        # Without pairs, which would be 46 copies of the weights.
        config = HybridTrainerConfig() if self.small else HybridTrainerConfig(secant_pairs=0)
        self.trainer = HybridTrainer(self.model, self.optimizer, config)
        for _ in range(400 if self.small else 160):
            self.trainer.step(lambda: F.cross_entropy(self.model(x), y))
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "run"
        self.time_save(holds)

    def teardown(self, holds):
        self.folder.cleanup()

    def time_save(self, holds):
        self.trainer.save(self.path, snapshots=not self.small)

    def time_load(self, holds):
        HybridTrainer.load(self.path, self.model, self.optimizer)

    def track_bytes(self, holds):
        return self.path.stat().st_size

    track_bytes.unit = "bytes"
