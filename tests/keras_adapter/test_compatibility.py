"""What else people use in `fit`: each thing with predicted steps beside it."""

import dataclasses
import gc
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_problems import (
    BRISK,
    CROSS_ENTROPY,
    CURVED,
    Watch,
    compiled,
    digits,
    forever,
    mirrored,
    perceptron,
    predicts,
    regression,
    same,
    spoiled,
    train,
    weights,
)

from hybridcore import Action, Directive, DivergenceError, HybridTrainerConfig, Phase
from hybridcore_keras import HybridCallback

# What Keras does to TensorFlow's tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_steps_per_execution():
    model, hybrid = regression(steps_per_execution=5), HybridCallback(BRISK)
    train(model, 4, hybrid, steps_per_epoch=200)
    statistics = hybrid.statistics()
    assert statistics.steps == 4 * 40
    assert statistics.predicted_steps > 20
    assert int(model.optimizer.iterations) == 5 * statistics.full_steps


def test_steps_per_execution_on_mini_batches():
    x, y = digits()
    model, hybrid = regression(steps_per_execution=4), HybridCallback(BRISK)
    model.fit(x[:1792], y[:1792], batch_size=32, epochs=60, verbose=0, callbacks=[hybrid])
    statistics = hybrid.statistics()
    assert statistics.steps == 60 * 56 / 4
    assert statistics.outer_steps > 30
    assert 0 < statistics.predicted_steps <= 2 * statistics.outer_steps
    assert int(model.optimizer.iterations) == 4 * statistics.full_steps


def test_several_epochs_with_validation_data():
    x, y = digits()
    model, hybrid = regression(metrics=["accuracy"]), HybridCallback(BRISK)
    validation = {"validation_data": (x[:500], y[:500]), "validation_freq": 10}
    history = train(model, 80, hybrid, **validation)
    assert hybrid.statistics().predicted_steps > 0
    assert len(history["val_loss"]) == 8
    # An epoch of predicted steps alone keeps the last accuracy, and its loss is the forecast.
    assert min(history["accuracy"][40:]) > 0.5
    assert min(history["loss"]) > 0.05
    assert history["val_accuracy"][-1] > 0.8


