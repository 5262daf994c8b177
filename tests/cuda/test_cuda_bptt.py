"""Gradients over windows, and Adam: GPU = CPU; losses also = NumPy oracle.

The CPU's gradient is compared with torch autograd in ``core/test_bptt.py``.
"""

import naive_rssm as naive
import numpy as np
import pytest
from ensembles import (
    MARGIN,
    ODD,
    SIZES,
    SMALL,
    agree,
    agree_as_gradient,
    ensemble,
    named,
    states,
)

from hybridcore.dynamics.rssm.params import Sizes
from hybridcore.kernels.cpu import bptt as cpu
from hybridcore.kernels.cpu import training
from hybridcore.kernels.cpu.bptt import Window

pytestmark = pytest.mark.usefixtures("kernels_run")
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)

DYNAMICS, REPRESENTATION = 0.5, 0.1


@pytest.fixture
def api():
    from hybridcore.kernels.cuda import api

    return api


def random_windows(sizes, members, windows, steps, seed=0):
    rng = np.random.default_rng(seed)
    lead = (members, windows, steps)
    weights = rng.choice([0.0, 1.0, 0.3], (2, *lead), p=[0.3, 0.4, 0.3]).astype(np.float32)
    weights[..., -1] = 0.7
    drawn = Window(
        features=rng.standard_normal((*lead, sizes.features)).astype(np.float32),
        changes=rng.standard_normal(lead).astype(np.float32),
        change_weights=weights[0],
        deltas=rng.random((*lead, sizes.outputs), dtype=np.float32),
        delta_weights=weights[1],
        uniforms=rng.random((*lead, sizes.categoricals), dtype=np.float32),
    )
    pairs = [states(sizes, windows, seed=seed + m + 1) for m in range(members)]
    hidden, classes = (np.stack(column) for column in zip(*pairs, strict=True))
    return drawn, hidden, classes


def oracle(sizes, p, window, hidden, classes, free):
    steps = [tuple(np.asarray(c[t], float) for c in window) for t in range(len(window.changes))]
    start = hidden.astype(float), list(classes)
    return naive.window_loss(*start, steps, p, sizes.classes, DYNAMICS, REPRESENTATION, free)


def check_gradients(api, sizes, members, windows, steps, free):
    params = ensemble(sizes, members)
    drawn, hidden, classes = random_windows(sizes, members, windows, steps)
    whole = np.ones((members, windows), np.bool_)
    whole[-1, 0] = windows == 1
    device = api.Ensemble(params, sizes)
    losses = np.full((members, windows), np.nan)
    divergences = np.full((members, steps), np.nan, np.float32)
    device.window_gradients(
        drawn, hidden, classes, whole, DYNAMICS, REPRESENTATION, free, losses, divergences
    )
    got = np.full_like(params, np.nan)
    device.copy_gradients_to(got)
    for m, p in enumerate(named(params, sizes)):
        expected = np.zeros_like(params[m])
        for i in range(windows):
            if not whole[m, i]:
                assert losses[m, i] == 0.0
                continue
            window = Window(*(field[m, i] for field in drawn))
            tr = cpu.trace(sizes, steps)
            tr.hidden[0], tr.classes[0] = hidden[m, i], classes[m, i]
            settings = DYNAMICS, REPRESENTATION, free
            loss = cpu.window_gradient(params[m], sizes, window, tr, *settings, expected)
            total, nats, margin = oracle(sizes, p, window, hidden[m, i], classes[m, i], free)
            assert margin > MARGIN
            agree(losses[m, i], loss)
            agree(losses[m, i], total)
        agree(divergences[m], tr.divergences)
        agree(divergences[m], nats)
        agree_as_gradient(got[m], expected, sizes)
        assert expected.any()


@every_size
@pytest.mark.parametrize("free", [0.0, 1.0, 100.0])
def test_gradients(api, sizes, free):
    check_gradients(api, sizes, members=2, windows=1, steps=3, free=free)


