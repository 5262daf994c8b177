"""Batches that stay for long and are followed by others, in the midst of quasi-Newton steps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from problems import digits, weights
from torch import nn

from hybridcore import CheckpointError
from hybridcore_torch import HybridTrainer
from hybridcore_torch.recovery import RecoveryPoint

BACK = "back to before the quasi-Newton steps"


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 16), nn.BatchNorm1d(16, momentum=0.01), nn.Tanh(), nn.Linear(16, 10)
    )


def shuffled(seed):
    """Digits whose pixels are in another order."""
    x, y = digits()
    return x[:, torch.randperm(64, generator=torch.Generator().manual_seed(seed))], y


class Tasks:
    """A run on the digits, which can be followed by ones of other pixels."""

    def __init__(self, seed=0, optimizer=torch.optim.Adam, **arguments):
        self.model = network(seed)
        self.optimizer = optimizer(self.model.parameters(), 3e-3, **arguments)
        self.trainer = HybridTrainer(self.model, self.optimizer)
        self.data = digits()
        self.evaluations = []

    def closure(self):
        self.evaluations.append(weights(self.model))
        x, y = self.data
        return F.cross_entropy(self.model(x), y)

    def step(self):
        return self.trainer.step(self.closure)

    def until(self, event, most=600):
        """Take steps until one that tells of `event`."""
        for _ in range(most):
            found = self.step()
            if event in [e["event"] for e in found.events]:
                return found
        raise AssertionError(f"no {event} in {most} steps")


def plain_step(model, optimizer, data):
    x, y = data
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def copied(model, optimizer):
    """Copies that go on as the two would."""
    twin = copy.deepcopy(model)
    other = type(optimizer)(twin.parameters(), optimizer.param_groups[0]["lr"])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twin, other


def all_states(model, optimizer):
    moments = [v for s in optimizer.state.values() for v in s.values()]
    return [*weights(model), *(b.clone() for b in model.buffers()), *moments]


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop])
def test_weights_moments_and_buffers_are_those_from_before_them(optimizer):
    run = Tasks(optimizer=optimizer)
    run.until("quasi-Newton steps")
    before = copied(run.model, run.optimizer)
    # In train mode the pass that begins them moves the running statistics once.
    before[0](run.data[0])
    run.until("optimizer on trial")
    while run.trainer.engine.controller.secant.holds_recovery:
        run.step()
    peak = run.trainer.statistics().memory["secant pairs"]
    assert peak > sum(t.nbytes for t in all_states(*before))
    run.data = shuffled(1)
    run.until(BACK, 200)
    assert run.trainer._hands.start is None
    plain_step(*before, run.data)
    assert all(map(torch.equal, all_states(run.model, run.optimizer), all_states(*before)))


def test_two_tasks_in_turns_end_as_low_as_in_plain_training():
    """What leads one to nothing leaves the other at a loss of hundreds."""
    ends = {}
    for kind in ("plain", "ours"):
        for seed in range(2):
            run = Tasks(seed)
            both = [digits(), shuffled(1)]
            for turn in range(6):
                run.data = both[turn % 2]
                for _ in range(300):
                    if kind == "plain":
                        plain_step(run.model, run.optimizer, run.data)
                    else:
                        run.step()
            ends[kind, seed] = run.closure().item()
    assert all(ends["ours", seed] < 1.5 * ends["plain", seed] for seed in range(2))


def test_parts_of_the_same_data_that_stay_for_long_are_not_followed_far():
    """What was held out is as low as in plain training: none of them is learned by heart."""
    x, y = digits()
    ends = []
    for plain in (True, False):
        run, generator = Tasks(), torch.Generator().manual_seed(0)
        for step in range(2400):
            if step % 300 == 0:
                batch = torch.randint(0, 1200, (64,), generator=generator)
                run.data = x[batch], y[batch]
            if plain:
                plain_step(run.model, run.optimizer, run.data)
            else:
                run.step()
        run.model.eval()
        ends.append(float(F.cross_entropy(run.model(x[1200:]), y[1200:]).detach()))
    assert ends[1] < 1.3 * ends[0]


def in_the_midst(run):
    """Bring `run` into its quasi-Newton steps, before a block is over; return where they began."""
    run.until("quasi-Newton steps")
    start = weights(run.model)
    for _ in range(60):
        run.step()
    assert run.trainer._hands.start is not None
    return start


def test_saved_in_the_midst_of_them_it_goes_back_all_the_same(tmp_path):
    run = Tasks()
    in_the_midst(run)
    run.trainer.save(tmp_path / "run.pt")
    run.data = shuffled(1)
    run.until(BACK, 200)
    other = Tasks(1)
    other.trainer = HybridTrainer.load(tmp_path / "run.pt", other.model, other.optimizer)
    other.data = run.data
    other.until(BACK, 200)
    assert all(
        map(
            torch.equal,
            all_states(run.model, run.optimizer),
            all_states(other.model, other.optimizer),
        )
    )


def test_a_state_of_version_6_goes_on_from_where_it_is():
    run = Tasks()
    in_the_midst(run)
    state = run.trainer.state_dict() | {"hybridcore": 6}
    del state["start"]
    numbers = state["engine"]["controller"]["secant"]["numbers"]
    for name in ("_first", "changed", "steady"):
        del numbers[name]
    other = Tasks(1)
    other.trainer.load_state_dict(state)
    other.data = shuffled(1)
    found = other.until("quasi-Newton steps end", 200)
    assert BACK not in [event["event"] for event in found.events]


def test_without_copies_a_state_holds_none_of_the_beginning():
    run = Tasks()
    in_the_midst(run)
    assert run.trainer.state_dict()["start"] is not None
    assert run.trainer._hands.recovery is None
    assert run.trainer.state_dict(snapshots=False)["start"] is None


def test_where_the_step_after_the_way_back_raises_the_next_begins_there():
    run = Tasks()
    start = in_the_midst(run)
    run.data = shuffled(1)
    model, passes = run.model, []

    def closure():
        # Of a probe there is no gradient.
        passes.append(torch.is_grad_enabled())
        if passes[-1] and all(map(torch.equal, weights(model), start)):
            raise OSError("no such file")
        return run.closure()

    with pytest.raises(OSError, match="no such file"):
        _ = [run.trainer.step(closure) for _ in range(200)]
    assert all(map(torch.equal, weights(model), start))
    before = copied(run.model, run.optimizer)
    run.step()
    plain_step(*before, run.data)
    assert all(map(torch.equal, all_states(run.model, run.optimizer), all_states(*before)))


def test_where_the_next_batch_raises_there_it_goes_on_from_here(caplog):
    run = Tasks()
    start = in_the_midst(run)
    run.data = shuffled(1)

    def closure():
        if all(map(torch.equal, weights(run.model), start)):
            raise ValueError("scale must be positive")
        return run.closure()

    for _ in range(100):
        run.trainer.step(closure)
    assert run.trainer._hands.start is None
    assert "at a point that was tried" in caplog.text
    assert not all(map(torch.equal, weights(run.model), start))


@pytest.mark.parametrize("method", ["load_weights", "restore"])
@pytest.mark.parametrize("moment", ["decision", "trial"])
def test_an_interrupt_on_the_way_back_leaves_none_of_it_undone(method, moment, monkeypatch):
    run = Tasks()
    run.until("quasi-Newton steps")
    before = copied(run.model, run.optimizer)
    before[0](run.data[0])
    for _ in range(60):
        run.step()
    secant = run.trainer.engine.controller.secant
    while moment == "trial" and not secant.holds_recovery:
        run.step()
    run.data = shuffled(1)
    own, interrupts = getattr(RecoveryPoint, method), []

    def interrupted(self, *arguments):
        if self is run.trainer._hands.start and run.trainer._hands._going_back and not interrupts:
            interrupts.append(1)
            raise KeyboardInterrupt
        return own(self, *arguments)

    monkeypatch.setattr(RecoveryPoint, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        _ = [run.step() for _ in range(100)]
    assert all(map(torch.equal, all_states(run.model, run.optimizer), all_states(*before)))
    run.step()
    plain_step(*before, run.data)
    assert all(map(torch.equal, weights(run.model), weights(before[0])))


@pytest.mark.parametrize("on_trial", [False, True])
def test_a_state_of_a_descent_goes_on_where_the_optimizer_has_a_hook_by_now(on_trial):
    run = Tasks()
    in_the_midst(run)
    while on_trial and not run.trainer.engine.controller.secant.holds_recovery:
        run.step()
    state = run.trainer.state_dict()
    other = Tasks(1)
    other.optimizer.register_step_post_hook(lambda *_: None)
    other.trainer.load_state_dict(state)
    assert all(map(torch.equal, weights(run.model), weights(other.model)))
    loss = other.closure().item()
    for _ in range(150):
        other.step()
    assert other.trainer.statistics().secant_steps == run.trainer.statistics().secant_steps
    assert other.closure().item() < max(1.1 * loss, 0.01)


def test_a_batch_that_has_no_loss_where_they_have_led_is_trained_from_before_them():
    run = Tasks()
    run.until("quasi-Newton steps")
    norm = sum(w.norm() for w in weights(run.model))
    run.until("optimizer on trial")

    def closure():
        far = sum(p.norm() for p in run.model.parameters()) > 1.5 * norm
        return run.closure() * (torch.nan if far else 1.0)

    assert closure().isnan()
    for _ in range(60):
        run.trainer.step(closure)
    assert closure().isfinite()
    assert run.trainer._hands.start is None
    assert run.trainer.statistics().divergences < 30


def damaged(start, how):
    if how == "other weights":
        return start | {"weights": [torch.zeros(3), *start["weights"][1:]]}
    return start | {"weights": start["weights"][1:] if how == "too few" else []}


@pytest.mark.parametrize("how", ["other weights", "too few", "none"])
def test_a_damaged_beginning_is_refused_before_anything_is_changed(how):
    run = Tasks()
    in_the_midst(run)
    state = run.trainer.state_dict()
    other = Tasks(1)
    before = all_states(other.model, other.optimizer)
    with pytest.raises(CheckpointError, match="not of these parameters"):
        other.trainer.load_state_dict(state | {"start": damaged(state["start"], how)})
    with pytest.raises(CheckpointError, match="no pairs"):
        other.trainer.load_state_dict(state | {"secants": None})
    assert all(map(torch.equal, before, all_states(other.model, other.optimizer)))


def test_the_beginning_is_kept_from_the_first_pair_on():
    run = Tasks()
    run.until("quasi-Newton steps")
    assert run.trainer._hands.start is None
    run.step()
    assert run.trainer._hands.start is not None
