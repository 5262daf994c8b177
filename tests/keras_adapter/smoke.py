"""One short run on the backend that KERAS_BACKEND names, in a process of its own."""

import dataclasses
import os
import sys
import tempfile

import keras
import numpy as np
from sklearn.datasets import load_digits

from hybridcore import CheckpointError, DivergenceError, HybridTrainerConfig, Phase
from hybridcore_keras import HybridCallback

SHORT = {"warmup_steps": 20, "min_full_steps": 24, "horizon": 30, "correction_interval": 10}
BRISK = HybridTrainerConfig(**SHORT, secant_pairs=0)
backend = sys.argv[1]
assert keras.backend.backend() == backend == os.environ["KERAS_BACKEND"]
data = load_digits()
x, y = (data.data / 16.0).astype("float32"), data.target.astype("int32")


def build(optimizer, *hidden, **more):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], **more)
    return model


def fit(model, *callbacks, epochs=150, inputs=x, labels=y, batch_size=2000, **more):
    arguments = {"batch_size": batch_size, "epochs": epochs, "verbose": 0, "shuffle": False}
    arguments |= more
    return model.fit(inputs, labels, callbacks=list(callbacks), **arguments).history


# Predicted steps, with a schedule, normalisation and a probe of the user's.
schedule = keras.optimizers.schedules.PolynomialDecay(1e-2, 400, 1e-3)
model = build(keras.optimizers.Adam(schedule))
hybrid, rates = HybridCallback(BRISK, probe=(x[:300], y[:300])), []
note = keras.callbacks.LambdaCallback(
    on_epoch_end=lambda epoch, logs: rates.append(
        float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
    )
)
history = fit(model, hybrid, note)
assert np.allclose(rates, [float(schedule(n + 1)) for n in range(150)], 1e-4), rates
statistics = hybrid.statistics()
assert statistics.predicted_steps > 20, statistics
assert statistics.steps == 150
assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == statistics.full_steps
assert history["loss"][-1] < 0.3 * history["loss"][0]
assert min(history["accuracy"][40:]) > 0.5
hybrid.hands.port.install()
rate = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
hybrid.hands.port.remove()
assert abs(rate / float(schedule(150)) - 1) < 1e-4, rate

# Off is plain fit, bit for bit; on, full steps are those of plain fit.
finals = []
for config in (None, HybridTrainerConfig(enabled=False), HybridTrainerConfig(warmup_steps=999)):
    model = build(keras.optimizers.AdamW(1e-2), keras.layers.BatchNormalization())
    callbacks = [] if config is None else [HybridCallback(config)]
    fit(model, *callbacks, epochs=3, batch_size=64)
    finals.append(model.get_weights())
assert all(np.array_equal(a, b) for a, b in zip(finals[0], finals[1], strict=True))
assert all(np.allclose(a, b, 1e-3, 1e-5) for a, b in zip(finals[0], finals[2], strict=True))

# Mini-batches have outer steps, at the end of steps too, and each of them is seen.
model, hybrid = build(keras.optimizers.Adam(1e-2)), HybridCallback(HybridTrainerConfig())
fit(model, hybrid, epochs=8, batch_size=32)
noisy = hybrid.statistics()
assert noisy.outer_steps > 20, noisy
assert noisy.steps == 8 * 57
assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == noisy.full_steps

# While outer steps take the weights further, averages of batch norm forget sooner.
norm = keras.layers.BatchNormalization()
model, hybrid = build(keras.optimizers.Adam(1e-2), norm), HybridCallback(HybridTrainerConfig())
seen = []
for step in range(200):
    times = hybrid.engine.controller.outer.forgetting
    rows = slice(32 * step % 1760, 32 * step % 1760 + 32)
    before = keras.ops.convert_to_numpy(norm.moving_mean)
    full_steps = hybrid.statistics().full_steps
    fit(model, hybrid, epochs=1, inputs=x[rows], labels=y[rows])
    if hybrid.statistics().full_steps > full_steps:
        moved = keras.ops.convert_to_numpy(norm.moving_mean) - before
        expected = 0.01 * (x[rows].mean(0) - before)
        # An outer step that is weighed is taken where the step begins, and others where one ends.
        # Steps that look at whether batches are the same are as ever.
        possible = times, hybrid.engine.controller.outer.forgetting, 1.0
        (found, *_) = (t for t in possible if np.allclose(moved, t * expected, 1e-3, 1e-6))
        seen.append(found)
assert seen[:100] == [1.0] * 100
assert np.median(seen[-20:]) > 4.0, seen

