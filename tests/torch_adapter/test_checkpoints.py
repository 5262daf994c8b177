"""A run that is saved: what the file holds, what it refuses, and where it goes on."""

import copy
import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from problems import BRISK, regression, weights
from resuming import RUNS, build, figures
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

from hybridcore import CheckpointError, ConfigError, HybridTrainerConfig, Phase
from hybridcore_torch import HybridTrainer

HERE = Path(__file__).parent


def trained(steps=30, config=BRISK):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, config)
    for _ in range(steps):
        trainer.step(closure)
    return trainer, closure


def everything(trainer):
    """All that a trainer holds, in a form that compares to the last bit."""
    state = trainer.state_dict()
    state.pop("random")
    return json.dumps(state, default=lambda t: t.tolist(), sort_keys=True)


# -- going on -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_a_new_process_goes_on_bit_for_bit(kind, tmp_path):
    rng = random.Random(kind)
    steps = 300
    trainer, closure = build(kind)
    at, seen, results = set(rng.sample(range(1, steps), 20)), {}, []
    for step in range(steps):
        engine = trainer.engine
        moment = engine.phase, engine.holds_mark, engine.holds_pairs
        # At 20 random steps, in every phase, and with and without what each of them may hold.
        if step in at or moment not in seen:
            seen.setdefault(moment, step)
            trainer.save(tmp_path / f"{step}")
        results.append(trainer.step(closure))
    assert {phase for phase, _, _ in seen} == set(Phase)
    assert (trainer.statistics().secant_steps > 50) == (kind == "quasi-Newton steps")
    done = subprocess.run(
        [sys.executable, str(HERE / "resuming.py"), kind, str(steps), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    resumed = json.loads(done.stdout)
    assert len(resumed) >= 20
    for step, (rest, last) in resumed.items():
        expected, at_last = figures(trainer, results[int(step) :])
        assert rest == expected, step
        assert last == at_last, step


def test_random_states_of_the_loop_come_back(tmp_path):
    trainer, _ = trained(5)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    trainer.save(tmp_path / "run")
    draw = lambda: (random.random(), np.random.random(), torch.rand(1).item())  # noqa: E731, NPY002
    expected = draw()
    HybridTrainer.load(tmp_path / "run", *regression(seed=5)[:2])
    assert draw() == expected


def test_a_small_checkpoint_warms_up_again(tmp_path):
    trainer, closure = trained(300, dataclasses.replace(BRISK, secant_pairs=0))
    while trainer.engine.may_roll_back:
        trainer.step(closure)
    trainer.step(closure)
    trainer.save(tmp_path / "full")
    trainer.save(tmp_path / "small", snapshots=False)
    arrays = {name: safetensors.torch.load_file(tmp_path / name) for name in ("small", "full")}
    copies = set(arrays["full"]) - set(arrays["small"])
    assert {name.split(".")[0] for name in copies} == {"bank", "average"}
    model, optimizer, again = regression(seed=5)
    resumed = HybridTrainer.load(tmp_path / "small", model, optimizer)
    assert all(map(torch.equal, weights(model), weights(trainer.model)))
    before, after = trainer.statistics(), resumed.statistics()
    assert after.arm_values == before.arm_values
    assert after.steps == before.steps
    assert resumed._hands.bank is None
    phases = [resumed.step(again).phase for _ in range(200)]
    # No jump before a bank is full again.
    assert set(phases[: BRISK.min_full_steps]) == {Phase.FULL}
    assert Phase.PREDICT in phases


def test_a_small_checkpoint_in_a_jump_can_still_take_it_back(tmp_path):
    trainer, closure = trained(0, dataclasses.replace(BRISK, secant_pairs=0))
    while trainer.engine.phase is not Phase.CORRECT:
        trainer.step(closure)
    trainer.save(tmp_path / "run", snapshots=False)
    model, optimizer, again = regression(seed=5)
    resumed = HybridTrainer.load(tmp_path / "run", model, optimizer)
    for run, loss in ((trainer, closure), (resumed, again)):
        while run.engine.phase is Phase.CORRECT:
            run.step(lambda loss=loss: 1e3 * loss())
        assert run.statistics().rollbacks == 1
    assert all(map(torch.equal, weights(model), weights(trainer.model)))


@pytest.mark.parametrize("pairs", [0, 20])
def test_a_run_that_goes_back_to_its_own_state_goes_the_same_way_again(pairs):
    trainer, closure = trained(0, dataclasses.replace(BRISK, secant_pairs=pairs))
    while trainer.engine.phase is not Phase.PREDICT:
        trainer.step(closure)
    state = copy.deepcopy(trainer.state_dict())
    first = [trainer.step(closure).loss for _ in range(60)]
    trainer.load_state_dict(state)
    assert [trainer.step(closure).loss for _ in range(60)] == first


def test_a_state_of_torch_save_of_version_2_goes_on(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(32, 3)
    y = x @ torch.randn(3, 2) + 1
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    scheduler = MultiStepLR(optimizer, [40, 90])
    old = HERE / "data" / "version-2.pt"
    trainer = HybridTrainer.load(old, model, optimizer, scheduler=scheduler)
    assert trainer.engine.phase is Phase.PREDICT
    assert trainer.statistics().steps == 70
    for _ in range(30):
        loss = trainer.step(lambda: F.mse_loss(model(x), y)).loss
    # What the version that wrote it came to.
    assert loss == pytest.approx(float.fromhex("0x1.f037e80000000p+1"), rel=1e-6)
    trainer.save(tmp_path / "new")
    HybridTrainer.load(tmp_path / "new", model, optimizer, scheduler=scheduler)
    state = torch.load(old, weights_only=True) | {"hybridcore": 1}
    with pytest.raises(CheckpointError, match="version 1, this hybridcore reads 2 to 7"):
        trainer.load_state_dict(state)


def test_a_state_of_version_5_goes_on_in_its_descent():
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    y = torch.sin(x @ torch.randn(3, 2))
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    trainer = HybridTrainer.load(HERE / "data" / "version-5.pt", model, optimizer)
    assert trainer.statistics().secant_steps == 30
    found = [trainer.step(lambda: F.mse_loss(model(x), y)).loss for _ in range(6)]
    # What the version that wrote it came to; it added up in another order.
    known = ("1.af8ee2", "1.aee59a", "1.ace934", "1.abacd8", "1.aaa614", "1.a94378")
    assert found == pytest.approx([float.fromhex(f"0x{loss}p-5") for loss in known], rel=1e-4)


@pytest.mark.parametrize("version", [3, 4])
def test_a_state_of_an_earlier_version_goes_on(version):
    trainer, closure = trained(20)
    state = copy.deepcopy(trainer.state_dict()) | {"steps_since_recovery": 0}
    del state["layers"]
    if version == 3:
        for name in ("random", "snapshots", "room"):
            del state[name]
        del state["engine"]["controller"]["rule"]["pace"]["snapshots"]
    model, optimizer, again = regression(seed=5)
    resumed = HybridTrainer(model, optimizer, BRISK)
    resumed.load_state_dict(state | {"hybridcore": version})
    for _ in range(60):
        assert trainer.step(closure).loss == resumed.step(again).loss


def test_a_state_goes_through_torch_save_and_distributed_checkpoint(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    def make(seed):
        model, optimizer, closure = regression(seed)
        scheduler = MultiStepLR(optimizer, [40, 90], 0.5)
        return HybridTrainer(model, optimizer, BRISK, scheduler=scheduler), closure

    trainer, closure = make(0)
    while trainer._hands.recovery is None:
        trainer.step(closure)
    state = copy.deepcopy(trainer.state_dict())
    torch.save(state, tmp_path / "run.pt")
    with pytest.warns(UserWarning, match="torch.distributed"):
        dcp.save(state, checkpoint_id=tmp_path / "dcp")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "dcp.pt")
    for _ in range(60):
        trainer.step(closure)
    for name in ("run.pt", "dcp.pt"):
        resumed, again = make(5)
        resumed.load_state_dict(torch.load(tmp_path / name, weights_only=True))
        for _ in range(60):
            resumed.step(again)
        assert all(map(torch.equal, weights(resumed.model), weights(trainer.model))), name
        assert resumed.scheduler.state_dict() == trainer.scheduler.state_dict()


# -- what the file holds --------------------------------------------------------------------------


class Odd(nn.Module):
    """Half precision, tied weights, a view of a larger buffer, a buffer without elements."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.second = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 2)
        self.register_buffer("view", torch.arange(12.0).reshape(3, 4).T[1:3])
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("flag", torch.tensor(True))
        self.extra = {"scale": 0.1, "names": ("a", None)}

    def forward(self, x):
        x = self.second(torch.tanh(self.first(x.bfloat16())))
        return self.head(x.float()) * self.view.mean()

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_tensors_of_every_kind_come_back(tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        model = Odd()
        return model, torch.optim.AdamW(model.parameters(), torch.tensor(1e-2), capturable=False)

    model, optimizer = make(0)
    x = torch.randn(16, 4)
    trainer = HybridTrainer(model, optimizer, BRISK)
    for _ in range(90):
        trainer.step(lambda: F.mse_loss(model(x), x[:, :2]))
    trainer.save(tmp_path / "run")
    other, optimizer = make(1)
    other.extra = None
    resumed = HybridTrainer.load(tmp_path / "run", other, optimizer)
    assert other.extra == model.extra
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert other.state_dict()[name].dtype == value.dtype
            assert torch.equal(other.state_dict()[name], value), name
    for _ in range(60):
        a = trainer.step(lambda: F.mse_loss(model(x), x[:, :2]))
        b = resumed.step(lambda: F.mse_loss(other(x), x[:, :2]))
        assert (a.loss, a.phase) == (b.loss, b.phase)


def test_any_tool_can_read_the_weights(tmp_path):
    trainer, _ = trained()
    trainer.save(tmp_path / "run")
    tensors = safetensors.torch.load_file(tmp_path / "run")
    assert torch.equal(tensors["model.weight"], trainer.model.weight)
    assert torch.equal(tensors["model.bias"], trainer.model.bias)


def test_what_is_no_number_is_named(tmp_path):
    trainer, _ = trained(5)
    trainer.optimizer.param_groups[0]["hook"] = print
    with pytest.raises(CheckpointError, match=r"optimizer.param_groups.0.hook is a builtins"):
        trainer.save(tmp_path / "run")
    assert not list(tmp_path.iterdir())


# -- what is refused ------------------------------------------------------------------------------


def test_damage_of_any_kind_leaves_the_trainer_as_it_was(tmp_path):
    trainer, _ = trained()
    path, damaged = tmp_path / "run", tmp_path / "damaged"
    trainer.save(path, snapshots=False)
    whole = path.read_bytes()
    model, optimizer, _ = regression(seed=5)
    before = weights(model)

    def refused():
        with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
            HybridTrainer.load(damaged, model, optimizer)

    for size in range(0, len(whole), 64):
        damaged.write_bytes(whole[:size])
        refused()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, 8 * len(whole), 500):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << (place % 8)
        damaged.write_bytes(flipped)
        refused()
    assert all(map(torch.equal, before, weights(model)))
    assert not optimizer.state
    with pytest.raises(FileNotFoundError):
        HybridTrainer.load(tmp_path / "none", model, optimizer)


def paths(value, path=()):
    """Where in nested containers something stands that can be taken out or spoilt."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from paths(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value[:2]):
            yield from paths(item, (*path, index))


def spoilt(state, path, rng):
    """A copy of `state` with what stands at `path` gone, or of another kind."""
    *way, last = path
    state = copy.deepcopy(state)
    place = state
    for key in way:
        place = place[key]
    if isinstance(place, tuple):
        return None
    if isinstance(place, dict) and rng.random() < 0.5:
        del place[last]
    else:
        place[last] = rng.choice(["other", None, [], {}, torch.zeros(3), -1])
    return state


def test_a_state_that_was_tampered_with_is_taken_whole_or_not_at_all():
    trainer, closure = trained(0, dataclasses.replace(BRISK, secant_pairs=0))
    while trainer.engine.phase is not Phase.PREDICT:
        trainer.step(closure)
    state = copy.deepcopy(trainer.state_dict())
    model, optimizer, again = regression(seed=5)
    other = HybridTrainer(model, optimizer, trainer.config)
    for _ in range(3):
        other.step(again)
    fresh = copy.deepcopy(other.state_dict())
    before = everything(other)
    rng = random.Random(0)
    places = [path for path in paths(state) if path]
    refused = 0
    for path in places:
        bad = spoilt(state, path, rng)
        if bad is None:
            continue
        try:
            other.load_state_dict(bad)
        except CheckpointError:
            refused += 1
            assert everything(other) == before, path
        else:
            other.load_state_dict(copy.deepcopy(fresh))
            assert everything(other) == before, path
    assert refused > 100


def test_a_part_that_refuses_its_state_leaves_all_as_it_was():
    model = Odd()
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters()), BRISK)
    trainer.step(lambda: model(torch.ones(2, 4)).sum())
    state = copy.deepcopy(trainer.state_dict())
    trainer.step(lambda: model(torch.ones(2, 4)).sum())
    before = everything(trainer)

    def refuse(extra):
        if extra is not model.extra:
            model.extra = extra
            raise ValueError("not mine")

    model.set_extra_state = refuse
    with pytest.raises(CheckpointError, match="not mine"):
        trainer.load_state_dict(state | {"model": state["model"] | {"_extra_state": {}}})
    model.extra = state["model"]["_extra_state"]
    assert everything(trainer) == before


class Picky(nn.Linear):
    """Loads by code of its own, which says no to what it has already taken."""

    refuses = False

    def _load_from_state_dict(self, *arguments):
        super()._load_from_state_dict(*arguments)
        if self.refuses:
            self.refuses = False
            raise ValueError("not mine")


@pytest.mark.parametrize("kind", ["a method", "a hook"])
def test_a_model_that_refuses_its_weights_keeps_those_it_had(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Picky(4, 2))
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters()), BRISK)
    closure = lambda: model(torch.ones(2, 4)).square().sum()  # noqa: E731
    trainer.step(closure)
    state = copy.deepcopy(trainer.state_dict())
    trainer.step(closure)
    before = everything(trainer)
    if kind == "a method":
        model[1].refuses = True
    else:
        calls = []

        def hook(module, incompatible):
            calls.append(module)
            if len(calls) == 1:
                raise ValueError("not mine")

        model.register_load_state_dict_post_hook(hook)
    with pytest.raises(CheckpointError, match="not mine"):
        trainer.load_state_dict(state)
    assert everything(trainer) == before


