"""Which errors are of the point that was tried."""

import contextlib
import logging

import numpy as np
import pytest

from hybridcore import ModelError
from hybridcore.raised import Raised, before_the_point


class Weights:
    """Weights that are one number, whose loss raises above 1, and snapshots of them."""

    def __init__(self, here, before=0.0, error=ArithmeticError):
        self.here, self.before, self.error = here, before, error
        self.aside = None
        self.evaluated = []

    def evaluate(self):
        self.evaluated.append(self.here)
        if self.here > 1.0:
            raise self.error("too large")

    def set_aside(self):
        self.aside = self.here

    def put_back(self):
        self.here, self.aside = self.here if self.aside is None else self.aside, None

    def restore(self):
        self.here = self.before

    def move(self, coefficients):
        assert np.array_equal(coefficients, [[1.0, 0.0]])
        self.here = self.before


def raised(is_other=lambda error: isinstance(error, MemoryError)):
    return Raised("the loss", is_other)


def led(weights, *, recovers=True):
    return before_the_point(weights, None, moved=False, recovers=recovers)


@pytest.mark.parametrize("recovers", [False, True])
def test_what_raises_there_alone_is_of_the_point(recovers):
    weights = Weights(2.0)
    assert raised().only_there(ArithmeticError(), weights.evaluate, led(weights, recovers=recovers))
    assert weights.evaluated == [2.0, 0.0]
    # Who tried it goes back from there.
    assert (weights.here, weights.aside) == (2.0, None)


def test_a_point_of_a_line_search_and_one_that_weights_are_set_aside_for_are_left():
    weights = Weights(2.0)
    before = before_the_point(None, weights.restore, moved=False, recovers=False)
    assert raised().only_there(ArithmeticError(), weights.evaluate, before)
    assert weights.here == 0.0
    weights = Weights(0.5)
    weights.set_aside()
    weights.here = 2.0
    before = before_the_point(weights, None, moved=True, recovers=False)
    assert raised().only_there(ArithmeticError(), weights.evaluate, before)
    assert weights.here == 0.5


def test_what_raises_at_the_weights_from_before_too_is_not():
    weights = Weights(2.0, before=3.0)
    assert not raised().only_there(ArithmeticError(), weights.evaluate, led(weights))
    assert weights.evaluated == [2.0, 3.0]
    assert weights.here == 2.0


def test_what_comes_and_goes_is_not():
    weights = Weights(0.5)
    assert not raised().only_there(ArithmeticError(), weights.evaluate, led(weights))
    assert weights.evaluated == [0.5]


@pytest.mark.parametrize("error", [MemoryError(), ModelError("a gradient is sparse")])
def test_nor_is_what_is_never_the_fault_of_weights(error):
    weights = Weights(2.0)
    assert not raised().only_there(error, weights.evaluate, led(weights))
    assert not raised().by_the_probe(error)
    assert weights.evaluated == []


def test_an_interrupt_while_it_is_looked_at_is_no_answer():
    weights = Weights(2.0, error=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        raised().only_there(ArithmeticError(), weights.evaluate, led(weights))
    assert weights.here == 2.0
    weights = Weights(2.0, before=3.0)

    def interrupted():
        if weights.here == weights.before:
            raise KeyboardInterrupt
        weights.evaluate()

    with pytest.raises(KeyboardInterrupt):
        raised().only_there(ArithmeticError(), interrupted, led(weights))
    assert weights.here == 2.0


def test_each_kind_is_told_once_and_briefly(caplog):
    caplog.set_level(logging.DEBUG, "hybridcore")
    one = raised()
    for _ in range(3):
        weights = Weights(2.0)
        assert one.only_there(ArithmeticError("x" * 5000), weights.evaluate, led(weights))
        assert one.by_the_probe(ValueError("scale"))
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "WARNING", "DEBUG", "DEBUG", "DEBUG", "DEBUG"]
    point, probe = (record.getMessage() for record in caplog.records[:2])
    assert point.startswith("the loss raised ArithmeticError: xxx")
    assert len(point) < 700
    assert probe.startswith("probe raised ValueError: scale, ")


def test_nothing_is_evaluated_in_a_block_that_cannot_be_entered():
    @contextlib.contextmanager
    def impossible():
        raise MemoryError
        yield

    weights = Weights(2.0)
    with pytest.raises(MemoryError):
        raised().only_there(ArithmeticError(), weights.evaluate, impossible())
    assert weights.evaluated == [2.0]
