"""Two processes train one model: each sees half of the rows, and all take the same decisions.

Shows: DistributedDataParallel with the trainer on every rank, and who saves. With a launcher of
one's own, drop ``mp.spawn`` and read rank and world size from it:

    torchrun --nproc-per-node 2 my_loop.py
    python examples/distributed.py                # starts both by itself
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hybridcore_torch import HybridTrainer

WORLD = 2


def work(rank, folder, steps):
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, world_size=WORLD, rank=rank)
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.data / 16.0).float()[rank::WORLD][:898]
    y = torch.tensor(digits.target)[rank::WORLD][:898]
    # First the wrapper, then optimizer and trainer, on every rank.
    model = DistributedDataParallel(nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    trainer = HybridTrainer(model, optimizer)
    phases = []
    for _ in range(steps):
        result = trainer.step(lambda: F.cross_entropy(model(x), y))
        phases.append(result.phase.value)
    # The weights are the same everywhere, so one rank saves for all.
    if rank == 0:
        trainer.save(Path(folder) / "run.safetensors")
        print(trainer.statistics())
    told = [None] * WORLD
    dist.all_gather_object(told, phases)
    assert told[0] == told[1]
    # A group that ends right behind an exchange or a backward pass can hang, in plain torch too.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    steps = 220 if parser.parse_args().quick else 1000
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder, steps), nprocs=WORLD)
