"""The RSSM's forward kernels: GPU = CPU = NumPy oracle."""

import naive_rssm as naive
import numpy as np
import pytest
from ensembles import MARGIN, SIZES, SMALL, agree, ensemble, named, states

from hybridcore.dynamics.rssm.params import Sizes, aligned_zeros
from hybridcore.kernels.cpu import rssm as cpu

pytestmark = pytest.mark.usefixtures("kernels_run")
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


@pytest.fixture
def api():
    from hybridcore.kernels.cuda import api

    return api


def scratch(sizes):
    return aligned_zeros(cpu.work_size(sizes)), np.zeros(sizes.categoricals, np.int64)


def check_encoding(api, sizes, members):
    params = ensemble(sizes, members)
    features = np.random.default_rng(3).standard_normal(sizes.features).astype(np.float32)
    got, expected = np.full((2, members, sizes.latent), np.nan, np.float32)
    api.encode(features, params, sizes, got)
    cpu.encode(features, params, sizes, expected)
    agree(got, expected)
    agree(got, [naive.encode(features.astype(float), p) for p in named(params, sizes)])


def check_observed_steps(api, sizes, members, steps):
    params = ensemble(sizes, members)
    device = api.Ensemble(params, sizes)
    got, expected = states(sizes, members), states(sizes, members)
    oracle = [(h.astype(float), list(k)) for h, k in zip(*got, strict=True)]
    rng = np.random.default_rng(5)
    work = scratch(sizes)[0]
    for _ in range(steps):
        features = rng.standard_normal(sizes.features).astype(np.float32)
        uniforms = rng.random((members, sizes.categoricals), dtype=np.float32)
        device.observe_step(features, uniforms, *got)
        cpu.observe_step(params, sizes, features, uniforms, *expected, work)
        for m, p in enumerate(named(params, sizes)):
            h, k, margin = naive.observe(
                *oracle[m], features.astype(float), uniforms[m], p, sizes.classes
            )
            assert margin > MARGIN
            oracle[m] = h, k
        for mine, other, third in zip(got, expected, zip(*oracle, strict=True), strict=True):
            agree(mine, other)
            agree(mine, np.array(third))


def check_rollouts(api, sizes, members, paths, horizon):
    params = ensemble(sizes, members)
    start = states(sizes, members)
    before = [array.copy() for array in (params, *start)]
    uniforms = np.random.default_rng(7).random(
        (members, paths, horizon, sizes.categoricals), dtype=np.float32
    )
    got, expected = np.full((2, 2, members, paths, horizon), np.nan, np.float32)
    api.rollout(params, sizes, *start, uniforms, *got, *scratch(sizes))
    cpu.rollout(params, sizes, *start, uniforms, *expected, *scratch(sizes))
    agree(got, expected)
    for m, p in enumerate(named(params, sizes)):
        for path in range(paths):
            mean, variance, margin = naive.rollout(
                start[0][m].astype(float), start[1][m], uniforms[m, path], p, sizes.classes
            )
            assert margin > MARGIN
            agree(got[0, m, path], mean)
            agree(got[1, m, path], variance)
    for old, new in zip(before, (params, *start), strict=True):
        np.testing.assert_array_equal(old, new)


def check_delta_head(api, sizes, members):
    params = ensemble(sizes, members)
    hidden, classes = states(sizes, members)
    got, expected = np.full((2, members, sizes.outputs), np.nan, np.float32)
    api.delta_outputs(params, sizes, hidden, classes, got)
    cpu.delta_outputs(params, sizes, hidden, classes, expected)
    agree(got, expected)
    for m, p in enumerate(named(params, sizes)):
        agree(got[m], naive.delta_head(hidden[m], naive.one_hot(classes[m], sizes.classes), p))


@every_size
def test_encoding(api, sizes):
    check_encoding(api, sizes, members=3)


@every_size
def test_observed_steps(api, sizes):
    check_observed_steps(api, sizes, members=2, steps=3)