def test_fits_with_batches_of_two_sizes_in_turn_are_those_of_plain_fit():
    x, y = digits()
    finals = []
    for callbacks in ([], [HybridCallback(HybridTrainerConfig(warmup_steps=999))]):
        model = regression(metrics=["accuracy"])
        for size in (64, 100, 64, 100):
            data = tf.data.Dataset.from_tensor_slices((x, y)).batch(size, drop_remainder=True)
            train(model, 1, *callbacks, data=data, steps_per_epoch=None)
        finals.append(weights(model))
    for ours, theirs in zip(*finals, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    # Traced for each once.
    assert len(callbacks[0].hands.port._graphs) == 2


def test_an_epoch_without_a_good_batch_tells_no_loss_and_no_best_one():
    model, hybrid = regression(metrics=["accuracy"]), HybridCallback(BRISK)
    stopping = keras.callbacks.EarlyStopping("loss", patience=2)
    history = train(model, 9, hybrid, stopping, data=spoiled([4, 6], np.nan))
    assert np.flatnonzero(np.isnan(history["loss"])).tolist() == [4, 6]
    assert stopping.best == history["loss"][-1] == min(np.delete(history["loss"], [4, 6]))
    # Among good ones a bad batch is none of those that are averaged.
    history = train(model, 1, hybrid, data=spoiled([4, 6], np.nan), steps_per_epoch=9)
    assert 0.5 * stopping.best < history["loss"][0] < 2.0 * stopping.best


def test_batches_that_are_all_bad_end_a_fit_that_is_to_end_there():
    model, hybrid, ends = regression(), HybridCallback(BRISK), keras.callbacks.TerminateOnNaN()
    # Nine are left out, the tenth of a row is hopeless.
    data = spoiled([*range(3, 12), *range(20, 40)], np.nan)
    train(model, 1, hybrid, ends, data=data, steps_per_epoch=60)
    statistics = hybrid.statistics()
    assert statistics.steps == 30
    assert statistics.divergences == 19
    assert statistics.backward_passes == 30
    assert all(np.isfinite(w).all() for w in weights(model))
    # In another fit they are counted anew.
    history = train(model, 1, hybrid, ends, data=spoiled([0], np.nan), steps_per_epoch=20)
    assert np.isfinite(history["loss"]).all()
    assert hybrid.statistics().steps == 50


def test_the_loss_of_an_epoch_is_the_mean_of_losses_and_forecasts():
    model, hybrid = regression(), HybridCallback(BRISK)
    seen, expected, mixed, before = [], [], [], 0

    class Note(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.clear()

        def on_train_batch_end(self, batch, logs=None):
            nonlocal before
            self.predicted = hybrid.engine.counters.predicted_steps > before
            if self.predicted:
                seen.append(hybrid.engine.forecast_loss)
            before = hybrid.engine.counters.predicted_steps

        def on_epoch_end(self, epoch, logs=None):
            full = 40 - len(seen)
            mean = float(self.model._loss_tracker.result())
            expected.append((full * mean + sum(seen)) / 40)
            mixed.append(full < 40 and not self.predicted)

    history = train(model, 4, hybrid, Note(), steps_per_epoch=40)
    np.testing.assert_allclose(history["loss"], expected, rtol=1e-5)
    assert any(mixed)


def test_a_dataset_without_repeat():
    x, y = digits()
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(900)
    model, hybrid = regression(), HybridCallback(BRISK)
    model.fit(data, epochs=90, verbose=0, shuffle=False, callbacks=[hybrid])
    assert hybrid.statistics().steps == 180
    assert hybrid.statistics().predicted_steps > 0


def test_a_generator_that_ends_early():
    x, y = digits()

    def batches():
        for _ in range(133):
            yield x, y

    model, hybrid = regression(), HybridCallback(BRISK)
    with pytest.warns(UserWarning, match="ran out of data"):
        model.fit(batches(), epochs=1, verbose=0, callbacks=[hybrid], shuffle=False)
    assert hybrid.statistics().steps == 133
    assert hybrid.statistics().predicted_steps > 0


def test_no_iterator_outlives_its_fit():
    def alive():
        # What isinstance() asks of some of torch's objects makes them warn.
        return [found for found in gc.get_objects() if issubclass(type(found), tf.data.Iterator)]

    before = alive()
    # A probe takes the batch out of the iterator, and feeds it again through one of its own.
    hybrid, model = HybridCallback(BRISK), regression()
    train(model, 90, hybrid)
    assert hybrid.statistics().probes
    assert all(any(found is other for other in before) for found in alive())


def test_a_schedule_stands_where_it_would_in_plain_fit():
    schedule = keras.optimizers.schedules.PolynomialDecay(1e-2, 300, 1e-4)
    model = regression(keras.optimizers.Adam(schedule))
    seen = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(float(model.optimizer.learning_rate))
    )
    predicts(model, 200, note)
    expected = [float(schedule(step + 1)) for step in range(200)]
    np.testing.assert_allclose(seen, expected, rtol=1e-5)


def test_a_schedule_goes_on_in_a_fit_with_another_callback():
    schedule = keras.optimizers.schedules.PolynomialDecay(1e-2, 600, 1e-4)
    model = regression(keras.optimizers.Adam(schedule))
    seen = []
    note = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: seen.append(float(model.optimizer.learning_rate))
    )
    predicts(model, 200)
    assert int(model.optimizer.iterations) < 200
    train(model, 1, HybridCallback(BRISK), note)
    np.testing.assert_allclose(seen, [float(schedule(200))], rtol=1e-5)
    # Two callbacks in turn, and an optimizer that is put back to where it was.
    hybrid, counted = HybridCallback(BRISK), int(model.optimizer.iterations)
    train(model, 99, hybrid, epochs=1, steps_per_epoch=99)
    train(model, 100, HybridCallback(BRISK), epochs=1, steps_per_epoch=100)
    train(model, 1, hybrid, note)
    np.testing.assert_allclose(seen[1], float(schedule(400)), rtol=1e-5)
    model.optimizer.iterations.assign(counted - 50)
    train(model, 1, HybridCallback(BRISK), note)
    np.testing.assert_allclose(seen[2], float(schedule(counted - 50)), rtol=1e-5)


