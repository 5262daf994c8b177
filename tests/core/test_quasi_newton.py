"""The direction from inner products against the two loops on the vectors, and the line search."""

import math

import naive
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import LbfgsInvHessProduct

from hybridcore.quasi_newton import SHRINK, Secants, direction, shorter, sufficient

WITHOUT_CLOCK = settings(deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32 - 1)
SIZE = 30


def products(moved, changed, gradient, metric):
    """What an adapter reports: pairs are rows, oldest first."""
    both = np.vstack((changed, gradient))
    return Secants(moved @ both.T, both * metric @ both.T)


def step_of(moved, changed, gradient, metric):
    """The direction as a vector, and the slope that is reported with it."""
    found = direction(products(moved, changed, gradient, metric))
    vectors = np.vstack((moved, changed * metric, gradient * metric))
    return found.coefficients @ vectors, found.slope


def bowl(random, size=SIZE):
    """Hessian of a quadratic whose curvatures differ by a factor of a hundred."""
    turn = np.linalg.qr(random.normal(size=(size, size)))[0]
    return turn * np.geomspace(0.1, 10.0, size) @ turn.T


def work(seed, k, size=SIZE):
    """Pairs and gradient of a quadratic, and a metric."""
    random = np.random.default_rng(seed)
    hessian = bowl(random, size)
    moved = random.normal(size=(k, size)) * 10.0 ** random.uniform(-2, 1, size=(k, 1))
    metric = 10.0 ** random.uniform(-1, 1, size=size)
    return hessian, moved, moved @ hessian, random.normal(size=size), metric


def close(found, expected):
    assert np.linalg.norm(found - expected) <= 1e-9 * np.linalg.norm(expected)


# -- the direction --------------------------------------------------------------------------------


@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("seed", range(5))
def test_it_is_that_of_the_two_loops_on_the_vectors(seed, k, with_metric):
    _, moved, changed, gradient, metric = work(seed, k)
    metric = metric if with_metric else np.ones(SIZE)
    found, _ = step_of(moved, changed, gradient, metric)
    close(found, naive.lbfgs_direction(moved, changed, gradient, metric))


@WITHOUT_CLOCK
@given(st.lists(st.sampled_from(["good", "negative", "flat"]), min_size=1, max_size=12), SEEDS)
def test_pairs_without_positive_curvature_might_as_well_not_be_there(kinds, seed):
    # Too short is what is so for the median of them.
    assume(kinds.count("good") > kinds.count("flat"))
    _, moved, changed, gradient, metric = work(seed, len(kinds))
    for i, kind in enumerate(kinds):
        if kind == "negative":
            changed[i] *= -1.0
        elif kind == "flat":
            # Far too short for the change, on either side of zero.
            share = moved[i] @ changed[i] / (moved[i] @ moved[i])
            changed[i] -= (1.0 + (-1.0) ** i * 1e-13) * share * moved[i]
    found, _ = step_of(moved, changed, gradient, metric)
    close(found, naive.lbfgs_direction(moved, changed, gradient, metric))
    good = [i for i, kind in enumerate(kinds) if kind == "good"]
    close(found, step_of(moved[good], changed[good], gradient, metric)[0])


@pytest.mark.parametrize("k", [1, 5, 20])
def test_it_is_scipys(k):
    _, moved, changed, gradient, metric = work(4, k)
    # scipy begins with the identity: with gamma = 1, and weights in which the metric is one.
    root = np.sqrt(metric)
    moved *= (changed[-1] ** 2 @ metric) / (moved[-1] @ changed[-1])
    inverse = LbfgsInvHessProduct(moved / root, changed * root)
    found, _ = step_of(moved, changed, gradient, metric)
    close(found, -root * inverse.matvec(gradient * root))


@pytest.mark.parametrize("history", [1, 4, 20])
def test_it_is_the_step_of_torch(history):
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(2)
    hessian = torch.tensor(bowl(random))
    x = torch.nn.Parameter(torch.tensor(random.normal(size=SIZE)))
    # One iteration a call, without line search, so that each step is a direction times the rate.
    optimizer = torch.optim.LBFGS([x], lr=0.5, max_iter=1, history_size=history)

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * x @ hessian @ x
        loss.backward()
        return loss

    points = [x.detach().numpy().copy()]
    for _ in range(12):
        optimizer.step(closure)
        points.append(x.detach().numpy().copy())
    gradients = np.array(points) @ hessian.numpy()
    for now in range(2, 12):
        pairs = slice(max(0, now - history), now)
        moved, changed = np.diff(points, axis=0)[pairs], np.diff(gradients, axis=0)[pairs]
        found, _ = step_of(moved, changed, gradients[now], np.ones(SIZE))
        np.testing.assert_allclose(found, (points[now + 1] - points[now]) / 0.5, atol=1e-9)