# A factor on the rate that ends at the highest one is plain fit at that rate.
plain, model = (build(keras.optimizers.SGD(0.1)) for _ in range(2))
fit(plain, epochs=1)
plain.optimizer.learning_rate = 0.2
fit(plain, epochs=3)
hybrid = HybridCallback(HybridTrainerConfig(warmup_steps=999))
fit(model, hybrid, epochs=1)
carry_out, bold = hybrid.hands.carry_out, {"learning_rate_scale": 5.0, "highest_rates": (0.2,)}
hybrid.hands.carry_out = lambda directive: carry_out(directive._replace(**bold))
fit(model, hybrid, epochs=3)
found, expected = model.get_weights(), plain.get_weights()
assert all(np.allclose(a, b, 1e-4, 1e-5) for a, b in zip(found, expected, strict=True))
assert abs(float(keras.ops.convert_to_numpy(model.optimizer.learning_rate)) - 0.1) < 1e-7

# A bad batch costs itself.
model = build(keras.optimizers.Adam(1e-2), keras.layers.BatchNormalization())
hybrid = HybridCallback(BRISK)
fit(model, hybrid, epochs=10)
before = model.get_weights() + [keras.ops.convert_to_numpy(v) for v in model.optimizer.variables]
before = [np.array(value) for value in before]
fit(model, hybrid, epochs=1, inputs=x * np.float32("nan"))
after = model.get_weights() + [keras.ops.convert_to_numpy(v) for v in model.optimizer.variables]
assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
assert hybrid.statistics().divergences == 1

# Or it raises, and leaves the model as the batch before did; the weights are not taken for others.
plain, model = (build(keras.optimizers.SGD(0.1)) for _ in range(2))
hybrid = HybridCallback(HybridTrainerConfig(warmup_steps=999, on_divergence="raise"))
for one, callbacks in ((plain, []), (model, [hybrid])):
    fit(one, *callbacks, epochs=3, batch_size=500)
fit(plain, epochs=1, inputs=x[:1500], labels=y[:1500], batch_size=500)
spoiled = x.copy()
spoiled[1600:] = np.nan
try:
    fit(model, hybrid, epochs=1, inputs=spoiled, batch_size=500)
except DivergenceError as error:
    refused = str(error)
assert "the batch was left out" in refused
kept = hybrid.hands.average
assert kept is not None
for _ in range(2):
    found, expected = model.get_weights(), plain.get_weights()
    assert all(np.allclose(a, b, 1e-3, 1e-5) for a, b in zip(found, expected, strict=True))
    iterations = [keras.ops.convert_to_numpy(m.optimizer.iterations) for m in (model, plain)]
    assert iterations[0] == iterations[1]
    fit(plain, epochs=1, batch_size=500)
    fit(model, hybrid, epochs=1, batch_size=500)
    assert hybrid.hands.average is kept

# A resumed run goes on bit for bit, from snapshots in fewer bits too.
CODED = dataclasses.replace(BRISK, snapshot_kind="int8")
model = build(keras.optimizers.Adam(1e-2))
hybrid = HybridCallback(CODED)
fit(model, hybrid, epochs=75)
assert hybrid.statistics().predicted_steps > 0
state, values = hybrid.state_dict(), [np.array(w) for w in model.get_weights()]
moments = [np.array(keras.ops.convert_to_numpy(v)) for v in model.optimizer.variables]
expected = fit(model, hybrid, epochs=60)["loss"]
again = build(keras.optimizers.Adam(1e-2))
again.optimizer.build(again.trainable_variables)
again.set_weights(values)
for variable, value in zip(again.optimizer.variables, moments, strict=True):
    variable.assign(value)
resumed = HybridCallback(CODED)
resumed.load_state_dict(state)
got = fit(again, resumed, epochs=60)["loss"]
assert got == expected, (got, expected)
sys.stdout.write(str(statistics))

# All of a run in one file, which a model that was built anew takes up; an interrupt breaks nothing.
with tempfile.TemporaryDirectory() as folder:
    model = build(keras.optimizers.Adam(1e-2), keras.layers.GaussianNoise(1e-3))
    hybrid = HybridCallback(BRISK)
    hybrid.save_every(45, folder)
    expected = fit(model, hybrid, epochs=60)["loss"][45:]
    again = build(keras.optimizers.Adam(3e-2), keras.layers.GaussianNoise(1e-3))
    resumed = HybridCallback(BRISK)
    resumed.load(folder)
    assert resumed.epoch == 45
    assert fit(again, resumed, epochs=60, initial_epoch=45)["loss"] == expected
    damaged = HybridCallback(BRISK)
    damaged.load(folder)
    try:
        fit(build(keras.optimizers.Adam(1e-2), keras.layers.Dense(10)), damaged, epochs=1)
    except CheckpointError as error:
        refused = str(error)
    assert "another model" in refused
while resumed.engine.phase is not Phase.PREDICT:
    fit(again, resumed, epochs=1)
before, carry_out = [np.array(w) for w in again.get_weights()], resumed.hands.carry_out