def test_a_rollback_restores_all_but_the_schedule():
    schedule = keras.optimizers.schedules.PolynomialDecay(1e-2, 300, 1e-4)

    def run(data):
        layers = lambda: [keras.layers.BatchNormalization()]  # noqa: E731
        model = perceptron(keras.optimizers.Adam(schedule), layers=layers)
        hybrid, states, rates = HybridCallback(BRISK), [], []
        watch = Watch(hybrid)
        note = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: (
                rates.append(float(model.optimizer.learning_rate)),
                states.append([v.numpy() for v in model.variables + model.optimizer.variables]),
            )
        )
        train(model, 100, hybrid, watch, note, data=data)
        return hybrid, watch.phases, states, rates

    _, phases, _, _ = run(forever())
    settling = phases.index(Phase.CORRECT) + 1
    hybrid, again, states, rates = run(spoiled([settling, settling + 1, settling + 2], np.nan))
    assert hybrid.statistics().rollbacks == 1
    assert again[:settling] == phases[:settling]
    jump = phases.index(Phase.PREDICT)
    # The jump's first step saved the weights where the step before had left them.
    assert same(states[jump - 1], states[settling + 2])
    assert not same(states[jump], states[jump - 1])
    np.testing.assert_allclose(rates, [float(schedule(n + 1)) for n in range(100)], rtol=1e-5)


def test_learning_rate_scheduler_and_reduce_on_plateau():
    model = regression()
    predicts(
        model,
        150,
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: 1e-2 * 0.995**epoch),
        keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=1000),
    )
    assert float(model.optimizer.learning_rate) == pytest.approx(1e-2 * 0.995**14, rel=1e-5)


def test_a_second_model_begins_anew():
    first, told = perceptron(), []
    before = [HybridCallback(BRISK), HybridCallback(BRISK)]
    train(first, 80, before[0])
    kept = weights(first)
    for hybrid in before:
        # A first batch that is left out tells nothing, and the other model's loss is not its.
        watch = Watch(hybrid)
        train(perceptron(seed=1), 90, hybrid, watch, data=spoiled([0], np.nan))
        assert hybrid.statistics().steps == 90
        told.append((watch.losses, watch.phases))
    np.testing.assert_array_equal(told[0][0], told[1][0])
    assert told[0][1] == told[1][1]
    assert Phase.PREDICT in told[0][1]
    assert same(kept, weights(first))


def test_a_new_optimizer_begins_anew():
    finals = []
    for hybrid in (None, HybridCallback(BRISK)):
        model, callbacks = regression(), [] if hybrid is None else [hybrid]
        train(model, 10, *callbacks)
        train(compiled(model, keras.optimizers.SGD(0.3)), 5, *callbacks)
        finals.append(weights(model))
    assert hybrid.statistics().steps == 5
    for ours, theirs in zip(*finals, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_early_stopping():
    stop = keras.callbacks.EarlyStopping(monitor="loss", patience=400, restore_best_weights=True)
    predicts(regression(), 150, stop)
    model, hybrid = regression(), HybridCallback(BRISK)
    stop = keras.callbacks.EarlyStopping(monitor="loss", baseline=1.0, patience=3)
    train(model, 200, stop, hybrid)
    assert hybrid.statistics().steps < 200


def test_model_checkpoint(tmp_path):
    model = regression()
    path = tmp_path / "best.keras"
    predicts(model, 150, keras.callbacks.ModelCheckpoint(path, monitor="loss"))
    again = keras.models.load_model(path)
    assert same(weights(again), weights(model))
    assert int(again.optimizer.iterations) == int(model.optimizer.iterations)


def test_backup_and_restore_with_the_callbacks_state(tmp_path):
    whole, hybrid = regression(), HybridCallback(BRISK)
    expected = train(whole, 120, hybrid)["loss"]
    for stop in (60, 85):
        first = HybridCallback(BRISK)
        halt = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs, s=stop, f=first: setattr(
                f.model, "stop_training", epoch + 1 == s
            )
        )
        place = str(tmp_path / str(stop))
        backup = keras.callbacks.BackupAndRestore(place, delete_checkpoint=False)
        train(regression(), 120, first, backup, halt)
        state = json.loads(json.dumps(first.state_dict(), default=lambda a: a.tolist()))
        second = HybridCallback(BRISK)
        second.load_state_dict(state)
        model = regression(seed=9)
        backup = keras.callbacks.BackupAndRestore(place, delete_checkpoint=False)
        rest = train(model, 120, backup, second)["loss"]
        assert rest == expected[stop:]
        assert same(weights(model), weights(whole))


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="the TensorBoard callback needs tensorboard")
    predicts(regression(), 120, keras.callbacks.TensorBoard(tmp_path))
    assert list(tmp_path.rglob("events*"))


