"""Losses that raise: at points that were only tried that is one that is no number."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_problems import BRISK, CURVED, digits, perceptron, regression, same, train
from keras_problems import weights as weights_of

from hybridcore import Action, HybridTrainerConfig, Phase
from hybridcore_keras import HybridCallback

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# Fewer than half of the images, in epochs of one step.
FEW = 700


class Bounded(keras.layers.Layer):
    """Its outputs, of which none may be larger than `bound`; in a graph, as users check them."""

    def __init__(self, bound):
        super().__init__()
        self.bound = bound

    def call(self, inputs):
        checked = tf.debugging.assert_less(tf.reduce_max(tf.abs(inputs)), self.bound)
        with tf.control_dependencies([checked]):
            return tf.identity(inputs)


def smoothed(bound):
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(16, activation="tanh"), keras.layers.BatchNormalization()]
    layers = [*hidden, keras.layers.Dense(10), Bounded(bound)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    model.compile(keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"])
    return model


def test_a_check_that_fails_only_where_steps_are_tried_ends_no_fit(caplog):
    x, labels = digits()
    y = np.eye(10, dtype=np.float32)[labels]
    plain, model = smoothed(9.0), smoothed(9.0)
    arguments = {"batch_size": len(x), "epochs": 300, "verbose": 0}
    before = plain.fit(x, y, **arguments).history["loss"][-1]
    hybrid = HybridCallback()
    found = model.fit(x, y, callbacks=[hybrid], **arguments).history
    statistics = hybrid.statistics()
    assert found["loss"][-1] < before
    assert np.isfinite(found["loss"]).all()
    # Metrics of the epoch, and averages of batch norm, are those of good passes.
    assert min(found["accuracy"][60:]) > 0.9
    assert all(np.isfinite(w).all() for w in model.get_weights())
    assert statistics.secant_steps > 50
    assert statistics.divergences == 0
    assert statistics.steps == 300
    assert int(model.optimizer.iterations) == statistics.full_steps
    told = [r for r in caplog.records if "InvalidArgumentError" in r.getMessage()]
    assert told[0].levelname == "WARNING"
    assert [r for r in told if r.levelname == "WARNING"] == told[:1]
    assert all(len(r.getMessage()) < 700 for r in told)


class Fragile:
    """A loss of a model that runs eagerly, which raises where `when` says so."""

    def __init__(self, when):
        self.when, self.raised, self.armed = when, 0, True
        self._plain = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def __call__(self, y, predicted):
        if self.armed and self.when():
            self.raised += 1
            raise ValueError("scale must be positive")
        return self._plain(y, predicted)


class Noted(HybridCallback):
    """Notes the weights before each step and at each ``SAVE``, and which directives there are."""

    saved = ()

    def _train(self, *arguments):
        self.before, self.actions = weights_of(self.model), []
        return super()._train(*arguments)

    def note(self):
        plain = self.hands.carry_out

        def carry_out(directive):
            self.actions.append(directive.action)
            if directive.action is Action.SAVE:
                self.saved = weights_of(self.model)
            return plain(directive)

        self.hands.carry_out = carry_out


def fragile(config, when, probe=None, layers=None, **arguments):
    """A model whose loss raises ``when(model, hybrid)``, from after the first step on."""
    model = regression() if layers is None else perceptron(layers=layers)
    hybrid = Noted(config, probe=probe)
    loss = Fragile(lambda: when(model, hybrid))
    loss.armed = False
    model.compile(model.optimizer, loss, run_eagerly=True, **arguments)
    train(model, 1, hybrid)
    hybrid.note()
    loss.armed = True
    return model, hybrid, loss


def normalised():
    return [keras.layers.BatchNormalization()]


def away(model, hybrid):
    """Whether the weights are not where they were before the step."""
    return not same(weights_of(model), hybrid.before)


def test_a_point_of_a_line_search_that_raises_is_taken_back():
    model, hybrid, loss = fragile(
        CURVED, lambda model, hybrid: hybrid.hands._on_trial and away(model, hybrid)
    )
    taken_back = seen = 0

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            nonlocal taken_back, seen
            if loss.raised > seen and Action.FULL not in hybrid.actions:
                taken_back += 1
                assert same(weights_of(model), hybrid.before)
                assert np.isfinite(logs["loss"])
            seen = loss.raised

    train(model, 120, hybrid, Look())
    assert taken_back > 5
    assert hybrid.statistics().divergences == 0
    assert int(model.optimizer.iterations) == hybrid.statistics().full_steps


def test_what_led_to_where_the_loss_raises_is_taken_back():
    led, returned, undone = False, 0, 0

    def there(model, hybrid):
        nonlocal led, returned
        back = bool(hybrid.saved) and same(weights_of(model), hybrid.saved)
        if hybrid.hands.recovery is None:
            returned += led
            assert back or not led
            led = False
            return False
        led = True
        return not back

    model, hybrid, loss = fragile(CURVED, there, layers=normalised, metrics=["accuracy"])

    def state():
        beside = [*model.non_trainable_variables, *model.metrics_variables]
        return [np.array(v) for v in beside]

    class Look(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.before, self.raised = state(), loss.raised

        def on_train_batch_end(self, batch, logs=None):
            nonlocal undone
            if loss.raised > self.raised and hybrid.actions == [Action.FULL]:
                undone += 1
                assert all(map(np.array_equal, state(), self.before))

    train(model, 1, hybrid, Look(), steps_per_epoch=300)
    assert loss.raised >= returned > 2
    assert undone > 2
    statistics = hybrid.statistics()
    assert statistics.divergences >= returned
    assert statistics.steps == 301
    assert int(model.optimizer.iterations) == statistics.full_steps - statistics.divergences


def test_a_jump_to_where_the_loss_raises_is_taken_back_as_the_run_ends():
    model, hybrid, loss = fragile(
        BRISK, lambda model, hybrid: not same(weights_of(model), hybrid.saved)
    )
    loss.armed = False
    while hybrid.engine.phase is not Phase.CORRECT:
        train(model, 1, hybrid)
    loss.armed = True
    hybrid.finish(digits())
    assert loss.raised
    assert same(weights_of(model), hybrid.saved)
    assert hybrid.statistics().rollbacks == 1


def test_what_a_step_of_keras_raises_is_the_users_to_see():
    model, hybrid, _ = fragile(
        HybridTrainerConfig(), lambda model, hybrid: hybrid.statistics().outer_steps > 0
    )
    x, y = digits()
    with pytest.raises(ValueError, match="scale must be positive"):
        model.fit(x, y, batch_size=64, epochs=12, verbose=0, callbacks=[hybrid])
    assert all(np.isfinite(w).all() for w in model.get_weights())


def test_a_probe_that_raises_only_where_a_jump_would_lead_is_no_number():
    x, y = digits()
    model, hybrid, loss = fragile(
        BRISK,
        lambda model, hybrid: hybrid.hands.bank is not None and hybrid.hands.bank.waits,
        probe=(x[:FEW], y[:FEW]),
    )
    train(model, 150, hybrid)
    assert loss.raised > 3
    assert hybrid.statistics().steps == 151


def test_what_raises_at_the_weights_from_before_too_is_the_users_to_see():
    model, hybrid, loss = fragile(CURVED, lambda model, hybrid: hybrid.hands.secants is not None)
    with pytest.raises(ValueError, match="scale must be positive"):
        train(model, 120, hybrid)
    assert all(np.isfinite(w).all() for w in model.get_weights())
    loss.armed = False
    train(model, 60, hybrid)


def test_what_raises_now_and_then_is_the_users_to_see():
    model, hybrid, loss = fragile(
        CURVED, lambda model, hybrid: hybrid.hands._on_trial and not loss.raised
    )
    with pytest.raises(ValueError, match="scale must be positive"):
        train(model, 120, hybrid)
    assert loss.raised == 1
