"""Several processes that train one model: the same decisions, and those of a single process."""

import datetime
import faulthandler
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from problems import digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from hybridcore import (
    Action,
    CheckpointError,
    ConfigError,
    Directive,
    HybridTrainerConfig,
    Phase,
    ProtocolError,
)
from hybridcore_torch import HybridTrainer

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.slow,
]

STEPS, HALF = 260, 130
# A group of processes takes no quasi-Newton steps, and what is compared with it must not either.
CONFIG = HybridTrainerConfig(warmup_steps=30, secant_pairs=0)
ROWS = 48
BAD = 60
# Kills right after a save is whole, right before the next one is, and of the other rank.
KILLS_AT_THE_WORST = 8176
EVEN = 20
# What the last exchange handed over, where exchanges are watched.
EXCHANGED = []
# Models whose group must not end in these processes: right behind a backward pass, plain
# DistributedDataParallel waits for the interpreter there now and then, and for ever.
KEPT = []


def problem(width=21):
    """A smooth regression in float64, so that rounding changes no decision."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, ROWS, dtype=torch.float64).unsqueeze(1)
    y = torch.sin(3 * x) + 0.3 * torch.cos(7 * x)
    # Widths that two and four ranks cannot share out evenly.
    model = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)).double()
    return model, x, y


def train(model, x, y, steps=range(STEPS), bad=None, file=None, parts=1):
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    with torch.no_grad():
        model(x)
    arguments = {"max_grad_norm": 10.0}
    if steps.start:
        trainer = HybridTrainer.load(file, model, optimizer, **arguments)
    else:
        trainer = HybridTrainer(model, optimizer, CONFIG, **arguments)
    phases, losses, norms, bare = [], [], [], 0
    for step in steps:

        def loss_of(rows, step=step):
            loss = F.mse_loss(model(x[rows]), y[rows])
            return loss * math.nan if step == bad else loss

        closure = [lambda rows=slice(part, None, parts): loss_of(rows) for part in range(parts)]
        if step % 20 == 0:
            evaluate(trainer, x)
        result = trainer.step(closure)
        phases.append(result.phase.name)
        losses.append(result.loss)
        norms.append(result.gradient_norm or 0.0)
        bare += any(tensor._use_count() < 2 for tensor in EXCHANGED)
    if steps.stop < STEPS and file is not None:
        trainer.save(file)
    weights = whole(model)
    with trainer.averaged():
        averaged = whole(model)
    statistics = trainer.statistics()
    back = rolled_back(trainer, closure)
    return {
        "phases": phases,
        "losses": losses,
        "norms": norms,
        "weights": weights,
        "averaged": averaged,
        "divergences": statistics.divergences,
        "predicted": statistics.predicted_steps,
        "passes": statistics.full_steps + statistics.probes + 1,
        "rolled_back": back,
        "bare": bare,
    }


@torch.no_grad()
def evaluate(trainer, x):
    """As loops do every now and then, at the average and at the weights."""
    with trainer.averaged():
        trainer.model(x)
    trainer.model(x)


def rolled_back(trainer, closure):
    """Whether weights and moments come back, as after a jump that made it worse."""
    hands, weights = trainer._hands, whole(trainer.model)
    moments = whole_state(trainer.optimizer)
    hands.carry_out(Directive(Action.SAVE), None)
    hands.carry_out(Directive(Action.FULL), closure)
    moved = not torch.equal(whole(trainer.model)[0], weights[0])
    hands.carry_out(Directive(Action.ROLLBACK), None)
    back = zip(
        weights + moments, whole(trainer.model) + whole_state(trainer.optimizer), strict=True
    )
    return moved and all(torch.equal(mine, theirs) for mine, theirs in back)


def whole_state(optimizer):
    return [full(s["exp_avg"]) for s in optimizer.state.values()]


def whole(model):
    return [full(p.detach()) for p in model.parameters()]


def full(value):
    # What all ranks hold whole comes as the very memory that it lies in.
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


def work(rank, world, rendezvous, folder, kind, steps, bad_rank):
    torch.set_num_threads(1)
    # A process that hangs where the group's own limit does not count says where, and fails.
    faulthandler.dump_traceback_later(400, exit=True)
    dist.init_process_group(
        "gloo", rendezvous, datetime.timedelta(seconds=120), world_size=world, rank=rank
    )
    model, x, y = problem()
    try:
        if kind == "ddp":
            model = DistributedDataParallel(model)
            local_parts = counted(model, "no_sync")
        elif kind == "fsdp":
            mesh = init_device_mesh("cpu", (world,))
            for layer in (model[0], model[2]):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        elif kind == "tensor parallel":
            # A layer that rows and columns are cut of has to be cut evenly.
            model, _, _ = problem(EVEN)
            layers = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(model, init_device_mesh("cpu", (world,)), layers)
        elif kind in ("root", "ended"):
            # Its weights stay whole after a pass forwards that none backwards follows.
            fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        if kind == "astray":
            outcome = astray(model, x, y, rank)
        elif kind == "refused":
            differing(*problem(), rank)
            outcome = uneven(model, x, y, rank)
        elif kind == "clipped":
            outcome = clipped(model, x, y, rank)
        elif kind == "normalised":
            outcome = normalised(rank)
        elif kind == "ended":
            outcome = ended(model, x[rank::world], y[rank::world])
        else:
            exchanged = watched_exchanges()
            bad = BAD if rank == bad_rank else None
            # A file is written by one of them, and a folder by all.
            all_write = kind == "fsdp" or steps.start > 0
            file = folder / "checkpoint" if rank == 0 or all_write else None
            # Each rank sees rows of its own; gradients are averaged over equal numbers of rows.
            rows, parts = slice(rank, None, world), 2 if kind == "ddp" else 1
            if kind == "tensor parallel":
                rows = slice(None)
            outcome = train(model, x[rows], y[rows], steps, bad, file, parts)
            outcome["exchanged"] = exchanged
            outcome["local parts"] = len(local_parts) if kind == "ddp" else 0
        torch.save(outcome, folder / f"{rank}.pt")
    finally:
        KEPT.append((model, dist.group.WORLD))
        dist.destroy_process_group()
    # Threads of torch's that are there while the interpreter ends have aborted a process.
    os._exit(0)


def counted(owner, name):
    """Count the calls of a method from now on, by the length of what is returned."""
    method, calls = getattr(owner, name), []
    setattr(owner, name, lambda: calls.append(None) or method())
    return calls


def astray(model, x, y, rank):
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-3), CONFIG)
    if rank == 1:
        # An error that one rank swallows.
        with pytest.raises(ZeroDivisionError):
            trainer.step(lambda: 1 / 0)
    with pytest.raises(ProtocolError, match=r"rank 1 is at directive 2 .* others at 1"):
        trainer.step(lambda: F.mse_loss(model(x), y))
    return {}


def differing(model, x, y, rank):
    """Settings that are not those of the first rank, which each of them is told."""
    model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for config, clip, text in (
        (HybridTrainerConfig(horizon=75 + 5 * rank), None, "horizon is 80 on rank 1 and 75 on"),
        (HybridTrainerConfig(enabled=rank == 0), None, "enabled is False on rank 1 and True on"),
        (CONFIG, 1.0 + rank, "max_grad_norm is 2.0 on rank 1 and 1.0 on rank 0: build the"),
    ):
        with pytest.raises(ConfigError, match=text):
            HybridTrainer(model, optimizer, config, max_grad_norm=clip)
    # Each process sees a loss of its own, so that quasi-Newton steps would part them.
    assert HybridTrainer(model, optimizer).engine.pairs == 0
    # Nothing is left behind: with the same ones they train.
    trainer = HybridTrainer(model, optimizer, CONFIG)
    trainer.step(lambda: F.mse_loss(model(x), y))


def uneven(model, x, y, rank):
    """What DDP makes up for where ranks have different numbers of batches."""
    model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    closure = lambda: F.mse_loss(model(x), y)  # noqa: E731
    trainer = HybridTrainer(model, optimizer, CONFIG)
    with pytest.raises(ProtocolError, match="equally many batches"), model.join():
        trainer.step(closure)
    plain = HybridTrainer(model, optimizer, HybridTrainerConfig(enabled=False))
    with model.join():
        for _ in range(3 + rank):
            plain.step(closure)
    return {"weights": whole(model)}


def watched_exchanges():
    """Bytes that each of hybridcore's exchanges hands over, in a list that grows."""
    sizes, gather = [], dist.all_gather

    def watched(rows, own, group):
        sizes.append(own.numel() * own.element_size())
        EXCHANGED[:] = own, *rows
        gather(rows, own, group)

    dist.all_gather = watched
    return sizes


