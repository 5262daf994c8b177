"""Quasi-Newton steps in fit: the algebra, what they gain, and where there are none."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_problems import (
    BRISK,
    CROSS_ENTROPY,
    CURVED,
    Watch,
    digits,
    perceptron,
    regression,
    train,
)
from keras_problems import weights as weights_of

from hybridcore import HybridTrainerConfig, Phase
from hybridcore.secant import Stage
from hybridcore_keras import HybridCallback
from hybridcore_keras.secants import SecantBank, affordable

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def descending(steps=60, **arguments):
    """A callback in the midst of its quasi-Newton steps."""
    model, hybrid = regression(**arguments), HybridCallback(CURVED)
    train(model, steps, hybrid)
    assert hybrid.hands.secants is not None
    return model, hybrid


def test_products_and_points_are_those_of_the_vectors():
    model, hybrid = descending()
    bank = hybrid.hands.secants
    state = bank.state_dict()
    k, size = state["counts"][0], sum(w.size for w in weights_of(model))
    rows = np.array(state["rows"], dtype=np.float64)
    assert rows.shape == (2 * k + 3, size)
    moved, changed = (rows[i * k : (i + 1) * k][state["order"]] for i in range(2))
    base, gradient, metric = rows[2 * k :]
    assert np.abs(moved).min(axis=0).max() > 0.0
    # Changes are kept in the metric.
    both = np.vstack((changed / metric, gradient))
    plain, scaled = bank.products()
    # Displacements and changes before them are in no direction.
    products = ((np.triu(plain), np.triu(moved @ both.T)), (scaled, both * metric @ both.T))
    # Of vectors in float32: to the rounding of a sum of so many.
    for found, expected in products:
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    shares = np.random.default_rng(0).normal(size=2 * k + 1)
    vectors = np.vstack((moved, changed, gradient * metric))
    bank.reach(shares)
    reached = np.concatenate([w.ravel() for w in weights_of(model)])
    np.testing.assert_allclose(reached, base + shares @ vectors, rtol=1e-3, atol=1e-5)
    bank.reach(np.full(2 * k + 1, np.nan))
    assert np.isnan(weights_of(model)[0]).all()
    bank.reach(np.zeros(2 * k + 1))
    back = np.concatenate([w.ravel() for w in weights_of(model)])
    assert np.array_equal(back, base.astype(np.float32))


def test_a_state_of_version_4_has_the_same_products():
    model, hybrid = descending()
    whole, bank = hybrid.state_dict(), hybrid.hands.secants
    state = whole["secants"]
    k, metric = state["counts"][0], state["rows"][-1]
    changes = [row / metric for row in state["rows"][k : 2 * k]]
    old = {"rows": [*state["rows"][:k], *changes, *state["rows"][2 * k :]]}
    old |= {"counts": state["counts"], "order": state["order"]}
    other = SecantBank(hybrid.hands.port, hybrid.hands.pairs)
    other.load_state_dict(old)
    (plain, scaled), (found, turned) = bank.products(), other.products()
    np.testing.assert_allclose(np.triu(found), np.triu(plain), rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(turned, scaled, rtol=1e-3, atol=1e-9)
    again = other.state_dict()
    for here, there in zip(again["rows"], state["rows"], strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-12)
    resumed = HybridCallback(CURVED)
    resumed.load_state_dict(whole | {"hybridcore_keras": 4, "secants": old})
    losses = train(regression(seed=1), 5, resumed)["loss"]
    np.testing.assert_allclose(losses, train(model, 5, hybrid)["loss"], rtol=1e-3)


def test_a_state_goes_into_a_bank_that_has_room_for_more_pairs():
    _, hybrid = descending()
    state = hybrid.hands.secants.state_dict()
    larger = SecantBank(hybrid.hands.port, hybrid.hands.pairs + 3)
    larger.load_state_dict(state)
    for here, there in zip(larger.products(), hybrid.hands.secants.products(), strict=True):
        np.testing.assert_array_equal(here, there)


def test_the_gradient_of_the_pairs_is_that_of_the_loss():
    model, hybrid = descending()
    hybrid.hands.secants.back_to_base()
    x, y = digits()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with tf.GradientTape() as tape:
        value = loss(y, model(x, training=True))
    expected = np.concatenate(
        [g.numpy().ravel() for g in tape.gradient(value, model.trainable_variables)]
    )
    gradient = hybrid.hands.secants.state_dict()["rows"][-2]
    assert np.linalg.norm(gradient - expected) < 1e-4 * np.linalg.norm(expected)


def test_they_lower_the_loss_as_in_torch():
    torch = pytest.importorskip("torch")
    from hybridcore_torch import HybridTrainer

    torch.set_num_threads(1)
    x, y = digits()
    model = regression(keras.optimizers.Adam(3e-3, epsilon=1e-16))
    kernel, bias = model.get_weights()
    config, steps = HybridTrainerConfig(), 250
    hybrid = HybridCallback(config)
    watch = Watch(hybrid)
    train(model, steps, hybrid, watch)
    twin = torch.nn.Linear(64, 10)
    with torch.no_grad():
        twin.weight.copy_(torch.from_numpy(kernel.T.copy()))
        twin.bias.copy_(torch.from_numpy(bias))
    trainer = HybridTrainer(twin, torch.optim.Adam(twin.parameters(), 3e-3, eps=1e-16), config)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    losses, phases = [], []
    for _ in range(steps):
        result = trainer.step(lambda: torch.nn.functional.cross_entropy(twin(inputs), labels))
        losses.append(result.loss)
        phases.append(trainer.engine.phase)
    ours, theirs = hybrid.statistics(), trainer.statistics()
    assert phases == watch.phases
    for name in ("full_steps", "predicted_steps", "secant_steps", "probes", "rollbacks"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.secant_steps > 50
    assert ours.predicted_steps > 50
    # Fifty quasi-Newton steps make much of rounding.
    np.testing.assert_allclose(watch.losses[:110], losses[:110], rtol=1e-4)
    assert watch.losses[-1] < 1e-4
    assert losses[-1] < 1e-4


def test_weights_that_a_callback_writes_after_each_batch_stay_so():
    class Clip(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            for variable in self.model.trainable_variables:
                variable.assign(keras.ops.clip(variable, -0.2, 0.2))

    ends = {}
    for name in ("plain", "ours"):
        model, hybrid = regression(), HybridCallback(CURVED)
        train(model, 200, *([hybrid] if name == "ours" else []), Clip())
        assert max(np.abs(w).max() for w in weights_of(model)) <= 0.2 + 1e-6
        x, y = digits()
        ends[name] = model.evaluate(x, y, verbose=0)
    statistics = hybrid.statistics()
    # Each of them is the last of its kind, as it is found out in the next.
    assert 0 < statistics.secant_steps < 10
    assert ends["ours"] < 1.02 * ends["plain"]


def test_weights_that_a_train_step_writes_stay_so_and_keras_counts_its_passes():
    class Clipped(keras.Sequential):
        def train_step(self, *arguments):
            logs = super().train_step(*arguments)
            kernel = self.trainable_variables[0]
            kernel.assign(keras.ops.clip(kernel, -0.25, 0.25))
            return logs

    keras.utils.set_random_seed(0)
    layers = keras.layers.Dense(16, "tanh"), keras.layers.BatchNormalization()
    model = Clipped([keras.Input((64,)), *layers, keras.layers.Dense(10)])
    model.compile(keras.optimizers.Adam(1e-2), CROSS_ENTROPY)
    hybrid = HybridCallback(CURVED)
    watch = Watch(hybrid)
    train(model, 300, hybrid, watch)
    statistics = hybrid.statistics()
    assert statistics.secant_steps > 0
    assert watch.iterations[-1] == statistics.full_steps
    assert np.abs(weights_of(model)[0]).max() <= 0.25 + 1e-6


MOMENTS = {
    "a step": lambda s: s.stage is Stage.DESCEND and not (s.landing or s.block_over or s.suspects),
    "a decision": lambda s: s.block_over,
    "a doubt": lambda s: s.suspects,
    # Where a run has stood still: from where the optimizer has led it may go anywhere.
    "a landing": lambda s: s.landing and not (s.holds_recovery or s._steps),
}


@pytest.mark.parametrize("moment", [*MOMENTS, "a leap"])
def test_what_a_callback_writes_once_is_not_undone(moment):
    class Prune(keras.callbacks.Callback):
        done = 0

        def on_train_batch_end(self, batch, logs=None):
            kernel, engine = self.model.trainable_variables[0], hybrid.engine
            if self.done:
                # Three steps of the optimizer since at most, each of about its rate, 0.01.
                assert np.abs(kernel.numpy()[:32]).max() <= 0.05
                self.done += 1
            elif hybrid.hands.secants is not None:
                leaps = engine.phase is Phase.PREDICT
                here = MOMENTS.get(moment, lambda s: True)(engine.controller.secant)
                if here and leaps is (moment == "a leap"):
                    kernel.assign(np.concatenate([np.zeros((32, 10)), kernel.numpy()[32:]]))
                    self.done = 1
            self.model.stop_training = self.done > 3

    model, hybrid, prune = regression(), HybridCallback(CURVED), Prune()
    train(model, 400, hybrid, prune)
    assert prune.done == 4


def test_keras_counts_the_passes():
    model, hybrid = regression(), HybridCallback(CURVED)
    watch = Watch(hybrid)
    history = train(model, 300, hybrid, watch)
    statistics = hybrid.statistics()
    assert statistics.secant_steps > 30
    assert watch.iterations[-1] == statistics.full_steps
    assert history["loss"][-1] < 1e-4


def test_a_trial_in_vain_leaves_no_trace():
    model = perceptron(
        layers=lambda: [keras.layers.BatchNormalization()], metrics=["accuracy"], seed=1
    )
    hybrid = HybridCallback(CURVED)
    rejected = counted = 0
    states = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            nonlocal counted, rejected
            now = b"".join(v.numpy().tobytes() for v in self.model.non_trainable_variables)
            statistics = hybrid.statistics()
            of_trial = statistics.secant_steps > counted
            if of_trial and np.isfinite(hybrid.engine.forecast_loss):
                # Before it steps of the optimizer may have been taken back, in the same step.
                assert now in states
                rejected += now == states[-1]
            states.append(now)
            counted = statistics.secant_steps

    train(model, 250, hybrid, Look())
    assert rejected > 3


class Adam(keras.optimizers.Adam):
    """One of the user's own, which may do more."""


