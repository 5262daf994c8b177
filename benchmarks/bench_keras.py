"""What the Keras callback costs a step of a compiled model, on TensorFlow."""

import os
import statistics
from time import perf_counter

import numpy as np

STEPS, BATCH = 200, 64


class WarmupOverhead:
    """Microseconds that a step in warm-up takes longer than one of plain ``fit``.

    A model of 0.1 million parameters. Plain and hybrid fit in turn, one thread.
    """

    timeout = 300
    rounds = 9
    # Rounds that compile, and get to what is measured.
    first = 1
    # Never out of warm-up: this is the price of watching.
    warmup_steps = 10**6

    def setup(self):
        os.environ.setdefault("KERAS_BACKEND", "tensorflow")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        import keras
        import tensorflow as tf

        from hybridcore import HybridTrainerConfig
        from hybridcore_keras import HybridCallback

        # Only once in a process, before anything has run.
        if tf.config.threading.get_intra_op_parallelism_threads() == 0:
            tf.config.threading.set_intra_op_parallelism_threads(1)
            tf.config.threading.set_inter_op_parallelism_threads(1)
        rng = np.random.default_rng(0)
        x = rng.standard_normal((STEPS * BATCH, 784), dtype=np.float32)
        y = rng.integers(0, 10, STEPS * BATCH)
        # TensorFlow's own tuning ends some fits as much as 0.3 s late, plain ones too.
        options = tf.data.Options()
        options.autotune.enabled = False
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).cache()
        self.data = data.with_options(options)
        self.models = []
        for _ in range(2):
            keras.utils.set_random_seed(0)
            model = keras.Sequential(
                [
                    keras.layers.Input((784,)),
                    keras.layers.Dense(128, "relu"),
                    keras.layers.Dense(10),
                ]
            )
            model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
            self.models.append(model)
        self.callback = HybridCallback(HybridTrainerConfig(warmup_steps=self.warmup_steps))

    def track_overhead(self):
        """Median over rounds of the difference."""
        plain, hybrid = self.models
        differences = []
        for _ in range(self.first + self.rounds):
            start = perf_counter()
            plain.fit(self.data, verbose=0)
            middle = perf_counter()
            hybrid.fit(self.data, verbose=0, callbacks=[self.callback])
            differences.append((perf_counter() - middle) - (middle - start))
        return 1e6 * statistics.median(differences[self.first :]) / STEPS

    track_overhead.unit = "us"


class OuterOverhead(WarmupOverhead):
    """The same with outer momentum, less what its predicted steps save."""

    first = 4
    warmup_steps = 100
