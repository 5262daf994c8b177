"""The self-measured speed-up, against figures worked out by hand."""

import json
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcore.meter import (
    BLOCK,
    MARGIN,
    MOST_STEPS,
    NOMINAL_PROBE_COST,
    OUTLIER,
    MeanTime,
    Meter,
    Stretch,
)


def timed(full=3.0, probe=1.0):
    meter = Meter()
    for _ in range(3):
        meter.full_time.add(full)
        meter.probe_time.add(probe)
    return meter


def test_probe_cost_is_the_ratio_of_means():
    assert Meter().probe_cost == NOMINAL_PROBE_COST
    assert timed(4.0, 1.0).probe_cost == 0.25


@given(st.lists(st.floats(0.0, 100.0), min_size=1, max_size=BLOCK))
def test_mean_time_is_a_mean_without_outliers(seconds):
    time = MeanTime()
    assert math.isnan(time.mean)
    for each in seconds:
        time.add(each)
    most = OUTLIER * statistics.median_low(seconds) or math.inf
    expected = np.minimum(seconds, most).mean()
    assert time.mean == pytest.approx(expected)


def test_the_second_time_tells_that_the_first_was_an_outlier():
    time = MeanTime()
    time.add(2.0)
    time.add(1e-3)
    assert time.mean == pytest.approx((OUTLIER + 1.0) / 2.0 * 1e-3)


def test_mean_time_knows_an_outlier_by_what_was_usual_before():
    time = MeanTime()
    for seconds in [1.0] * BLOCK + [1e4]:
        time.add(seconds)
    assert time.mean == pytest.approx((BLOCK + OUTLIER) / (BLOCK + 1))


def test_mean_time_follows_steps_that_have_become_longer():
    time = MeanTime()
    for seconds in [1.0] * BLOCK + [10.0] * 50:
        time.add(seconds)
    assert time.mean == pytest.approx((BLOCK + 500.0) / (BLOCK + 50))


def test_mean_time_is_of_the_whole_run():
    rng = np.random.default_rng(0)
    # The first step compiles, and the machine is slower in the second half and asleep once in it.
    seconds = np.concatenate([rng.uniform(1.0, 2.0, 2000), rng.uniform(2.0, 3.0, 2000)])
    slow = seconds.copy()
    slow[[0, 3000]] = 1e4
    time = MeanTime()
    for each in slow:
        time.add(float(each))
    assert time.mean == pytest.approx(seconds.mean(), rel=0.003)
    assert len(time.newest) < BLOCK


def jump(progress, steps=8):
    return Stretch(progress, steps, True)


def plain(progress, steps=50):
    return Stretch(progress, steps, False)


def test_speedup_by_hand():
    meter = timed(4.0, 1.0)
    for mark, full in ((5.0, 0), (4.0, 50)):
        meter.close_stretch(mark, full, 0, predicting=False)
    meter.close_stretch(1.0, 66, 8, predicting=True, progress=3.0)
    meter.close_stretch(0.0, 116, 8, predicting=False)
    # Outside of the jump 100 full steps, each of which gained 0.02: the jump stands for 150.
    speedup, interval = meter.speedup(116, 8)
    assert speedup == pytest.approx((100.0 + 150.0) / (116.0 + 8 / 4))
    assert interval.low == pytest.approx(speedup * (1 - MARGIN))
    assert interval.high == pytest.approx((100.0 + 2 * 150.0) / (116.0 + 8 / 4) * (1 + MARGIN))
    meter.overhead_seconds = 0.1 * 4.0 * 118
    assert meter.speedup(116, 8)[0] == pytest.approx(speedup / 1.1)


def test_the_slopes_before_and_after_bound_what_a_jump_stands_for():
    meter = timed()
    # The loss flattens: 0.02 a step before the jump, 0.01 after it, and the warm-up of 100 steps
    # has no slope of its own.
    meter.stretches = [plain(1.0), jump(0.6), plain(0.5)]
    speedup, interval = meter.speedup(208, 0)
    assert speedup == pytest.approx((200 + 0.6 / 0.015) / 208)
    assert interval.low == pytest.approx((1 - MARGIN) * (200 + 30) / 208)
    assert interval.high == pytest.approx((1 + MARGIN) * (200 + 2 * 60) / 208)


def test_each_jump_is_held_against_the_stretches_beside_it():
    meter = timed()
    meter.stretches = [plain(5.0), jump(1.0), plain(5.0), plain(0.05), jump(0.01), plain(0.05)]
    assert meter.speedup(216, 0)[0] == pytest.approx((200 + 10 + 10) / 216)


def test_a_descent_by_a_power_law_is_measured_within_the_interval():
    # The loss falls like 1 / (100 + t); a jump goes ahead by 40 steps and costs 8.
    meter, time, full, true = timed(), 0.0, 0, 0.0
    for stretch in range(21):
        before = time
        taken, gained = (8, 40.0) if stretch % 2 else (50, 50.0)
        time, full = time + gained, full + taken
        meter.stretches.append(
            Stretch(math.log((100.0 + time) / (100.0 + before)), taken, bool(stretch % 2))
        )
        true = time / full
    speedup, interval = meter.speedup(full, 0)
    assert interval.low < true < interval.high
    assert speedup == pytest.approx(true, rel=0.02)


def test_what_is_counted_otherwise_is_not_held_against_a_speed_from_before():
    meter = timed()
    meter.close_stretch(2.0, 100, 0, predicting=False, progress=math.nan)
    meter.secants.measure(100, 0.01)
    meter.break_off(100, 0)
    # Neither is what lies between, nor at what speed the loss fell then.
    meter.close_block(1.0, 110, 0)
    meter.close_block(0.5, 120, 0)
    assert meter.secants.progress == 0.5
    assert meter.secants.stands_for()[:2] == (20.0, 20.0)


