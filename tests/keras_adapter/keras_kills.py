"""A fit that is killed again and again: ``python keras_kills.py 200`` kills it 200 times."""

import hashlib
import json
import random
import sys
import tempfile
from pathlib import Path

import conftest  # noqa: F401 - the same paths, backend and threads
import keras
import numpy as np
from drilling import drill
from keras_problems import BRISK, CROSS_ENTROPY, compiled, train

from hybridcore import Action, Phase, checkpoint
from hybridcore.rotation import checkpoints_in
from hybridcore_keras import HybridCallback, hands

# The last step is not saved: a fit that has nothing to do tells nothing.
STEPS, EVERY = 125, 8
# Lines of Python that a child spends there, about: the kill is at a random one of them.
PLACES = {"save": 300_000, "predict": 40_000, "correct": 35_000, "rollback": 20_000}
PLACES["any moment"] = 1
CLOCKS = ("seconds", "probe_cost", "hybrid_cost", "measured_speedup")


def lie_in_wait(killer):
    if killer.place == "save":
        killer.around(HybridCallback, "save")
    elif killer.place == "rollback":
        killer.around(hands.Hands, "carry_out", lambda _, d: d.action is Action.ROLLBACK)
    elif killer.place != "any moment":
        phase = Phase[killer.place.upper()]
        killer.around(HybridCallback, "_train", lambda callback, _: callback.engine.phase is phase)


class Hurt(keras.callbacks.Callback):
    """Makes the loss draw from Python and NumPy, and has the first jump taken back."""

    def __init__(self, hybrid):
        super().__init__()
        self.hybrid, self.factor = hybrid, keras.Variable(1.0, trainable=False)

    def loss(self, labels, outputs):
        return self.factor.value * CROSS_ENTROPY(labels, outputs)

    def on_epoch_begin(self, epoch, logs=None):
        engine = self.hybrid.engine
        bad = engine.phase is Phase.CORRECT and engine.counters.steps < 120
        noise = np.random.standard_normal() + random.random()  # noqa: NPY002
        self.factor.assign(1e3 if bad else 1.0 + 1e-5 * noise)


def build(seed, folder):
    """Model, new or resumed from `folder`, and its callbacks."""
    keras.utils.set_random_seed(seed)
    hidden = [keras.layers.GaussianNoise(3e-3), keras.layers.Dense(16, activation="tanh")]
    hidden += [keras.layers.BatchNormalization(), keras.layers.Dropout(1e-3)]
    model = keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])
    hybrid = HybridCallback(BRISK)
    hurt = Hurt(hybrid)
    schedule = keras.optimizers.schedules.PolynomialDecay(1e-2, 300, 1e-3)
    compiled(model, keras.optimizers.Adam(schedule), loss=hurt.loss, metrics=["accuracy"])
    if checkpoints_in(folder):
        hybrid.load(folder)
    return model, hybrid, hurt


def figures(model, hybrid, history):
    """What must be the same to the last bit: weights, decisions, the last row of the history."""
    digest = hashlib.sha256()
    for variable in (*model.variables, *model.optimizer.variables):
        digest.update(variable.numpy().tobytes())
    row = {name: values[-1] for name, values in history.items()}
    summary = {f"hybrid_{name}": value for name, value in hybrid.statistics().to_dict().items()}
    told = {
        name: repr(value)
        for name, value in (summary | row).items()
        if not any(clock in name for clock in CLOCKS)
    }
    return [digest.hexdigest(), told]


def run(folder, killer, tell):
    """Train to the end, from the newest checkpoint if there is one; return the last figures."""
    found = checkpoints_in(folder)
    model, hybrid, hurt = build(9 if found else 0, folder)
    hybrid.save_every(EVERY, folder, keep=2, before_jumps=True)

    def told(epoch, logs):
        if (epoch + 1) % EVERY == 0:
            tell(epoch + 1)
            assert not list(folder.glob(".*")), "something was left over"

    telling = keras.callbacks.LambdaCallback(on_epoch_end=told)
    lie_in_wait(killer)
    history = train(model, STEPS, hybrid, hurt, telling, initial_epoch=hybrid.epoch)
    return figures(model, hybrid, history)


def main(kills="200", seed="0"):
    # The children are forked before TensorFlow has computed anything.
    with tempfile.TemporaryDirectory() as folder:
        done = drill(run, PLACES, 6.0, checkpoint.read, int(kills), int(seed), Path(folder))
    sys.stdout.write(json.dumps(done) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
