"""Optimizers that do something of their own to gradients or weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_problems import (
    BRISK,
    CROSS_ENTROPY,
    compiled,
    digits,
    perceptron,
    regression,
    spoiled,
    train,
    weights,
)

from hybridcore import DivergenceError, Engine, HybridTrainerConfig, ModelError
from hybridcore_keras import HybridCallback

# What Keras does to TensorFlow's tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.Adam(1e-2, use_ema=True, ema_momentum=0.9),
        keras.optimizers.Adam(1e-2, global_clipnorm=0.5),
        keras.optimizers.SGD(0.5, momentum=0.9, gradient_accumulation_steps=2),
        keras.optimizers.SGD(1.0, loss_scale_factor=8.0),
    ],
    ids=["ema", "clipped", "accumulating", "loss scale factor"],
)
def test_optimizers(optimizer):
    hybrid = HybridCallback(BRISK)
    model = regression(optimizer)
    history = train(model, 200, hybrid)
    assert history["loss"][-1] < 0.3 * history["loss"][0]
    assert hybrid.statistics().predicted_steps > 0


@pytest.mark.parametrize("wrap", [lambda inner: inner, keras.optimizers.LossScaleOptimizer])
def test_nothing_is_predicted_where_the_optimizer_forgets_the_weights(wrap, caplog):
    """Ftrl takes back every move in its next step."""
    found = []
    for callbacks in ([], [HybridCallback(BRISK)]):
        model = regression(wrap(keras.optimizers.Ftrl(0.5)))
        train(model, 120, *callbacks)
        found.append(weights(model))
    (hybrid,) = callbacks
    assert all(map(np.array_equal, *found))
    assert hybrid.statistics().predicted_steps == hybrid.statistics().outer_steps == 0
    assert hybrid.statistics().full_steps == 120
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [message[:15] for message in told] == ["optimizer Ftrl "]


def test_the_gradient_norm_is_that_of_the_whole_unscaled_gradient(monkeypatch):
    x, y = digits()
    for optimizer in (
        keras.optimizers.SGD(0.1, loss_scale_factor=8.0),
        keras.optimizers.SGD(0.1, global_clipnorm=1e-3),
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
    ):
        model, hybrid = perceptron(optimizer), HybridCallback()
        with tf.GradientTape() as tape:
            loss = CROSS_ENTROPY(y, model(x))
        expected = tf.linalg.global_norm(tape.gradient(loss, model.trainable_variables))
        observations = []
        plain = Engine.observe

        def observe(engine, seen, observations=observations, plain=plain):
            observations.append(seen)
            plain(engine, seen)

        monkeypatch.setattr(Engine, "observe", observe)
        train(model, 1, hybrid)
        monkeypatch.undo()
        (seen,) = observations
        assert seen.gradient_norm == pytest.approx(float(expected), rel=1e-4)
        assert seen.loss == pytest.approx(float(loss), rel=1e-5)
        assert seen.learning_rate == pytest.approx(0.1)


def halved(scale):
    """A model in half precision, whose gradients overflow under a loss scale that is too high."""
    keras.utils.set_random_seed(0)
    hidden = keras.layers.Dense(16, activation="tanh", dtype="mixed_float16")
    model = keras.Sequential([keras.Input((64,)), hidden, keras.layers.Dense(10, dtype="float32")])
    schedule = keras.optimizers.schedules.PolynomialDecay(1e-2, 100, 1e-3)
    inner = keras.optimizers.Adam(schedule)
    return compiled(model, keras.optimizers.LossScaleOptimizer(inner, initial_scale=scale))


def test_an_overflow_under_a_loss_scale_is_no_divergence():
    plain, model = halved(2.0**22), halved(2.0**22)
    hybrid = HybridCallback(HybridTrainerConfig(warmup_steps=999, on_divergence="raise"))
    found = []
    for one, callbacks in ((plain, []), (model, [hybrid])):
        rates = []
        note = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs, one=one, rates=rates: rates.append(
                float(one.optimizer.inner_optimizer.learning_rate)
            )
        )
        train(one, 20, *callbacks, note)
        counted = int(one.optimizer.inner_optimizer.iterations)
        found.append([rates, float(one.optimizer.dynamic_scale), counted, *weights(one)])
    assert 0 < found[0][2] < 20
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    assert hybrid.statistics().divergences == 0
    assert hybrid.statistics().steps == 20


def test_a_bad_batch_under_a_loss_scale_is_a_divergence():
    hybrid = HybridCallback(HybridTrainerConfig(on_divergence="raise"))
    with pytest.raises(DivergenceError, match="left out"):
        train(halved(1.0), 9, hybrid, data=spoiled([4], np.float32("nan")))
    assert hybrid.statistics().divergences == 1


def test_several_optimizers_in_one_are_refused():
    multi = getattr(keras.optimizers, "MultiOptimizer", None)
    if multi is None:
        pytest.skip("this Keras has no MultiOptimizer")
    model = regression()
    model.optimizer = multi.__new__(multi)
    with pytest.raises(ModelError, match="MultiOptimizer"):
        train(model, 1, HybridCallback())