@pytest.mark.parametrize(
    "optimizer",
    [
        Adam(1e-2),
        keras.optimizers.AdamW(1e-2),
        keras.optimizers.Adam(1e-2, use_ema=True),
        keras.optimizers.Adam(1e-2, gradient_accumulation_steps=2),
        keras.optimizers.Adam(1e-2, loss_scale_factor=8.0),
        keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(1e-2)),
        keras.optimizers.Ftrl(1e-2),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_where_the_loss_is_not_all_that_is_lowered_there_are_none(optimizer):
    assert affordable(regression(), 20, 1e9) == 20
    assert affordable(regression(optimizer), 20, 1e9) == 0


def test_nor_where_a_step_is_several_batches_or_weights_are_bound_or_half():
    assert affordable(regression(steps_per_execution=2), 20, 1e9) == 0
    bound = perceptron(layers=lambda: [keras.layers.Dense(4, kernel_constraint="max_norm")])
    assert affordable(bound, 20, 1e9) == 0
    half = perceptron(layers=lambda: [keras.layers.Dense(4, dtype="float16")])
    assert affordable(half, 20, 1e9) == 0


def test_where_memory_runs_out_they_are_given_up_first(monkeypatch, caplog):
    plain = SecantBank.take

    def refused(bank):
        plain(bank)
        if len(bank._order) == 3:
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    monkeypatch.setattr(SecantBank, "take", refused)
    model, hybrid = regression(), HybridCallback(CURVED)
    watch = Watch(hybrid)
    train(model, 120, hybrid, watch)
    assert "from now on there are no secant pairs" in caplog.text
    statistics = hybrid.statistics()
    assert statistics.steps == 120
    assert statistics.snapshots == 6
    assert statistics.secant_steps == 0
    assert Phase.PREDICT in watch.phases
    # What was given up stays so in a run that goes on.
    again = HybridCallback(CURVED)
    again.load_state_dict(hybrid.state_dict())
    train(model, 60, again)
    assert again.statistics().secant_steps == 0
    assert again.hands.pairs == 0


@pytest.mark.parametrize("config", [CURVED, BRISK], ids=["curved", "brisk"])
def test_weights_that_the_user_loads_between_two_fits_are_kept(config):
    model, hybrid = regression(), HybridCallback(config)
    train(model, 65, hybrid)
    assert hybrid.hands.identities is not None
    rng = np.random.default_rng(0)
    loaded = [rng.normal(size=w.shape).astype("float32") for w in weights_of(model)]
    model.set_weights(loaded)
    train(model, 1, hybrid)
    # One step of Adam from there, and not from where the copies were.
    for now, before in zip(weights_of(model), loaded, strict=True):
        assert 0.0 < np.abs(now - before).max() < 0.05
    train(model, 60, hybrid)
    assert hybrid.statistics().steps == 126
    assert model.evaluate(*digits(), verbose=0) < 2.0


def test_an_interrupted_fit_goes_on_from_new_copies(monkeypatch):
    model, hybrid = regression(), HybridCallback(CURVED)
    plain, calls = SecantBank.products, 0

    def interrupted(bank):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return plain(bank)

    monkeypatch.setattr(SecantBank, "products", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, 100, hybrid)
    assert hybrid.hands.identities is None
    kept = weights_of(model)
    assert all(np.isfinite(w).all() for w in kept)
    hybrid.load_state_dict(hybrid.state_dict())
    train(model, 200, hybrid)
    assert hybrid.statistics().predicted_steps > 0
    assert model.evaluate(*digits(), verbose=0) < 0.3