def interrupted(directive):
    carry_out(directive)
    raise KeyboardInterrupt


resumed.hands.carry_out = interrupted
try:
    fit(again, resumed, epochs=1)
except KeyboardInterrupt:
    del resumed.hands.carry_out
assert resumed.engine.phase is Phase.FULL
# The jump was taken back, to where the weights were before it.
assert not all(np.array_equal(a, b) for a, b in zip(before, again.get_weights(), strict=True))
assert np.isfinite(fit(again, epochs=2)["loss"]).all()
steps = resumed.statistics().steps
last = fit(again, resumed, epochs=60)["loss"][-1]
assert last < 0.5, last
assert resumed.statistics().steps == steps + 60

# A run that ends in a jump is left at the weights that have the lower loss.
model, before = build(keras.optimizers.Adam(1e-2)), None
hybrid = HybridCallback(BRISK)
while hybrid.engine.phase is not Phase.CORRECT:
    if hybrid.engine.may_jump:
        before = [np.array(w) for w in model.get_weights()]
    fit(model, hybrid, epochs=1)
model.set_weights([-w for w in model.get_weights()])
hybrid._left = hybrid.hands.fingerprint()
hybrid.finish((x, y))
assert hybrid.engine.phase is Phase.FULL
assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))

# Quasi-Newton steps.
model = build(keras.optimizers.Adam(1e-2), keras.layers.BatchNormalization())
hybrid = HybridCallback(HybridTrainerConfig(**SHORT, secant_pairs=8))
history = fit(model, hybrid, epochs=200)
statistics = hybrid.statistics()
assert statistics.secant_steps > 20, statistics
assert statistics.predicted_steps > 20, statistics
assert history["loss"][-1] < 1e-4 * history["loss"][0]
assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == statistics.full_steps
# Batch norm holds the statistics of the one batch there is, and not of older weights.
hybrid.finish((x, y))
evaluated = model.evaluate(x, y, batch_size=len(x), verbose=0, return_dict=True)
assert evaluated["loss"] < 1e-3 * history["loss"][0], evaluated


# Another batch is trained from before them where it has the lower loss there.
def values(model):
    of_optimizer = [keras.ops.convert_to_numpy(v) for v in model.optimizer.variables]
    return [np.array(w) for w in (*model.get_weights(), *of_optimizer)]


model, plain = (build(keras.optimizers.Adam(1e-2), keras.layers.BatchNormalization()) for _ in "ab")
hybrid = HybridCallback(HybridTrainerConfig(**SHORT, secant_pairs=8))
fit(model, hybrid, epochs=1)
while hybrid.hands.start is None:
    before = values(model)
    fit(model, hybrid, epochs=1)
# The pass that begins them leaves the statistics of the batch, and moves nothing else.
size, trained = len(model.get_weights()), [id(w) for w in model.trainable_weights]
here = [id(w) in trained for w in model.weights]
before[:size] = [a if t else b for a, b, t in zip(before, values(model), here, strict=False)]
fit(model, hybrid, epochs=25)
turned = x[:, ::-1].copy()
while hybrid.hands.start is not None:
    fit(model, hybrid, epochs=1, inputs=turned)
plain.optimizer.build(plain.trainable_variables)
plain.set_weights(before[:size])
for variable, value in zip(plain.optimizer.variables, before[size:], strict=True):
    variable.assign(value)
plain.optimizer.iterations.assign(model.optimizer.iterations - 1)
fit(plain, epochs=1, inputs=turned)
found, expected = values(model), values(plain)
assert all(np.allclose(a, b, 1e-5, 1e-6) for a, b in zip(found, expected, strict=True))

# A schedule stands in a step of any kind where plain fit would be after as many batches.
FULL = HybridTrainerConfig(warmup_steps=999)
batch = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)
decay = keras.optimizers.schedules.PolynomialDecay(0.2, 50, 0.01)
plain, model, other = (build(keras.optimizers.SGD(rate)) for rate in (0.2, decay, decay))
fit(plain, epochs=1)
plain.optimizer.learning_rate = float(keras.ops.convert_to_numpy(decay(41)))
fit(plain, epochs=1)
for late in (model, other):
    hybrid = HybridCallback(FULL)
    fit(late, hybrid, epochs=1)
    port = hybrid.hands.port
    port.skip(40)
    if late is model:
        fit(late, hybrid, epochs=1)
        continue
    with port.alone(batch):
        port.gradient()
        port.apply(1.0)
expected = plain.get_weights()
for late in (model, other):
    assert int(keras.ops.convert_to_numpy(late.optimizer.iterations)) == 2
    found = late.get_weights()
    assert all(np.allclose(a, b, 1e-4, 1e-5) for a, b in zip(found, expected, strict=True))

