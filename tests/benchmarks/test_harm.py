"""The loops of the benchmark of harm, short."""

import dataclasses
import math

import pytest

from benchmarks.harm import LOOPS, ratio, train


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.title)
def test_both_train_from_the_same_weights_on_the_same_batches(loop):
    short = dataclasses.replace(loop, steps=30)
    plain, again, hybrid = (
        train(short, loop.rates[0], 1, hybrid=which) for which in (False, False, True)
    )
    assert math.isfinite(plain["loss"])
    # Within warm-up they are the same loop, but for the passes that look at it.
    assert plain["loss"] == again["loss"] == hybrid["loss"]
    assert plain["backward"] == hybrid["backward"] == 30
    assert plain["forward_alone"] == 0 < hybrid["forward_alone"] <= 3
    assert train(short, loop.rates[0], 2, hybrid=False)["loss"] != plain["loss"]


def test_ratios_are_medians_over_the_seeds():
    runs = {
        "plain": [{"cost": 2.0}, {"cost": 4.0}, {"cost": 1.0}],
        "hybrid": [{"cost": 1.0}, {"cost": 4.0}, {"cost": 3.0}],
    }
    assert ratio(runs, "cost") == 1.0