@pytest.mark.parametrize("steps", [1, 4])
def test_windows_add_up_and_torn_ones_are_left_out(api, steps):
    check_gradients(api, ODD, members=2, windows=2, steps=steps, free=0.2)


@pytest.mark.filterwarnings("ignore::numba.core.errors.NumbaPerformanceWarning")
def test_any_number_of_threads_gives_the_same_bits():
    from hybridcore.kernels.cuda import bptt

    params = ensemble(SMALL, members=1)
    drawn, hidden, classes = random_windows(SMALL, 1, 1, 2)
    results = []
    for threads in (1, 7, 40):
        grads, losses = np.zeros_like(params), np.zeros((1, 1))
        bptt.window_gradients[1, threads](
            params,
            SMALL,
            Window(*(field.copy() for field in drawn)),
            hidden,
            classes,
            np.ones((1, 1), np.bool_),
            bptt.traces(SMALL, 2, 1),
            DYNAMICS,
            REPRESENTATION,
            0.0,
            grads,
            losses,
        )
        results.append((grads, losses))
    for grads, losses in results[1:]:
        np.testing.assert_array_equal(grads, results[0][0])
        np.testing.assert_array_equal(losses, results[0][1])
    assert results[0][0].any()


def test_the_gradient_of_one_window_is_added(api):
    params = ensemble(SMALL, members=1)[0]
    drawn, hidden, classes = random_windows(SMALL, 1, 1, 2)
    window = Window(*(field[0, 0] for field in drawn))
    got, expected = np.full((2, *params.shape), 0.5, np.float32)
    losses = []
    for kernels, grad in ((api, got), (cpu, expected)):
        tr = cpu.trace(SMALL, 2)
        tr.hidden[0], tr.classes[0] = hidden[0, 0], classes[0, 0]
        settings = DYNAMICS, REPRESENTATION, 0.0
        losses.append(kernels.window_gradient(params, SMALL, window, tr, *settings, grad))
        losses.append(tr.divergences)
    assert losses[0] == pytest.approx(losses[2], rel=5e-6)
    agree(losses[1], losses[3])
    agree(got, expected)
    assert (got != 0.5).any()


@pytest.mark.parametrize("max_norm", [1e-3, 3.0, 1e9])
def test_adam(api, max_norm):
    rng = np.random.default_rng(0)
    size = 75  # more than the threads of a block, and no multiple of them
    start = rng.standard_normal(size).astype(np.float32)
    mine, other = (
        [start.copy(), *np.zeros((3, size), np.float32)],
        [start.copy(), *np.zeros((3, size), np.float32)],
    )
    for step in range(1, 4):
        grad = (rng.standard_normal(size) * 10.0 ** rng.integers(-3, 2)).astype(np.float32)
        norms = []
        for kernels, arrays in ((api, mine), (training, other)):
            arrays[1][:] = grad
            settings = (3e-3, 0.8, 0.99, 1e-8, max_norm)
            norms.append(kernels.adam_update(*arrays, step, *settings))
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)
        for a, b in zip(mine, other, strict=True):
            # A change of the learning rate, 3e-3, to some rounding errors.
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-8)
    assert not mine[1].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_adam_leaves_alone_what_has_no_finite_gradient_or_no_turn(api, bad):
    params = np.ones((3, 40), np.float32)
    grads = np.full((3, 40), 0.1, np.float32)
    grads[0, 7] = bad
    device = api.Ensemble(params, SMALL, params * 2, params * 3, grads)
    norms = np.full(3, -1.0)
    device.adam_updates(np.array([1, 0, 1]), training.Objective(), norms)
    got = np.full((3, 3, 40), np.nan, np.float32)
    device.copy_to(*got)
    for value, array in zip((1.0, 2.0, 3.0), got, strict=True):
        assert (array[:2] == value).all()
        assert (array[2] != value).all()
    device.copy_gradients_to(grads)
    assert not grads[[0, 2]].any()
    assert grads[1].all()
    assert not np.isfinite(norms[0])
    assert norms[2] == pytest.approx(0.1 * np.sqrt(40), rel=1e-6)