@pytest.mark.parametrize("loss_scaling", [True, False])
def test_mixed_precision(loss_scaling):
    policy = "mixed_float16" if loss_scaling else "mixed_bfloat16"
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(8, activation="tanh", dtype=policy),
            keras.layers.Dense(10, dtype="float32"),
        ]
    )
    optimizer = keras.optimizers.Adam(3e-3)
    if loss_scaling:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    predicts(compiled(model, optimizer), 120, data=forever(100))


def test_jit_compile():
    predicts(regression(jit_compile=True))


def test_run_eagerly():
    predicts(regression(run_eagerly=True), 80)


def test_a_functional_model_with_two_outputs_and_batch_norm_and_dropout():
    x, y = digits()
    keras.utils.set_random_seed(0)
    inputs = keras.Input((64,))
    hidden = keras.layers.Dense(32, activation="relu")(inputs)
    hidden = keras.layers.Dropout(0.02)(keras.layers.BatchNormalization()(hidden))
    outputs = {"label": keras.layers.Dense(10, name="label")(hidden)}
    outputs["mean"] = keras.layers.Dense(1, name="mean")(hidden)
    model = keras.Model(inputs, outputs)
    loss = {"label": CROSS_ENTROPY, "mean": "mse"}
    compiled(model, keras.optimizers.Adam(1e-3), loss=loss, metrics={"label": "accuracy"})
    labels = {"label": y, "mean": x.mean(1, keepdims=True)}
    data = tf.data.Dataset.from_tensors((x, labels)).repeat()
    config = HybridTrainerConfig(warmup_steps=20, min_full_steps=24, confidence_threshold=0.2)
    hybrid = predicts(model, 250, config=config, data=data)
    assert hybrid.statistics().probes > 0


