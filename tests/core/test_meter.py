"""The self-measured speed-up, against figures worked out by hand."""

import json
import math

import pytest

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