@WITHOUT_CLOCK
@given(SEEDS, st.integers(1, 20))
def test_it_leads_down_and_says_how_steeply(seed, k):
    _, moved, changed, gradient, metric = work(seed, k)
    found, slope = step_of(moved, changed, gradient, metric)
    assert slope < 0.0
    assert slope == pytest.approx(gradient @ found, rel=1e-9)


def test_products_too_small_for_a_float_show_no_descent():
    # Solved by elimination the one in the corner would be 1e-400.
    plain = np.array([[1e-200, 1.0, 1e-150], [1.0, 1e-200, 1e-150]])
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.solve(np.triu(plain[:, :2]).T, np.ones(2))
    assert direction(Secants(plain, np.full((3, 3), 1e-250))) is None


@WITHOUT_CLOCK
@given(SEEDS, st.integers(1, 12))
def test_it_turns_with_the_parameters(seed, k):
    _, moved, changed, gradient, _ = work(seed, k)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(SIZE, SIZE)))[0]
    straight, slope = step_of(moved, changed, gradient, np.ones(SIZE))
    turned, same = step_of(moved @ turn, changed @ turn, gradient @ turn, np.ones(SIZE))
    close(turned, straight @ turn)
    assert same == pytest.approx(slope, rel=1e-9)


@WITHOUT_CLOCK
@given(SEEDS, st.integers(1, 12), st.floats(1e-15, 1e15))
def test_the_unit_of_the_loss_does_not_matter(seed, k, unit):
    _, moved, changed, gradient, metric = work(seed, k)
    plain, slope = step_of(moved, changed, gradient, metric)
    scaled, steeper = step_of(moved, unit * changed, unit * gradient, metric)
    close(scaled, plain)
    assert steeper == pytest.approx(unit * slope, rel=1e-9)


@WITHOUT_CLOCK
@given(SEEDS, st.integers(1, 12), st.floats(1e-3, 1e3))
def test_the_unit_of_the_metric_does_not_matter(seed, k, unit):
    _, moved, changed, gradient, metric = work(seed, k)
    close(
        step_of(moved, changed, gradient, unit * metric)[0],
        step_of(moved, changed, gradient, metric)[0],
    )


@WITHOUT_CLOCK
@given(SEEDS, st.integers(1, 20))
def test_the_newest_secant_equation_holds(seed, k):
    """Where the gradient is the newest change, that displacement is what undoes it."""
    _, moved, changed, _, metric = work(seed, k)
    close(step_of(moved, changed, changed[-1], metric)[0], -moved[-1])


@pytest.mark.parametrize("size", [1, 3, 10])
def test_conjugate_pairs_in_all_directions_lead_to_the_minimum_of_a_quadratic(size):
    hessian, moved, _, gradient, metric = work(3, size, size)
    # Gram-Schmidt in the inner product of the Hessian.
    for i in range(size):
        for earlier in moved[:i]:
            moved[i] -= (moved[i] @ hessian @ earlier) / (earlier @ hessian @ earlier) * earlier
    found, slope = step_of(moved, moved @ hessian, gradient, metric)
    close(found, -np.linalg.solve(hessian, gradient))
    # Down the whole of the loss above the minimum, which is half of what the slope says.
    assert slope == pytest.approx(-gradient @ np.linalg.solve(hessian, gradient), rel=1e-9)


# -- no direction ---------------------------------------------------------------------------------


def test_without_pairs_there_is_none():
    gradient = np.ones(SIZE)
    assert direction(products(np.zeros((0, SIZE)), np.zeros((0, SIZE)), gradient, gradient)) is None


@pytest.mark.parametrize("k", [1, 5])
def test_without_positive_curvature_there_is_none(k):
    _, moved, changed, gradient, metric = work(0, k)
    assert direction(products(moved, -changed, gradient, metric)) is None
    assert direction(products(moved, np.zeros_like(changed), gradient, metric)) is None


@pytest.mark.parametrize(("length", "usable"), [(0.9e-10, False), (1.1e-10, True)])
@pytest.mark.parametrize("unit", [1e-15, 1.0, 1e15])
def test_a_displacement_may_be_too_short_for_its_change(length, usable, unit):
    # One pair along each of three axes, in the middle of which the change is the median one.
    moved, changed = np.diag([1.0, 7.0, length]), unit * np.eye(3)
    found = direction(products(moved, changed, unit * np.ones(3), 1.0 / unit))
    assert (found.coefficients[[2, 5]] != 0.0).tolist() == [usable, usable]
    assert found.coefficients[[0, 1]] == pytest.approx(-1.0)


def test_where_the_gradient_vanishes_there_is_none():
    _, moved, changed, gradient, metric = work(0, 5)
    assert direction(products(moved, changed, 0.0 * gradient, metric)) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", Secants._fields)