def clipped(model, x, y, rank):
    """A gradient that is not finite, of a layer that another optimizer trains, on one rank."""
    model = DistributedDataParallel(model)
    layers = model.module
    trainer = HybridTrainer(
        model, torch.optim.Adam(layers[0].parameters(), 1e-3), CONFIG, max_grad_norm=1.0
    )
    for step in range(20):
        bad = math.nan if step == 10 and rank == 1 else 1.0
        handle = layers[2].bias.register_hook(lambda g, bad=bad: g * bad)
        trainer.step(lambda: F.mse_loss(model(x), y))
        handle.remove()
    return {"divergences": trainer.statistics().divergences, "weights": whole(model)}


def ended(model, x, y):
    """A run that ends in a jump, as it is and then in one that went astray."""
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 3e-3), CONFIG)
    closure = lambda: F.mse_loss(model(x), y)  # noqa: E731
    before, at, ends = [], [], []
    for spoil in (False, True):
        while trainer.engine.phase is not Phase.PREDICT:
            before = whole(model)
            trainer.step(closure)
        if spoil:
            for p in model.parameters():
                p.data.mul_(3.0)
        at = whole(model)
        trainer.finish(closure)
        assert trainer.engine.phase is Phase.FULL
        ends.append(all(map(torch.equal, whole(model), before if spoil else at)))
    trainer.step(closure)
    return {"ends": ends, "rollbacks": trainer.statistics().rollbacks, "weights": whole(model)}


