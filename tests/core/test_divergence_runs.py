"""False alarms and missed ones of the divergence monitor, on whole series of losses."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from monitored import CAUTION, CRITICAL, NORMAL, WARNING, settled, severity, steady

from hybridcore.divergence import (
    BASELINE_PATIENCE,
    DivergenceMonitor,
    RecoveryAction,
    Signal,
)

# ---------------------------------------------------------------------------------------------
# False alarms and missed ones
# ---------------------------------------------------------------------------------------------


def watch(losses, norms=None, monitor=None):
    monitor = monitor or DivergenceMonitor()
    norms = np.full(len(losses), math.nan) if norms is None else norms
    return np.array([int(monitor.observe(x, g)) for x, g in zip(losses, norms, strict=True)])


# Largest share of steps with a deviating loss, and at WARNING or above.
NOISES = {
    "gaussian": (lambda rng, n: rng.standard_normal(n), 0.018, 2e-4),
    "student-3": (lambda rng, n: rng.standard_t(3, n), 0.035, 1e-3),
    "student-2": (lambda rng, n: rng.standard_t(2, n), 0.04, 1e-3),
    "uniform": (lambda rng, n: rng.uniform(-1, 1, n), 0.001, 1e-4),
    "gumbel": (lambda rng, n: rng.gumbel(size=n), 0.045, 1e-3),
}


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("slope", [0.0, -2e-4])
def test_noise_is_seldom_taken_for_divergence(name, slope):
    draw, cautions, warnings = NOISES[name]
    n = 40_000
    logs = 0.1 * draw(np.random.default_rng(1), n) + slope * np.arange(n)
    levels = watch(np.exp(logs))
    entered = np.mean((levels[1:] > 0) & (levels[:-1] == 0))
    assert entered <= cautions
    assert np.mean(levels >= 2) <= warnings
    assert levels.max() < CRITICAL
    if name == "gaussian":
        # P(z > 2.2) = 1.39 %: neither deaf nor nervous.
        assert entered > 0.010


@steady
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(-80.0, 80.0))
def test_neither_the_size_of_the_loss_nor_of_the_gradients_matters(seed, scale):
    rng = np.random.default_rng(seed)
    logs = 0.2 * rng.standard_normal(120) + 3.0 * (rng.uniform(size=120) > 0.9)
    norms = np.exp(2.0 * rng.standard_normal(120))
    factor = math.exp(scale)
    expected = watch(np.exp(logs), norms)
    assert expected.max() > 0
    assert np.array_equal(watch(np.exp(logs + scale), norms * factor), expected)


def test_a_descent_of_any_shape_is_calm():
    t = np.arange(3000)
    for losses in (np.exp(-0.01 * t), 1.0 / (1.0 + t), 2.0 + np.exp(-t / 300), np.full(3000, 0.7)):
        assert not watch(losses).any()


def test_a_gradient_norm_may_fall_a_thousand_times_in_a_run():
    t = np.arange(5000)
    noise = np.exp(0.5 * np.random.default_rng(0).standard_normal(5000))
    for norms in (10.0 ** (-3.0 * t / 5000), 1.0 / (1.0 + t)):
        assert not watch(np.ones(5000), norms).any()
        assert not watch(np.ones(5000), norms * noise).any()


def test_a_gradient_norm_that_falls_at_once_has_vanished():
    norms = np.concatenate([np.ones(300), np.full(20, 1e-3)])
    levels = watch(np.ones(320), norms)
    assert not levels[:300].any()
    assert levels[300:].tolist() == [1] * 3 + [2] * 17


def test_only_calm_steps_feed_the_baseline():
    before = settled().state_dict()["baseline"]
    for step, count in (((1.0, 50.0), BASELINE_PATIENCE - 1), ((50.0, 3.0), 1), ((1.0, 1e-4), 9)):
        monitor = settled()
        for _ in range(count):
            monitor.observe(*step)
        assert monitor.state_dict()["baseline"] == before
    assert monitor.observe(1.0, 3.0) is WARNING
    assert monitor.state_dict()["baseline"] > before


@pytest.mark.parametrize(("rise", "level"), [(0.005, NORMAL), (0.02, NORMAL), (0.05, CAUTION)])
def test_a_loss_without_noise_may_rise_a_little(rise, level):
    monitor = DivergenceMonitor(sigma=2.2)
    for i in range(100):
        monitor.observe(3.0 + 1e-5 * (i % 5))
    assert monitor.observe(3.0 * (1.0 + rise)) is level


def test_a_norm_that_stays_where_it_is_becomes_the_baseline():
    monitor = settled()
    for _ in range(BASELINE_PATIENCE + 20):
        monitor.observe(1.0, 1e3)
    assert severity(monitor, Signal.GRADIENT_EXPLOSION) == pytest.approx(0.1)
    for _ in range(9):
        monitor.observe(1.0, 1e3)
    assert monitor.level is NORMAL


@pytest.mark.parametrize("rise", [0.05, 0.5, 5.0])
def test_a_run_that_diverges_is_found(rise):
    rng = np.random.default_rng(5)
    logs = 0.1 * rng.standard_normal(260)
    logs[200:] += rise * np.arange(60)
    levels = watch(np.exp(np.minimum(logs, 600.0)))
    assert levels[:200].max() <= CAUTION
    assert levels[200:].max() == CRITICAL
    assert np.argmax(levels[200:] == CRITICAL) <= (40 if rise < 0.1 else 12)


def test_a_lasting_change_is_accepted_in_the_end():
    rng = np.random.default_rng(6)
    logs = 0.1 * rng.standard_normal(600)
    logs[100:] += 4.0
    levels = watch(np.exp(logs))
    assert levels[100:130].max() == CRITICAL
    assert levels[-100:].max() <= CAUTION


def test_one_wild_batch_neither_blinds_nor_alarms():
    for wild in (1e-300, 1e300):
        monitor = settled()
        monitor.observe(wild, 1.0)
        assert monitor.level <= CAUTION
        for _ in range(6):
            monitor.observe(1.0, 1.0)
        assert monitor.level is NORMAL
        monitor.observe(1.6, 1.0)
        assert severity(monitor, Signal.LOSS_DEVIATION) > 1.0


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_an_oscillation_is_found_and_asks_for_full_steps(shift):
    t = np.arange(200)
    losses = shift + np.exp(-0.002 * t) * (1.0 + 0.003 * (-1.0) ** t)
    monitor = DivergenceMonitor()
    levels = watch(losses, monitor=monitor)
    assert not levels[:30].any()
    assert (levels[40:] == WARNING).all()
    assert monitor.action() is RecoveryAction.FORCE_FULL


def test_slow_waves_and_rounding_are_no_oscillation():
    t = np.arange(400)
    for losses in (2.0 + np.sin(t / 3.0), 1.0 + 1e-7 * (-1.0) ** t):
        monitor = DivergenceMonitor(sigma=50.0)
        assert not watch(losses, monitor=monitor).any()


def test_negative_losses_are_compared_on_a_linear_scale():
    rng = np.random.default_rng(8)
    losses = 0.5 - 0.01 * np.arange(800) + 0.1 * rng.standard_normal(800)
    levels = watch(losses)
    assert levels.max() <= CAUTION
    assert np.mean(levels > 0) < 0.1
    monitor = DivergenceMonitor()
    watch(losses, monitor=monitor)
    assert monitor.observe(losses[-1] + 2.0) is CAUTION


def test_a_loss_of_zero_is_quiet():
    monitor = settled()
    before = monitor.state_dict()
    assert [monitor.observe(0.0) for _ in range(50)] == [NORMAL] * 50
    after = monitor.state_dict()
    assert after["mean"] == before["mean"]
    assert after["variance"] == before["variance"]