def test_one_product_that_is_not_finite_is_enough_for_none(name, value):
    for row in range(5):
        for column in range(6):
            secants = products(*work(0, 5)[1:])
            assert direction(secants) is not None
            getattr(secants, name)[row, column] = value
            assert direction(secants) is None


@WITHOUT_CLOCK
@given(st.integers(0, 6), st.sampled_from([0, 5, 160, 300]), SEEDS)
def test_whatever_finite_products_say_it_is_finite_and_down_or_none(k, exponents, seed):
    """Those of no vectors at all too, as rounding makes them; no warning leaves it either."""
    random = np.random.default_rng(seed)

    def wild(*shape):
        numbers = random.choice([-1.0, 0.0, 1.0, 1.0], size=shape)
        return numbers * 10.0 ** random.uniform(-exponents, exponents, size=shape)

    scaled = wild(k + 1, k + 1)
    found = direction(Secants(wild(k, k + 1), np.abs(scaled) if seed % 2 else scaled))
    if found is not None:
        assert found.slope < 0.0
        assert found.coefficients.shape == (2 * k + 1,)
        assert np.isfinite(found.coefficients).all()


def test_a_change_whose_square_underflows_gives_none():
    """In float32 the square of 1e-24 is 0, its product with a displacement of 1 is not."""
    tiny = np.full((1, 4), 1e-24, dtype=np.float32)
    secants = products(np.ones((1, 4), dtype=np.float32), tiny, tiny[0], np.float32(1.0))
    assert secants.plain[0, 0] > 0.0 == secants.scaled[0, 0]
    assert direction(Secants(*(p.astype(np.float64) for p in secants))) is None


# -- the line search ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "length", "slope", "enough"),
    [
        # A ten-thousandth of what the slope promises is asked for.
        (2.0, 1.0, 1.0, -1.0, True),
        (2.0, 2.0 - 1.01e-4, 1.0, -1.0, True),
        (2.0, 2.0 - 0.99e-4, 1.0, -1.0, False),
        (2.0, 2.0 - 0.99e-4, 0.5, -1.0, True),
        (2.0, 2.0 - 2.01e-4, 0.5, -4.0, True),
        (2.0, 2.0 - 1.99e-4, 0.5, -4.0, False),
        (-3.0, -4.0, 1.0, -1.0, True),
        (2.0, 2.0, 1.0, -1.0, False),
        (2.0, 3.0, 1.0, -1.0, False),
        (2.0, math.nan, 1.0, -1.0, False),
        (2.0, math.inf, 1.0, -1.0, False),
    ],
)
def test_what_is_enough_by_hand(before, after, length, slope, enough):
    assert sufficient(before, after, length, slope) == enough


@pytest.mark.parametrize(
    ("before", "after", "length", "slope", "next_length"),
    [
        # 1 - t + 1.5 t^2 is least at a third.
        (1.0, 1.5, 1.0, -1.0, 1.0 / 3.0),
        # -2 - 4 t + 6 t^2 is least there too.
        (-2.0, 14.0, 2.0, -4.0, 1.0 / 3.0),
        # 1 - t + t^2 at a half; a bit flatter than that, and it would be further than allowed.
        (1.0, 1.0, 1.0, -1.0, 0.5),
        (1.0, 0.9, 1.0, -1.0, 0.5),
        # 1 - t + 50 t^2 is least at a hundredth: less than allowed.
        (1.0, 50.0, 1.0, -1.0, 0.1),
        (1.0, 50.0, 0.2, -1.0, 0.02),
        # No parabola that opens upwards.
        (1.0, -1.0, 1.0, -1.0, 0.1),
        (1.0, math.inf, 1.0, -1.0, 0.1),
        (1.0, math.nan, 0.5, -1.0, 0.05),
    ],
)
def test_the_next_length_by_hand(before, after, length, slope, next_length):
    assert shorter(before, after, length, slope) == pytest.approx(next_length)


@WITHOUT_CLOCK
@given(
    st.floats(-1e9, 1e9),
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(1e-9, 1.0),
    st.floats(-1e9, -1e-9),
)
def test_the_next_length_is_a_fair_share_of_the_last(before, after, length, slope):
    found = shorter(before, after, length, slope)
    assert SHRINK[0] * length <= found <= SHRINK[1] * length
    assert SHRINK == (0.1, 0.5)


@WITHOUT_CLOCK
@given(st.floats(-5.0, 5.0), st.floats(-5.0, -0.1), st.floats(0.01, 50.0), st.floats(0.1, 2.0))
def test_between_the_bounds_it_is_the_minimum_of_the_parabola(before, slope, bend, length):
    least = -slope / (2.0 * bend)
    after = before + slope * length + bend * length * length
    found = shorter(before, after, length, slope)
    assert found == pytest.approx(min(max(least, 0.1 * length), 0.5 * length), rel=1e-6)