def test_layers_of_one_shape_are_not_taken_for_each_other():
    def frozen(layer):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        model[layer].requires_grad_(False)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        return HybridTrainer(model, optimizer, HybridTrainerConfig(warmup_steps=5)), model

    trainer, model = frozen(0)
    x = torch.randn(16, 8)
    for _ in range(80):
        trainer.step(lambda: F.mse_loss(model(x), x.roll(1, 1)))
    other, _ = frozen(2)
    before = everything(other)
    with pytest.raises(CheckpointError, match="another set of trainable parameters"):
        other.load_state_dict(trainer.state_dict())
    assert everything(other) == before
    same, _ = frozen(0)
    same.load_state_dict(trainer.state_dict())
    # Without copies of the weights there is nothing to be mistaken.
    other.load_state_dict(trainer.state_dict(snapshots=False))


def test_groups_of_one_size_are_not_taken_for_each_other():
    def grouped(order):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        groups = [list(model[layer].parameters()) for layer in order]
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        return HybridTrainer(model, optimizer, BRISK, layer_groups=groups), model

    trainer, model = grouped([0, 1])
    x = torch.randn(16, 8)
    for _ in range(30):
        trainer.step(lambda: F.mse_loss(model(x), x.roll(1, 1)))
    with pytest.raises(CheckpointError, match="other layer groups"):
        grouped([1, 0])[0].load_state_dict(trainer.state_dict())


