"""Optimizers whose steps do more than lower the loss, by hooks or by themselves."""

import pytest
import torch
from problems import BRISK, noisy, regression
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from hybridcore import HybridTrainerConfig, Phase
from hybridcore_torch import HybridTrainer
from hybridcore_torch.decay import is_known


class Shrinking(torch.optim.SGD):
    """Moves the weights at a rate of zero too."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            p.mul_(0.999)


class Plain(torch.optim.Adam):
    """Adam by another name."""


def test_a_step_or_a_hook_of_the_users_own_is_not_left_out(caplog):
    model, _, _ = regression()
    parameters = list(model.parameters())
    optimizers = {kind: kind(parameters, 0.1) for kind in (Shrinking, Plain, torch.optim.Adam)}
    pairs = {k: HybridTrainer(model, o, BRISK).engine.pairs for k, o in optimizers.items()}
    assert pairs == {Shrinking: 0, Plain: 20, torch.optim.Adam: 20}
    caplog.set_level("INFO", logger="hybridcore")
    optimizer = optimizers[Plain]
    # A schedule has a step of its own around the optimizer's.
    torch.optim.lr_scheduler.StepLR(optimizer, 10)
    assert HybridTrainer(model, optimizer, BRISK).engine.pairs == 20
    assert not caplog.text
    step = optimizer.step
    optimizer.step = lambda: step()
    assert HybridTrainer(model, optimizer, BRISK).engine.pairs == 0
    assert "optimizer Plain" in caplog.text


@pytest.mark.parametrize("when", ["pre", "post"])
def test_weights_that_a_hook_keeps_at_zero_stay_there(when):
    """Those of a pruned network, by their gradients or by themselves."""
    model, optimizer, closure = regression()
    mask = (torch.rand(10, 64) < 0.5).float()
    trainer = HybridTrainer(model, optimizer, BRISK)
    while trainer.statistics().secant_steps < 5:
        trainer.step(closure)

    @torch.no_grad()
    def keep(*_):
        (model.weight.grad if when == "pre" else model.weight).mul_(mask)

    # In the midst of a descent, as pruning begins late.
    getattr(optimizer, f"register_step_{when}_hook")(keep)
    optimizer.state.clear()
    with torch.no_grad():
        model.weight.mul_(mask)
    for _ in range(150):
        trainer.step(closure)
        assert not model.weight[mask == 0].any()
    assert trainer.statistics().secant_steps == 5
    assert trainer.engine.pairs == 0


@pytest.mark.parametrize("pairs", [0, 20])
def test_a_hook_that_comes_and_goes_does_not_begin_everything_anew(pairs):
    trainer, closure, _ = noisy(config=HybridTrainerConfig(secant_pairs=pairs))
    events, optimizer = [], trainer.optimizer
    for step in range(600):
        hook = optimizer.register_step_post_hook(lambda *_: None) if step % 100 == 0 else None
        events += [event["event"] for event in trainer.step(closure).events]
        if hook is not None:
            hook.remove()
    assert events.count("snapshots and trend start over") <= (pairs > 0)


def test_hooks_at_all_optimizers_and_wrappers_of_ones_own_count_too():
    model, optimizer, _ = regression()

    class Wrapper(torch.optim.Optimizer):
        """As of Lookahead, or of a projection."""

        def __init__(self, inner):
            self.optimizer, self.param_groups, self.state = inner, inner.param_groups, inner.state

        def step(self, closure=None):
            self.optimizer.step()

    assert is_known(optimizer)
    assert not is_known(Wrapper(optimizer))
    for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook):
        hook = register(lambda *_: None)
        assert not is_known(optimizer)
        hook.remove()
    assert is_known(optimizer)
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    assert is_known(accelerator.prepare(optimizer))
    for kind in (torch.optim.Rprop, torch.optim.ASGD):
        assert not is_known(accelerator.prepare(kind(model.parameters())))
    assert not is_known(accelerator.prepare(Shrinking(model.parameters(), 0.1)))


class Restless(Shrinking):
    """One that is known to lower the loss, as Schedule-Free is, which moves at a rate of zero."""

    def step(self, closure=None):
        super().step()


Restless.step.__module__ = "schedulefree.own"


def test_an_optimizer_that_moves_at_a_rate_of_zero_moves_no_weights_in_a_descent():
    model, _, closure = regression()
    trainer = HybridTrainer(model, Restless(model.parameters(), 0.1), BRISK)
    while trainer.statistics().secant_steps < 30:
        result = trainer.step(closure)
        if trainer.statistics().secant_steps > 1 and result.phase is Phase.FULL:
            assert result.loss == pytest.approx(closure().item(), rel=1e-5)
