"""The running average of the weights, between two fits."""

import keras
import numpy as np
import pytest
from keras_problems import CURVED, digits, perceptron, regression, same, train, weights

from hybridcore import Action, ConfigError, HybridTrainerConfig, ProtocolError
from hybridcore.averaging import DECAY, INTERVAL
from hybridcore_keras import HybridCallback

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def noisy(hybrid, *callbacks, epochs=4, rate=1e-2, seed=0):
    x, y = digits()
    model = perceptron(keras.optimizers.Adam(rate), seed)
    model.fit(
        x[:1200], y[:1200], batch_size=16, epochs=epochs, verbose=0, callbacks=[hybrid, *callbacks]
    )
    return model


class Weights(keras.callbacks.Callback):
    """The weights that each full step left, before an outer step moved them on."""

    def __init__(self, hybrid):
        super().__init__()
        self.hybrid, self.seen = hybrid, []

    def on_train_begin(self, logs=None):
        engine = self.hybrid.engine
        observe = engine.observe

        def watched(observation):
            if engine.next().action is Action.FULL:
                self.seen.append([np.array(w, np.float64) for w in self.model.get_weights()])
            observe(observation)

        engine.observe = watched


def test_it_is_the_polynomial_mean_of_what_fit_went_through():
    hybrid = HybridCallback()
    watch = Weights(hybrid)
    model = noisy(hybrid, watch)
    assert hybrid.statistics().outer_steps > 0
    mean = watch.seen[0]
    for count, now in enumerate(watch.seen[INTERVAL - 1 :: INTERVAL], start=2):
        share = (DECAY + 1) / (DECAY + count)
        mean = [m + share * (w - m) for m, w in zip(mean, now, strict=True)]
    raw = weights(model)
    with hybrid.averaged():
        for found, expected in zip(weights(model), mean, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        with pytest.raises(ProtocolError, match="leave the with block"):
            model.fit(*digits(), verbose=0, callbacks=[hybrid])
    assert same(raw, weights(model))
    with pytest.raises(KeyboardInterrupt), hybrid.averaged():
        raise KeyboardInterrupt
    assert same(raw, weights(model))
    hybrid.state_dict()


def test_quasi_newton_steps_are_in_it():
    hybrid, mean, asked = HybridCallback(CURVED), [], []

    class Mean(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            observe = hybrid.engine.observe

            def watched(observation):
                action, share = hybrid.engine.next().action, hybrid.engine.next().average
                if share:
                    now = [np.array(w, np.float64) for w in self.model.get_weights()]
                    past = mean if mean else now
                    mean[:] = [m + share * (w - m) for m, w in zip(past, now, strict=True)]
                    asked.append(action)
                observe(observation)

            hybrid.engine.observe = watched

    model = regression()
    train(model, 1, hybrid, Mean(), steps_per_epoch=70)
    assert asked.count(Action.BASE) > 3
    with hybrid.averaged():
        for found, expected in zip(weights(model), mean, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_noise_is_less_at_the_average():
    """On three seeds, at a rate that is high enough for noise to be most of what is left."""
    (x, y), raw, averaged = digits(), [], []
    for seed in range(3):
        hybrid = HybridCallback()
        model = noisy(hybrid, epochs=8, rate=3e-2, seed=seed)
        raw.append(model.evaluate(x[1200:], y[1200:], verbose=0))
        with hybrid.averaged():
            averaged.append(model.evaluate(x[1200:], y[1200:], verbose=0))
    assert np.mean(averaged) < 0.95 * np.mean(raw)


def test_it_waits_until_fit_has_returned():
    hybrid, errors = HybridCallback(), []

    class Eager(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            with pytest.raises(ProtocolError, match="after fit") as caught:
                hybrid.averaged()
            errors.append(caught)

    noisy(hybrid, Eager(), epochs=2)
    assert len(errors) == 2


def test_the_average_is_not_taken_for_the_run_s_own_weights(tmp_path):
    hybrid = HybridCallback()
    noisy(hybrid, epochs=2)
    state = hybrid.state_dict()
    with hybrid.averaged():
        for call in (
            hybrid.state_dict,
            lambda: hybrid.save(tmp_path / "run"),
            lambda: hybrid.load_state_dict(state),
            lambda: hybrid.load(tmp_path),
            lambda: hybrid.finish((np.zeros((1, 64)), np.zeros(1))),
            hybrid.averaged,
        ):
            with pytest.raises(ProtocolError, match=r"inside averaged\(\): .* leave the with"):
                call()
    assert not list(tmp_path.iterdir())


def test_with_hybridcore_off_the_weights_are_the_run_s_own():
    hybrid = HybridCallback(HybridTrainerConfig(enabled=False))
    model = noisy(hybrid, epochs=1)
    raw = weights(model)
    with hybrid.averaged():
        assert same(raw, weights(model))


def test_without_the_setting_there_is_none():
    with pytest.raises(ConfigError, match="averaging=True, got False"):
        HybridCallback(HybridTrainerConfig(averaging=False)).averaged()


def test_it_goes_on_where_it_was_saved():
    x, y = digits()

    def resumed(stop):
        hybrid = HybridCallback()
        model = perceptron()
        for _ in range(2):
            model.fit(x, y, batch_size=16, shuffle=False, verbose=0, callbacks=[hybrid])
            if stop:
                state, hybrid = hybrid.state_dict(), HybridCallback()
                hybrid.load_state_dict(state)
        # A loaded state is taken up when fit begins.
        model.fit(x, y, batch_size=16, steps_per_epoch=9, verbose=0, callbacks=[hybrid])
        with hybrid.averaged():
            return weights(model)

    assert same(resumed(stop=False), resumed(stop=True))
