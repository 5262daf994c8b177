"""The self-measured speed-up, against figures worked out by hand."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcore.meter import NOMINAL_PROBE_COST, Meter


def timed(full=3.0, probe=1.0):
    meter = Meter()
    meter.full_seconds.extend([full, full, 100.0])
    meter.probe_seconds.extend([probe, probe, 100.0])
    return meter


def test_probe_cost_is_the_ratio_of_medians():
    assert Meter().probe_cost == NOMINAL_PROBE_COST
    assert timed(4.0, 1.0).probe_cost == 0.25


def test_speedup_by_hand():
    meter = timed(4.0, 1.0)
    for mark, full in ((5.0, 0), (4.0, 50)):
        meter.close_stretch(mark, full, 0, predicting=False)
    meter.close_stretch(1.0, 66, 8, predicting=True, progress=3.0)
    meter.close_stretch(0.0, 116, 8, predicting=False)
    # 1 + 3 + 1 in 50 + (16 + 8 / 4) + 50 full steps; plain 2 in 100.
    speedup, interval = meter.speedup(116, 8)
    assert speedup == pytest.approx((5.0 / 118.0) / (2.0 / 100.0))
    assert interval == (0.0, math.inf)
    meter.overhead_seconds = 0.1 * 4.0 * 118
    assert meter.speedup(116, 8)[0] == pytest.approx(speedup / 1.1)


def test_nothing_predicted_is_a_little_below_one():
    meter = timed(4.0, 1.0)
    speedup, interval = meter.speedup(100, 4)
    assert speedup == pytest.approx(100 / 101)
    assert interval == (speedup, speedup)
    assert Meter().speedup(0, 0)[0] == 1.0


def test_interval_holds_the_estimate_and_does_not_change_by_asking():
    meter = timed()
    full = 0
    for k in range(12):
        full += 50
        meter.close_stretch(-0.1 * k, full, 0, predicting=False, progress=0.1 + 0.01 * (k % 3))
        full += 16
        meter.close_stretch(0.0, full, 0, predicting=True, progress=0.2 + 0.05 * (k % 4))
    speedup, interval = meter.speedup(full, 0)
    assert interval.low < speedup < interval.high
    assert meter.speedup(full, 0) == (speedup, interval)


def test_a_stretch_without_a_beginning_is_not_recorded():
    meter = Meter()
    meter.close_stretch(1.0, 10, 0, predicting=False)
    assert meter.full == []
    meter.close_stretch(math.nan, 20, 0, predicting=False)
    meter.close_stretch(0.5, 30, 0, predicting=False)
    assert meter.full == []
    assert meter.mark == (0.5, 30, 0)


def test_state_round_trips():
    meter = timed()
    meter.close_stretch(1.0, 10, 1, predicting=False)
    meter.close_stretch(0.5, 20, 2, predicting=True)
    meter.overhead_seconds = 1.5
    other = Meter()
    other.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    assert other == meter


def test_each_stretch_is_paid_for_by_its_own_steps_and_probes():
    meter = timed(full=3.0, probe=1.0)
    meter.predicting = [(0.4, 16, 9), (0.0, 3, 6)]
    meter.full = [(0.2, 50, 3), (0.1, 58, 0)]
    work = (16 + 3 + 50 + 58) + (9 + 6 + 3) / 3.0
    plain = (0.2 + 0.1) / (50 + 58)
    assert meter.speedup(127, 18)[0] == pytest.approx((0.7 / work) / plain)


def test_jumps_that_gain_nothing_slow_a_run_down():
    meter = timed()
    meter.predicting, meter.full = [(0.0, 3, 6)] * 3, [(0.2, 50, 0)] * 3
    speedup, interval = meter.speedup(159, 18)
    assert speedup == pytest.approx(150 / (159 + 6))
    assert interval == pytest.approx((speedup, speedup))
    # Progress undone is no progress, and never a negative speed-up.
    meter.predicting = [(-5.0, 3, 6)] * 3
    assert meter.speedup(159, 18) == (0.0, (0.0, 0.0))


@pytest.mark.parametrize(
    "full", [[(-0.1, 50, 2), (0.2, 50, 2)], [(-0.1, 50, 2)] * 2, [(0.0, 50, 2), (0.3, 50, 2)]]
)
def test_full_steps_that_lower_nothing_leave_the_upper_end_open(full):
    # Where resampling finds no plain progress there is nothing to compare with: infinite, not NaN,
    # and without a warning.
    meter = timed()
    meter.predicting, meter.full = [(0.3, 10, 5), (0.2, 12, 4)], full
    speedup, interval = meter.speedup(122, 13)
    assert interval.low <= speedup <= interval.high == math.inf


stretches = st.lists(
    st.tuples(st.floats(-10.0, 10.0), st.integers(1, 500), st.integers(0, 50)),
    max_size=6,
)


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(stretches, stretches, st.floats(0.0, 100.0), st.floats(0.0, 10.0), st.floats(0.0, 1000.0))
def test_the_interval_always_holds_the_estimate(predicting, full, step, probe, overhead):
    meter = Meter(predicting=predicting, full=full, overhead_seconds=overhead)
    meter.full_seconds.append(step)
    meter.probe_seconds.append(probe)
    steps = sum(s for _, s, _ in predicting + full)
    probes = sum(n for _, _, n in predicting + full)
    speedup, interval = meter.speedup(steps, probes)
    assert 0.0 <= interval.low <= speedup <= interval.high
    assert meter.speedup(steps, probes) == (speedup, interval)
    if predicting and min(len(predicting), len(full)) < 2:
        assert interval == (0.0, math.inf)


def test_more_stretches_of_a_kind_narrow_the_interval():
    def width(count):
        meter = timed()
        meter.full = [(0.1 + 0.02 * (k % 3), 50, 0) for k in range(count)]
        meter.predicting = [(0.2 + 0.1 * (k % 3), 16, 9) for k in range(count)]
        interval = meter.speedup(66 * count, 9 * count)[1]
        return interval.high - interval.low

    assert 0.0 < width(60) < 0.7 * width(6)


def test_overhead_counts_as_work():
    for predicting in ([], [(0.4, 16, 9)] * 3):
        meter = timed(full=2.0)
        meter.predicting, meter.full = predicting, [(0.2, 50, 3)] * 3
        before = meter.speedup(200, 30)[0]
        cost = meter.cost(200, 30)
        meter.overhead_seconds = 2.0 * 10.0
        assert meter.overhead == 10.0
        assert meter.speedup(200, 30)[0] == pytest.approx(before * cost / (cost + 10.0))


def test_probes_alone_or_a_clock_that_stands_still_do_no_harm():
    meter = Meter()
    meter.probe_seconds.append(1.0)
    assert meter.probe_cost == NOMINAL_PROBE_COST
    assert meter.overhead == 0.0
    meter = timed(full=0.0, probe=0.0)
    assert meter.probe_cost == 0.0
    assert math.isfinite(meter.speedup(10, 10)[0])


def test_probe_cost_follows_the_newest_times():
    meter = timed(full=1.0, probe=1.0)
    for _ in range(101):
        meter.full_seconds.append(4.0)
        meter.probe_seconds.append(1.0)
    assert meter.probe_cost == 0.25


def test_a_mark_that_is_nan_survives_a_checkpoint():
    meter = timed()
    meter.predicting, meter.full = [(0.4, 16, 9)], [(0.2, 50, 3)]
    meter.close_stretch(math.nan, 66, 12, predicting=False)
    state = meter.state_dict()
    other = Meter()
    other.load_state_dict(json.loads(json.dumps(state)))
    assert math.isnan(other.mark[0])
    assert other.mark[1:] == (66, 12)
    assert other.speedup(66, 12) == meter.speedup(66, 12)
    assert other.full_seconds.maxlen == other.probe_seconds.maxlen == 101
    # A state that was handed out does not move with the meter, nor with its restored twin.
    before = json.dumps(state)
    for each in (meter, other):
        each.full.append((1.0, 1, 1))
        each.full_seconds.append(9.0)
    assert json.dumps(state) == before


def test_a_stretch_without_full_steps_is_not_recorded():
    meter = Meter(mark=(1.0, 50, 3))
    meter.close_stretch(0.5, 50, 5, predicting=True)
    assert meter.predicting == []
    assert meter.mark == (0.5, 50, 5)
    assert meter.spent(60, 9) == (10, 4)