@every_size
@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_rollouts(api, sizes, horizon):
    check_rollouts(api, sizes, members=2, paths=2, horizon=horizon)


@every_size
def test_delta_head(api, sizes):
    check_delta_head(api, sizes, members=3)


@pytest.mark.filterwarnings("ignore::numba.core.errors.NumbaPerformanceWarning")
def test_any_number_of_threads_gives_the_same_bits():
    from hybridcore.kernels.cuda import rssm

    params, (hidden, classes) = ensemble(SMALL), states(SMALL)
    rng = np.random.default_rng(2)
    uniforms = rng.random((2, 2, 3, SMALL.categoricals), dtype=np.float32)
    results = []
    for threads in (1, 5, 32):
        mean, variance = np.full((2, 2, 2, 3), np.nan, np.float32)
        rssm.rollout[4, threads, 0, rssm.shared_bytes(SMALL)](
            params, SMALL, hidden, classes, uniforms, mean, variance
        )
        results.append((mean, variance))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    assert np.isfinite(results[0]).all()


def test_the_ensemble_keeps_its_weights_and_takes_any_number_of_paths(api):
    params, start = ensemble(SMALL), states(SMALL)
    device = api.Ensemble(params, SMALL)
    kept = params.copy()
    params[:] = np.nan
    for paths in (3, 0, 1, 3):
        uniforms = np.random.default_rng(paths).random((2, paths, 2, 2), dtype=np.float32)
        got, expected = np.full((2, 2, 2, paths, 2), np.nan, np.float32)
        device.rollout(*start, uniforms, *got)
        cpu.rollout(kept, SMALL, *start, uniforms, *expected, *scratch(SMALL))
        agree(got, expected)
    back = np.zeros_like(kept)
    device.copy_to(back)
    np.testing.assert_array_equal(back, kept)


@pytest.mark.filterwarnings("ignore:.*invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_member_harms_no_other(api, bad):
    params = ensemble(SMALL)
    uniforms = np.full((2, 1, 3, SMALL.categoricals), 0.4, np.float32)
    clean, got = np.zeros((2, 2, 2, 1, 3), np.float32)
    api.rollout(params, SMALL, *states(SMALL), uniforms, *clean, *scratch(SMALL))
    params[0, :] = bad
    api.rollout(params, SMALL, *states(SMALL), uniforms, *got, *scratch(SMALL))
    np.testing.assert_array_equal(got[:, 1], clean[:, 1])
    expected = np.zeros_like(got)
    cpu.rollout(params, SMALL, *states(SMALL), uniforms, *expected, *scratch(SMALL))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))


def test_observing_may_call_the_stateless_twin(api):
    params = ensemble(SMALL)
    features = np.linspace(-1, 1, SMALL.features, dtype=np.float32)
    uniforms = np.full((2, SMALL.categoricals), 0.3, np.float32)
    got, expected = states(SMALL), states(SMALL)
    work = scratch(SMALL)[0]
    api.observe_step(params, SMALL, features, uniforms, *got, work)
    assert not work.any()
    cpu.observe_step(params, SMALL, features, uniforms, *expected, work)
    agree(got[0], expected[0])
    agree(got[1], expected[1])


@pytest.mark.gpu
def test_full_size_on_a_gpu(api):
    check_encoding(api, Sizes(), members=5)
    check_observed_steps(api, Sizes(), members=5, steps=6)
    check_rollouts(api, Sizes(), members=5, paths=8, horizon=12)
    check_delta_head(api, Sizes(), members=5)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits_again(api):
    params, start = ensemble(Sizes(), 64), states(Sizes(), 64)
    uniforms = np.random.default_rng(0).random((64, 32, 75, 4), dtype=np.float32)
    first, again = np.full((2, 2, 64, 32, 75), np.nan, np.float32)
    device = api.Ensemble(params, Sizes())
    device.rollout(*start, uniforms, *first)
    device.rollout(*start, uniforms, *again)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)
