"""Buffers, optimizers and scalers that are not as most are, and interrupts in odd places."""

import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from drilling import Interrupter
from problems import BRISK, digits, regression, weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hybridcore import CheckpointError, ClosureError, HybridTrainerConfig, ModelError
from hybridcore_torch import HybridTrainer
from hybridcore_torch.buffers import LARGE, BufferWatch, put_back
from hybridcore_torch.recovery import RecoveryPoint

JUMPS = dataclasses.replace(BRISK, secant_pairs=0)


# -- buffers ---------------------------------------------------------------------------------------


def inference(shape):
    with torch.inference_mode():
        return torch.ones(shape)


ODD = {
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "coo": lambda: torch.eye(3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "inference": lambda: inference(3),
    "expanded": lambda: torch.ones(1).expand(5),
}


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors).*:UserWarning")
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("config", [BRISK, JUMPS])
def test_a_buffer_that_cannot_be_written_as_a_whole_is_left_alone(kind, config):
    model, optimizer, closure = regression()
    model.register_buffer("odd", ODD[kind]())
    trainer = HybridTrainer(model, optimizer, config)
    for _ in range(150):
        trainer.step(closure)
    assert trainer.statistics().predicted_steps > 0


def in_place(buffer):
    buffer.add_(1.0)


def through_data(buffer):
    buffer.data.mul_(0.5)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("change", [in_place, through_data])
def test_a_large_buffer_is_copied_while_it_changes_and_only_then(change, layout):
    table = torch.rand(LARGE // 4, 4)
    model = nn.Module()
    model.register_buffer("table", table if layout == "rows" else table.T)
    model.register_buffer("small", torch.ones(3))
    watch = BufferWatch()

    def kept():
        return watch.keep([model])

    assert [one.name for one in kept()] == ["table", "small"]
    assert [one.name for one in kept()] == ["small"]
    change(model.table)
    for _ in range(2):
        copies, before = kept(), model.table.clone()
        assert [one.name for one in copies] == ["table", "small"]
        change(model.table)
        put_back(copies)
        assert torch.equal(model.table, before)
        # Looked at twice with no pass between, it changes still.
        assert [one.name for one in kept()] == ["table", "small"]
    model.table = model.table.clone()
    assert [one.name for one in kept()] == ["table", "small"]
    assert [one.name for one in kept()] == ["small"]
    watch = pickle.loads(pickle.dumps(watch))
    assert [one.name for one in kept()] == ["table", "small"]


def test_a_large_buffer_for_which_there_was_no_memory_is_copied_at_the_next_look():
    model = nn.Module()
    model.register_buffer("table", torch.rand(LARGE))
    watch = BufferWatch()

    class Short(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            if function is torch.ops.aten.clone.default and arguments[0].numel() == LARGE:
                raise torch.OutOfMemoryError
            return function(*arguments, **(named or {}))

    with Short(), pytest.raises(torch.OutOfMemoryError):
        watch.keep([model])
    assert len(watch.keep([model])) == 1


class Counting(nn.Linear):
    """Changes a large buffer in each pass."""

    def __init__(self):
        super().__init__(64, 10)
        self.register_buffer("seen", torch.zeros(LARGE))

    def forward(self, x):
        with torch.no_grad():
            self.seen += x.mean()
        return super().forward(x)


def test_a_bad_batch_leaves_no_mark_in_a_large_buffer_whatever_the_step_is_for():
    x, y = digits()
    stages = set()
    for bad in range(18, 48):
        torch.manual_seed(0)
        model = Counting()
        trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-2), BRISK)
        secant = trainer.engine.controller.secant
        for step in range(bad + 1):
            if step == bad:
                stages.add((secant.stage.name, secant.landing))
            batch = x * float("nan") if step == bad else x
            trainer.step(lambda m=model, b=batch: F.cross_entropy(m(b), y))
        assert model.seen.isfinite().all()
    assert {("GATHER", False), ("DESCEND", True), ("DESCEND", False)} <= stages


def test_a_table_that_nothing_changes_costs_no_copy_in_a_step():
    model, optimizer, closure = regression()
    model.register_buffer("table", torch.rand(LARGE))
    trainer = HybridTrainer(model, optimizer, BRISK, probe=closure)
    copied = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            large = function is torch.ops.aten.clone.default and arguments[0].numel() == LARGE
            copied.append(trainer.statistics().steps) if large else None
            return function(*arguments, **(named or {}))

    with Count():
        for _ in range(150):
            trainer.step(closure)
    assert trainer.statistics().predicted_steps > 0
    assert set(copied) == {0}


