"""``hybridcore doctor``: an estimate that is what a run takes, and a self-test that can fail."""

import dataclasses
import importlib.metadata
import types

import pytest
import torch
import torch.nn.functional as F
from command_line import call, figures
from torch import nn

from hybridcore import HybridTrainerConfig
from hybridcore.cli import selftest
from hybridcore.cli.common import UserError
from hybridcore.cli.memory import estimate, optimizer_class
from hybridcore_torch import HybridTrainer
from hybridcore_torch.buffers import BufferWatch
from hybridcore_torch.recovery import RecoveryPoint

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
}


def storages(value, seen=None):
    """Bytes of every tensor storage that can be reached from `value`, by where it lies."""
    seen = set() if seen is None else seen
    found = {}
    if id(value) in seen or isinstance(value, type | types.FunctionType | types.MethodType):
        return found
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        kept = value.untyped_storage()
        return {kept.data_ptr(): kept.nbytes()} if value.numel() > 1 else {}
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list | tuple):
        inner = list(value)
    else:
        inner = list(getattr(value, "__dict__", {}).values())
    for item in inner:
        found |= storages(item, seen)
    return found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_estimate_is_what_a_run_takes(optimizer, dtype):
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4)).to(kind)
    config = HybridTrainerConfig(warmup_steps=20, min_full_steps=24, horizon=20)
    trainer = HybridTrainer(model, OPTIMIZERS[optimizer](model.parameters(), lr=1e-3), config)
    x, y = torch.randn(32, 16, dtype=kind), torch.randn(32, 4, dtype=kind)
    most = dict.fromkeys(("snapshots", "secants", "average"), 0)
    for step in range(150):
        if step == 70:
            # Snapshots make room for pairs, so they come to their number without any.
            without = dataclasses.replace(config, secant_pairs=0)
            trainer = HybridTrainer(model, trainer.optimizer, without)
        trainer.step(lambda: F.mse_loss(model(x), y))
        hands = trainer._hands
        own = [list(model.parameters()), [p.grad for p in model.parameters()]]
        own = storages([own, list(trainer.optimizer.state.values())])
        secants = hands.secants, hands.start
        parts = {"snapshots": hands.bank, "secants": secants, "average": hands.average}
        for name, part in parts.items():
            found = storages(part)
            most[name] = max(most[name], sum(n for at, n in found.items() if at not in own))
    # What SAVE makes; not every one of these runs has a jump.
    most["recovery"] = sum(
        storages(RecoveryPoint(model, trainer.optimizer, None, BufferWatch())).values()
    )
    most["optimizer"] = sum(storages(list(trainer.optimizer.state.values())).values())
    most["weights"] = sum(storages(list(model.parameters())).values())
    count = sum(p.numel() for p in model.parameters())
    told = estimate(count, optimizer, dtype, config)
    assert most["secants"] > 0
    # The weights from before the pairs are kept in the bank.
    most["secants"] += most["weights"]
    for name, taken in most.items():
        assert getattr(told, name) == pytest.approx(taken, rel=0.02), name


def test_large_models_keep_no_pairs_and_memory_saver_takes_less():
    told = figures("doctor", "--model-params", "1.2e9", "--no-self-test")["memory"]
    plain = told["as set"]["plain"]
    # Weights, gradients and Adam's two moments, in four bytes.
    assert plain == 4 * 4 * 1_200_000_000
    assert told["as set"]["pairs"] == 0
    assert told["as set"]["kind"] == "int8"
    weights = told["as set"]["weights"]
    assert weights < told["as set"]["total"] - plain <= 4 * weights
    # Of a large model there is room for the average alone.
    assert told["memory_saver()"]["total"] - plain == weights


@pytest.mark.parametrize(
    ("written", "count"), [("7B", 7e9), ("350m", 350e6), ("2.5k", 2500), ("1T", 1e12), ("3e6", 3e6)]
)
def test_a_number_of_parameters_is_read_as_people_write_it(written, count):
    told = figures("doctor", "--model-params", written, "--no-self-test")["memory"]
    assert told["as set"]["plain"] == 4 * 4 * count


def test_momentum_and_half_precision_are_in_the_estimate():
    config = HybridTrainerConfig()
    without, with_it = (estimate(1000, "sgd", "float32", config, m) for m in (0.0, 0.9))
    assert without.optimizer == 0
    assert with_it.optimizer == with_it.weights == 4000
    half = estimate(1000, "adamw", "bfloat16", config)
    assert half.weights == 2000
    # It is averaged in single precision.
    assert half.average == 4000


def test_every_optimizer_that_is_offered_can_be_estimated():
    with pytest.raises(UserError) as told:
        optimizer_class("none")
    offered = str(told.value).partition("is not one of ")[2].split(", ")
    assert {"adam", "adafactor"} < set(offered)
    for name in offered:
        assert estimate(4096, name, "float32", HybridTrainerConfig()).plain >= 2 * 4 * 4096
    if hasattr(torch.optim, "Muon"):
        # A momentum.
        assert estimate(4096, "muon", "float32", HybridTrainerConfig()).optimizer == 4 * 4096


def test_it_tells_versions_devices_and_threads():
    told = figures("doctor", "--no-self-test")
    assert told["versions"]["torch"] == importlib.metadata.version("torch")
    assert told["versions"]["hybridcore"]
    assert told["devices"][0]["kind"] == "cpu"
    assert told["devices"][0]["bytes"] > 2**28
    assert told["threads"]["torch"] == torch.get_num_threads()
    assert "numba threading layer" in told["threads"]
    assert "self_test" not in told


def test_the_self_test_passes_here():
    told = figures("doctor")
    assert [check["check"] for check in told["self_test"]] == list(selftest.CHECKS)
    assert all(check["passed"] for check in told["self_test"]), told


def test_a_check_that_fails_is_told_and_is_the_exit_code(monkeypatch):
    def broken():
        raise ImportError("libfoo.so is missing")

    monkeypatch.setattr(selftest, "CHECKS", {"plain loop": broken})
    result = call("doctor")
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert "libfoo.so is missing" in result.stdout
