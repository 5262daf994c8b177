"""The search along a path whose loss is known: a parabola, and any three points."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcore.planning import MOST_REACH
from hybridcore.search import _vertex, search
from hybridcore.types import Observation

# Six snapshots of one parameter that moves by 1 an interval.
PLACES = np.arange(-5.0, 1.0)
GRAM = np.outer(PLACES, PLACES)[None]


def walk(loss, reach, arms=("linear",)):
    """Search with `loss` of the distance moved: distances probed, and the trials."""
    steps, moved = search(GRAM, arms, reach, loss(0.0)), []
    try:
        directive = next(steps)
        while True:
            moved.append(float(directive.coefficients[0] @ PLACES))
            directive = steps.send(Observation(loss=loss(moved[-1])))
    except StopIteration as end:
        return moved, end.value


@pytest.mark.parametrize("best", [3.0, 4.7, 5.8, 11.0])
def test_the_minimum_of_a_parabola_is_found_after_the_first_overshoot(best):
    moved, trials = walk(lambda x: math.exp(0.01 * (x - best) ** 2), reach=2.0)
    assert min(moved, key=lambda x: abs(x - best)) == pytest.approx(best)
    assert min(trials, key=lambda trial: trial.loss).jump.reach == pytest.approx(best)


@pytest.mark.parametrize("best", [5.0, 10.0])
def test_on_what_is_no_parabola_the_points_next_to_the_lowest_decide(best):
    moved, _ = walk(lambda x: math.exp(abs(x - best) ** 3 / 500.0), reach=2.0)
    (*_, a, b, c), between = moved[:-1], moved[-1]
    logs = [abs(x - best) ** 3 for x in (a, b, c)]
    assert logs[1] < min(logs[0], logs[2])
    two, one, _ = np.polyfit((a, b, c), logs, 2)
    assert between == pytest.approx(-one / (2.0 * two))


def test_a_minimum_close_to_a_doubling_is_not_probed_again():
    moved, _ = walk(lambda x: math.exp(0.01 * (x - 8.1) ** 2), reach=2.0)
    assert moved == pytest.approx([2.0, 4.0, 8.0, 16.0])


def test_a_loss_that_falls_all_the_way_ends_at_the_farthest_reach():
    moved, _ = walk(lambda x: math.exp(-x), reach=2.0)
    assert moved == pytest.approx([2.0 * 2**k for k in range(round(math.log2(MOST_REACH)) + 1)])


@pytest.mark.parametrize("beyond", [math.nan, math.inf, 0.0])
def test_where_the_loss_beyond_is_no_number_nothing_is_made_of_it(beyond):
    moved, trials = walk(lambda x: math.exp(-x) if x < 3.0 else beyond, reach=2.0)
    assert moved == pytest.approx([2.0, 4.0])
    assert trials[-1].loss == math.inf


def test_a_first_reach_that_is_too_far_ends_the_search():
    moved, _ = walk(lambda x: math.exp(x), reach=2.0)
    assert moved == pytest.approx([2.0])


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.floats(0.0, 1e3),
    st.floats(1e-3, 1e3),
    st.floats(1e-3, 1e3),
    st.floats(1e-6, 1e6),
    st.floats(1.0, 1e3),
    st.floats(1.0, 1e3),
)
def test_the_vertex_lies_between_and_is_that_of_the_parabola(
    start, first, second, least, above, over
):
    reaches = start, start + first, start + first + second
    losses = least * above, least, least * over
    found = _vertex(*zip(reaches, losses, strict=True))
    assert reaches[0] <= found <= reaches[2]
    logs = np.log(losses) - math.log(least)
    if max(logs[0] / first, logs[2] / second) > 1e-6:
        # Lagrange's formula for the vertex, about the middle point.
        a, b, fa, fb = -first, second, logs[0], logs[2]
        vertex = 0.5 * (b * b * fa - a * a * fb) / (b * fa - a * fb)
        assert found - reaches[1] == pytest.approx(vertex, rel=1e-6, abs=1e-9 * reaches[2])
