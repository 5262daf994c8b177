"""A byte-level GPT on Python's own source, in batches of several parts, stopped and resumed.

Shows: gradient accumulation, by a list of closures, and checkpoints: ``save_every``, and
``HybridTrainer.load``, which goes on where the run was, bit for bit.

    python examples/byte_gpt.py
"""

import argparse
import sysconfig
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hybridcore_torch import HybridTrainer

LENGTH, WIDTH, PARTS = 48, 48, 2


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        block = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.logits = nn.Linear(WIDTH, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, x):
        seen = self.bytes(x) + self.places.weight
        return self.logits(self.blocks(seen, mask=self.mask, is_causal=True))


def build():
    torch.manual_seed(0)
    model = GPT()
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3)


parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true", help="fewer steps")
steps = 80 if parser.parse_args().quick else 1500

torch.set_num_threads(1)
sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
text = torch.frombuffer(bytearray(b"".join(p.read_bytes() for p in sources)), dtype=torch.uint8)


def part(model, step, number):
    """Loss of one part of a step's batch; which one depends on the step alone."""
    seed = torch.Generator().manual_seed(PARTS * step + number)
    rows = torch.randint(len(text) - LENGTH, (8, 1), generator=seed) + torch.arange(LENGTH + 1)
    sample = text[rows].long()
    return F.cross_entropy(model(sample[:, :-1]).flatten(0, 1), sample[:, 1:].flatten())


def train(trainer, steps):
    for step in steps:
        parts = [lambda s=step, n=n: part(trainer.model, s, n) for n in range(PARTS)]
        result = trainer.step(parts)
        if step % 50 == 0:
            print(f"step {step}: {result.phase.name:7} loss {result.loss:.3f}")


with tempfile.TemporaryDirectory() as folder:
    trainer = HybridTrainer(*build())
    trainer.save_every(steps // 2, folder)
    train(trainer, range(steps // 2))
    # As after a crash: everything is built again, and goes on from the newest file.
    resumed = HybridTrainer.load(folder, *build())
train(resumed, range(resumed.statistics().steps, steps))
print(resumed.statistics())
