"""Gradients of the RSSM against torch autograd, its loss against the NumPy oracle, and Adam."""

import naive_rssm as naive
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hybridcore.dynamics.rssm.params import (
    Sizes,
    aligned_zeros,
    initialize,
    parameter_count,
    split,
)
from hybridcore.kernels.cpu import bptt, rssm, training

SMALL = Sizes(features=5, latent=3, categoricals=2, classes=3, outputs=4)
ODD = Sizes(features=9, latent=6, categoricals=5, classes=2, outputs=3)
every_size = pytest.mark.parametrize("sizes", [SMALL, ODD, Sizes()], ids=["small", "odd", "full"])

DYNAMICS, REPRESENTATION = 0.5, 0.1
# A uniform number closer than this to an edge of the CDF could fall either way in float32.
MARGIN = 1e-5


def problem(sizes, steps, seed=0):
    """Random weights, a random initial state and a random window, as the kernels take them."""
    rng = np.random.default_rng(seed)
    params = aligned_zeros(parameter_count(sizes))
    initialize(params, sizes, rng)
    w = split(params, sizes)
    for view in (w.encoder_bias, w.hidden_bias, w.posterior_bias, w.delta_weight, w.delta_bias):
        view[:] = 0.5 * rng.standard_normal(view.shape)
    w.stochastic_bias[: 3 * sizes.latent] = 0.5 * rng.standard_normal(3 * sizes.latent)
    w.posterior_weight[:] *= 3.0  # so that the divergences stand out
    window = training.empty_window(sizes, steps)
    window.features[:] = rng.standard_normal(window.features.shape)
    window.changes[:] = rng.standard_normal(steps)
    window.change_weights[:] = rng.choice([0.0, 1.0, 0.3], steps, p=[0.2, 0.6, 0.2])
    window.deltas[:] = rng.random(window.deltas.shape)
    window.delta_weights[:] = rng.choice([0.0, 1.0, 0.3], steps, p=[0.4, 0.4, 0.2])
    window.delta_weights[-1] = 0.7
    window.change_weights[-1] = 1.0
    window.uniforms[:] = rng.random(window.uniforms.shape)
    tr = bptt.trace(sizes, steps)
    tr.hidden[0] = rng.uniform(-1, 1, sizes.latent)
    tr.classes[0] = rng.integers(0, sizes.classes, sizes.categoricals)
    return params, window, tr


def rows(window):
    """The window as the oracle takes it."""
    for t in range(len(window.changes)):
        yield tuple(np.asarray(column[t], dtype=np.float64) for column in window)


def oracle(sizes, params, window, tr, free):
    p = naive.parts(split(params, sizes), sizes)
    start = tr.hidden[0].astype(np.float64), list(tr.classes[0])
    steps = list(rows(window))
    return naive.window_loss(*start, steps, p, sizes.classes, DYNAMICS, REPRESENTATION, free)


def kl(q, p):
    return torch.sum(q * torch.log(q / p))


def torch_loss(sizes, p, window, tr, free):
    """Loss of the window as one differentiable expression; ``p`` holds leaf tensors."""

    def mixed(logits):
        softmax = torch.softmax(logits.reshape(sizes.categoricals, sizes.classes), dim=1)
        return 0.99 * softmax + 0.01 / sizes.classes

    cell = torch.nn.GRUCell(
        sizes.categoricals * sizes.classes, sizes.latent, dtype=torch.float64, device="meta"
    )
    gru = {
        "weight_ih": p["gru_input_w"].T,
        "weight_hh": p["gru_hidden_w"].T,
        "bias_ih": p["gru_input_b"],
        "bias_hh": p["gru_hidden_b"],
    }
    h = torch.tensor(tr.hidden[0], dtype=torch.float64)
    s = F.one_hot(torch.tensor(tr.classes[0]), sizes.classes).double().reshape(-1)
    total = torch.zeros((), dtype=torch.float64)
    for features, change, change_weight, delta, delta_weight, uniforms in rows(window):
        h = torch.func.functional_call(cell, gru, (s, h))
        e = torch.tanh(torch.tensor(features) @ p["encoder_w"] + p["encoder_b"])
        prior = mixed(h @ p["prior_w"] + p["prior_b"])
        posterior = mixed(torch.cat([h, e]) @ p["posterior_w"] + p["posterior_b"])
        edges = torch.cumsum(posterior.detach(), dim=1)[:, :-1]
        classes = (torch.tensor(uniforms)[:, None] >= edges).sum(dim=1)
        value = F.one_hot(classes, sizes.classes).double()
        s = (value + posterior - posterior.detach()).reshape(-1)
        mean, raw = h @ p["loss_hidden_w"] + s @ p["loss_stochastic_w"] + p["loss_b"]
        scale = torch.exp(7.0 * torch.tanh(raw / 7.0))
        nll = -torch.distributions.Laplace(mean, scale).log_prob(torch.tensor(float(change)))
        out = torch.cat([h, s]) @ p["delta_w"] + p["delta_b"]
        mapped = torch.cat([F.softplus(out[:1]), torch.sigmoid(out[1:2]), F.softplus(out[2:])])
        error = torch.sum((mapped - torch.tensor(delta)) ** 2)
        dynamics = torch.clamp(kl(posterior.detach(), prior), min=free)
        representation = torch.clamp(kl(posterior, prior.detach()), min=free)
        total = total + float(change_weight) * nll + float(delta_weight) * error
        total = total + DYNAMICS * dynamics + REPRESENTATION * representation
    return total