def test_nothing_predicted_is_a_little_below_one():
    meter = timed(4.0, 1.0)
    speedup, interval = meter.speedup(100, 4)
    assert speedup == pytest.approx(100 / 101)
    assert interval == pytest.approx((speedup * (1 - MARGIN), speedup * (1 + MARGIN)))
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
    assert meter.stretches == []
    meter.close_stretch(math.nan, 20, 0, predicting=False)
    meter.close_stretch(0.5, 30, 0, predicting=False)
    assert meter.stretches == []
    assert meter.mark == (0.5, 30, 0)


def test_state_round_trips():
    meter = timed()
    meter.close_stretch(1.0, 10, 1, predicting=False)
    meter.close_stretch(0.5, 20, 2, predicting=True)
    meter.overhead_seconds = 1.5
    other = Meter()
    other.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    assert other == meter


def test_jumps_that_gain_nothing_slow_a_run_down():
    meter = timed()
    meter.stretches = [plain(0.2), jump(0.0, 3)] * 3
    speedup, _ = meter.speedup(159, 18)
    assert speedup == pytest.approx(150 / (159 + 6))
    # Progress undone stands for no full steps either, and never for less than none.
    meter.stretches = [plain(0.2), jump(-5.0, 3)] * 3
    assert meter.speedup(159, 18)[0] == speedup


def test_a_jump_alone_leaves_the_upper_end_open():
    meter = timed()
    meter.stretches = [jump(0.3)]
    speedup, interval = meter.speedup(150, 9)
    assert interval.low <= speedup <= interval.high == math.inf


@pytest.mark.parametrize("progress", [0.0, -0.1])
def test_full_steps_that_lower_nothing_do_not_make_a_jump_worth_everything(progress):
    meter = timed()
    meter.stretches = [plain(progress), jump(0.3), plain(progress)]
    assert meter.speedup(108, 0)[0] == pytest.approx((100 + MOST_STEPS) / 108)


stretches = st.lists(
    st.tuples(st.floats(-10.0, 10.0), st.integers(1, 500), st.booleans()).map(
        lambda fields: Stretch(*fields)
    ),
    max_size=12,
)


@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@given(
    stretches,
    st.integers(0, 100),
    st.floats(0.0, 100.0),
    st.floats(0.0, 10.0),
    st.floats(0.0, 1000.0),
)
def test_the_interval_always_holds_the_estimate(stretches, probes, step, probe, overhead):
    meter = Meter(stretches=stretches, overhead_seconds=overhead)
    meter.full_time.add(step)
    meter.probe_time.add(probe)
    steps = sum(stretch.full_steps for stretch in stretches)
    speedup, interval = meter.speedup(steps, probes)
    assert 0.0 <= interval.low <= speedup <= interval.high
    assert meter.speedup(steps, probes) == (speedup, interval)


def test_overhead_counts_as_work():
    for jumps in (0, 3):
        meter = timed(full=2.0)
        meter.stretches = [plain(0.2)] + [jump(0.4), plain(0.2)] * jumps
        before = meter.speedup(200, 30)[0]
        cost = meter.cost(200, 30)
        meter.overhead_seconds = 2.0 * 10.0
        assert meter.overhead == 10.0
        assert meter.speedup(200, 30)[0] == pytest.approx(before * cost / (cost + 10.0))


def test_probes_alone_or_a_clock_that_stands_still_do_no_harm():
    meter = Meter()
    meter.probe_time.add(1.0)
    assert meter.probe_cost == NOMINAL_PROBE_COST
    assert meter.overhead == 0.0
    meter = timed(full=0.0, probe=0.0)
    assert meter.probe_cost == 0.0
    assert math.isfinite(meter.speedup(10, 10)[0])


def test_the_newest_times_of_an_older_checkpoint_are_taken_for_the_run():
    state = timed().state_dict()
    del state["full_time"], state["probe_time"]
    state |= {"full_seconds": [4.0] * 101, "probe_seconds": [1.0, 1.0, 1.0]}
    meter = Meter()
    meter.load_state_dict(state)
    assert (meter.full_time.mean, meter.probe_cost) == (4.0, 0.25)


def test_a_mark_that_is_nan_survives_a_checkpoint():
    meter = timed()
    for _ in range(BLOCK):
        meter.full_time.add(2.0)
    meter.stretches = [plain(0.2), jump(0.4)]
    meter.close_stretch(math.nan, 66, 12, predicting=False)
    state = meter.state_dict()
    other = Meter()
    other.load_state_dict(json.loads(json.dumps(state)))
    assert math.isnan(other.mark[0])
    assert other.mark[1:] == (66, 12)
    assert other.speedup(66, 12) == meter.speedup(66, 12)
    assert (other.full_time, other.probe_time) == (meter.full_time, meter.probe_time)
    # A state that was handed out does not move with the meter, nor with its restored twin.
    before = json.dumps(state)
    for each in (meter, other):
        each.stretches.append(plain(1.0))
        each.secants.earlier[0] = 7.0
        each.full_time.add(9.0)
    assert json.dumps(state) == before


def test_a_stretch_without_full_steps_is_not_recorded():
    meter = Meter(mark=(1.0, 50, 3))
    meter.close_stretch(0.5, 50, 5, predicting=True)
    assert meter.stretches == []
    assert meter.mark == (0.5, 50, 5)
    assert meter.spent(60, 9) == (10, 4)
