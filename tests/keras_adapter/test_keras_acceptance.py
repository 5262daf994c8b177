"""The promises of the Keras adapter, on real problems."""

import dataclasses

import documents
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_problems import (
    BRISK,
    Watch,
    compiled,
    digits,
    perceptron,
    regression,
    same,
    spoiled,
    train,
)
from keras_problems import weights as weights_of

from hybridcore import ConfigError, DivergenceError, HybridTrainerConfig, ModelError, Phase
from hybridcore_keras import HybridCallback
from hybridcore_keras.fits import Fit

# What Keras does to TensorFlow's tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def normalised():
    return [keras.layers.BatchNormalization()]


def normalised_with_dropout():
    return [keras.layers.BatchNormalization(), keras.layers.Dropout(0.1)]


def test_one_core_two_skins():
    torch = pytest.importorskip("torch")
    from hybridcore_torch import HybridTrainer

    torch.set_num_threads(1)
    x, y = digits()
    # The two place epsilon differently, so it must not matter.
    model = regression(keras.optimizers.Adam(3e-3, epsilon=1e-16))
    kernel, bias = model.get_weights()
    # More snapshots make extrapolations that turn rounding into different coefficients.
    # Of quasi-Newton steps this holds until rounding decides: see test_keras_secants.py.
    config = HybridTrainerConfig(snapshots=4, secant_pairs=0)
    hybrid = HybridCallback(config)
    watch = Watch(hybrid)
    train(model, 500, hybrid, watch)

    twin = torch.nn.Linear(64, 10)
    with torch.no_grad():
        twin.weight.copy_(torch.from_numpy(kernel.T.copy()))
        twin.bias.copy_(torch.from_numpy(bias))
    optimizer = torch.optim.Adam(twin.parameters(), 3e-3, eps=1e-16)
    trainer = HybridTrainer(twin, optimizer, config)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    closure = lambda: torch.nn.functional.cross_entropy(twin(inputs), labels)  # noqa: E731
    phases, losses = [], []
    for _ in range(500):
        losses.append(trainer.step(closure).loss)
        phases.append(trainer.engine.phase)
    assert phases == watch.phases
    assert phases.count(Phase.PREDICT) > 100
    # How far a jump spreads rounding depends on the processor: 3 % was seen, and less than 1 %.
    np.testing.assert_allclose(watch.losses, losses, rtol=5e-2)
    ours, theirs = hybrid.statistics(), trainer.statistics()
    for name in ("full_steps", "predicted_steps", "probes", "rollbacks"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_disabled_is_plain_fit_bit_for_bit():
    def run(*callbacks):
        model = perceptron(layers=normalised_with_dropout)
        x, y = digits()
        model.fit(x, y, batch_size=64, epochs=5, verbose=0, callbacks=list(callbacks))
        return weights_of(model)

    off = HybridCallback(HybridTrainerConfig(enabled=False))
    assert same(run(), run(off))
    assert off.statistics().backward_passes == 5 * 29
    assert off.statistics().predicted_steps == 0


def test_disabled_a_loop_of_the_users_own_is_counted():
    off = HybridCallback(HybridTrainerConfig(enabled=False))
    calls, logs = keras.callbacks.CallbackList([off], model=regression()), {"loss": 1.0}
    calls.on_train_begin()
    calls.on_epoch_begin(0)
    for batch in range(3):
        calls.on_train_batch_begin(batch)
        calls.on_train_batch_end(batch, {"loss": 1.0})
    off.on_epoch_end(0, logs)
    calls.on_train_end()
    assert off.statistics().steps == 3
    assert logs["hybrid_backward_reduction"] == 0.0


def test_full_steps_are_those_of_plain_fit():
    def run(*callbacks):
        model = perceptron(
            keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(1e-2, 100), 0.01),
            layers=normalised_with_dropout,
            metrics=["accuracy"],
        )
        x, y = digits()
        history = model.fit(x, y, batch_size=64, epochs=3, verbose=0, callbacks=list(callbacks))
        return weights_of(model), history.history["loss"], history.history["accuracy"]

    plain, hybrid = run(), run(HybridCallback(HybridTrainerConfig(warmup_steps=1000)))
    # Not bit for bit: TensorFlow rounds the same formula differently in another graph.
    for ours, theirs in zip(hybrid[0], plain[0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(hybrid[1:], plain[1:], rtol=1e-5)


def test_two_runs_are_the_same_bit_for_bit():
    runs = []
    for _ in range(2):
        model, hybrid = regression(), HybridCallback(BRISK)
        watch = Watch(hybrid)
        train(model, 250, hybrid, watch)
        runs.append((watch.losses, watch.phases, weights_of(model)))
    assert runs[0][:2] == runs[1][:2]
    assert same(runs[0][2], runs[1][2])


def test_predicted_steps_run_no_backward_pass():
    model, hybrid = regression(), HybridCallback(BRISK)
    watch = Watch(hybrid)
    train(model, 400, hybrid, watch)
    statistics = hybrid.statistics()
    assert statistics.steps == 400
    assert statistics.predicted_steps >= 100
    assert statistics.rollbacks == 0
    assert watch.iterations[-1] == 400 - statistics.predicted_steps
    assert watch.iterations[-1] == round(400 * (1 - statistics.backward_reduction))


@pytest.mark.parametrize("data", ["whole", "ragged"])
def test_nothing_is_traced_again(data):
    traces, (x, y) = 0, digits()

    class Counted(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(10)

        def call(self, x):
            nonlocal traces
            traces += 1
            return self.dense(x)

    def run(*callbacks, fits=1):
        nonlocal traces
        traces = 0
        keras.utils.set_random_seed(0)
        model = Counted()
        model.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(True))
        model(np.zeros((1, 64), "float32"))
        # Otherwise the function of plain fit is traced once more, because it builds the optimizer.
        model.optimizer.build(model.trainable_variables)
        for _ in range(fits):
            if data == "whole":
                train(model, 150, *callbacks)
            else:
                # The last batch is smaller than the others.
                model.fit(x, y, batch_size=60, epochs=5, verbose=0, callbacks=[*callbacks])
        return traces

    plain = run()
    hybrid = HybridCallback(BRISK)
    # One more for the probe's function, and none in a second fit.
    assert run(hybrid, fits=2) == plain + 1
    assert hybrid.statistics().probes > 0
    assert hybrid.statistics().predicted_steps > 0
    assert hybrid.statistics().steps == 300


def test_full_batch_regression_is_reached_for_less():
    target = train(regression(), 800)["loss"][-1]
    hybrid = HybridCallback()
    watch = Watch(hybrid)

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            predicted = hybrid.engine.phase is Phase.PREDICT
            self.model.stop_training = not predicted and logs["loss"] <= target

    train(regression(), 1600, hybrid, watch, Stop())
    statistics = hybrid.statistics()
    assert watch.losses[-1] <= target
    assert statistics.backward_passes + statistics.probes / 3 < 0.75 * 800


def test_noisy_training_gets_outer_steps_and_no_jumps():
    x, y = digits()
    model, hybrid = perceptron(), HybridCallback()
    model.fit(x, y, batch_size=32, epochs=14, verbose=0, callbacks=[hybrid])
    statistics = hybrid.statistics()
    assert statistics.steps == 14 * 57
    # What outer steps stand for is all, and Keras itself counts as many steps less.
    assert 0.05 * statistics.steps < statistics.predicted_steps <= 2 * statistics.outer_steps
    assert int(model.optimizer.iterations) == statistics.steps - statistics.predicted_steps
    assert statistics.rollbacks == 0
    # Probes of outer steps and looks for smooth work, a third of a step each.
    assert statistics.probes / 3 <= 0.02 * statistics.steps
    assert statistics.outer_steps > 30


def test_no_probe_is_charged_with_its_compilation():
    x, y = digits()
    model, hybrid = perceptron(), HybridCallback()
    while not hybrid.statistics().probes:
        model.fit(x, y, batch_size=32, verbose=0, callbacks=[hybrid])
    # Compiled in the time of some dozens of steps.
    assert hybrid.statistics().probe_cost < 10.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_batch_costs_itself_and_nothing_else(bad):
    for victim in (0, 30, 46):
        model = perceptron(layers=normalised, metrics=["sparse_categorical_crossentropy"])
        hybrid = HybridCallback(BRISK)
        kept = []
        keep = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs, m=model, k=kept: k.append(weights_of(m))
        )
        history = train(model, 60, hybrid, keep, data=spoiled([victim], bad))
        assert all(np.isfinite(w).all() for step in kept for w in step)
        assert np.isfinite(history["loss"][-1])
        statistics = hybrid.statistics()
        assert statistics.steps == 60
        if statistics.divergences:
            assert same(kept[victim], kept[victim - 1]) or victim == 0


def test_a_bad_batch_leaves_all_state_as_it_was():
    model = perceptron(layers=normalised, metrics=["sparse_categorical_crossentropy"])
    hybrid = HybridCallback(BRISK)
    state = []
    variables = lambda: [  # noqa: E731
        v.numpy() for v in (*model.variables, *model.optimizer.variables)
    ]
    keep = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: state.append((variables(), logs))
    )
    x, y = digits()
    parts = np.array_split(np.arange(len(x)), 10)
    x[parts[6]] = np.nan
    data = tf.data.Dataset.from_generator(
        lambda: ((x[p], y[p]) for p in parts),
        output_signature=(tf.TensorSpec((None, 64)), tf.TensorSpec((None,), tf.int64)),
    )
    train(model, 1, hybrid, keep, data=data, steps_per_epoch=10)
    assert same(state[5][0], state[6][0])
    assert not same(state[6][0], state[7][0])
    assert state[5][1] == state[6][1]
    assert all(np.isfinite(v).all() for values, _ in state for v in values)
    assert hybrid.statistics().divergences == 1