def test_a_trial_point_does_not_come_back_by_a_buffer_that_shares_memory():
    x, y = digits()
    x, y = x[:300], y[:300]
    y = torch.where(torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.3, y.roll(1), y)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 10))
    model.register_buffer("prototypes", model[2].weight.detach(), persistent=False)
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-2), BRISK)
    secant, last = trainer.engine.controller.secant, float("inf")
    taken = failed = 0

    def fail():
        raise KeyError

    for step in range(300):
        before = secant.stage
        if before.name == "DESCEND" and not secant.landing and step % 5 == 0:
            at_base = weights(model)
            try:
                trainer.step(fail)
            except KeyError:
                failed += 1
                assert all(map(torch.equal, at_base, weights(model)))
        trainer.step(lambda: F.cross_entropy(model(x), y))
        here = float(F.cross_entropy(model(x), y).detach())
        if secant.stage is before and before.name == "DESCEND":
            assert here <= last * (1.0 + 1e-5)
            taken += not secant.accepted
        last = here
    assert taken > 0
    assert failed > 0


# -- optimizers ------------------------------------------------------------------------------------


class Zeroing(torch.optim.SGD):
    def zero_grad(self, set_to_none=False):
        super().zero_grad(set_to_none=set_to_none)


@pytest.mark.parametrize("enabled", [True, False])
def test_an_optimizer_may_keep_gradients_of_zero(enabled):
    config = HybridTrainerConfig(enabled=enabled, warmup_steps=100)
    ends = []
    for hybrid in (True, False):
        model, _, closure = regression()
        optimizer = Zeroing(model.parameters(), 0.1, momentum=0.9)
        trainer = HybridTrainer(model, optimizer, config)
        for _ in range(20):
            if hybrid:
                trainer.step(closure)
                continue
            optimizer.zero_grad()
            closure().backward()
            optimizer.step()
        ends.append(weights(model))
    assert all(map(torch.equal, *ends))

    def eager():
        loss = closure()
        loss.backward(retain_graph=True)
        return loss

    trainer.step(closure)
    with pytest.raises(ClosureError, match="leave backward"):
        trainer.step(eager)


