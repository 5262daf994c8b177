"""The signals and levels of the divergence monitor against oracles."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from monitored import CAUTION, CRITICAL, NORMAL, WARNING, settled, severity, steady

from hybridcore.divergence import (
    DivergenceLevel,
    DivergenceMonitor,
    RecoveryAction,
    Signal,
)

# ---------------------------------------------------------------------------------------------
# The statistics against explicit weights
# ---------------------------------------------------------------------------------------------


def naive_deviation(values, sigma=2.2):
    """Severity of the last of `values`, from weights written out for the whole history.

    For series without outliers, so without clipping.
    """
    values = np.asarray(values)
    averages = [values[0]]
    for n, value in enumerate(values[1:], start=2):
        averages.append(averages[-1] + max(1 / n, 0.05) * (value - averages[-1]))
    innovations = values[1:] - averages[:-1]
    past = innovations[:-1]
    weights = np.zeros(len(past))
    for i in range(len(past)):
        rate = max(1 / (i + 1), 0.02)
        weights[:i] *= 1 - rate
        weights[i] = rate
    mean = weights @ past
    spread = max(0.01, math.sqrt(weights @ (past - mean) ** 2))
    return max(0.0, innovations[-1] / (sigma * spread))


@pytest.mark.parametrize("count", [21, 22, 50, 51, 52, 53, 120, 400])
@pytest.mark.parametrize("slope", [0.0, -0.02, 0.01])
def test_the_deviation_equals_the_oracle(count, slope):
    rng = np.random.default_rng(count)
    # Uniform noise stays within 1.74 of its own standard deviations: nothing is clipped.
    values = slope * np.arange(count) + rng.uniform(-1.0, 1.0, count)
    for last in (0.5, 2.0, 6.0):
        values[-1] = slope * count + last
        monitor = DivergenceMonitor(sigma=2.2)
        for value in values:
            monitor.observe(math.exp(value))
        found = severity(monitor, Signal.LOSS_DEVIATION)
        assert found == pytest.approx(naive_deviation(values), rel=1e-9, abs=1e-12)
        assert (monitor.level > NORMAL) >= (found > 1.0)


@pytest.mark.parametrize("count", [5, 33, 34, 35, 100])
def test_the_oscillation_is_the_share_of_sign_changes(count):
    rng = np.random.default_rng(count)
    logs = 0.3 * rng.standard_normal(count) + (-1.0) ** np.arange(count)
    monitor = DivergenceMonitor()
    for value in logs:
        monitor.observe(math.exp(value))
    signs = np.sign(np.diff(logs))
    changes = (signs[1:] * signs[:-1] < 0)[-32:]
    expected = max(0.0, (changes.sum() / 32 - 2 / 3) / (0.95 - 2 / 3))
    assert severity(monitor, Signal.OSCILLATION) == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------------------------------------
# Each trigger, just below and just above
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "signal", "triggered"),
    [
        (9.9, Signal.GRADIENT_EXPLOSION, False),
        (10.1, Signal.GRADIENT_EXPLOSION, True),
        (0.0101, Signal.GRADIENT_VANISHING, False),
        (0.0099, Signal.GRADIENT_VANISHING, True),
        (0.0, Signal.GRADIENT_VANISHING, True),
    ],
)
@pytest.mark.parametrize("baseline", [1e-200, 1e-3, 1.0, 1e200])
def test_gradient_thresholds(ratio, signal, triggered, baseline):
    monitor = DivergenceMonitor()
    for _ in range(50):
        monitor.observe(1.0, baseline)
    level = monitor.observe(1.0, ratio * baseline)
    assert level is (CAUTION if triggered else NORMAL)
    assert (severity(monitor, signal) > 1.0) is triggered
    expected = {Signal.GRADIENT_EXPLOSION: ratio / 10.0}
    expected[Signal.GRADIENT_VANISHING] = min(0.01 / ratio, 100.0) if ratio else 100.0
    assert severity(monitor, signal) == pytest.approx(expected[signal], rel=1e-6)
    if not ratio:
        assert severity(monitor, Signal.GRADIENT_EXPLOSION) == 0.0


@pytest.mark.parametrize("probe", [1.0, 1e-200, 1e200, -3.0])
@pytest.mark.parametrize(
    ("forecast", "triggered"), [(1.0, False), (1.19, False), (0.81, False), (1.21, True), (0.79, 1)]
)
def test_prediction_errors(probe, forecast, triggered):
    monitor = DivergenceMonitor()
    level = monitor.observe_prediction(forecast * probe, probe)
    assert level is (CAUTION if triggered else NORMAL)
    expected = abs(forecast - 1.0) / 0.2
    assert severity(monitor, Signal.PREDICTION_ERROR) == pytest.approx(expected, abs=1e-12)


def test_a_probe_of_zero_is_missed_unless_it_was_forecast():
    monitor = DivergenceMonitor()
    assert monitor.observe_prediction(0.0, 0.0) is NORMAL
    assert monitor.observe_prediction(1e-9, 0.0) is CAUTION
    assert severity(monitor, Signal.PREDICTION_ERROR) == 100.0


BAD = [math.nan, math.inf, -math.inf]
NON_FINITE = {
    "loss": lambda m, bad: m.observe(bad, 1.0),
    "forecast": lambda m, bad: m.observe_prediction(bad, 1.0),
    "probe": lambda m, bad: m.observe_prediction(1.0, bad),
    "delta": lambda m, _: m.observe_delta(False),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", NON_FINITE)
@pytest.mark.parametrize("fresh", [True, False])
def test_what_is_not_finite_is_critical_at_once_and_leaves_no_trace(where, bad, fresh):
    monitor = DivergenceMonitor() if fresh else settled()
    twin = DivergenceMonitor() if fresh else settled()
    assert NON_FINITE[where](monitor, bad) is CRITICAL
    assert monitor.action() is RecoveryAction.ROLL_BACK
    assert severity(monitor, Signal.NON_FINITE) == 100.0
    levels = [monitor.observe(1.0, 1.0) for _ in range(9)]
    assert levels == [CRITICAL] * 2 + [WARNING] * 3 + [CAUTION] * 3 + [NORMAL]
    for _ in range(9):
        twin.observe(1.0, 1.0)
    assert monitor.state_dict() == twin.state_dict()


def test_an_infinite_norm_is_critical_and_a_missing_one_is_not():
    assert DivergenceMonitor().observe(1.0, math.inf) is CRITICAL
    monitor = settled()
    before = monitor.signals
    assert monitor.observe(1.0) is NORMAL
    assert monitor.signals[Signal.GRADIENT_EXPLOSION] == before[Signal.GRADIENT_EXPLOSION] > 0.0


def test_a_finite_delta_changes_nothing():
    for monitor in (settled(), settled()):
        monitor.observe(10.0, 1.0)
        before = monitor.state_dict()
        assert monitor.observe_delta(True) is CAUTION
        assert monitor.state_dict() == before


# ---------------------------------------------------------------------------------------------
# Escalation: the rule as a table. T a loss too high, G a gradient too high (both serious),
# v a gradient too small, e a forecast that failed (both lead to WARNING at most), p a good probe,
# q a quiet step, d a finite delta, N a batch that is not finite.
# ---------------------------------------------------------------------------------------------

EVENTS = {
    "T": lambda m: m.observe(1e9, 1.0),
    "G": lambda m: m.observe(1.0, 50.0),
    "v": lambda m: m.observe(1.0, 1e-4),
    "e": lambda m: m.observe_prediction(1.0, 2.0),
    "p": lambda m: m.observe_prediction(1.0, 1.0),
    "q": lambda m: m.observe(1.0, 1.0),
    "d": lambda m: m.observe_delta(True),
    "N": lambda m: m.observe(math.nan, 1.0),
}
# Levels after each event, patience 3.
TABLE = [
    ("qqq", "0 0 0"),
    ("Tqqqq", "1 1 1 0 0"),
    ("TTTT", "1 1 1 2"),
    ("TTTTTTT", "1 1 1 2 2 2 3"),
    ("TqqTqqTqqT", "1 1 1 1 1 1 1 1 1 2"),
    ("TTTqqqTTT", "1 1 1 1 1 0 1 1 1"),
    ("GTGT", "1 1 1 2"),
    ("GGGGGGGqqqqqqqqq", "1 1 1 2 2 2 3 3 3 2 2 2 1 1 1 0"),
    ("GGGGqqGqqGqqG", "1 1 1 2 2 2 2 2 2 2 2 2 3"),
    ("vvvvvvvvvvvv", "1 1 1 2 2 2 2 2 2 2 2 2"),
    ("eeeeeeeeqqqqqq", "1 1 1 2 2 2 2 2 2 2 1 1 1 0"),
    ("epppeee", "1 1 1 0 1 1 1"),
    ("vvvvGGG", "1 1 1 2 2 2 3"),
    ("GGGGGGGvvvvqqq", "1 1 1 2 2 2 3 3 3 3 3 3 3 2"),
    ("Tddddqqq", "1 1 1 1 1 1 1 0"),
    ("N", "3"),
    ("TNqqqTTT", "1 3 3 3 2 2 2 3"),
    ("qNqqNqqq", "0 3 3 3 3 3 3 2"),
]


@pytest.mark.parametrize(("events", "levels"), TABLE)
def test_escalation(events, levels):
    monitor = settled(patience=3)
    seen = []
    for event in events:
        seen.append(int(EVENTS[event](monitor)))
        assert monitor.level == seen[-1]
    assert seen == [int(level) for level in levels.split()]


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_patience_is_what_it_takes_to_rise_and_to_fall(patience):
    monitor = settled(patience=patience)
    levels = [int(monitor.observe(1.0, 50.0)) for _ in range(1 + 2 * patience)]
    assert levels == [1] * patience + [2] * patience + [3]
    levels = [int(monitor.observe(1.0, 1.0)) for _ in range(3 * patience)]
    assert levels == sorted([3, 2, 1] * patience + [0], reverse=True)[1:]


ACTIONS = {
    "q": "continue",
    "T": "shorten horizon",
    "TTTT": "force full steps",
    "vvvvvvvvvvvvvvvvvvvvvvvvvvvv": "force full steps",
    "TTTTTTT": "roll back",
    "N" * 15: "roll back",
    "N" * 16: "stop",
    "N" * 16 + "q": "stop",
    "N" * 16 + "qqq": "force full steps",
    "G" * (7 + 14): "roll back",
    "G" * (7 + 15): "stop",
    "N" + "v" * 30: "roll back",
}


@pytest.mark.parametrize("events", ACTIONS)
def test_actions(events):
    monitor = settled()
    for event in events:
        EVENTS[event](monitor)
    assert monitor.action() is RecoveryAction(ACTIONS[events])


# ---------------------------------------------------------------------------------------------
# Hostile numbers, state, arguments
# ---------------------------------------------------------------------------------------------

hostile = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1e300, -1e300, 5e-324, -5e-324, 1.7e308, -1.7e308]),
)
calls = st.lists(st.tuples(st.sampled_from("opd"), hostile, hostile), max_size=80)


def feed(monitor, sequence):
    for kind, first, second in sequence:
        if kind == "o":
            monitor.observe(first, second)
        elif kind == "p":
            monitor.observe_prediction(first, second)
        else:
            monitor.observe_delta(first > second)
        yield monitor.level, monitor.action(), monitor.signals


@steady
@given(sequence=calls, warm=st.booleans())
def test_hostile_numbers_leave_everything_finite(sequence, warm):
    monitor = settled() if warm else DivergenceMonitor()
    for level, action, signals in feed(monitor, sequence):
        assert isinstance(level, DivergenceLevel)
        assert isinstance(action, RecoveryAction)
        assert list(signals) == list(Signal)
        assert all(0.0 <= value <= 100.0 for value in signals.values())
    for value in monitor.state_dict().values():
        assert np.isfinite(value).all()


@steady
@given(before=calls, after=calls, warm=st.booleans())
def test_the_state_goes_round(before, after, warm):
    monitor = settled() if warm else DivergenceMonitor()
    list(feed(monitor, before))
    state = json.loads(json.dumps(monitor.state_dict()))
    twin = DivergenceMonitor()
    twin.load_state_dict(state)
    assert twin.state_dict() == monitor.state_dict() == state
    assert list(feed(twin, after)) == list(feed(monitor, after))


def test_the_state_is_a_copy():
    monitor = settled()
    state = monitor.state_dict()
    monitor.signals[Signal.NON_FINITE] = 7.0
    state["severities"][:] = [7.0] * 6
    assert 7.0 not in monitor.signals.values()


def test_an_incomplete_state_changes_nothing():
    monitor = settled()
    before = monitor.state_dict()
    broken = DivergenceMonitor().state_dict()
    del broken["baseline"]
    with pytest.raises(KeyError, match="baseline"):
        monitor.load_state_dict(broken)
    assert monitor.state_dict() == before


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_sigma_is_named(sigma):
    with pytest.raises(ValueError, match=r"^sigma must be .*2\.2 is usual"):
        DivergenceMonitor(sigma=sigma)


@pytest.mark.parametrize("patience", [0, -1, 1.5, math.nan, "3"])
def test_a_bad_patience_is_named(patience):
    with pytest.raises(ValueError, match=r"^patience must be an integer"):
        DivergenceMonitor(patience=patience)


def test_what_turned_before_losses_were_forgotten_is_no_oscillation_after_it():
    monitor = DivergenceMonitor()
    for step in range(60):
        monitor.observe(2.0 + step % 2)
    assert monitor.signals[Signal.OSCILLATION] > 1.0
    monitor.forget_losses()
    for loss in (9.0, 8.0):
        monitor.observe(loss)
        assert monitor.signals[Signal.OSCILLATION] == 0.0


def test_norms_of_an_oscillation_are_no_baseline():
    calm, restless = DivergenceMonitor(), DivergenceMonitor()
    for step in range(400):
        late = step >= 100
        calm.observe(2.0 + 0.1 * math.sin(step), 1.0)
        # From the hundredth step on losses go up and down, and norms are higher.
        restless.observe(2.0 + late * 0.5 * (step % 2), 1.0 + 4.0 * late)
    assert restless.signals[Signal.OSCILLATION] > 1.0
    found = []
    for monitor in (calm, restless):
        monitor.observe(2.0, 20.0)
        found.append(monitor.signals[Signal.GRADIENT_EXPLOSION])
    assert found[0] == pytest.approx(2.0, rel=0.01)
    # But for what had passed before it was seen that they go up and down.
    assert found[1] > 1.2
