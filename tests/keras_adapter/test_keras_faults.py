"""What may happen to a process that runs fit: it is killed or interrupted."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from drilling import Interrupter
from keras_problems import BRISK, CURVED, digits, regression, same, train, weights

from hybridcore import Phase
from hybridcore_keras import HybridCallback

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="signals are those of POSIX"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.mark.slow
def test_a_fit_that_is_killed_again_and_again_loses_nothing():
    # python tests/keras_adapter/keras_kills.py 200 is the whole drill.
    done = subprocess.run(
        [sys.executable, str(HERE / "keras_kills.py"), "10", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["kills"] == 10


class Seen(keras.callbacks.Callback):
    """Phase, steps so far and weights at the end of each step."""

    def __init__(self, hybrid, model):
        super().__init__()
        self.hybrid, self.phase, self.steps = hybrid, Phase.WARMUP, (0, 0)
        self.weights = [weights(model)]

    def present_steps(self):
        """Real steps, as Keras counts them, and predicted ones."""
        predicted = self.hybrid.engine.counters.predicted_steps
        return int(self.model.optimizer.iterations), predicted

    def on_train_batch_end(self, batch, logs=None):
        self.steps = self.present_steps()
        self.weights.append(weights(self.model))
        # Last, because the interrupt may come in there.
        self.phase = self.hybrid.engine.phase


def left_over(model):
    """What a callback that was not given the time to let go of its model leaves in it."""
    replaced = ("train_step", "apply", "_get_current_learning_rate", "_get_metrics_result_or_logs")
    found = {name for owner in (model, model.optimizer) for name in vars(owner)} & {*replaced}
    ours = isinstance(getattr(model.train_function, "__self__", None), HybridCallback)
    return found | ({"train_function"} if ours else set())


@pytest.mark.parametrize(("config", "times"), [(BRISK, 24), (CURVED, 12)])
def test_an_interrupted_fit_can_be_begun_again(config, times, record_property):
    rng = random.Random(times)
    model, hybrid = regression(), HybridCallback(config)
    seen = Seen(hybrid, model)
    interrupted, unseen, phases = 0, 0, set()
    wanted = {Phase.WARMUP, Phase.FULL, Phase.PREDICT}
    # Where lines fall depends on how many there are: 25,000 to 35,000 for 80 steps.
    while interrupted < times or (interrupted < 4 * times and not phases >= wanted):
        # One in three comes while fit begins; the others when there may be a jump.
        line = rng.randrange(1, 30_000 if interrupted % 3 else 300)
        try:
            with Interrupter(line):
                train(model, 1, hybrid, seen, steps_per_epoch=80)
        except KeyboardInterrupt:
            interrupted += 1
            phases.add(seen.phase)
            now = weights(model)
            assert all(np.isfinite(w).all() for w in now)
            # A step that the callback did not come to see, or what some step before it left.
            stepped = seen.present_steps() != seen.steps
            unseen += stepped
            assert stepped or any(same(now, w) for w in seen.weights)
            seen.weights = [now, *seen.weights]
            hybrid.state_dict()
    assert phases >= wanted
    # Or nothing was compared.
    assert unseen < 0.9 * interrupted
    # Whatever the last interrupt left, fit without the callback is plain, at the plain rate.
    steps, before = hybrid.engine.counters.steps, int(model.optimizer.iterations)
    train(model, 1, steps_per_epoch=7)
    assert hybrid.engine.counters.steps == steps
    assert int(model.optimizer.iterations) == before + 7
    assert not left_over(model)
    # And with it the run goes on as ever.
    jumped = hybrid.statistics().predicted_steps
    train(model, 1, hybrid, steps_per_epoch=150)
    assert hybrid.statistics().steps == steps + 150
    assert hybrid.statistics().predicted_steps > jumped
    assert model.evaluate(*digits(), verbose=0) < 0.1
    assert not left_over(model)
    record_property("times", interrupted)