def test_an_optimizer_may_keep_what_is_of_no_parameter():
    def made():
        model, optimizer, closure = regression()
        optimizer.state["k"] = {"count": 3}
        return HybridTrainer(model, optimizer, BRISK), closure

    trainer, closure = made()
    for _ in range(30):
        trainer.step(closure)
    other, _ = made()
    other.load_state_dict(trainer.state_dict())
    assert other.optimizer.state["k"] == {"count": 3}


def test_a_table_in_a_schedule_comes_back_as_one(tmp_path):
    class Table:
        def __init__(self):
            self.rates = np.linspace(1.0, 0.5, 100)

        def __call__(self, step):
            return self.rates[min(step, 99)]

    def made():
        model, optimizer, closure = regression()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, Table())
        return model, optimizer, schedule, closure

    model, optimizer, schedule, closure = made()
    trainer = HybridTrainer(model, optimizer, BRISK, scheduler=schedule)
    for _ in range(7):
        trainer.step(closure)
    trainer.save(tmp_path / "run")
    model, optimizer, schedule, closure = made()
    other = HybridTrainer.load(tmp_path / "run", model, optimizer, scheduler=schedule)
    assert isinstance(schedule.lr_lambdas[0].rates, np.ndarray)
    other.step(closure)
    assert isinstance(optimizer.param_groups[0]["lr"], float)