def test_probes_leave_no_trace():
    layers = lambda: [keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)]  # noqa: E731
    model, hybrid = perceptron(layers=layers, metrics=["accuracy"]), HybridCallback(BRISK)
    losses = []

    class Probe(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            before = [v.numpy() for v in model.variables + model.metrics_variables]
            x, y = digits()
            data = tf.constant(x), tf.constant(y)
            port = hybrid.hands.port
            with port.replaced:
                losses.extend(port.probe(data) for _ in range(2))
            after = [v.numpy() for v in model.variables + model.metrics_variables]
            assert same(before, after)

    train(model, 3, hybrid, Probe())
    assert losses[0] == losses[1] != losses[2]


def recurrent():
    keras.utils.set_random_seed(0)
    layers = [keras.Input(batch_shape=(30, 8, 8)), keras.layers.GRU(6, stateful=True)]
    return compiled(keras.Sequential([*layers, keras.layers.Dense(10)]))


def test_a_stateful_layer_sees_each_batch_once_and_its_state_is_saved():
    x, y = digits()
    data = {"x": x[:180].reshape(-1, 8, 8), "y": y[:180], "batch_size": 30, "shuffle": False}
    models, hybrid = (
        [recurrent() for _ in range(3)],
        HybridCallback(HybridTrainerConfig(warmup_steps=999)),
    )
    models[0].fit(**data, epochs=3, verbose=0)
    models[1].fit(**data, epochs=3, verbose=0, callbacks=[hybrid])
    assert hybrid.statistics().probes > 0
    states = [model.layers[0].states[0].numpy() for model in models[:2]]
    np.testing.assert_allclose(states[1], states[0], atol=1e-4)
    other = HybridCallback(hybrid.config)
    other.load_state_dict(hybrid.state_dict())
    began = []

    class Began(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            began.append(self.model.layers[0].states[0].numpy())

    models[2].fit(**data, epochs=1, steps_per_epoch=1, verbose=0, callbacks=[other, Began()])
    assert same(began[:1], states[1:])


def test_a_rollback_restores_the_state_of_a_stateful_layer():
    x, y = digits()
    model, hybrid = recurrent(), HybridCallback(HybridTrainerConfig(warmup_steps=999))
    model.fit(x[:30].reshape(-1, 8, 8), y[:30], batch_size=30, verbose=0, callbacks=[hybrid])
    state = model.layers[0].states[0]
    before = state.numpy()
    with hybrid.hands.port.alone((tf.constant(x[30:60].reshape(-1, 8, 8)), tf.constant(y[30:60]))):
        hybrid.hands.carry_out(Directive(Action.SAVE))
        hybrid.hands.carry_out(Directive(Action.FULL))
        assert not np.array_equal(state.numpy(), before)
        hybrid.hands.carry_out(Directive(Action.ROLLBACK))
    assert np.array_equal(state.numpy(), before)


@pytest.mark.parametrize("built", [True, False])
def test_a_probe_of_the_users_is_evaluated_once_and_leaves_no_trace(built):
    x, y = digits()
    states = []
    for probe in (None, (x[:200], y[:200])):
        keras.utils.set_random_seed(0)
        layers = [keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)]
        model = keras.Sequential([*layers, keras.layers.Dense(10)])
        compiled(model, metrics=["accuracy"])
        if built:
            model.build((None, 64))
        hybrid = HybridCallback(HybridTrainerConfig(warmup_steps=999), probe=probe)
        history = train(model, 3, hybrid)
        assert hybrid.statistics().probes == 0
        states.append([history["loss"], history["accuracy"], *(v.numpy() for v in model.variables)])
    assert same(*states)


def test_a_part_of_a_probe_may_be_none():
    x, y = digits()
    losses = []
    for probe in ((x[:200], y[:200]), (x[:200], y[:200], None)):
        hybrid, model = HybridCallback(BRISK, probe=probe), regression()
        losses.append(train(model, 60, hybrid)["loss"])
        assert hybrid.statistics().probes > 0
        hybrid.finish(probe)
        assert hybrid.engine.phase is Phase.FULL
        losses.append(model.evaluate(x, y, verbose=0))
    assert losses[:2] == losses[2:]


def test_frozen_layers_stay_where_they_are():
    model = perceptron()
    model.layers[0].trainable = False
    compiled(model)
    before = weights(model)
    hybrid = predicts(model)
    assert same(before[:2], weights(model)[:2])
    assert len(hybrid.hands.port.variables) == 2


def test_freezing_a_layer_between_two_fits_starts_over():
    model, optimizer = perceptron(), keras.optimizers.SGD(0.3)
    compiled(model, optimizer)
    hybrid = HybridCallback(BRISK)
    train(model, 1, hybrid, steps_per_epoch=90)
    model.layers[0].trainable = False
    compiled(model, optimizer)
    before = weights(model)
    predicted = hybrid.statistics().predicted_steps
    train(model, 1, hybrid, steps_per_epoch=150)
    assert hybrid.statistics().steps == 240
    assert hybrid.statistics().predicted_steps > predicted
    assert same(before[:2], weights(model)[:2])


@pytest.mark.parametrize("trainable", [True, False])
def test_without_a_new_compile_what_is_trained_stays_as_in_plain_fit(trainable):
    moved = []
    for hybrid in (None, HybridCallback(BRISK)):
        model = perceptron()
        model.layers[0].trainable = not trainable
        compiled(model, keras.optimizers.SGD(0.3))
        callbacks = [] if hybrid is None else [hybrid]
        train(model, 1, *callbacks, steps_per_epoch=150)
        model.layers[0].trainable = trainable
        before = weights(model)
        train(model, 1, *callbacks, steps_per_epoch=150)
        moved.append(
            [not np.array_equal(*pair) for pair in zip(before, weights(model), strict=True)]
        )
    assert moved[0] == moved[1]
    assert hybrid.statistics().steps == 300
    assert hybrid.statistics().predicted_steps > 0


def far(model):
    """How far the weights are from those that :class:`Writer` writes."""
    return max(abs(w - 3.0).max() for w in model.get_weights())


class Writer(keras.callbacks.Callback):
    """Writes weights of its own at the end of an epoch, or of a fit, as EarlyStopping does."""

    def __init__(self, hybrid, ready, at_the_end=False):
        super().__init__()
        self.hybrid, self.ready, self.at_the_end = hybrid, ready, at_the_end
        self.written, self.seen = False, []

    def on_epoch_end(self, epoch, logs=None):
        if self.written:
            self.seen.append(far(self.model))
        elif not self.at_the_end and self.ready(self.hybrid.engine):
            self.write()

    def on_train_end(self, logs=None):
        if self.at_the_end and not self.written and self.ready(self.hybrid.engine):
            self.write()

    def write(self):
        self.written = True
        self.model.set_weights([np.full_like(w, 3.0) for w in self.model.get_weights()])


READY = {
    "before a jump": (BRISK, lambda engine: engine.may_jump),
    "in a jump": (BRISK, lambda engine: engine.phase is Phase.PREDICT),
    "after a jump": (BRISK, lambda engine: engine.phase is Phase.CORRECT),
    "quasi-Newton steps": (CURVED, lambda engine: engine.holds_pairs),
    "a leap": (CURVED, lambda engine: engine.phase is Phase.PREDICT),
}


@pytest.mark.parametrize("when", READY)
@pytest.mark.parametrize("first", [True, False])
def test_weights_that_another_callback_writes_are_kept(when, first):
    config, ready = READY[when]
    hybrid = HybridCallback(config)
    # Within a fit, in the order of the list.
    model, writer = regression(), Writer(hybrid, ready)
    train(model, 110, *((writer, hybrid) if first else (hybrid, writer)))
    # At the end of one, after which another begins.
    assert all(distance < 0.03 * step for step, distance in enumerate(writer.seen[:10], 1))
    assert len(writer.seen) >= 10
    model, hybrid = regression(), HybridCallback(config)
    writer = Writer(hybrid, ready, at_the_end=True)
    while not writer.written:
        train(model, 4, *((writer, hybrid) if first else (hybrid, writer)))
    for step in range(1, 5):
        train(model, 1, hybrid)
        assert far(model) < 0.03 * step


@pytest.mark.parametrize("how", ["an error of a callback", "a bad batch that raises"])
def test_weights_that_are_written_after_a_fit_was_cut_off_are_kept(how):
    hybrid = HybridCallback(BRISK)
    watch = Watch(hybrid)
    train(regression(), 100, hybrid, watch)
    settling = watch.phases.index(Phase.CORRECT) + 1
    bad = how == "a bad batch that raises"
    config = dataclasses.replace(BRISK, on_divergence="raise" if bad else "recover")
    model, hybrid = regression(), HybridCallback(config)

    def fail(batch, logs):
        if batch == settling:
            raise OSError

    cut = keras.callbacks.LambdaCallback(on_train_batch_end=fail)
    data = spoiled([settling] if bad else [], np.nan)
    with pytest.raises(DivergenceError if bad else OSError):
        train(model, 1, hybrid, cut, data=data, steps_per_epoch=100)
    assert hybrid.engine.phase is Phase.CORRECT
    model.set_weights([np.full_like(w, 3.0) for w in model.get_weights()])
    for step in range(1, 20):
        train(model, 1, hybrid)
        assert far(model) < 0.03 * step


def test_constraints_hold_after_a_jump():
    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense(10, kernel_constraint=keras.constraints.NonNeg())
    model = compiled(keras.Sequential([keras.Input((64,)), dense]))
    least = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: least.append(weights(model)[0].min())
    )
    predicts(model, 150, note)
    assert min(least) >= 0.0


def test_mirrored_strategy():
    with mirrored().scope():
        model = perceptron(layers=lambda: [keras.layers.BatchNormalization()])
    predicts(model, 150, data=forever(1796))