def test_a_bad_batch_among_good_ones_is_as_if_it_had_not_been_there():
    x, y = digits()
    spoilt = x.copy()
    spoilt[600:700] = np.nan
    good = np.r_[0:600, 700:1700]
    found = []
    for inputs, labels, callbacks in (
        (x[good], y[good], []),
        (spoilt[:1700], y[:1700], [HybridCallback(HybridTrainerConfig(warmup_steps=999))]),
    ):
        model = perceptron(layers=normalised, metrics=["accuracy"])
        more = {"batch_size": 100, "epochs": 2, "shuffle": False, "verbose": 0}
        history = model.fit(inputs, labels, callbacks=callbacks, **more).history
        found.append([history["loss"], history["accuracy"], *weights_of(model)])
    for theirs, ours in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_bad_batch_can_raise():
    hybrid = HybridCallback(HybridTrainerConfig(on_divergence="raise"))
    model = regression()
    with pytest.raises(DivergenceError, match="left out"):
        train(model, 10, hybrid, data=spoiled([4], np.nan))
    assert hybrid.statistics().steps == 5
    assert np.isfinite(train(model, 10)["loss"]).all()
    assert hybrid.statistics().steps == 5
    # The model is as good as new for whoever comes next.
    other = HybridCallback(BRISK)
    assert np.isfinite(train(model, 10, other)["loss"]).all()
    assert other.statistics().full_steps == 10
    assert np.isfinite(train(model, 10)["loss"]).all()