def test_a_file_of_unknown_settings_is_refused(tmp_path):
    trainer, _ = trained(5)
    state = trainer.state_dict()
    state["config"] = state["config"] | {"invented": 1}
    from hybridcore_torch import files

    files.write(state, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"settings not known here: .*'invented'"):
        HybridTrainer.load(tmp_path / "run", *regression()[:2])


# -- saving by itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [True, False])
def test_saves_every_so_many_steps_and_keeps_the_newest(tmp_path, enabled):
    config = dataclasses.replace(BRISK, enabled=enabled)
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, config)
    folder = tmp_path / "runs" / "one"
    trainer.save_every(40, folder, keep=2)
    (folder / "step-1.safetensors").write_text("mine")
    for _ in range(130):
        trainer.step(closure)
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "step-1.safetensors",
        "step-000000080.safetensors",
        "step-000000120.safetensors",
    }
    other, optimizer, again = regression(seed=5)
    resumed = HybridTrainer.load(folder, other, optimizer)
    assert resumed.statistics().steps == 120
    for _ in range(10):
        resumed.step(again)
    assert all(map(torch.equal, weights(model), weights(other)))
    # The count goes on where it was.
    resumed.save_every(40, folder, keep=9)
    for _ in range(30):
        resumed.step(again)
    assert (folder / "step-000000160.safetensors").exists()
    # And where another state is loaded into the same trainer.
    resumed.load_state_dict(trainer.state_dict())
    for _ in range(80):
        resumed.step(again)
    assert (folder / "step-000000200.safetensors").exists()


