"""What the PyTorch adapter costs a step, as a ratio to the plain loop beside it."""

from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hybridcore import HybridTrainerConfig
from hybridcore_torch import HybridTrainer
from hybridcore_torch.snapshots import SnapshotBank


def classifier(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))
    return model, torch.optim.AdamW(model.parameters(), 1e-3)


class StepOverhead:
    """Median time of a step over that of the plain loop, interleaved, one thread.

    The widths are models of 0.1, 0.4 and 1.6 million parameters. Noise labels keep the engine from
    predicting: this is the price of watching. Where its tensors come to lie in memory makes one of
    two equal loops up to 1.7 times as slow as the other, so the figure is the median of several
    pairs, of which every second one was built in the other order.
    """

    params = ((128, 512, 2048), ("enabled", "disabled"))
    param_names = ("width", "trainer")
    timeout = 300
    pairs, warmup, steps = 6, 100, 60

    def setup(self, width, trainer):
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(100, 64, 784, generator=generator)
        self.y = torch.randint(0, 10, (100, 64), generator=generator)

    def track_ratio(self, width, trainer):
        config = HybridTrainerConfig(enabled=trainer == "enabled")
        # Kept, so that no pair lies where an earlier one did.
        pairs = [[classifier(width), classifier(width)] for _ in range(self.pairs)]
        for pair in pairs[::2]:
            pair.reverse()
        return np.median([self.ratio(*pair, config) for pair in pairs])

    def ratio(self, plain, watched, config):
        (model, optimizer), (plain_model, plain_optimizer) = watched, plain
        hybrid = HybridTrainer(model, optimizer, config)

        def plain_step(x, y):
            plain_optimizer.zero_grad()
            loss = F.cross_entropy(plain_model(x), y)
            loss.backward()
            plain_optimizer.step()
            loss.item()

        def hybrid_step(x, y):
            hybrid.step(lambda: F.cross_entropy(model(x), y))

        calls = [plain_step, hybrid_step]
        times = np.zeros((2, self.warmup + self.steps))
        for step in range(times.shape[1]):
            # Who comes second finds the batch in the cache.
            for which in (0, 1) if step % 2 else (1, 0):
                start = perf_counter()
                calls[which](self.x[step % 100], self.y[step % 100])
                times[which, step] = perf_counter() - start
        plain_time, ours = np.median(times[:, self.warmup :], axis=1)
        return ours / plain_time

    track_ratio.unit = "hybrid / plain"


class Snapshots:
    """Taking a snapshot, its Gram matrix, and moving, for one million parameters."""

    def setup(self):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        groups = [[nn.Parameter(torch.randn(125_000))] for _ in range(8)]
        self.bank = SnapshotBank(groups, 6)
        for _ in range(6):
            self.bank.take(fresh=False)
        self.coefficients = np.tile(np.array([0, 0, 0, 0, -1.0, 2.0]), (8, 1))

    def time_take(self):
        self.bank.take(fresh=False)

    def time_gram(self):
        self.bank.gram()

    def time_move(self):
        self.bank.move(self.coefficients)


class Cycle:
    """Snapshots, Gram matrix and move of a cycle, for 25 million parameters.

    As a share of the cycle's 50 full steps, by AdamW on batches of 64, and in plain copies of the
    parameters. By default that size has the four snapshots in 8 bits for which there is room.
    """

    params = (("exact", "int8"),)
    param_names = ("kind",)
    timeout = 300

    def setup(self, kind):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        layers = [[nn.Linear(2500, 2500, bias=False), nn.ReLU()] for _ in range(4)]
        self.model = nn.Sequential(*(part for layer in layers for part in layer))
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(parameters, 1e-4)
        self.x = torch.randn(64, 2500)
        self.count = 6 if kind == "exact" else 4
        groups = [[p] for p in parameters]
        self.bank = SnapshotBank(groups, self.count, kind=kind)
        coefficients = np.zeros((4, self.count))
        coefficients[:, -2:] = -1.0, 2.0
        self.coefficients = coefficients
        self.copies = [p.detach().clone() for p in parameters]
        self.step()
        self.cycle()

    def step(self):
        self.optimizer.zero_grad()
        F.mse_loss(self.model(self.x), self.x).backward()
        self.optimizer.step()

    def copy(self):
        torch._foreach_copy_(self.copies, [p.detach() for p in self.model.parameters()])

    def cycle(self):
        for taken in range(self.count):
            last = taken + 1 == self.count
            self.bank.take(fresh=taken == 0, exact=last)
        self.bank.gram()
        self.bank.move(self.coefficients)

    def seconds(self, call, times):
        spent = []
        for _ in range(times):
            start = perf_counter()
            call()
            spent.append(perf_counter() - start)
        return float(np.median(spent))

    def track_share_of_full_steps(self, kind):
        return self.seconds(self.cycle, 3) / (50 * self.seconds(self.step, 5))

    def track_plain_copies(self, kind):
        return self.seconds(self.cycle, 3) / self.seconds(self.copy, 5)

    track_share_of_full_steps.unit = "share"
    track_plain_copies.unit = "copies"


class BackwardPassesSaved:
    """Share of the backward passes that a smooth run (digits, full batch) does without."""

    def track_share(self):
        from sklearn.datasets import load_digits

        torch.set_num_threads(1)
        torch.manual_seed(0)
        digits = load_digits()
        x = torch.tensor(digits.data / 16, dtype=torch.float32)
        y = torch.tensor(digits.target)
        model = nn.Linear(64, 10)
        trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-2))
        for _ in range(600):
            trainer.step(lambda: F.cross_entropy(model(x), y))
        return trainer.statistics().backward_reduction

    track_share.unit = "share"