def torch_gradient(sizes, params, window, tr, free):
    leaves = {
        name: torch.tensor(part, requires_grad=True)
        for name, part in naive.parts(split(params, sizes), sizes).items()
    }
    loss = torch_loss(sizes, leaves, window, tr, free)
    loss.backward()
    gradient = {
        name: np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
        for name, leaf in leaves.items()
    }
    return loss.item(), gradient


def kernel_gradient(sizes, params, window, tr, free, grad):
    return bptt.window_gradient(params, sizes, window, tr, DYNAMICS, REPRESENTATION, free, grad)


def compare(gradient, grad, sizes, tolerance=1e-5):
    for name, got in naive.parts(split(grad, sizes), sizes).items():
        expected = gradient[name]
        size = np.abs(expected).max()
        assert size > 0.0, name
        error = np.abs(got - expected).max() / size
        assert error < tolerance, (name, error)


# ---------------------------------------------------------------------------------------------
# Windows
# ---------------------------------------------------------------------------------------------


@every_size
@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("free", [0.0, 1.0, 100.0])
def test_window_loss_follows_the_oracle(sizes, steps, free):
    params, window, tr = problem(sizes, steps)
    expected, divergences, margin = oracle(sizes, params, window, tr, free)
    assert margin > MARGIN
    grad = np.zeros_like(params)
    loss = kernel_gradient(sizes, params, window, tr, free, grad)
    assert loss == pytest.approx(expected, rel=2e-6)
    np.testing.assert_allclose(tr.divergences, divergences, rtol=1e-5, atol=1e-6)


@every_size
@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("free", ["inactive", "some", "active"])
def test_gradient_is_that_of_autograd(sizes, steps, free):
    params, window, tr = problem(sizes, steps, seed=steps)
    _, divergences, margin = oracle(sizes, params, window, tr, 0.0)
    assert margin > MARGIN
    # Between the divergences of the steps: some are below the free nats, some above.
    level = {"inactive": 0.0, "some": np.mean(divergences) * 1.01, "active": 1e3}[free]
    if free == "some" and steps > 1:
        assert min(divergences) < level < max(divergences)
    loss, gradient = torch_gradient(sizes, params, window, tr, level)
    grad = np.zeros_like(params)
    got = kernel_gradient(sizes, params, window, tr, level, grad)
    assert got == pytest.approx(loss, rel=2e-6)
    if level > max(divergences):
        # Nothing else reaches the prior.
        parts = naive.parts(split(grad, sizes), sizes)
        for name in ("prior_w", "prior_b"):
            assert not gradient[name].any()
            assert not parts[name].any()
            gradient[name] = np.ones_like(parts[name])
        w = split(grad, sizes)
        w.hidden_weight[:, 3 * sizes.latent :][:, : sizes.categoricals * sizes.classes] = 1.0
        w.hidden_bias[3 * sizes.latent :][: sizes.categoricals * sizes.classes] = 1.0
    compare(gradient, grad, sizes)


@every_size
def test_gradients_add_up_and_padding_stays_zero(sizes):
    params, window, tr = problem(sizes, 3)
    once, twice = np.zeros_like(params), np.zeros_like(params)
    kernel_gradient(sizes, params, window, tr, 1.0, once)
    for _ in range(2):
        kernel_gradient(sizes, params, window, tr, 1.0, twice)
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5, atol=1e-5 * np.abs(once).max())
    used = np.zeros_like(params)
    w, n_l = split(used, sizes), sizes.latent
    for view in w:
        view[:] = 1.0
    w.hidden_weight[:, 3 * n_l + sizes.categoricals * sizes.classes + 2 :] = 0.0
    w.hidden_bias[3 * n_l + sizes.categoricals * sizes.classes + 2 :] = 0.0
    w.stochastic_weight[:, 3 * n_l + 2 :] = 0.0
    w.stochastic_bias[3 * n_l :] = 0.0
    assert not once[used == 0.0].any()


