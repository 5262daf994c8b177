"""Lightning: the same fit with one more callback, on scikit-learn's digits.

python examples/lightning_callback.py
"""

import argparse

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn

from hybridcore_torch.lightning import HybridCallback

parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true", help="fewer steps")
steps = 300 if parser.parse_args().quick else 1000


class Digits(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


digits = load_digits()
x = torch.tensor(digits.data / 16.0, dtype=torch.float32)
loader = torch.utils.data.DataLoader([(x, torch.tensor(digits.target))] * steps, batch_size=None)

hybrid = HybridCallback()
quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[hybrid], **quiet).fit(Digits(), loader)
print(hybrid.hybrid.statistics())
