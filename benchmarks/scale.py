"""What hybridcore adds on many ranks: formulas, held against runs on 2 and 4 processes.

    python benchmarks/scale.py          minutes; writes benchmarks/results/scale.json and the tables
                                        of examples/at_scale.md
    python benchmarks/scale.py --toy    one small run, and nothing is written

The formulas are explained in examples/at_scale.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hybridcore import HybridTrainerConfig
from hybridcore.memory import Size, beside_bytes, plan, snapshots_bytes
from hybridcore_torch import HybridTrainer

ROOT = Path(__file__).resolve().parent
RESULTS, PAGE = ROOT / "results" / "scale.json", ROOT.parent / "examples" / "at_scale.md"
GROUPS = 8
# Of an H100: bytes a second of its memory, and floating-point operations a second in bfloat16, of
# which large models reach about this share.
BANDWIDTH, OPERATIONS, REACHED = 3.35e12, 989e12, 0.4
TOKENS = 8192  # of one rank in a step
CONFIG = {"warmup_steps": 30, "secant_pairs": 0}


class Extra(NamedTuple):
    """What hybridcore adds on each rank."""

    kind: str
    snapshots: int
    memory: float
    sent_by_pass: int
    sent_by_decision: int
    received_in_cycle: float
    moved_in_cycle: float


def extra(parameters: float, ranks: int, shards: int, config: HybridTrainerConfig) -> Extra:
    """Formulas for AdamW in float32: bytes on each rank.

    Parameters
    ----------
    parameters : float
        Trainable parameters of the whole model.
    ranks, shards : int
        Processes, and over how many of them the weights are spread.
    config : HybridTrainerConfig
        Settings.
    """
    own = parameters / shards
    size = Size(own, 4 * own, 8 * own, on_gpu=True)
    there = plan(config, size)
    m = there.snapshots
    memory = snapshots_bytes(there.kind, m, size) + beside_bytes(there, size)
    by_pass, by_decision = 3 * 8, 8 * (1 + GROUPS * m * m)
    full = config.min_full_steps
    if there.kind == "exact":
        # Read and written when taken, read for the Gram matrix, read and written by a move.
        moved = (8 * m + 4 * m + 4 * m + 4) * own
    else:
        # The first is a copy, the others are read against it, and the last one takes its place.
        # Then the Gram matrix, and a move.
        moved = (8 + (m - 1) * 9 + 4 + (m - 1) + 4 + (m - 1) + 4) * own
    received = ranks * (full * by_pass + by_decision)
    return Extra(there.kind, m, memory, by_pass, by_decision, received, moved)


def of_a_step(parameters: float, shards: int, moved: float, config: HybridTrainerConfig) -> float:
    """Share of the cycle's full steps that moving so many bytes takes, by the figures above."""
    step = 6 * parameters * TOKENS / (OPERATIONS * REACHED)
    return moved / BANDWIDTH / (config.min_full_steps * step)


# -- measurements ---------------------------------------------------------------------------------


def work(rank: int, world: int, folder: str, kind: str, width: int, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/{kind}{world}", rank=rank, world_size=world)
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 64).unsqueeze(1)
    y = torch.sin(3 * x) + 0.3 * torch.cos(7 * x)
    sizes = [1, *[width] * 8, 1]
    layers = [part for two in itertools.pairwise(sizes) for part in (nn.Linear(*two), nn.Tanh())]
    model: nn.Module = nn.Sequential(*layers[:-1])
    parameters = sum(p.numel() for p in model.parameters())
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    handed, gather = [], dist.all_gather

    def watched(rows, own, group):
        handed.append(own.numel() * own.element_size())
        gather(rows, own, group)

    dist.all_gather = watched
    config = HybridTrainerConfig(**CONFIG)
    trainer = HybridTrainer(model, torch.optim.AdamW(model.parameters(), 3e-5), config)
    # Only what steps exchange counts, and not the settings.
    handed.clear()
    for _ in range(steps):
        trainer.step(lambda: F.mse_loss(model(x[rank::world]), y[rank::world]))
    summary = trainer.statistics()
    if rank == 0:
        result = {
            "parameters": parameters,
            "passes": summary.full_steps + summary.probes,
            "predicted_steps": summary.predicted_steps,
            "sent_by_pass": min(handed),
            "sent_by_decision": max(handed),
            "exchanges": len(handed),
            "memory": summary.memory,
        }
        Path(folder, "result.json").write_text(json.dumps(result), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measure(world: int, kind: str, width: int, steps: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (world, folder, kind, width, steps), nprocs=world)
        found = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
    shards = world if kind == "fsdp" else 1
    told = extra(found["parameters"], world, shards, HybridTrainerConfig(**CONFIG))
    found["memory"] = sum(found["memory"].values())
    row = {"kind": kind, "ranks": world, "measured": found, "formula": told._asdict()}
    print(json.dumps(row))
    return row


def tables(rows: list[dict]) -> str:
    """Markdown of the page's tables."""
    lines = [
        "| run here | ranks | memory on a rank, formula | measured | sent by a pass | measured | "
        "by a decision | measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found, told = row["measured"], row["formula"]
        name = {"ddp": "DDP", "fsdp": "FSDP2"}[row["kind"]]
        lines.append(
            f"| {name}, {found['parameters'] / 1e6:.2f}M parameters | {row['ranks']} "
            f"| {told['memory'] / 1e6:.2f} MB | {found['memory'] / 1e6:.2f} MB "
            f"| {told['sent_by_pass']} B | {found['sent_by_pass']} B "
            f"| {told['sent_by_decision']} B | {found['sent_by_decision']} B |"
        )
    lines += [
        "",
        "| on paper | GPUs | weights, gradients, AdamW | hybridcore | sent in a cycle | received "
        "| moved in memory | of the full steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    config = HybridTrainerConfig()
    for parameters in (7e9, 70e9):
        for ranks in (64, 1024):
            told = extra(parameters, ranks, ranks, config)
            sent = config.min_full_steps * told.sent_by_pass + told.sent_by_decision
            share = of_a_step(parameters, ranks, told.moved_in_cycle, config)
            lines.append(
                f"| {parameters / 1e9:.0f}B | {ranks} | {16 * parameters / ranks / 1e9:.2f} GB "
                f"| {told.memory / 1e9:.2f} GB, {told.kind} | {sent / 1e3:.1f} kB "
                f"| {told.received_in_cycle / 1e6:.2f} MB | {told.moved_in_cycle / 1e9:.2f} GB "
                f"| {share:.1e} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="one small run")
    arguments = parser.parse_args()
    if arguments.toy:
        print(tables([measure(2, "fsdp", 32, 200)]))
        return
    rows = [measure(world, kind, 192, 260) for kind in ("ddp", "fsdp") for world in (2, 4)]
    RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    begin, end = "<!-- tables -->\n", "\n<!-- end of tables -->"
    before, after = page.split(begin)[0], page.split(end)[1]
    PAGE.write_text(before + begin + tables(rows) + end + after, encoding="utf-8")


if __name__ == "__main__":
    main()
