"""Single features of the adapter, each against plain `fit`, NumPy or a formula."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from keras_problems import (
    BRISK,
    CROSS_ENTROPY,
    CURVED,
    compiled,
    digits,
    mirrored,
    perceptron,
    regression,
    same,
    train,
    weights,
)

from hybridcore import Action, Directive, HybridTrainerConfig
from hybridcore_keras import HybridCallback
from hybridcore_keras.averages import WeightAverage
from hybridcore_keras.fits import Fit
from hybridcore_keras.gradients import gradient_norm
from hybridcore_keras.groups import by_depth
from hybridcore_keras.ports import port_of, slow_averages

# What Keras does to TensorFlow's tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FULL = HybridTrainerConfig(warmup_steps=999)
SCHEDULE = keras.optimizers.schedules.PolynomialDecay(0.2, 300, 1e-3)


def batch():
    return tuple(map(tf.constant, digits()))


def normalised():
    return [keras.layers.BatchNormalization()]


def trained(model, steps=1):
    """A callback that has taken `model` through so many full steps."""
    hybrid = HybridCallback(FULL)
    train(model, steps, hybrid)
    return hybrid


def gradients(model, loss=CROSS_ENTROPY):
    """What TensorFlow itself finds for all digits."""
    x, y = batch()
    with tf.GradientTape() as tape:
        value = loss(y, model(x, training=True))
    return [g.numpy() for g in tape.gradient(value, model.trainable_variables)]


def euclidean(values):
    return np.sqrt(sum(np.square(np.asarray(v, np.float64)).sum() for v in values))


def state_of(model):
    return [np.array(v) for v in (*model.variables, *model.optimizer.variables)]


def close(found, expected, rtol=1e-4, atol=1e-6):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def marked(y, predicted):
    """A loss that is not finite, though its gradient is, where the first label is below zero."""
    value = CROSS_ENTROPY(tf.where(y < 0, -y - 1, y), predicted)
    return value + tf.where(y[0] < 0, np.float32("nan"), 0.0)


# -- rollback and schedule ------------------------------------------------------------------------


def test_a_rollback_restores_moments_statistics_and_averages_but_not_rate_and_iterations():
    layers = lambda: [keras.layers.BatchNormalization(), keras.layers.Dropout(0.1)]  # noqa: E731
    model = perceptron(keras.optimizers.Adam(1e-2, use_ema=True), layers=layers)
    hybrid, optimizer = trained(model, 2), model.optimizer
    own = {id(optimizer.iterations), id(optimizer._learning_rate)}
    others = [v for v in (*model.variables, *optimizer.variables) if id(v) not in own]
    # Weights, statistics and the seed; two moments and an average for each of six weights.
    assert len(others) == 6 + 2 + 1 + 3 * 6
    before = [v.numpy() for v in others]
    with hybrid.hands.port.alone(batch()):
        hybrid.hands.carry_out(Directive(Action.SAVE))
        for _ in range(2):
            hybrid.hands.carry_out(Directive(Action.FULL))
        assert not any(np.array_equal(v.numpy(), b) for v, b in zip(others, before, strict=True))
        optimizer.learning_rate = 3e-3
        hybrid.hands.carry_out(Directive(Action.ROLLBACK))
    assert same([v.numpy() for v in others], before)
    assert int(optimizer.iterations) == 4
    assert float(optimizer.learning_rate) == pytest.approx(3e-3)


def test_an_update_after_a_rollback_is_of_no_gradient_from_before_it():
    model = perceptron(keras.optimizers.SGD(0.2, gradient_accumulation_steps=3))
    hybrid = trained(model, 4)
    with hybrid.hands.port.alone(batch()):
        hybrid.hands.carry_out(Directive(Action.SAVE))
        hybrid.hands.carry_out(Directive(Action.FULL))
        hybrid.hands.carry_out(Directive(Action.ROLLBACK))
        before, expected = weights(model), gradients(model)
        hybrid.hands.carry_out(Directive(Action.FULL))
    # The place in the cycle went on: this is its third batch, and the only one that counts.
    close(weights(model), [w - 0.2 * g / 3 for w, g in zip(before, expected, strict=True)])


def test_a_resumed_run_goes_on_at_the_rate_of_the_schedule():
    model = regression(keras.optimizers.SGD(SCHEDULE))
    hybrid = trained(model, 2)
    hybrid.hands.port.skip(40)
    again, resumed = regression(keras.optimizers.SGD(SCHEDULE)), HybridCallback(FULL)
    resumed.load_state_dict(hybrid.state_dict())
    step = zip(weights(model), gradients(model), strict=True)
    train(again, 1, resumed)
    assert int(again.optimizer.iterations) == 3
    close(weights(again), [w - float(SCHEDULE(42)) * g for w, g in step])


def test_predicted_executions_advance_the_schedule_by_all_of_their_batches():
    schedule = keras.optimizers.schedules.PolynomialDecay(1e-2, 300, 1e-3)
    model = regression(keras.optimizers.Adam(schedule), steps_per_execution=3)
    hybrid, rates = HybridCallback(BRISK), []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: rates.append(float(model.optimizer.learning_rate))
    )
    train(model, 1, hybrid, note, steps_per_epoch=3 * 60)
    statistics = hybrid.statistics()
    assert statistics.predicted_steps > 3
    assert int(model.optimizer.iterations) == 3 * statistics.full_steps
    close(rates, [float(schedule(3 * step)) for step in range(1, 61)], rtol=1e-5)


# -- bad batches ----------------------------------------------------------------------------------


def test_a_batch_of_bad_loss_and_good_gradients_is_left_out():
    model, states = perceptron(layers=normalised, loss=marked), []
    x, y = batch()
    assert all(np.isfinite(g).all() for g in gradients(model, lambda y, p: marked(-y - 1, p)))
    signs = tf.data.Dataset.from_tensor_slices([1, 1, -1, 1])
    data = signs.map(lambda sign: (x, tf.where(sign < 0, -y - 1, y)))
    hybrid = HybridCallback(FULL)
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: states.append(state_of(model))
    )
    train(model, 1, hybrid, note, data=data, steps_per_epoch=4)
    assert hybrid.statistics().divergences == 1
    assert [same(*pair) for pair in itertools.pairwise(states)] == [False, True, False]


# -- quasi-Newton steps ---------------------------------------------------------------------------


def test_the_gradients_kept_are_applied_at_scaled_rates():
    model = perceptron(keras.optimizers.SGD(0.2))
    port = trained(model).hands.port
    before, expected = weights(model), gradients(model)
    with port.alone(batch()):
        port.gradient()
        port.apply(0.0)
        assert same(weights(model), before)
        for scale, highest, rate in ((1.0, np.inf, 0.2), (0.5, np.inf, 0.1), (5.0, 0.3, 0.3)):
            model.set_weights(before)
            port.apply(scale, highest)
            moved = [now - w for now, w in zip(weights(model), before, strict=True)]
            close(moved, [-rate * g for g in expected])


def test_a_base_stays_where_it_is_though_the_optimizer_moves_weights_at_a_rate_of_zero():
    class SGD(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            super().update_step(gradient, variable, learning_rate)
            self.assign_add(variable, keras.ops.full_like(variable, 0.125))

    # Of others there are no quasi-Newton steps.
    SGD.__module__ = "keras.own"
    model = regression(SGD(0.1))
    hands = trained(model).hands
    with hands.port.alone(batch()):
        hands.carry_out(Directive(Action.FULL, pair=True, fresh_pairs=True))
        trial = weights(model)
        hands.carry_out(Directive(Action.GRADIENT))
        hands.carry_out(Directive(Action.BASE))
        assert same(weights(model), trial)
        hands.port.apply(0.0)
        assert not same(weights(model), trial)


def test_where_every_batch_is_the_same_batch_norm_holds_its_own_statistics():
    model = perceptron(layers=normalised)
    norm = model.layers[1]
    port = trained(model, 3).hands.port
    x, _ = batch()
    # Of what the layers before it make of the digits.
    inside = np.asarray(model.layers[0](x), np.float64)
    with port.alone(batch()):
        port.gradient()
        close([norm.moving_mean, norm.moving_variance], [inside.mean(0), inside.var(0)])
        before = inside.mean(0)
        port.full()
        assert norm.momentum == 0.99
        # The step has seen the same weights.
        close([norm.moving_mean], [before])
    inside = np.asarray(model.layers[0](x), np.float64)
    with port.alone(batch()):
        port.full()
    close([norm.moving_mean], [0.99 * before + 0.01 * inside.mean(0)])


@pytest.mark.parametrize(("times", "share"), [(1.0, 0.01), (3.0, 0.03), (20.0, 0.1)])
def test_batch_norm_forgets_as_many_times_as_fast(times, share):
    model = perceptron(layers=normalised)
    norm = model.layers[1]
    port = trained(model, 3).hands.port
    inside = np.asarray(model.layers[0](batch()[0]), np.float64)
    kept = [np.asarray(norm.moving_mean), np.asarray(norm.moving_variance)]
    with port.alone(batch()):
        port.full(forgetting=times)
    new = [inside.mean(0), inside.var(0)]
    expected = [old + share * (now - old) for old, now in zip(kept, new, strict=True)]
    close([norm.moving_mean, norm.moving_variance], expected)


def test_averages_of_few_batches_are_left_alone_and_those_that_stand_still():
    for momentum in (0.5, 0.9, 1.0):
        norm = keras.layers.BatchNormalization(momentum=momentum)
        assert not slow_averages(perceptron(layers=lambda norm=norm: [norm]))
    assert len(slow_averages(perceptron(layers=normalised))) == 1


def test_statistics_of_a_layer_that_is_called_twice_are_the_mean_of_both():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((64,))
    norm = keras.layers.BatchNormalization()
    halves = [norm(keras.layers.Dense(8, name=name)(inputs)) for name in ("first", "second")]
    outputs = keras.layers.Dense(10)(keras.layers.Concatenate()(halves))
    model = compiled(keras.Model(inputs, outputs))
    port = trained(model, 3).hands.port
    x, _ = batch()
    inside = [np.asarray(model.get_layer(n)(x), np.float64) for n in ("first", "second")]
    expected = np.asarray(norm.moving_mean)
    for part in inside:
        expected = expected + 0.1 * (part.mean(0) - expected)
    with port.alone(batch()):
        port.full(forgetting=20.0)
    close([norm.moving_mean], [expected])
    inside = [np.asarray(model.get_layer(n)(x), np.float64) for n in ("first", "second")]
    with port.alone(batch()):
        port.gradient()
    close([norm.moving_mean], [np.mean([h.mean(0) for h in inside], axis=0)])
    close([norm.moving_variance], [np.mean([h.var(0) for h in inside], axis=0)])
    assert norm.momentum == 0.99
    assert "call" not in vars(norm)


def test_after_quasi_newton_steps_the_loss_at_inference_is_that_of_training():
    model = perceptron(layers=normalised)
    hybrid = HybridCallback(CURVED)
    loss = train(model, 250, hybrid)["loss"][-1]
    assert hybrid.statistics().secant_steps > 30
    hybrid.finish(digits())
    assert loss < 0.01
    assert model.evaluate(*digits(), batch_size=1797, verbose=0) < 2.0 * loss


# -- compiled anew --------------------------------------------------------------------------------


def test_after_another_compile_passes_are_those_of_the_new_loss_and_layers():
    model, optimizer = perceptron(keras.optimizers.SGD(0.2)), keras.optimizers.SGD(0.2)
    compiled(model, optimizer)
    hybrid = trained(model)
    port = hybrid.hands.port
    with port.alone(batch()):
        port.buffers()
        port.probe(None)
        port.gradient()
        port.apply(1.0)

    def loss(y, predicted):
        return 3.0 * CROSS_ENTROPY(y, predicted) + 1.0

    model.layers[0].trainable = False
    compiled(model, optimizer, loss=loss)
    train(model, 1, hybrid)
    assert hybrid.hands.port is port
    x, y = batch()
    before, expected = weights(model), gradients(model, loss)
    with port.alone((x, y)):
        assert port.probe(None) == pytest.approx(float(loss(y, model(x))), rel=1e-5)
        beside, kept = [v.numpy() for v in model.metrics_variables], port.buffers()
        _, figures = port.gradient()
        port.put_back_buffers(kept)
        assert same([v.numpy() for v in model.metrics_variables], beside)
        port.apply(1.0)
    assert figures.gradient_norm == pytest.approx(euclidean(expected), rel=1e-4)
    assert same(weights(model)[:2], before[:2])
    close(weights(model)[2:], [w - 0.2 * g for w, g in zip(before[2:], expected, strict=True)])


@pytest.mark.parametrize(
    "arguments",
    [{"steps_per_execution": 2}, {"loss": lambda y, p: 0.1 * CROSS_ENTROPY(y, p) + 5.0}],
    ids=["several batches a step", "another loss"],
)
def test_after_another_compile_with_the_same_optimizer_nothing_known_of_steps_is_used(arguments):
    hybrid, model = HybridCallback(CURVED), regression()
    while not hybrid.engine.holds_pairs:
        train(model, 1, hybrid, steps_per_epoch=10)
    before, plain = hybrid.statistics(), regression()
    plain.optimizer.build(plain.trainable_variables)
    plain.set_weights(model.get_weights())
    for ours, theirs in zip(plain.optimizer.variables, model.optimizer.variables, strict=True):
        ours.assign(theirs)
    for one in (plain, model):
        compiled(one, one.optimizer, **arguments)
    for one, callbacks in ((plain, []), (model, [hybrid])):
        train(one, 1, *callbacks, steps_per_epoch=20)
    for ours, theirs in zip(weights(model), weights(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    after = hybrid.statistics()
    assert after.secant_steps == before.secant_steps
    assert after.steps == before.steps + 20 // arguments.get("steps_per_execution", 1)
    assert (hybrid.hands.pairs == 0) == ("steps_per_execution" in arguments)


def test_copies_are_of_the_layers_that_are_trained_now_though_values_are_equal():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((64,))
    first, second = keras.layers.Dense(10), keras.layers.Dense(10)
    model = keras.Model(inputs, keras.layers.Add()([first(inputs), second(inputs)]))
    second.trainable, optimizer = False, keras.optimizers.SGD(0.3)
    compiled(model, optimizer)
    optimizer.build([*first.variables, *second.variables])
    hybrid = HybridCallback(BRISK)
    train(model, 1, hybrid, steps_per_epoch=40)
    assert hybrid.hands.identities == [id(v) for v in first.variables]
    second.set_weights(first.get_weights())
    first.trainable, second.trainable = False, True
    compiled(model, optimizer)
    before, predicted = first.get_weights(), hybrid.statistics().predicted_steps
    train(model, 1, hybrid, steps_per_epoch=110)
    assert hybrid.hands.identities == [id(v) for v in second.variables]
    assert hybrid.statistics().predicted_steps > predicted
    assert same(first.get_weights(), before)


def test_a_bound_layer_that_is_trained_from_now_on_stays_in_its_bounds():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((64,))
    free = keras.layers.Dense(10)
    bound = keras.layers.Dense(10, kernel_constraint="non_neg", trainable=False)
    model = keras.Model(inputs, keras.layers.Add()([free(inputs), bound(inputs)]))
    bound.kernel.assign(keras.ops.abs(bound.kernel))
    optimizer = keras.optimizers.Adam(1e-2)
    compiled(model, optimizer)
    optimizer.build([*free.variables, *bound.variables])
    hybrid, least = HybridCallback(CURVED), []
    train(model, 1, hybrid, steps_per_epoch=60)
    assert hybrid.statistics().secant_steps > 0
    bound.trainable = True
    compiled(model, optimizer)
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: least.append(bound.kernel.numpy().min())
    )
    train(model, 1, hybrid, note, steps_per_epoch=90)
    assert min(least) >= 0.0
    assert hybrid.hands.pairs == 0


def test_after_fit_nothing_of_the_callbacks_is_left_on_model_and_optimizer():
    plain, model = perceptron(), perceptron()
    train(plain, 2)
    hybrid = trained(model, 2)
    for theirs, ours in ((plain, model), (plain.optimizer, model.optimizer)):
        assert vars(ours).keys() == vars(theirs).keys()
    port = hybrid.hands.port
    held = [*vars(model).values(), *vars(model.optimizer).values()]
    assert not any(isinstance(value, Fit) for value in held)
    assert not {id(hybrid), id(port), id(port.rates)} & {
        id(getattr(value, "__self__", None)) for value in held
    }


# -- two replicas ---------------------------------------------------------------------------------


class Norms(keras.callbacks.Callback):
    """Tells what gradient norm the engine is told of each full step."""

    def __init__(self, hybrid):
        super().__init__()
        self.hybrid, self.seen = hybrid, []

    def on_train_begin(self, logs=None):
        carry_out = self.hybrid.hands.carry_out

        def heard(directive):
            observation = carry_out(directive)
            self.seen.append(observation.gradient_norm)
            return observation

        self.hybrid.hands.carry_out = heard


def on_two(build):
    with mirrored().scope():
        return build()


def on_replicas(variables, local):
    """Values of `variables` on each replica, or twice those that all of them share."""
    values = [local(variable.value) for variable in variables]
    return [[np.array(v[n if len(v) > 1 else 0]) for v in values] for n in range(2)]


def test_two_replicas_take_the_steps_of_one():
    # They halve what they are given.
    x, y = (array[:1796] for array in digits())
    data = tf.data.Dataset.from_tensors((x, y)).repeat()

    def run(model):
        hybrid = HybridCallback(FULL)
        norms = Norms(hybrid)
        train(model, 1, hybrid, norms, data=data, steps_per_epoch=3)
        return norms.seen, weights(model)

    build = lambda: perceptron(keras.optimizers.SGD(0.2))  # noqa: E731
    (norms, reached), (expected, where) = run(on_two(build)), run(build())
    np.testing.assert_allclose(norms, expected, rtol=1e-4)
    close(reached, where)


def test_layers_that_bring_replicas_together_train_as_in_plain_fit():
    x, y = (array[:1796] for array in digits())
    data = tf.data.Dataset.from_tensors((x, y)).repeat()
    together = lambda: [keras.layers.BatchNormalization(synchronized=True)]  # noqa: E731
    finals = []
    for callbacks in ([], [HybridCallback(FULL)]):
        model = on_two(lambda: perceptron(keras.optimizers.SGD(0.2), layers=together))
        train(model, 1, *callbacks, data=data, steps_per_epoch=3)
        finals.append(weights(model))
    close(*finals)


def test_a_batch_that_is_bad_on_one_replica_is_left_out_on_both():
    x, y = (array[:1796] for array in digits())
    inputs, labels = np.stack([x] * 5), np.stack([y] * 5)
    inputs[1, :100] = np.nan
    # Of the other replica the loss alone is bad.
    labels[3, 898:] = -labels[3, 898:] - 1
    data = tf.data.Dataset.from_tensor_slices((inputs, labels))
    optimizer = lambda: keras.optimizers.SGD(0.2, momentum=0.9)  # noqa: E731
    model = on_two(
        lambda: perceptron(optimizer(), layers=normalised, loss=marked, metrics=["accuracy"])
    )
    local, states = model.distribute_strategy.experimental_local_results, []

    class Note(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            trained = [*model.trainable_variables, *model.optimizer.variables]
            beside = [*model.non_trainable_variables, *model.metrics_variables]
            states.append((on_replicas(trained, local), on_replicas(beside, local)))

    hybrid = HybridCallback(FULL)
    train(model, 1, hybrid, Note(), data=data, steps_per_epoch=5)
    assert hybrid.statistics().divergences == 2
    for (first, second), _ in states:
        assert same(first, second)
        assert all(np.isfinite(v).all() for v in first)
    steps = [same(before[0][0], after[0][0]) for before, after in itertools.pairwise(states)]
    assert steps == [True, False, True, False]
    # Of statistics and metrics each replica has its own.
    for bad in (1, 3):
        for before, after in zip(states[bad - 1][1], states[bad][1], strict=True):
            assert same(before, after)


# -- numbers --------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=40))
def test_layer_groups_are_eighths_of_the_elements_by_depth(sizes):
    middles = np.cumsum(sizes) - np.array(sizes) / 2
    eighths = np.floor(8 * middles / sum(sizes)).astype(int)
    expected = [np.flatnonzero(eighths == one).tolist() for one in np.unique(eighths)]
    assert by_depth(sizes) == expected


def sum_of_squares(values):
    return tf.reduce_sum(values * values)


@pytest.mark.parametrize("size", [1.0, 1e25, 1e-25, 0.0])
def test_the_gradient_norm_is_that_of_float64(size):
    rng = np.random.default_rng(0)
    arrays = [(size * rng.normal(size=shape)).astype("float32") for shape in ((7, 3), (5,), ())]
    found = gradient_norm([*map(tf.constant, arrays), None], sum_of_squares)
    assert float(found) == pytest.approx(euclidean(arrays), rel=1e-5)
    assert float(gradient_norm([None], sum_of_squares)) == 0.0


def test_the_norm_of_an_embeddings_gradient_is_that_of_its_rows():
    embedding = keras.layers.Embedding(9, 4)
    rows = tf.constant([1, 5, 7])
    embedding.build()
    factors = tf.reshape(tf.range(12.0), (3, 4))
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(embedding(rows) * factors)
    gradient = tape.gradient(value, embedding.embeddings.value)
    assert isinstance(gradient, tf.IndexedSlices)
    found = gradient_norm([gradient], sum_of_squares)
    assert float(found) == pytest.approx(np.sqrt(sum(n**2 for n in range(12))), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_moves_of_an_average_in_half_precision_are_not_lost(dtype):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype=dtype)])
    average = WeightAverage(port_of(compiled(model)))
    ones = [np.ones(w.shape, "float32") for w in weights(model)]
    model.set_weights(ones)
    average.add(1.0)
    # The next number of bfloat16 is 1 + 1 / 128, and one of a hundred moves is 100 times less.
    model.set_weights([(1.0 + 1 / 128) * w for w in ones])
    for _ in range(100):
        average.add(0.01)
    close(average.state_dict(), [w * (1.0 + (1.0 - 0.99**100) / 128) for w in ones], rtol=1e-5)


@pytest.mark.parametrize("how", [{"steps_per_execution": 2}, {"run_eagerly": True}])
def test_the_end_of_data_of_unknown_length_ends_an_epoch_and_nothing_else(how):
    x, y = digits()
    data = tf.data.Dataset.from_tensor_slices((x[:60], y[:60])).batch(15).filter(lambda *_: True)
    model, hybrid = regression(**how), HybridCallback(FULL)
    # As in plain fit.
    with pytest.warns(UserWarning, match="ran out of data"):
        model.fit(data, epochs=3, verbose=0, shuffle=False, callbacks=[hybrid])
    assert hybrid.statistics().steps == 3 * 4 // how.get("steps_per_execution", 1)
    assert int(model.optimizer.iterations) == 3 * 4