def test_the_figures_of_the_run_are_logged():
    seen = []
    spy = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(dict(logs)))
    history = train(regression(), 120, HybridCallback(BRISK), spy)
    for name in ("hybrid_phase", "hybrid_measured_speedup", "hybrid_backward_reduction"):
        assert len(history[name]) == 120
        assert name in seen[-1]
    assert set(history["hybrid_phase"]) == {0.0, 1.0, 2.0, 3.0}
    assert history["hybrid_steps"] == list(range(1, 121))
    assert history["hybrid_full_steps"][-1] + history["hybrid_predicted_steps"][-1] == 120


def test_the_progress_bar_shows_what_it_always_did(capsys):
    train(regression(), 1, HybridCallback(BRISK), steps_per_epoch=60, verbose=2)
    assert "loss:" in capsys.readouterr().out


def test_a_probe_that_is_no_number_is_told_once(caplog):
    config = dataclasses.replace(BRISK, outer_momentum=False)
    hybrid = HybridCallback(config, probe=(digits()[0] * np.nan, digits()[1]))
    train(regression(), 2, hybrid, steps_per_epoch=60)
    assert hybrid.statistics().predicted_steps == 0
    assert caplog.text.count("probe has the loss nan at first") == 1


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match="from_dict"):
        HybridCallback({"horizon": 3})
    with pytest.raises(ConfigError, match="snapshot_kind is 'host'"):
        HybridCallback(HybridTrainerConfig(snapshot_kind="host"))
    with pytest.raises(ConfigError, match="probe must be"):
        HybridCallback(probe=lambda: 1.0)
    with pytest.raises(ConfigError, match="probe has parts of 5, 4 rows"):
        HybridCallback(probe=(np.zeros((5, 64)), np.zeros(4)))
    with pytest.raises(ConfigError, match="probe has 0 rows"):
        HybridCallback(probe=(np.zeros((0, 64)), np.zeros(0)))
    model = regression()
    for flat in (list, iter):
        with pytest.raises(ConfigError, match=r"got \w*Variable in the place .* for each group"):
            HybridCallback(layer_groups=flat(model.trainable_variables))
    for groups in ({"all": model.trainable_variables}, ["kernel"], 3):
        with pytest.raises(ConfigError, match=r"got (dict|str|int).* a list for each group"):
            HybridCallback(layer_groups=groups)
    first, *others = model.trainable_variables
    for groups, message in (
        ([[first]], f"lacks {len(others)} .* such as {others[0].path}: "),
        ([[first, *others], [first]], f"names {first.path} twice: "),
        ([[first, *others, keras.Variable(0.0, name="own")]], "holds own, which is no trainable"),
    ):
        with pytest.raises(ModelError, match=f"layer_groups {message}"):
            train(model, 1, HybridCallback(layer_groups=groups))
    with pytest.raises(ConfigError, match="path must be a path, got 3"):
        HybridCallback().load(3)
    with pytest.raises(ConfigError, match="folder must be a path, got 3"):
        HybridCallback().save_every(5, 3)
    frozen = regression()
    frozen.trainable = False
    frozen.compile("adam", "mse")
    with pytest.raises(ModelError, match="no trainable variable"):
        train(frozen, 1, HybridCallback())


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("parts", [lambda x, y: (x[:9, :5], y[:9]), lambda x, y: (x[:9],)])
def test_a_probe_that_cannot_be_evaluated_is_told_in_the_first_step(parts, built):
    x, y = digits()
    model = perceptron() if built else compiled(keras.Sequential([keras.layers.Dense(10)]))
    probe = parts(x, y)
    hybrid = HybridCallback(probe=probe)
    with pytest.raises(ConfigError, match=r"probe with parts of shapes .* pass a batch") as raised:
        train(model, 100, hybrid)
    assert str(probe[0].shape) in str(raised.value)
    assert model.optimizer.iterations == 1
    assert not isinstance(model.train_function, Fit)
    train(model, 2)
    train(model, 2, HybridCallback(probe=(x, y)))


