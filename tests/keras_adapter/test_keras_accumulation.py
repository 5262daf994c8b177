"""Optimizers that sum gradients over batches: `fit` is in batches, and the weights in updates."""

import keras
import numpy as np
import pytest
from keras_problems import BRISK, compiled, digits, perceptron, regression, train, weights

from hybridcore.outer import INTERVAL
from hybridcore_keras import HybridCallback
from hybridcore_keras.ports import executions_of_an_update

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def accumulating(steps):
    return keras.optimizers.Adam(3e-3, gradient_accumulation_steps=steps)


@pytest.mark.parametrize(
    ("accumulated", "of_an_execution", "expected"),
    [(None, 1, 1), (None, 5, 1), (4, 1, 4), (4, 2, 2), (4, 3, 4), (4, 8, 1), (6, 4, 3)],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_an_update_takes_as_many_executions_as_keras_needs(
    accumulated, of_an_execution, expected, scaled
):
    optimizer = accumulating(accumulated)
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model = compiled(
        keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)]),
        optimizer,
        steps_per_execution=of_an_execution,
    )
    assert executions_of_an_update(model) == expected


@pytest.mark.parametrize("steps", [2, 4])
def test_outer_steps_are_of_ten_updates_each(steps):
    x, y = digits()
    model, hybrid = perceptron(accumulating(steps)), HybridCallback()
    model.fit(x, y, batch_size=16, epochs=8 * steps, verbose=0, callbacks=[hybrid])
    statistics = hybrid.statistics()
    updates = int(model.optimizer.iterations)
    assert updates == statistics.full_steps // steps
    assert 0.4 * updates / INTERVAL < statistics.outer_steps <= updates / INTERVAL
    assert 0.03 * statistics.steps < statistics.predicted_steps


def test_a_full_batch_in_several_parts_alike_is_jumped_over():
    ends = {}
    for name in ("plain", "ours"):
        model, hybrid = regression(accumulating(2)), HybridCallback(BRISK)
        train(model, 600, *([hybrid] if name == "ours" else []))
        x, y = digits()
        ends[name] = model.evaluate(x, y, verbose=0)
    statistics = hybrid.statistics()
    assert statistics.predicted_steps > 60
    assert ends["ours"] < ends["plain"]


def test_another_compile_for_as_many_updates_goes_on_and_for_others_begins_anew():
    x, y = digits()
    model, hybrid = perceptron(accumulating(4)), HybridCallback()
    fit = {"batch_size": 64, "verbose": 0, "callbacks": [hybrid]}
    model.fit(x, y, **fit)
    before = hybrid.statistics().steps
    model.fit(x, y, **fit)
    assert hybrid.statistics().steps == 2 * before
    compiled(model, model.optimizer, steps_per_execution=4)
    model.fit(x, y, **fit)
    # Fewer steps, each of four batches, and no others.
    assert hybrid.statistics().steps == -(-before // 4)


def test_a_run_is_resumed_exactly_in_the_midst_of_a_cycle():
    whole, callback = perceptron(accumulating(3)), HybridCallback(BRISK)
    train(whole, 400, callback)
    first, saved = perceptron(accumulating(3)), HybridCallback(BRISK)
    train(first, 200, saved)
    second, resumed = perceptron(accumulating(3), seed=5), HybridCallback(BRISK)
    resumed.load_state_dict(saved.state_dict())
    train(second, 200, resumed)
    assert callback.statistics().predicted_steps > 0
    assert all(map(np.array_equal, weights(whole), weights(second)))