def normalised(rank):
    """Slow averages of batch norm behind outer steps, which each pass takes from the first rank."""
    x, y = digits()
    torch.manual_seed(0)
    layers = (nn.Linear(64, 32), nn.BatchNorm1d(32, momentum=0.01), nn.ReLU(), nn.Linear(32, 10))
    model = DistributedDataParallel(nn.Sequential(*layers))
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-2), CONFIG)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(200):
        rows = torch.randint(0, 1200, (16,), generator=generator)
        trainer.step(lambda rows=rows: F.cross_entropy(model(x[rows]), y[rows]))
    norm = model.module[1]
    averages = [norm.running_mean.clone(), norm.running_var.clone()]
    return {"outer_steps": trainer.statistics().outer_steps, "averages": averages}


def run(world, folder, kind, steps=range(STEPS), bad_rank=None):
    rendezvous = f"file://{folder}/rendezvous-{world}"
    mp.spawn(work, (world, rendezvous, folder, kind, steps, bad_rank), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def alone():
    model, x, y = problem()
    outcome = train(model, x, y)
    assert outcome["predicted"] > 50
    return outcome


@pytest.mark.parametrize(
    ("world", "kind"), [(2, "ddp"), (2, "root"), (4, "fsdp"), (2, "tensor parallel")]
)
def test_ranks_decide_as_one_process_does(alone, tmp_path, world, kind):
    first, *others = run(world, tmp_path, kind)
    for other in others:
        assert other["phases"] == first["phases"]
        assert other["losses"] == first["losses"]
        for mine, theirs in zip(first["weights"], other["weights"], strict=True):
            assert torch.equal(mine, theirs)
    assert first["rolled_back"]
    # What only Python has could keep the group from ending, where a thread of it lets go last.
    assert first["bare"] == 0
    if kind == "tensor parallel":
        model, x, y = problem(EVEN)
        alone = train(model, x, y)
    assert first["phases"] == alone["phases"]
    assert first["predicted"] == alone["predicted"]
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=1e-5)
    # By rounding the path is another in its last digits, and so is where it is flat.
    np.testing.assert_allclose(first["norms"], alone["norms"], rtol=1e-3, atol=1e-7)
    # Each pass has two parts there, and gradients are exchanged in one of them.
    passes = sum(phase != "PREDICT" for phase in first["phases"])
    assert first["local parts"] >= passes * (kind == "ddp")
    for name in ("weights", "averaged"):
        for ours, single in zip(first[name], alone[name], strict=True):
            torch.testing.assert_close(ours, single, rtol=1e-5, atol=1e-8)
    # The settings once, in two, then a small one for each pass, and one more for each bank of
    # snapshots that is decided on.
    exchanged = first["exchanged"][2:]
    cycles = sum(size > 24 for size in exchanged)
    assert len(exchanged) - cycles == first["passes"]
    assert 0 < cycles <= 1 + STEPS // CONFIG.min_full_steps
    assert max(exchanged) <= 8 * (1 + 8 * 6 * 6)


