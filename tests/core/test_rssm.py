"""The RSSM's forward kernels against torch, against a NumPy oracle, and against theory."""

import naive_rssm as naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcore.dynamics.rssm.params import (
    ALIGNMENT,
    Sizes,
    Weights,
    aligned_zeros,
    initialize,
    parameter_count,
    split,
)
from hybridcore.kernels import bodies
from hybridcore.kernels.cpu import rssm

steady = settings(deadline=None, derandomize=True, database=None, max_examples=200)

# Small enough to run uncompiled; odd sizes that are no multiple of any block, and the real ones.
SMALL = Sizes(features=5, latent=3, categoricals=2, classes=3, outputs=4)
ODD = Sizes(features=9, latent=6, categoricals=5, classes=2, outputs=3)
every_size = pytest.mark.parametrize("sizes", [SMALL, ODD, Sizes()], ids=["small", "odd", "full"])


def ensemble(sizes, members=2, seed=0, spread=0.6):
    """Random weights, every one of them different from 0."""
    rng = np.random.default_rng(seed)
    params = aligned_zeros(members, parameter_count(sizes))
    for row in params:
        initialize(row, sizes, rng)
        w = split(row, sizes)
        for view in (w.encoder_bias, w.hidden_bias, w.posterior_bias, w.delta_weight, w.delta_bias):
            view[:] = spread * rng.standard_normal(view.shape)
        w.stochastic_bias[: 3 * sizes.latent] = rng.standard_normal(3 * sizes.latent)
    return params


def states(sizes, members, seed=1):
    rng = np.random.default_rng(seed)
    hidden = rng.uniform(-1, 1, (members, sizes.latent)).astype(np.float32)
    classes = rng.integers(0, sizes.classes, (members, sizes.categoricals))
    return hidden, classes


def named(params, sizes):
    return [naive.parts(split(row, sizes), sizes) for row in params]


# ---------------------------------------------------------------------------------------------
# Scalar formulas
# ---------------------------------------------------------------------------------------------


def test_tanh_and_exp_follow_the_library():
    grid = np.linspace(-12, 12, 4801)
    x = grid.astype(np.float32)
    tanh = np.array([rssm.tanh(v) for v in x], dtype=np.float64)
    assert np.abs(tanh - np.tanh(x.astype(np.float64))).max() < 5e-7
    small = np.array([rssm.tanh(v) for v in x * np.float32(1e-6)], dtype=np.float64)
    np.testing.assert_allclose(small, np.tanh(x * 1e-6), rtol=2e-6)
    x = np.linspace(-32, 0, 4801).astype(np.float32)
    exp = np.array([rssm.exp_of_negative(v) for v in x], dtype=np.float64)
    np.testing.assert_allclose(exp, np.exp(x.astype(np.float64)), rtol=8e-7)
    assert 0.0 < rssm.exp_of_negative(np.float32(-1e30)) < 2e-14


@pytest.mark.parametrize("x", [-100.0, -3.0, -1e-3, 0.0, 1e-3, 3.0, 100.0])
def test_softplus_and_its_slope(x):
    value = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.softplus(value, threshold=1e3)
    expected.backward()
    assert rssm.softplus(np.float32(x)) == pytest.approx(expected.item(), rel=1e-6)
    slope = bodies.softplus_slope(np.float32(x))
    assert slope == pytest.approx(value.grad.item(), rel=1e-6)


def test_laplace_formulas_follow_torch():
    for error, log_b in [(0.3, -2.0), (-1.5, 0.7), (0.0, 3.0), (20.0, -6.9)]:
        density = torch.distributions.Laplace(0.0, np.exp(log_b))
        nll = bodies.laplace_nll(np.float32(error), np.float32(log_b))
        assert nll == pytest.approx(-density.log_prob(torch.tensor(error)).item(), rel=1e-5)
        decay = np.float32(np.exp(-2 * abs(log_b)))
        variance = bodies.laplace_variance(np.float32(log_b), decay)
        assert variance == pytest.approx(density.variance.item(), rel=1e-5)


def test_nan_survives_the_scalar_formulas():
    nan = np.float32(np.nan)
    for formula in (rssm.tanh, rssm.exp_of_negative, rssm.softplus):
        assert np.isnan(formula(nan))


def test_generator_follows_its_definition_on_integers():
    state, mask = 88172645463325252, 2**64 - 1
    out = np.zeros((2, 40), np.float32)
    generators = np.array([state, 1], np.uint64)
    rssm.fill_uniforms(generators, out)
    for j in range(40):
        state ^= (state << 13) & mask
        state ^= state >> 7
        state ^= (state << 17) & mask
        assert out[0, j] == (state >> 40) / 2**24
    assert int(generators[0]) == state
    # Drawing on continues the stream.
    again, both = np.array([7, 9], np.uint64), np.array([7, 9], np.uint64)
    long, first, second = (np.zeros((2, n), np.float32) for n in (10, 4, 6))
    rssm.fill_uniforms(again, long)
    rssm.fill_uniforms(both, first)
    rssm.fill_uniforms(both, second)
    np.testing.assert_array_equal(long, np.hstack([first, second]))
    np.testing.assert_array_equal(again, both)


