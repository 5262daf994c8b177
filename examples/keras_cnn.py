"""Classify images with a small convolutional network in Keras, on mini-batches.

Fashion-MNIST where its files are on this machine, else scikit-learn's digits. Mini-batches are
noisy; where jumps do not pay, the callback finds that out, and leaves out only the few batches that
its outer momentum makes up for.
Run it: python examples/keras_cnn.py --steps 2000
"""

import argparse
import gzip
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
from sklearn.datasets import load_digits

from hybridcore_keras import HybridCallback

FOLDER = Path("/usr/share/datasets/fashion-mnist")


def images():
    if (FOLDER / "train-images-idx3-ubyte.gz").exists():
        pixels = gzip.decompress((FOLDER / "train-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((FOLDER / "train-labels-idx1-ubyte.gz").read_bytes())[8:]
        x = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28, 1) / np.float32(255)
        return x, np.frombuffer(labels, np.uint8).astype("int32")
    data = load_digits()
    x = (data.images[..., None] / 16.0).astype("float32")
    return x, data.target.astype("int32")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="batches of 64 to train on")
    parser.add_argument("--quick", action="store_true", help="300 steps, to see that it works")
    arguments = parser.parse_args()
    steps = 300 if arguments.quick else arguments.steps

    x, y = images()
    rows = np.random.default_rng(0).integers(0, len(x), 64 * steps)
    keras.utils.set_random_seed(0)
    layers = [keras.Input(x.shape[1:]), keras.layers.Conv2D(16, 3, strides=2, activation="relu")]
    layers += [keras.layers.Conv2D(32, 3, activation="relu"), keras.layers.Flatten()]
    model = keras.Sequential([*layers, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(2e-3), loss, metrics=["accuracy"])

    hybrid = HybridCallback()
    model.fit(x[rows], y[rows], batch_size=64, verbose=2, callbacks=[hybrid])
    print(hybrid.statistics())


if __name__ == "__main__":
    main()
