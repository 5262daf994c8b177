"""Models with a `train_step` of their own: what it may do, and what is refused."""

import keras
import pytest
import tensorflow as tf
from keras_problems import BRISK, CROSS_ENTROPY, predicts, same, train, weights

from hybridcore import ModelError
from hybridcore_keras import HybridCallback

# What Keras does to TensorFlow's tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


class Custom(keras.Model):
    """Subclassed, with a train step of its own that computes its loss by itself."""

    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(16, activation="tanh")
        self.last = keras.layers.Dense(10)
        self.mean = keras.metrics.Mean(name="loss")

    def call(self, x):
        return self.last(self.hidden(x))

    @property
    def metrics(self):
        return [self.mean]

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = CROSS_ENTROPY(y, self(x, training=True))
        found = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(found, self.trainable_variables, strict=True))
        self.mean.update_state(loss)
        return {"loss": self.mean.result()}


def test_a_subclassed_model_with_a_custom_train_step():
    keras.utils.set_random_seed(0)
    model = Custom()
    model.compile(keras.optimizers.Adam(1e-2))
    predicts(model)


def test_a_train_step_that_reports_its_loss_and_one_that_does_not():
    class Reports(Custom):
        metrics = ()

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = CROSS_ENTROPY(y, self(x, training=True))
            found = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(found, self.trainable_variables)
            return {self.label: loss}

    for label in ("loss", "energy"):
        keras.utils.set_random_seed(0)
        model = Reports()
        model.label = label
        model.compile(keras.optimizers.Adam(1e-2))
        model._loss_tracker = None
        if label == "loss":
            predicts(model)
        else:
            with pytest.raises(ModelError, match="key 'loss'"):
                train(model, 1, HybridCallback(BRISK))


def test_a_train_step_that_keeps_its_loss_to_a_metric():
    class Quiet(Custom):
        def train_step(self, data):
            return {"energy": super().train_step(data)["loss"]}

    keras.utils.set_random_seed(0)
    model, hybrid = Quiet(), HybridCallback(BRISK)
    model.compile(keras.optimizers.Adam(1e-2))
    energies = train(model, 1, hybrid, steps_per_epoch=150)["energy"]
    assert hybrid.statistics().predicted_steps > 0
    assert 0.0 < energies[0] < 2.0


@pytest.mark.parametrize("steps", [0, 2])
def test_a_train_step_takes_one_step_of_the_optimizer(steps):
    class Steps(Custom):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = CROSS_ENTROPY(y, self(x, training=True))
            found = tape.gradient(loss, self.trainable_variables)
            for _ in range(steps):
                self.optimizer.apply(found, self.trainable_variables)
            self.mean.update_state(loss)
            return {"loss": self.mean.result()}

    model = Steps()
    model.compile(keras.optimizers.Adam(1e-2))
    with pytest.raises(ModelError, match=f"applies model.optimizer {steps} times"):
        train(model, 1, HybridCallback(BRISK))


def test_a_train_step_that_is_compiled_by_a_decorator_is_refused():
    class Decorated(Custom):
        train_step = tf.function(Custom.train_step)

    model = Decorated()
    model.compile(keras.optimizers.Adam(1e-2))
    # Keras itself does not mind.
    train(model, 1)
    with pytest.raises(ModelError, match=r"a decorator such as tf\.function.* has to go"):
        train(model, 1, HybridCallback(BRISK))


@pytest.mark.parametrize("place", ["attribute", "list", "dictionary", "layer"])
def test_a_second_optimizer_is_refused_where_it_is_used(place):
    # Outside of the model, so that it is held in one place.
    used = []

    class Two(Custom):
        def train_step(self, data):
            for optimizer in used:
                with tf.GradientTape() as tape:
                    loss = tf.reduce_sum(self.last.kernel**2)
                optimizer.apply(tape.gradient(loss, [self.last.kernel]), [self.last.kernel])
            return super().train_step(data)

    model, other = Two(), keras.optimizers.SGD(1e-2)
    owner, held = {
        "attribute": (model, other),
        "list": (model, [other]),
        "dictionary": (model, {"other": other}),
        "layer": (model.hidden, other),
    }[place]
    owner.held = held
    model.compile(keras.optimizers.Adam(1e-2))
    train(model, 2, HybridCallback(BRISK))
    used.append(other)
    model.compile(keras.optimizers.Adam(1e-2))
    before = weights(model)
    with pytest.raises(ModelError, match=r"besides model\.optimizer"):
        train(model, 1, HybridCallback(BRISK))
    assert same(before, weights(model))
    assert "apply" not in vars(other)