def test_uniforms_look_uniform():
    out = np.zeros((3, 4000), np.float32)
    rssm.fill_uniforms(np.array([1234567, 2**63 + 5, 99], np.uint64), out)
    assert out.min() >= 0.0
    assert out.max() < 1.0
    # Six standard errors of the mean and of the mean square, and of a lagged product.
    assert abs(out.mean() - 1 / 2) < 6 * np.sqrt(1 / 12 / out.size)
    assert abs((out**2).mean() - 1 / 3) < 6 * np.sqrt(4 / 45 / out.size)
    lagged = ((out[:, 1:] - 0.5) * (out[:, :-1] - 0.5)).mean()
    assert abs(lagged) < 6 / 12 / np.sqrt(out.size)
    assert np.abs(np.corrcoef(out)[np.triu_indices(3, 1)]).max() < 6 / np.sqrt(4000)


# ---------------------------------------------------------------------------------------------
# Layout
# ---------------------------------------------------------------------------------------------


@every_size
def test_weights_share_no_float_and_start_on_cache_lines(sizes):
    flat = aligned_zeros(parameter_count(sizes))
    assert flat.ctypes.data % 64 == 0
    assert len(flat) % ALIGNMENT == 0
    weights = split(flat, sizes)
    for view in weights:
        assert (view.ctypes.data - flat.ctypes.data) % (4 * ALIGNMENT) == 0
        view += 1.0
    assert flat.max() == 1.0
    assert flat.sum() == sum(view.size for view in weights)
    assert weights.encoder_weight.shape == (sizes.features, sizes.latent)
    assert weights.delta_bias.shape == (sizes.outputs,)


