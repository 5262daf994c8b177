"""What may happen to a process that runs fit: it is killed or interrupted."""

import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import keras
import numpy as np
import pytest
from drilling import Interrupter
from keras_problems import BRISK, CURVED, compiled, digits, regression, same, train, weights

from hybridcore import Phase, ProtocolError
from hybridcore_keras import HybridCallback
from hybridcore_keras.fits import Fit

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
    ours = isinstance(model.train_function, Fit)
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
    # How far it had come until then depends on where the lines fell.
    train(model, 1, hybrid, steps_per_epoch=250)
    assert hybrid.statistics().steps == steps + 250
    assert hybrid.statistics().predicted_steps > jumped
    assert model.evaluate(*digits(), verbose=0) < 0.1
    assert not left_over(model)
    record_property("times", interrupted)


# -- cut off where Keras tells nobody: in another callback, or in validation ----------------------

RATE = 0.3


class CutOff(keras.callbacks.Callback):
    """Raises at the end of its first fit."""

    done = False

    def on_epoch_end(self, epoch, logs=None):
        if not self.done:
            self.done = True
            raise KeyboardInterrupt


def cut_off(model, hybrid, *callbacks, steps=3):
    with pytest.raises(KeyboardInterrupt):
        train(model, 1, hybrid, *callbacks, CutOff(), steps_per_epoch=steps)
    assert {"train_function"} <= left_over(model)


def gradient_descent(model):
    return compiled(model, keras.optimizers.SGD(RATE))


@pytest.mark.parametrize("then", ["nothing", "the same optimizer", "another optimizer"])
@pytest.mark.parametrize("follows", ["plain fit", "the same callback", "another callback"])
def test_after_a_fit_that_was_cut_off_training_goes_on_as_in_plain_fit(then, follows):
    plain, model, hybrid = regression(), regression(), HybridCallback(BRISK)
    gradient_descent(plain)
    gradient_descent(model)
    train(plain, 3)
    cut_off(model, hybrid)
    if then != "nothing":
        compiled(model, model.optimizer if "same" in then else keras.optimizers.SGD(RATE))
        assert left_over(model) <= {"_get_metrics_result_or_logs", "_get_current_learning_rate"}
    callbacks = {"the same callback": [hybrid], "another callback": [HybridCallback(BRISK)]}
    got = train(model, 4, *callbacks.get(follows, []))
    expected = train(plain, 4)
    np.testing.assert_allclose(got["loss"], expected["loss"], rtol=1e-5)
    for ours, theirs in zip(weights(model), weights(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert int(model.optimizer.iterations) == (4 if then == "another optimizer" else 7)
    assert not left_over(model)
    assert follows == "the same callback" or hybrid.statistics().steps == 3


@pytest.mark.parametrize("call", ["train_on_batch", "evaluate"])
def test_after_a_cut_off_and_a_compile_the_models_other_methods_are_its_own(call):
    model, hybrid = regression(), HybridCallback(BRISK)
    cut_off(model, hybrid)
    compiled(model, keras.optimizers.SGD(RATE))
    assert np.isfinite(getattr(model, call)(*digits()))
    assert hybrid.statistics().steps == 3
    train(model, 1, hybrid)
    assert not left_over(model)


def test_a_predicted_train_on_batch_of_a_callback_leaves_no_loss_of_zero():
    """It empties Keras's means, in which nothing is then at the end of the epoch."""

    class Twice(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.train_on_batch(*digits())

    hybrid = HybridCallback(BRISK)
    losses = train(regression(), 120, Twice(), hybrid)["loss"]
    assert hybrid.statistics().predicted_steps > 30
    assert all(0.9 * after < before < 1.5 * after for before, after in pairwise(losses))


def test_a_model_whose_fit_was_cut_off_is_left_alone_when_the_callback_trains_another():
    first, second, hybrid = regression(), regression(seed=1), HybridCallback(BRISK)
    cut_off(first, hybrid)
    train(second, 2, hybrid)
    assert not left_over(first)
    before, steps = weights(second), int(first.optimizer.iterations)
    train(first, 3)
    assert int(first.optimizer.iterations) == steps + 3
    assert same(before, weights(second))
    assert hybrid.statistics().steps == 2


@pytest.mark.parametrize("again", [True, False])
def test_a_history_of_the_users_may_be_in_the_fit_after_one_that_was_cut_off(again):
    model, hybrid, history = regression(), HybridCallback(BRISK), keras.callbacks.History()
    cut_off(model, hybrid, history)
    train(model, 4, *([hybrid] if again else []), history)
    assert int(model.optimizer.iterations) == 7
    assert hybrid.statistics().steps == (7 if again else 3)
    assert not left_over(model)


def test_a_run_is_ended_by_hand_after_a_fit_that_was_cut_off():
    model, hybrid = regression(), HybridCallback(BRISK)
    while hybrid.engine.phase is not Phase.PREDICT:
        train(model, 1, hybrid)
    cut_off(model, hybrid)
    assert hybrid.engine.phase is Phase.PREDICT
    for call in (hybrid.averaged, lambda: hybrid.finish(digits())):
        with pytest.raises(ProtocolError, match=r"call on_train_end\(\) of this callback first"):
            call()
    hybrid.on_train_end()
    assert not left_over(model)
    hybrid.finish(digits())
    assert hybrid.engine.phase is Phase.FULL
    with hybrid.averaged():
        assert np.isfinite(model.evaluate(*digits(), verbose=0))
    # Once more does no harm, wherever the model has been since then.
    compiled(model, keras.optimizers.SGD(RATE))
    train(model, 1)
    function = model.train_function
    hybrid.on_train_end()
    assert model.train_function is function
    assert hybrid.statistics().divergences == 0
