"""The learned models of the loss: their gradient, what they learn, and that engines run on them."""

import json
import math

import contract
import numba
import numpy as np
import pytest
import torch
from descent import BRISK, Descent

from hybridcore import HybridTrainerConfig
from hybridcore.dynamics import DeltaHead, LinearDynamics, build
from hybridcore.dynamics.mixture import ExpertMixture
from hybridcore.dynamics.mlp import BATCH, CAPACITY, KNOTS, LEARNING_RATE, MLPDynamics
from hybridcore.dynamics.rssm import RSSMDynamics

compiled = pytest.mark.skipif(numba.config.DISABLE_JIT, reason="takes minutes uncompiled")


# -- the network --------------------------------------------------------------------------------


def torch_step(state, seed):
    """The weights after one update, by torch: its autograd and its Adam, from a saved state."""
    count, updates, _ = state["counts"]
    weights = [torch.tensor(w, requires_grad=True) for w in state["weights"]]
    optimizer = torch.optim.Adam(weights, LEARNING_RATE)
    for w, m, v in zip(weights, *state["moments"], strict=True):
        optimizer.state[w] = {
            "step": torch.tensor(float(updates)),
            "exp_avg": torch.tensor(m),
            "exp_avg_sq": torch.tensor(v),
        }
    steps = np.random.default_rng([seed, count]).integers(max(0, count - CAPACITY), count, BATCH)
    losses = []
    for step in steps:
        x = torch.tensor(state["features"][step % CAPACITY])
        out = torch.tanh(x @ weights[0] + weights[1]) @ weights[2] + weights[3]
        for knot, horizon in enumerate(KNOTS):
            std = state["stds"][step % CAPACITY, knot]
            end = step + horizon
            torn = state["segments"][step % CAPACITY] != state["segments"][end % CAPACITY]
            if end >= count or not 0.0 < std < math.inf or torn:
                continue
            truth = state["logs"][end % CAPACITY] - state["means"][step % CAPACITY, knot]
            b = torch.exp(out[len(KNOTS) + knot]) / math.sqrt(2.0)
            losses.append(torch.abs(truth / std - out[knot]) / b + torch.log(b))
    torch.stack(losses).mean().backward()
    optimizer.step()
    return [w.detach().numpy() for w in weights]


@pytest.mark.parametrize("count", [40, 200, 700])
def test_an_update_is_that_of_torch(count):
    model = contract.fed(lambda: MLPDynamics(3), contract.noisy_series(0, count - 1))
    model.restart()  # a torn stretch within the ring
    for loss in contract.noisy_series(1, 120):
        model.observe(contract.observed(loss))
    before = model.state_dict()
    # Whatever the turn: the update itself is what is compared.
    model._learn()
    for ours, theirs in zip(model.state_dict()["weights"], torch_step(before, 3), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)


def test_it_begins_as_the_mixture():
    model, mixture = MLPDynamics(), ExpertMixture()
    for loss in contract.noisy_series(4, 14):
        model.observe(contract.observed(loss))
        mixture.observe(math.log(loss))
    for horizon in (0, 1, 3, 7, 75, 500):
        assert model.forecast(horizon).mean == pytest.approx(mixture.forecast(horizon).mean)


@pytest.mark.parametrize("name", ["mlp", pytest.param("rssm", marks=compiled)])
def test_a_bend_that_comes_back_is_learned(name):
    """A loss that swings: its line misses, in a way that the features foretell."""
    rng = np.random.default_rng(0)
    logs = np.sin(np.arange(3000) / 12.0) + 0.02 * rng.normal(size=3000)
    models = build(name, "cpu"), LinearDynamics()
    errors = []
    for step, value in enumerate(logs[:-15]):
        for model in models:
            model.observe(contract.observed(math.exp(value)))
        if step > 2000:
            errors.append([model.forecast(15).mean - logs[step + 15] for model in models])
    learned, line = np.sqrt(np.mean(np.square(errors), axis=0))
    assert learned < 0.85 * line


# -- the head of ten outputs ----------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("groups", [1, 3, 8, 11])
def test_the_head_learns_by_how_much_each_group_is_missed(groups):
    model = RSSMDynamics()
    assert isinstance(model, DeltaHead)
    assert not isinstance(build("linear", "cpu"), DeltaHead)
    factors = np.linspace(0.6, 1.2, groups)
    missed = np.column_stack((factors, np.full(groups, 0.95)))
    for loss in contract.noisy_series(5, 1200):
        model.observe(contract.observed(loss))
        model.teach_delta(missed)
    delta = model.delta()
    assert delta.shape == (groups,)
    # Neighbours among more than eight groups share an output.
    assert np.abs(delta - factors).max() < 0.15


@compiled
def test_the_head_starts_neutral_and_takes_anything():
    model = RSSMDynamics()
    np.testing.assert_allclose(model.delta(), 1.0, atol=1e-6)
    for loss in contract.noisy_series(6, 40):
        model.observe(contract.observed(loss))
        model.teach_delta(np.array([[0.0, -1.0], [1e300, 1.0], [1.0, 0.0]]))
        assert np.isfinite(model.delta()).all()


# -- engines that run on them ---------------------------------------------------------------------


def config(name, **options):
    return HybridTrainerConfig(
        **{**BRISK.to_dict(), "dynamics": name, "group_correction": True, **options}
    )


@pytest.mark.parametrize("name", ["linear", "mlp", pytest.param("rssm", marks=compiled)])
def test_an_engine_predicts_resumes_and_repeats(name):
    one, again = Descent(config(name)), Descent(config(name))
    one.run(260)
    again.run(150)
    saved = json.dumps(again.engine.state_dict(), default=lambda array: array.tolist())
    resumed = Descent(config(name))
    resumed.engine.load_state_dict(json.loads(saved))
    resumed.x, resumed.bank, resumed.saved = again.x, again.bank, again.saved
    resumed.run(110)
    assert one.engine.counters.predicted_steps > 50
    np.testing.assert_array_equal(resumed.x, one.x)
    assert resumed.engine.counters.probes == one.engine.counters.probes


@compiled
def test_a_gpu_that_is_not_there_is_named_before_anything_starts():
    from hybridcore.kernels.dispatch import gpu_available

    if gpu_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="use device='auto'"):
        Descent(config("rssm", device="cuda"))