def test_two_in_one_fit_are_refused_and_the_model_is_given_back():
    model, hybrid = regression(), HybridCallback()
    for twice in ([hybrid, HybridCallback()], [hybrid, hybrid]):
        with pytest.raises(ModelError, match="HybridCallback twice"):
            train(model, 1, *twice)
        assert not isinstance(model.train_function, Fit)
        train(model, 2)
        train(model, 2, hybrid)


def test_a_loop_of_the_users_own_is_refused():
    callbacks = keras.callbacks.CallbackList([HybridCallback()], model=regression())
    with pytest.raises(ModelError, match="no fit"):
        callbacks.on_train_begin()


@pytest.mark.parametrize("inside", [keras.Model, keras.layers.Layer])
def test_a_model_that_is_built_before_its_layers_trains(inside):
    class Late(inside):
        def __init__(self):
            super().__init__()
            self.inner = keras.layers.Dense(10)

        def build(self, shape):
            self.built = True

        def call(self, x):
            return self.inner(x)

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden, self.late = keras.layers.Dense(8), Late()

        def build(self, shape):
            self.hidden.build(shape)
            self.late.build((None, 8))
            self.built = True

        def call(self, x):
            return self.late(self.hidden(x))

    model = Late() if inside is keras.Model else Model()
    model.build((None, 64))
    compiled(model)
    hybrid = HybridCallback(BRISK)
    train(model, 2, hybrid)
    assert hybrid.statistics().full_steps == 2


def test_the_users_probe_and_layer_groups_are_used():
    x, y = digits()
    model = perceptron()
    groups = [model.layers[1].trainable_variables, model.layers[0].trainable_variables]
    hybrid = HybridCallback(BRISK, probe=(x[:200], y[:200]), layer_groups=groups)
    train(model, 150, hybrid)
    assert hybrid.statistics().probes > 0
    assert hybrid.hands.snapshots.groups == [[2, 3], [0, 1]]


def test_layer_groups_with_a_layer_that_was_frozen_are_refused_before_a_step():
    model = perceptron()
    hybrid = HybridCallback(BRISK, layer_groups=[one.trainable_variables for one in model.layers])
    train(model, 40, hybrid)
    plain = model.train_function
    model.layers[0].trainable = False
    compiled(model, model.optimizer)
    before = weights_of(model)
    with pytest.raises(ModelError, match=r"layer_groups holds \S+/kernel, which is no trainable"):
        train(model, 5, hybrid)
    assert same(before, weights_of(model))
    assert hybrid.statistics().steps == 40
    assert model.train_function is not plain
    # With the groups that it was built with it goes on.
    model.layers[0].trainable = True
    compiled(model, model.optimizer)
    train(model, 5, hybrid)
    assert hybrid.statistics().steps == 45


