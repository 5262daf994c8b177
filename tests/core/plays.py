"""Arms and plays for the tests of LinUCB."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from hybridcore.bandit import NO_PREDICTION

steady = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def names(count):
    """`count` arms, the one that must be there in the middle."""
    arms = [f"arm-{i}" for i in range(count - 1)]
    return [*arms[: count // 2], NO_PREDICTION, *arms[count // 2 :]]


def history(seed, count, dimension, length):
    rng = np.random.default_rng(seed)
    for _ in range(length):
        yield int(rng.integers(count)), rng.normal(size=dimension), float(rng.normal())


discounts = st.sampled_from([1.0, 0.99, 0.96, 0.7])


def as_array(values):
    return np.array(list(values.values()))