@pytest.mark.parametrize("before_jumps", [False, True])
def test_saves_where_a_jump_may_begin_if_that_is_asked_for(tmp_path, before_jumps):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, dataclasses.replace(BRISK, secant_pairs=0))
    trainer.save_every(10_000, tmp_path, before_jumps=before_jumps)
    begun = []
    for step in range(160):
        events = [event["event"] for event in trainer.step(closure).events]
        begun += [step] * ("jump" in events)
    assert begun
    saved = {int(path.stem.removeprefix("step-")) for path in tmp_path.iterdir()}
    assert (set(begun[-2:]) <= saved) if before_jumps else not saved


def test_saving_by_itself_is_checked_first(tmp_path):
    trainer, _ = trained(0)
    for bad in (0, -1, 2.5, True, None):
        with pytest.raises(ConfigError, match=r"steps must be an integer of at least 1, got"):
            trainer.save_every(bad, tmp_path)
        with pytest.raises(ConfigError, match=r"keep must be"):
            trainer.save_every(5, tmp_path, keep=bad)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        trainer.save_every(5, tmp_path / "file")
    assert trainer.callbacks == ()


def test_without_snapshots_it_is_small(tmp_path):
    trainer, _ = trained(200, HybridTrainerConfig())
    trainer.save(tmp_path / "run", snapshots=False)
    assert (tmp_path / "run").stat().st_size < 2e6


@pytest.mark.parametrize("bad", ["other", None, -1, np.zeros(16, np.float32)])
def test_a_buffer_that_is_no_tensor_is_refused_before_anything_is_loaded(bad):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16))
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters()), BRISK)
    state = copy.deepcopy(trainer.state_dict())
    state["model"]["0.weight"] += 1.0
    name = "1.running_mean" if isinstance(bad, np.ndarray) else "1.num_batches_tracked"
    state["model"][name] = bad
    before = weights(model)
    with pytest.raises(CheckpointError, match=name):
        trainer.load_state_dict(state)
    assert all(map(torch.equal, before, weights(model)))