def test_a_window_without_targets_teaches_only_the_latent_model():
    params, window, tr = problem(SMALL, 3)
    window.change_weights[:] = 0.0
    window.delta_weights[:] = 0.0
    grad = np.zeros_like(params)
    kernel_gradient(SMALL, params, window, tr, 0.0, grad)
    parts = naive.parts(split(grad, SMALL), SMALL)
    for name, part in parts.items():
        assert part.any() != name.startswith(("loss", "delta")), name


# ---------------------------------------------------------------------------------------------
# Adam
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [1e-3, 3.0, 1e9])
def test_adam_is_the_one_of_torch(max_norm):
    rng = np.random.default_rng(0)
    params = rng.standard_normal(37).astype(np.float32)
    leaf = torch.tensor(params.astype(np.float64), requires_grad=True)
    settings = {"lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-8}
    reference = torch.optim.Adam([leaf], **settings)
    first, second = np.zeros_like(params), np.zeros_like(params)
    for step in range(1, 9):
        grad = (rng.standard_normal(37) * 10.0 ** rng.integers(-3, 2)).astype(np.float32)
        leaf.grad = torch.tensor(grad.astype(np.float64))
        expected = torch.nn.utils.clip_grad_norm_([leaf], max_norm).item()
        reference.step()
        norm = training.adam_update(
            params, grad, first, second, step, 3e-3, 0.8, 0.99, 1e-8, max_norm
        )
        assert norm == pytest.approx(expected, rel=1e-6)
        assert not grad.any()
        np.testing.assert_allclose(params, leaf.detach().numpy(), rtol=0, atol=2e-7 * step)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_adam_leaves_the_weights_alone_when_the_gradient_is_not_finite(bad):
    params, grad = np.ones(5, np.float32), np.array([1, 2, bad, 4, 5], np.float32)
    first, second = np.full(5, 2.0, np.float32), np.full(5, 3.0, np.float32)
    norm = training.adam_update(params, grad, first, second, 1, 1e-3, 0.9, 0.999, 1e-8, 1.0)
    assert not np.isfinite(norm)
    assert not grad.any()
    for array, value in ((params, 1.0), (first, 2.0), (second, 3.0)):
        assert (array == value).all()


# ---------------------------------------------------------------------------------------------
# Updates from a replay
# ---------------------------------------------------------------------------------------------


def filled(sizes, members, capacity, seed=0):
    rng = np.random.default_rng(seed)
    replay = training.empty_replay(sizes, members, capacity)
    replay.features[:] = rng.standard_normal(replay.features.shape)
    replay.changes[:] = rng.standard_normal(capacity)
    replay.change_weights[:] = 1.0
    replay.deltas[:] = rng.random(replay.deltas.shape)
    replay.delta_weights[:] = rng.integers(0, 2, capacity)
    replay.follows[:] = True
    replay.hidden[:] = rng.uniform(-1, 1, replay.hidden.shape)
    replay.classes[:] = rng.integers(0, sizes.classes, replay.classes.shape)
    return replay


def test_loaded_windows_are_consecutive_steps_of_the_ring():
    capacity, steps, start = 7, 3, 19  # steps 19, 20, 21 stand in slots 5, 6, 0
    replay = filled(SMALL, members=2, capacity=capacity)
    window, tr = training.empty_window(SMALL, steps), bptt.trace(SMALL, steps)
    load = (replay, 1, start, np.float32(2.0), np.float32(0.25), window, tr)
    assert training.load_window(*load)
    slots = [5, 6, 0]
    np.testing.assert_array_equal(window.features, replay.features[slots])
    np.testing.assert_array_equal(window.deltas, replay.deltas[slots])
    np.testing.assert_array_equal(window.changes, replay.changes[slots] / 2)
    np.testing.assert_array_equal(window.change_weights, [0.25] * 3)
    np.testing.assert_array_equal(window.delta_weights, replay.delta_weights[slots] / 4)
    np.testing.assert_array_equal(tr.hidden[0], replay.hidden[1, 4])
    np.testing.assert_array_equal(tr.classes[0], replay.classes[1, 4])
    replay.follows[4] = False  # before the window: that step is only its start
    assert training.load_window(*load)
    for slot in slots:
        replay.follows[slot] = False
        assert not training.load_window(*load)
        replay.follows[slot] = True


class Trainer:
    """All that `training.update` needs, for a small model."""

    def __init__(self, members=2, capacity=12, steps=3, windows=2):
        rng = np.random.default_rng(3)
        self.sizes = SMALL
        self.params = aligned_zeros(members, parameter_count(SMALL))
        for row in self.params:
            initialize(row, SMALL, rng)
        self.grads, self.first, self.second = (np.zeros_like(self.params) for _ in range(3))
        self.updates = np.zeros(members, np.int64)
        self.generators = np.arange(1, members + 1).astype(np.uint64) * np.uint64(2**33 + 7)
        self.replay = filled(SMALL, members, capacity)
        self.window, self.trace = training.empty_window(SMALL, steps), bptt.trace(SMALL, steps)
        self.losses = np.zeros(members)
        self.windows = windows

    def update(self, observed, **objective):
        training.update(
            self.params,
            self.grads,
            self.first,
            self.second,
            self.updates,
            self.generators,
            self.sizes,
            self.replay,
            observed,
            0.5,
            self.windows,
            self.window,
            self.trace,
            training.Objective(**objective),
            self.losses,
        )


def test_update_is_adam_on_the_mean_loss_of_the_windows_drawn():
    trainer = Trainer(members=1, windows=1)
    before = trainer.params.copy()
    trainer.update(4, learning_rate=1e-2)  # steps 0 to 3: the window can only be 1 to 3
    tr = trainer.trace
    np.testing.assert_array_equal(tr.hidden[0], trainer.replay.hidden[0, 0])
    np.testing.assert_array_equal(trainer.window.features, trainer.replay.features[1:4])
    expected, _, margin = oracle(SMALL, before[0], trainer.window, tr, 1.0)
    assert margin > MARGIN
    assert trainer.losses[0] == pytest.approx(expected, rel=1e-5)
    _, gradient = torch_gradient(SMALL, before[0], trainer.window, tr, 1.0)
    moved = naive.parts(split(trainer.params[0] - before[0], SMALL), SMALL)
    # The first step of Adam goes by the learning rate against the sign of the gradient.
    for name, change in moved.items():
        strong = np.abs(gradient[name]) > 1e-4
        np.testing.assert_allclose(change[strong], -1e-2 * np.sign(gradient[name][strong]), 1e-3)


def test_several_windows_count_by_their_mean():
    trainer, windows, steps = Trainer(members=1, windows=4), 4, 3
    trainer.replay.follows[6] = False
    stream = np.zeros((1, windows * (1 + steps * SMALL.categoricals)), np.float32)
    rssm.fill_uniforms(trainer.generators.copy(), stream)
    window, tr = training.empty_window(SMALL, steps), bptt.trace(SMALL, steps)
    total, losses = np.zeros_like(trainer.params[0]), []
    for draws in stream.reshape(windows, -1):
        start = 1 + int(draws[0] * 9)
        window.uniforms[:] = draws[1:].reshape(steps, -1)
        one = np.float32(1.0)
        if training.load_window(trainer.replay, 0, start, np.float32(0.5), one, window, tr):
            losses.append(
                bptt.window_gradient(trainer.params[0], SMALL, window, tr, 0.5, 0.1, 1.0, total)
            )
    assert 0 < len(losses) < windows
    trainer.update(12, max_norm=1e9, beta1=0.0)
    assert trainer.losses[0] == pytest.approx(np.mean(losses), rel=1e-5)
    np.testing.assert_allclose(trainer.first[0], total / windows, rtol=1e-4, atol=1e-6)


def test_members_draw_windows_of_their_own():
    trainer = Trainer(members=2, windows=1)
    trainer.params[1] = trainer.params[0]
    trainer.replay.hidden[1] = trainer.replay.hidden[0]
    trainer.replay.classes[1] = trainer.replay.classes[0]
    for _ in range(3):
        trainer.update(12)
    assert (trainer.params[0] != trainer.params[1]).any()
    np.testing.assert_array_equal(trainer.updates, [3, 3])
    assert not trainer.grads.any()


def test_every_window_is_drawn_about_equally_often():
    trainer = Trainer(members=1, capacity=8, windows=1)
    starts = np.zeros(8)
    for row, k in zip(trainer.replay.features, range(8), strict=True):
        row[:] = k
    for _ in range(600):
        trainer.update(21, learning_rate=0.0)  # steps 13 to 20; windows start at 14 to 18
        starts[int(trainer.window.features[0, 0])] += 1
    assert (starts > 0).nonzero()[0].tolist() == sorted(step % 8 for step in range(14, 19))
    assert np.abs(starts[starts > 0] - 120).max() < 6 * np.sqrt(600 * 0.2 * 0.8)


def test_torn_windows_change_nothing():
    trainer = Trainer()
    trainer.replay.follows[:] = False
    before = trainer.params.copy()
    trainer.update(12)
    np.testing.assert_array_equal(trainer.params, before)
    np.testing.assert_array_equal(trainer.updates, [0, 0])
    assert np.isnan(trainer.losses).all()


def test_training_fits_a_replay():
    trainer = Trainer(members=2, windows=4)
    history = []
    for _ in range(150):
        trainer.update(12, learning_rate=1e-2)
        history.append(trainer.losses.copy())
    assert (np.mean(history[-30:], axis=0) < np.mean(history[:30], axis=0) - 0.3).all()