@every_size
def test_initial_weights(sizes):
    first, again, other = (np.full(parameter_count(sizes), np.nan, np.float32) for _ in range(3))
    initialize(first, sizes, np.random.default_rng(1))
    initialize(again, sizes, np.random.default_rng(1))
    initialize(other, sizes, np.random.default_rng(2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.25
    p = naive.parts(split(first, sizes), sizes)
    n_l, n_s = sizes.latent, sizes.categoricals * sizes.classes
    fan_in = {
        **{"encoder_w": sizes.features, "gru_input_w": n_l, "gru_hidden_w": n_l, "prior_w": n_l},
        **{"posterior_w": 2 * n_l, "loss_hidden_w": n_l + n_s, "loss_stochastic_w": n_l + n_s},
    }
    for name, inputs in fan_in.items():
        bound = 1 / np.sqrt(inputs)
        assert 0.5 * bound < np.abs(p[name]).max() <= bound * (1 + 1e-6), name
    # The delta head says "leave it as it is" in whatever state.
    neutral = np.ones(sizes.outputs)
    neutral[1] = 0.5
    np.testing.assert_allclose(naive.delta_head(np.ones(n_l), np.ones(n_s), p), neutral, 1e-6)


def test_fields_are_where_the_kernels_unpack_them():
    assert len(Weights._fields) == len(split(aligned_zeros(parameter_count(SMALL)), SMALL))


# ---------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------


@every_size
def test_gru_is_the_one_of_torch(sizes):
    n_l, n_s = sizes.latent, sizes.categoricals * sizes.classes
    params = ensemble(sizes)[0]
    w, p = split(params, sizes), naive.parts(split(params, sizes), sizes)
    cell = torch.nn.GRUCell(n_s, n_l, dtype=torch.float64)
    with torch.no_grad():
        cell.weight_ih.copy_(torch.tensor(p["gru_input_w"].T))
        cell.weight_hh.copy_(torch.tensor(p["gru_hidden_w"].T))
        cell.bias_ih.copy_(torch.tensor(p["gru_input_b"]))
        cell.bias_hh.copy_(torch.tensor(p["gru_hidden_b"]))
    hidden, classes = states(sizes, members=4)
    recurrent, gates = np.zeros_like(w.hidden_bias), np.zeros_like(w.stochastic_bias)
    for h, k in zip(hidden, classes, strict=True):
        x = torch.tensor(naive.one_hot(k, sizes.classes))
        expected = cell(x, torch.tensor(h, dtype=torch.float64)).detach().numpy()
        rssm.from_hidden(h, w, recurrent)
        rssm.from_classes(k, sizes.classes, w, gates)
        rssm.gru(gates, recurrent, h)
        np.testing.assert_allclose(h, expected, rtol=0, atol=1e-6)


@every_size
def test_encoding(sizes):
    params = ensemble(sizes, members=3)
    features = np.random.default_rng(3).standard_normal(sizes.features).astype(np.float32)
    out = np.full((3, sizes.latent), np.nan, np.float32)
    rssm.encode(features, params, sizes, out)
    expected = [naive.encode(features.astype(float), p) for p in named(params, sizes)]
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)


@given(
    logits=st.lists(st.floats(-60, 60, width=32), min_size=6, max_size=6),
    offset=st.sampled_from([0.0, 1000.0]),
)
@steady
def test_softmax(logits, offset):
    values = (np.array(logits, np.float32) + np.float32(offset)).astype(np.float32)
    expected = torch.softmax(torch.tensor(values, dtype=torch.float64).reshape(2, 3), 1).numpy()
    rssm.softmax(values, 2, 3)
    np.testing.assert_allclose(values.reshape(2, 3), expected, rtol=2e-6, atol=1e-13)
    np.testing.assert_allclose(values.reshape(2, 3).sum(1), 1.0, rtol=1e-6)


def test_draws_have_the_mixed_probabilities():
    softmax = np.array([0.0, 0.2, 0.8, 0.5, 0.5, 0.0], np.float32)
    uniforms = ((np.arange(10000) + 0.5) / 10000).astype(np.float32)
    counts = np.zeros((2, 3))
    classes = np.zeros(2, np.int64)
    for u in uniforms:
        rssm.sample(softmax, 3, np.array([u, u], np.float32), classes)
        counts[[0, 1], classes] += 1
    expected = 0.99 * softmax.reshape(2, 3) + 0.01 / 3
    np.testing.assert_allclose(counts / 10000, expected, atol=2e-4)


# ---------------------------------------------------------------------------------------------
# Whole steps
# ---------------------------------------------------------------------------------------------

# A uniform number closer than this to an edge of the CDF could fall either way in float32.
MARGIN = 1e-5


@every_size
def test_observed_steps_follow_the_oracle(sizes):
    members, steps = 3, 6
    params = ensemble(sizes, members)
    hidden, classes = states(sizes, members)
    expected = [(h.astype(float), list(k)) for h, k in zip(hidden, classes, strict=True)]
    work = aligned_zeros(rssm.work_size(sizes))
    rng = np.random.default_rng(5)
    for _ in range(steps):
        features = rng.standard_normal(sizes.features).astype(np.float32)
        uniforms = rng.random((members, sizes.categoricals), dtype=np.float32)
        rssm.observe_step(params, sizes, features, uniforms, hidden, classes, work)
        for m, p in enumerate(named(params, sizes)):
            h, k, margin = naive.observe(
                *expected[m], features.astype(float), uniforms[m], p, sizes.classes
            )
            assert margin > MARGIN
            expected[m] = h, k
            np.testing.assert_allclose(hidden[m], h, rtol=0, atol=3e-6)
            assert list(classes[m]) == k


@every_size
@pytest.mark.parametrize("horizon", [1, 2, 12])
def test_rollouts_follow_the_oracle(sizes, horizon):
    members, paths = 2, 3
    params = ensemble(sizes, members)
    hidden, classes = states(sizes, members)
    before = hidden.copy(), classes.copy(), params.copy()
    rng = np.random.default_rng(7)
    uniforms = rng.random((members, paths, horizon, sizes.categoricals), dtype=np.float32)
    mean, variance = np.full((2, members, paths, horizon), np.nan, np.float32)
    work, work_classes = aligned_zeros(rssm.work_size(sizes)), np.zeros_like(classes[0])
    rssm.rollout(params, sizes, hidden, classes, uniforms, mean, variance, work, work_classes)
    for m, p in enumerate(named(params, sizes)):
        for path in range(paths):
            expected, spread, margin = naive.rollout(
                hidden[m].astype(float), classes[m], uniforms[m, path], p, sizes.classes
            )
            assert margin > MARGIN
            np.testing.assert_allclose(mean[m, path], expected, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(variance[m, path], spread, rtol=2e-5)
    for old, new in zip(before, (hidden, classes, params), strict=True):
        np.testing.assert_array_equal(old, new)


@every_size
def test_delta_head_follows_the_oracle(sizes):
    params = ensemble(sizes, members=3)
    hidden, classes = states(sizes, members=3)
    out = np.full((3, sizes.outputs), np.nan, np.float32)
    rssm.delta_outputs(params, sizes, hidden, classes, out)
    for m, p in enumerate(named(params, sizes)):
        expected = naive.delta_head(hidden[m], naive.one_hot(classes[m], sizes.classes), p)
        np.testing.assert_allclose(out[m], expected, rtol=5e-6)
