"""Small real problems that the Keras adapter's tests train on."""

from functools import cache

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

from hybridcore import HybridTrainerConfig
from hybridcore_keras import HybridCallback

# Short phases, so that a few hundred steps hold several jumps.
SHORT = {"warmup_steps": 20, "min_full_steps": 24, "horizon": 30, "correction_interval": 10}
BRISK = HybridTrainerConfig(**SHORT, secant_pairs=0)
# The same with quasi-Newton steps.
CURVED = HybridTrainerConfig(**SHORT, secant_pairs=8)
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def digits():
    data = load_digits()
    return (data.data / 16.0).astype("float32"), data.target.astype("int64")


def forever(count=None):
    """All digits at once, again and again: as smooth as training gets."""
    x, y = digits()
    data = tf.data.Dataset.from_tensors((x[:count], y[:count])).repeat()
    # There is nothing to tune, and TensorFlow is slow to end some of the iterators that it tunes.
    options = tf.data.Options()
    options.autotune.enabled = False
    return data.with_options(options)


def spoiled(victims, value):
    """All digits, again and again, the batches of the numbers `victims` multiplied by `value`."""
    x, y = digits()
    bad = tf.constant(victims, tf.int64)
    factors = tf.data.Dataset.range(10_000).map(
        lambda i: tf.where(tf.reduce_any(bad == i), tf.constant(value), tf.constant(1.0))
    )
    return factors.map(lambda factor: (x * factor, y))


@cache
def mirrored():
    """Two replicas, each of which gets its half of a batch.

    There is one for all tests: a second one would number its sums as the first one did, and
    TensorFlow takes sums of one number for the same.
    """
    devices = [device.name for device in tf.config.list_logical_devices("CPU")]
    strategy = tf.distribute.MirroredStrategy(devices)
    assert strategy.num_replicas_in_sync == 2
    return strategy


def compiled(model, optimizer=None, **arguments):
    optimizer = keras.optimizers.Adam(1e-2) if optimizer is None else optimizer
    model.compile(optimizer, arguments.pop("loss", CROSS_ENTROPY), **arguments)
    return model


def regression(optimizer=None, seed=0, **arguments):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    return compiled(model, optimizer, **arguments)


def perceptron(optimizer=None, seed=0, layers=list, **arguments):
    keras.utils.set_random_seed(seed)
    hidden = [keras.layers.Dense(16, activation="tanh"), *layers()]
    model = keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])
    return compiled(model, optimizer, **arguments)


def train(model, steps, *callbacks, data=None, **arguments):
    """Fit in epochs of one step, whose logs are those of the step."""
    data = forever() if data is None else data
    arguments = {"epochs": steps, "steps_per_epoch": 1, "verbose": 0} | arguments
    return model.fit(data, callbacks=list(callbacks), shuffle=False, **arguments).history


def weights(model):
    return [np.array(w) for w in model.get_weights()]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


class Watch(keras.callbacks.Callback):
    """Records phase, loss and the optimizer's iterations of each batch."""

    def __init__(self, hybrid):
        super().__init__()
        self.hybrid = hybrid
        self.phases, self.losses, self.iterations = [], [], []

    def on_train_batch_end(self, batch, logs=None):
        self.phases.append(self.hybrid.engine.phase)
        self.losses.append(logs["loss"])
        optimizer = self.model.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        self.iterations.append(int(keras.ops.convert_to_numpy(optimizer._iterations)))


def predicts(model, steps=150, *callbacks, config=BRISK, **arguments):
    """Train, check that steps were predicted and counted, and that the loss fell; the callback."""
    hybrid = HybridCallback(config)
    watch = Watch(hybrid)
    # Epochs of several steps take less time; whoever needs the logs of each step says so.
    arguments = {"epochs": steps // 10, "steps_per_epoch": 10} | arguments
    history = train(model, steps, hybrid, watch, *callbacks, **arguments)
    statistics = hybrid.statistics()
    assert statistics.predicted_steps > 0
    assert statistics.steps == steps
    assert np.isfinite(history["loss"]).all()
    assert history["loss"][-1] < 0.8 * history["loss"][0]
    assert watch.iterations[-1] == statistics.full_steps
    return hybrid