def test_the_diff_of_the_readme():
    readme = documents.document("README")
    if readme is None:
        pytest.skip("the documents are in the source tree alone")
    for program in documents.sides(documents.block(readme, "diff", "hybridcore_keras")):
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
        model.compile("adam", "mse")
        scope = {"model": model, "x": np.ones((64, 64)), "y": np.ones((64, 10))}
        exec(f"import hybridcore_keras\n{program}", scope)
        assert model.optimizer.iterations == 2


@pytest.mark.parametrize("spoil", [False, True])
@pytest.mark.parametrize("phase", [Phase.PREDICT, Phase.CORRECT])
def test_a_run_that_ends_in_a_jump_is_left_at_the_better_weights(phase, spoil):
    model, hybrid, before = regression(), HybridCallback(BRISK), None
    while hybrid.engine.phase is not phase or before is None:
        if hybrid.engine.may_jump:
            before = weights_of(model)
        train(model, 1, hybrid)
    train(model, 1, hybrid)
    with pytest.raises(ConfigError, match="needs a batch"):
        hybrid.finish()
    if spoil:
        model.set_weights([-w for w in model.get_weights()])
        # As if nobody had noticed.
        hybrid._left = hybrid.hands.fingerprint()
    jumped = weights_of(model)
    iterations, steps = int(model.optimizer.iterations), hybrid.statistics().steps
    average = hybrid.hands.average
    hybrid.finish(digits())
    assert hybrid.engine.phase is Phase.FULL
    assert not hybrid.engine.may_roll_back
    assert same(weights_of(model), before if spoil else jumped)
    assert (int(model.optimizer.iterations), hybrid.statistics().steps) == (iterations, steps)
    assert hybrid.statistics().rollbacks == spoil
    assert hybrid.state_dict()["recovery"] is None
    # Nothing has changed that it would not know of.
    train(model, 1, hybrid)
    assert hybrid.hands.average is average is not None
    predicted = hybrid.statistics().predicted_steps
    train(model, 100, hybrid)
    assert hybrid.statistics().predicted_steps > predicted
    assert model.evaluate(*digits(), verbose=0) < 0.3


def test_weights_that_are_written_before_a_run_is_ended_are_kept():
    model, hybrid = regression(), HybridCallback(BRISK)
    while hybrid.engine.phase is not Phase.CORRECT:
        train(model, 1, hybrid)
    model.set_weights([-w for w in model.get_weights()])
    written = weights_of(model)
    hybrid.finish(digits())
    assert same(weights_of(model), written)


def test_a_batch_that_cannot_be_evaluated_ends_nothing():
    model, hybrid = regression(), HybridCallback(BRISK)
    while hybrid.engine.phase is not Phase.CORRECT:
        train(model, 1, hybrid)
    x, y = digits()
    jumped = weights_of(model)
    for bad in ((x[:, :2], y), (x, np.stack([y] * 3, 1))):
        with pytest.raises(ConfigError, match=r"batch with parts of shapes .* cannot be evaluated"):
            hybrid.finish(bad)
        assert same(weights_of(model), jumped)
        assert hybrid.engine.may_roll_back
    hybrid.finish((x, y))
    assert not hybrid.engine.may_roll_back
    assert hybrid.statistics().rollbacks == 0
    assert same(weights_of(model), jumped)


@pytest.mark.parametrize("name", ["probe", "put_back"])
def test_what_fails_while_a_run_is_ended_takes_the_jump_back(name, monkeypatch):
    model, hybrid = regression(), HybridCallback(BRISK)
    while hybrid.engine.phase is not Phase.CORRECT:
        if hybrid.engine.may_jump:
            before = weights_of(model)
        train(model, 1, hybrid)
    model.set_weights([-w for w in model.get_weights()])
    hybrid._left = hybrid.hands.fingerprint()
    port, calls = hybrid.hands.port, []
    plain = getattr(port, name)

    def once(*arguments):
        calls.append(name)
        # The first one sees whether the batch can be evaluated at all.
        if name == "probe" and len(calls) == 1:
            return plain(*arguments)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(port, name, once)
    with pytest.raises(KeyboardInterrupt):
        hybrid.finish(digits())
    assert same(weights_of(model), before)
    assert not hybrid.engine.may_roll_back
    train(model, 100, hybrid)
    assert model.evaluate(*digits(), verbose=0) < 0.3