class Wide(torch.optim.Optimizer):
    """Momentum in float32, whatever the weights are."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p, dtype=torch.float32)
                state["momentum"].mul_(0.9).add_(p.grad.float())
                p.sub_((group["lr"] * state["momentum"]).to(p.dtype))


def test_a_rollback_leaves_states_as_wide_as_they_are():
    torch.manual_seed(0)
    model = nn.Linear(8, 1).bfloat16()
    x = torch.randn(64, 8).bfloat16()
    optimizer = Wide(model.parameters(), 1e-3)
    trainer = HybridTrainer(model, optimizer, JUMPS)
    target = x @ torch.randn(8, 1).bfloat16()

    def loss():
        return (model(x) - target).float().square().mean()

    while not trainer.engine.may_roll_back:
        kept = [s["momentum"].clone() for s in optimizer.state.values()]
        before = weights(model)
        trainer.step(loss)
    trainer.step(loss)
    # Anywhere but where it was the loss is higher.
    trainer.finish(
        lambda: sum(
            (p - b).float().square().sum() for p, b in zip(model.parameters(), before, strict=True)
        )
    )
    assert trainer.statistics().rollbacks == 1
    momenta = [s["momentum"] for s in optimizer.state.values()]
    assert {m.dtype for m in momenta} == {torch.float32}
    assert all(map(torch.equal, momenta, kept))


def test_a_rollback_to_before_the_first_step_leaves_no_state():
    model, optimizer, closure = regression()
    point = RecoveryPoint(model, optimizer, None, BufferWatch())
    closure().backward()
    optimizer.step()
    assert optimizer.state
    point.restore(model, optimizer, None)
    assert not optimizer.state


class Looked(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, 3))

    def forward(self, i):
        return F.embedding(i, self.table, sparse=True)


def test_sparse_gradients_are_told_whatever_makes_them():
    model = Looked()
    trainer = HybridTrainer(model, torch.optim.SGD(model.parameters(), 0.1))
    before = weights(model)
    with pytest.raises(ModelError, match="gradient is sparse"):
        trainer.step(lambda: model(torch.arange(4)).square().mean())
    assert all(map(torch.equal, before, weights(model)))

    def fail():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        trainer.step([lambda: model(torch.arange(4)).square().mean(), fail])
    # A table that is frozen has none.
    words = nn.Embedding(5, 4, sparse=True).requires_grad_(False)
    model = nn.Sequential(words, nn.Linear(4, 2))
    trainer = HybridTrainer(model, torch.optim.SGD(model.parameters(), 0.1))
    trainer.step(lambda: model(torch.arange(4)).square().mean())


@pytest.mark.filterwarnings("ignore:.*Sparse CSR:UserWarning")
def test_frozen_weights_that_are_sparse_are_no_reason_to_stop(tmp_path):
    model, optimizer, closure = regression()
    model.frozen = nn.Parameter(torch.eye(3).to_sparse_csr(), requires_grad=False)
    optimizer.add_param_group({"params": [model.frozen]})
    trainer = HybridTrainer(model, optimizer, JUMPS)
    trainer.save_every(5, tmp_path)
    for _ in range(12):
        trainer.step(closure)
    assert trainer.statistics().full_steps == 12


# -- scalers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_step_with_a_scaler_that_is_cut_off_can_be_taken_again(error, clip):
    model, optimizer, closure = regression()
    failing = []

    def fail(*_):
        if failing:
            raise failing.pop()

    optimizer.register_step_pre_hook(fail)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    trainer = HybridTrainer(model, optimizer, BRISK, scaler=scaler, max_grad_norm=clip)
    for _ in range(5):
        last = trainer.step(closure).loss
    failing.append(error("CUDA out of memory"))
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            trainer.step(closure)
    for _ in range(5):
        result = trainer.step(closure)
        assert result.loss < last
        last = result.loss
    assert scaler.get_scale() == 16.0


class Interrupted(torch.amp.GradScaler):
    """Ctrl-C comes as the gradients have just been unscaled, once."""

    times = 1

    def unscale_(self, optimizer):
        super().unscale_(optimizer)
        if self.times:
            self.times -= 1
            raise KeyboardInterrupt


def test_an_interrupt_behind_unscale_is_no_reason_to_stop():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, scaler=Interrupted("cpu", init_scale=16.0))
    with pytest.raises(KeyboardInterrupt):
        trainer.step(closure)
    first = trainer.step(closure).loss
    assert trainer.step(closure).loss < first


def test_a_scaler_that_is_off_is_none():
    def bad(model, x):
        return model(x).square().mean() + 0.0 * (0.0 * model(x)).abs().sqrt().sum()

    seen = []
    for scaler in (None, torch.amp.GradScaler("cpu", enabled=False)):
        model, optimizer, closure = regression()
        trainer = HybridTrainer(model, optimizer, BRISK, scaler=scaler)
        trainer.step(lambda m=model: bad(m, digits()[0]))
        for _ in range(150):
            trainer.step(closure)
        statistics = trainer.statistics()
        seen.append((weights(model), statistics.divergences, statistics.secant_steps))
    (plain, *figures), (off, *others) = seen
    assert figures == others
    assert figures[0] == 1
    assert figures[1] > 0
    assert all(map(torch.equal, plain, off))


@pytest.mark.parametrize("was", [True, False])
def test_a_checkpoint_says_which_scaler_was_off(was):
    def built(on):
        model, optimizer, _ = regression()
        scaler = torch.amp.GradScaler("cpu", enabled=on)
        return HybridTrainer(model, optimizer, scaler=scaler)

    words = ("on", "off") if was else ("off", "on")
    with pytest.raises(CheckpointError, match="that was {}, and here it is {}".format(*words)):
        built(not was).load_state_dict(built(was).state_dict())


# -- where and when --------------------------------------------------------------------------------


def test_tensors_that_the_user_makes_elsewhere_by_default_are_no_matter():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, JUMPS)
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        for _ in range(150):
            trainer.step(closure)
    finally:
        torch.set_default_device(before)
    assert trainer.statistics().predicted_steps > 0


@pytest.mark.parametrize("kind", ["exact", "bfloat16", "int8"])
def test_weights_may_become_channels_last_in_the_midst_of_it(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 256, 1), nn.Tanh(), nn.Conv2d(256, 256, 3), nn.Flatten())
    model.append(nn.Linear(1024, 1))
    x = torch.randn(4, 3, 4, 4)
    config = dataclasses.replace(JUMPS, snapshot_kind=kind, memory="100x")
    trainer = HybridTrainer(model, torch.optim.SGD(model.parameters(), 1e-3), config)
    for step in range(110):
        if step == 40:
            model.to(memory_format=torch.channels_last)
        trainer.step(lambda: (model(x) - 1.0).square().mean())
    assert trainer.statistics().predicted_steps > 0


def test_a_state_loads_right_after_freezing():
    model, optimizer, closure = regression()
    model.bias.requires_grad_(False)
    trainer = HybridTrainer(model, optimizer, BRISK)
    for _ in range(103):
        trainer.step(closure)
    other, other_optimizer, again = regression(seed=1)
    resumed = HybridTrainer(other, other_optimizer, BRISK)
    other.bias.requires_grad_(False)
    resumed.load_state_dict(trainer.state_dict())
    for _ in range(60):
        trainer.step(closure)
        resumed.step(again)
    assert all(map(torch.equal, weights(model), weights(other)))


def test_an_interrupt_on_the_way_to_the_average_or_back_loses_nothing():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    for _ in range(60):
        trainer.step(closure)
    before, interrupted = weights(model), 0
    for line in range(1, 200):
        interrupter = Interrupter(line)
        try:
            with interrupter, trainer.averaged():
                pass
        except KeyboardInterrupt:
            interrupted += 1
        assert all(map(torch.equal, before, weights(model)))
        if interrupter.left > 0:
            break
    assert interrupted > 10
    trainer.step(closure)