def test_a_run_goes_on_with_another_number_of_ranks(alone, tmp_path):
    before = run(2, tmp_path, "ddp", range(HALF))[0]
    after = run(4, tmp_path, "ddp", range(HALF, STEPS))
    assert before["phases"] + after[0]["phases"] == alone["phases"]
    for outcome in after:
        for ours, single in zip(outcome["weights"], alone["weights"], strict=True):
            torch.testing.assert_close(ours, single, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("last", "phase", "world"), [(126, "FULL", 4), (146, "PREDICT", 1)])
def test_sharded_weights_are_saved_and_loaded_by_other_ranks(tmp_path, last, phase, world):
    before = run(2, tmp_path, "fsdp", range(last))[0]
    assert before["phases"][-1] == phase
    rest = range(last, STEPS)
    if world > 1:
        after = run(world, tmp_path, "fsdp", rest)[0]
        assert after["losses"][0] < before["losses"][-1]
    else:
        # One process alone, whose weights are whole; the jump that was under way is taken back.
        model, x, y = problem()
        after = train(model, x, y, rest, file=tmp_path / "checkpoint")
        jump = before["phases"].index("PREDICT")
        assert after["losses"][0] == pytest.approx(before["losses"][jump - 1], rel=0.05)
    assert after["predicted"] > before["predicted"]
    assert after["losses"][-1] < after["losses"][0]
    if world == 1:
        wrapped = nn.Sequential(problem()[0])
        with pytest.raises(CheckpointError, match=r"0\.weight, which the model does not have"):
            HybridTrainer.load(
                tmp_path / "checkpoint", wrapped, torch.optim.Adam(wrapped.parameters(), 3e-3)
            )


@pytest.mark.parametrize("kind", ["ddp", "root"])
def test_a_bad_batch_on_one_rank_costs_that_batch_on_all(tmp_path, kind):
    outcomes = run(2, tmp_path, kind, bad_rank=1)
    for outcome in outcomes:
        assert outcome["divergences"] == 1
        assert math.isnan(outcome["losses"][BAD])
        assert all(torch.isfinite(w).all() for w in outcome["weights"])
        assert outcome["phases"] == outcomes[0]["phases"]
        assert Phase.PREDICT.name in outcome["phases"]


def test_sharded_saves_that_are_killed_or_fail_lose_nothing_and_no_rank_waits(record_property):
    # python tests/torch_adapter/sharded_kills.py 40 is the whole drill.
    script = Path(__file__).with_name("sharded_kills.py")
    done = subprocess.run(
        [sys.executable, str(script), "3", str(KILLS_AT_THE_WORST)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    assert (counts["kills"], counts["failed saves"]) == (3, 4)
    record_property("times", 7)


def test_what_is_clipped_with_has_to_be_finite_on_every_rank(tmp_path):
    for outcome in run(2, tmp_path, "clipped"):
        assert outcome["divergences"] == 1
        assert all(w.isfinite().all() for w in outcome["weights"])


def test_a_run_that_ends_in_a_jump_ends_alike_on_every_rank(tmp_path):
    one, other = run(2, tmp_path, "ended")
    assert one["ends"] == other["ends"] == [True, True]
    assert one["rollbacks"] == other["rollbacks"] == 1
    assert all(map(torch.equal, one["weights"], other["weights"]))


def test_averages_that_come_from_another_rank_are_not_hastened(tmp_path):
    for outcome in run(2, tmp_path, "normalised"):
        assert outcome["outer_steps"] > 5
        mean, variance = outcome["averages"]
        assert mean.abs().max() < 10.0
        assert 0.0 < variance.min() < variance.max() < 100.0


def test_a_rank_that_is_elsewhere_is_named(tmp_path):
    run(2, tmp_path, "astray")


def test_settings_that_differ_and_uneven_inputs_are_refused_on_every_rank(tmp_path):
    one, other = run(2, tmp_path, "refused")
    assert all(map(torch.equal, one["weights"], other["weights"]))