class Trainer:
    """All that `update` needs."""

    def __init__(self, sizes, members=2, capacity=12, steps=2, windows=2):
        rng = np.random.default_rng(3)
        self.params = ensemble(sizes, members)
        self.grads, self.first, self.second = (np.zeros_like(self.params) for _ in range(3))
        self.updates = np.zeros(members, np.int64)
        self.generators = np.arange(1, members + 1).astype(np.uint64) * np.uint64(2**33 + 7)
        self.sizes = sizes
        self.replay = replay = training.empty_replay(sizes, members, capacity)
        replay.features[:] = rng.standard_normal(replay.features.shape)
        replay.changes[:] = rng.standard_normal(capacity)
        replay.change_weights[:] = 1.0
        replay.deltas[:] = rng.random(replay.deltas.shape)
        replay.delta_weights[:] = rng.integers(0, 2, capacity)
        replay.follows[:] = True
        replay.hidden[:] = rng.uniform(-1, 1, replay.hidden.shape)
        replay.classes[:] = rng.integers(0, sizes.classes, replay.classes.shape)
        self.window, self.trace = training.empty_window(sizes, steps), cpu.trace(sizes, steps)
        self.losses = np.zeros(members)
        self.windows = windows

    def arrays(self):
        return self.params, self.first, self.second, self.updates, self.generators, self.losses

    def update(self, kernels, observed, **objective):
        kernels.update(
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


def check_updates(api, sizes, **settings):
    mine, other = Trainer(sizes, **settings), Trainer(sizes, **settings)
    for observed in (6, 12, 17):
        for trainer, kernels in ((mine, api), (other, training)):
            trainer.replay.follows[3] = observed != 12
            # So large that the denominator of Adam is no small number, which magnifies rounding.
            trainer.update(kernels, observed, epsilon=1e-2)
        for a, b in zip(mine.arrays(), other.arrays(), strict=True):
            if a.dtype == np.uint64:
                np.testing.assert_array_equal(a, b)
            else:
                agree(a, b)
        assert not mine.grads.any()
    assert (mine.updates > 0).all()


def test_updates_are_those_of_the_cpu(api):
    check_updates(api, SMALL)


def test_torn_windows_change_nothing(api):
    trainer = Trainer(SMALL)
    trainer.replay.follows[:] = False
    before = trainer.params.copy()
    trainer.update(api, 12)
    np.testing.assert_array_equal(trainer.params, before)
    np.testing.assert_array_equal(trainer.updates, [0, 0])
    assert np.isnan(trainer.losses).all()


def test_an_ensemble_learns_without_its_weights_leaving_the_device(api):
    trainer, other = Trainer(SMALL), Trainer(SMALL)
    device = api.Ensemble(trainer.params, SMALL)
    for _ in range(2):
        device.update(
            trainer.updates,
            trainer.generators,
            trainer.replay,
            12,
            0.5,
            trainer.windows,
            len(trainer.window.changes),
            training.Objective(epsilon=1e-2),
            trainer.losses,
        )
        other.update(training, 12, epsilon=1e-2)
    device.copy_to(trainer.params, trainer.first, trainer.second)
    for a, b in zip(trainer.arrays(), other.arrays(), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("free", [0.0, 1.0, 100.0])
def test_full_size_on_a_gpu(api, free):
    check_gradients(api, Sizes(), members=5, windows=4, steps=3, free=free)
    check_gradients(api, Sizes(), members=2, windows=2, steps=8, free=free)


@pytest.mark.gpu
def test_full_size_updates_on_a_gpu(api):
    check_updates(api, Sizes(), members=5, capacity=64, steps=3, windows=4)
