"""Classify digits with Keras, full-batch: smooth training, where jumps pay.

The only line that is not plain Keras is the callback.
Run it: python examples/keras_mlp.py --steps 1000
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
from sklearn.datasets import load_digits

from hybridcore_keras import HybridCallback


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="steps to train, one an epoch")
    parser.add_argument("--quick", action="store_true", help="200 steps, to see that it works")
    arguments = parser.parse_args()
    steps = 200 if arguments.quick else arguments.steps

    data = load_digits()
    x, y = (data.data / 16.0).astype("float32"), data.target.astype("int32")
    keras.utils.set_random_seed(0)
    layers = [keras.Input((64,)), keras.layers.Dense(32, activation="tanh"), keras.layers.Dense(10)]
    model = keras.Sequential(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss)

    hybrid = HybridCallback()
    history = model.fit(x, y, batch_size=len(x), epochs=steps, verbose=0, callbacks=[hybrid])
    print(f"loss {history.history['loss'][0]:.4f} -> {history.history['loss'][-1]:.4f}")
    print(hybrid.statistics())


if __name__ == "__main__":
    main()