# The gradient norm is that of the loss, whatever the optimizer multiplies it by.
norms = []
for optimizer in (
    keras.optimizers.SGD(0.1),
    keras.optimizers.SGD(0.1, loss_scale_factor=8.0),
    keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
):
    hybrid = HybridCallback(FULL)
    fit(build(optimizer), hybrid, epochs=1)
    with hybrid.hands.port.alone(batch):
        norms.append(hybrid.hands.port.full()[1].gradient_norm)
assert np.isfinite(norms).all()
assert np.allclose(norms, norms[0], 1e-3), norms

# Gradients that overflow under a loss scale are no sign of divergence; each halves the scale.
keras.mixed_precision.set_dtype_policy("mixed_float16")
scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2.0**22)
model = build(scaled, keras.layers.Dense(16, activation="tanh"))
keras.mixed_precision.set_dtype_policy("float32")
hybrid = HybridCallback(dataclasses.replace(FULL, on_divergence="raise"))
fit(model, hybrid, epochs=15)
figures = scaled.dynamic_scale, scaled.inner_optimizer.iterations
scale, iterations = (float(keras.ops.convert_to_numpy(value)) for value in figures)
assert 15 - iterations == 22 - np.log2(scale) > 0, (iterations, scale)
assert (hybrid.statistics().steps, hybrid.statistics().divergences) == (15, 0)

# A rollback restores the optimizer, but not its count of steps and the user's rate.
model = build(keras.optimizers.Adam(1e-2), keras.layers.BatchNormalization())
hybrid, optimizer = HybridCallback(FULL), model.optimizer
fit(model, hybrid, epochs=2)
own = {id(optimizer.iterations), id(optimizer._learning_rate)}
others = [*model.non_trainable_variables, *optimizer.variables]
others = [v for v in others if id(v) not in own]
before = [np.array(keras.ops.convert_to_numpy(v)) for v in others]
with hybrid.hands.port.alone(batch):
    kept = hybrid.hands.port.keep()
fit(model, hybrid, epochs=2)
optimizer.learning_rate = 3e-3
moved = [np.array(keras.ops.convert_to_numpy(v)) for v in others]
with hybrid.hands.port.alone(batch):
    hybrid.hands.port.put_back(kept)
after = [np.array(keras.ops.convert_to_numpy(v)) for v in others]
assert not any(np.array_equal(a, b) for a, b in zip(before, moved, strict=True))
assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
assert int(keras.ops.convert_to_numpy(optimizer.iterations)) == 4
assert abs(float(keras.ops.convert_to_numpy(optimizer.learning_rate)) - 3e-3) < 1e-9

# But gradients that were summed up before it are not those of any batch to come.
optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)
model, hybrid = build(keras.optimizers.LossScaleOptimizer(optimizer)), HybridCallback(FULL)
fit(model, hybrid, epochs=2)
sums = optimizer._accumulated_gradients
assert all(np.any(keras.ops.convert_to_numpy(one)) for one in sums)
with hybrid.hands.port.alone(batch):
    hybrid.hands.port.put_back(hybrid.hands.port.keep())
assert not any(np.any(keras.ops.convert_to_numpy(one)) for one in sums)

# A predicted execution counts all of its batches; torch knows none of several.
if backend == "jax":
    model = build(keras.optimizers.Adam(schedule), steps_per_execution=3)
    hybrid = HybridCallback(BRISK)
    fit(model, hybrid, epochs=60, inputs=np.tile(x, (3, 1)), labels=np.tile(y, 3), batch_size=1797)
    statistics = hybrid.statistics()
    assert statistics.predicted_steps > 3, statistics
    assert statistics.steps == 60
    hybrid.hands.port.install()
    rate = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
    hybrid.hands.port.remove()
    assert abs(rate / float(schedule(180)) - 1) < 1e-4, rate

# What raises where a quasi-Newton step was tried does not end fit: torch's checks, and JAX's of
# what is no number.
if backend == "jax":
    import jax

    jax.config.update("jax_debug_nans", True)
smoothed, raised = keras.losses.CategoricalCrossentropy(True, 0.1), 0


def bounded(labels, logits):
    global raised
    left = 8.0 - keras.ops.max(keras.ops.abs(logits))
    if backend == "torch" and not left > 0.0:
        raised += 1
        raise ValueError("too large")
    return smoothed(labels, logits) + 0.0 * keras.ops.log(left)


model = build(keras.optimizers.Adam(1e-2), keras.layers.Dense(16, activation="tanh"))
model.compile(model.optimizer, bounded)
hybrid = HybridCallback()
history = fit(model, hybrid, epochs=200, labels=np.eye(10, dtype=np.float32)[y])
statistics = hybrid.statistics()
assert statistics.secant_steps > 20, statistics
assert raised > 1 or backend != "torch"
assert history["loss"][-1] < 0.6
