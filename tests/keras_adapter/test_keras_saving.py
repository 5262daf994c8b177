"""A run in Keras as a file: whole, checked against the model, and resumed to the last bit."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_problems import (
    BRISK,
    CURVED,
    compiled,
    digits,
    perceptron,
    regression,
    same,
    train,
    weights,
)

from hybridcore import CheckpointError, HybridTrainerConfig, Phase, checkpoint
from hybridcore.rotation import checkpoints_in
from hybridcore_keras import HybridCallback

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
EPOCHS = 130

RESUME = """
import json, sys
sys.path.insert(0, sys.argv[1])
import conftest  # the same backend and threads
import keras
from keras_problems import BRISK, CURVED, train, weights
from hybridcore_keras import HybridCallback
rest = {}
for step in json.loads(sys.argv[3]):
    model = keras.models.load_model(f"{sys.argv[2]}/{step}.keras")
    callback = HybridCallback({"brisk": BRISK, "curved": CURVED}[sys.argv[5]])
    callback.load(f"{sys.argv[2]}/{step}")
    history = train(model, int(sys.argv[4]) - step, callback)
    rest[step] = history["loss"], [w.tolist() for w in weights(model)]
sys.stdout.write(json.dumps(rest))
"""


class Save(keras.callbacks.Callback):
    def __init__(self, hybrid, folder, steps):
        super().__init__()
        self.hybrid, self.folder, self.steps, self.seen = hybrid, folder, steps, set()

    def on_epoch_end(self, epoch, logs=None):
        phase = self.hybrid.engine.phase
        if epoch + 1 in self.steps or phase not in self.seen:
            self.seen.add(phase)
            self.model.save(self.folder / f"{epoch + 1}.keras")
            self.hybrid.save(self.folder / f"{epoch + 1}")


@pytest.mark.parametrize(("name", "config"), [("brisk", BRISK), ("curved", CURVED)])
def test_a_new_process_goes_on_bit_for_bit(name, config, tmp_path):
    model, hybrid = regression(), HybridCallback(config)
    steps = set(np.random.default_rng(0).choice(range(1, EPOCHS), 20, replace=False).tolist())
    save = Save(hybrid, tmp_path, steps)
    history = train(model, EPOCHS, hybrid, save)
    assert save.seen == set(Phase)
    saved = sorted(int(path.stem) for path in tmp_path.glob("*.keras"))
    assert len(saved) >= 20
    arguments = [str(HERE), str(tmp_path), json.dumps(saved), str(EPOCHS), name]
    done = subprocess.run(
        [sys.executable, "-c", RESUME, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for step, (losses, last) in json.loads(done.stdout).items():
        assert losses == history["loss"][int(step) :], step
        assert all(np.array_equal(a, b) for a, b in zip(weights(model), last, strict=True)), step


def test_a_damaged_or_foreign_file_changes_nothing(tmp_path):
    hybrid = HybridCallback(BRISK)
    hybrid.save(tmp_path / "run")
    before = json.dumps(hybrid.state_dict(), default=str)
    whole = (tmp_path / "run").read_bytes()
    (tmp_path / "run").write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        hybrid.load(tmp_path / "run")
    for state in ({"model": 1}, hybrid.state_dict() | {"engine": {}}):
        checkpoint.write(tmp_path / "run", state)
        with pytest.raises(CheckpointError, match=r"not one of a HybridCallback|damaged"):
            hybrid.load(tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        hybrid.load(tmp_path / "none")
    assert json.dumps(hybrid.state_dict(), default=str) == before


def test_half_precision_comes_back(tmp_path):
    import ml_dtypes

    array = np.arange(5).astype(ml_dtypes.bfloat16)
    checkpoint.write(tmp_path / "run", {"rows": [array]})
    (rows,) = checkpoint.read(tmp_path / "run")["rows"]
    assert rows.dtype == array.dtype
    assert rows.tobytes() == array.tobytes()


# -- what comes back ------------------------------------------------------------------------------


def state_of(model):
    return [np.array(v) for v in (*model.variables, *model.optimizer.variables)]


def rows(history, first):
    """What ``History`` tells of the epochs from `first` on, but for what a clock says."""
    clocks = ("seconds", "probe_cost", "hybrid_cost", "measured_speedup")
    return {
        name: values[first:]
        for name, values in history.items()
        if not any(clock in name for clock in clocks)
    }


class Keep(keras.callbacks.Callback):
    """The state after the first epoch of each phase, and after some others."""

    def __init__(self, hybrid):
        super().__init__()
        self.hybrid, self.states, self.seen = hybrid, {}, set()

    def on_epoch_end(self, epoch, logs=None):
        phase = self.hybrid.engine.phase
        if phase not in self.seen or epoch % 40 == 33:
            self.seen.add(phase)
            self.states[epoch + 1] = self.hybrid.state_dict(), state_of(self.model)


def noisy(seed):
    """Dropout and noise draw from seed generators, which Keras does not save."""
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.GaussianNoise(3e-3), keras.layers.Dense(16, activation="tanh")]
    layers += [keras.layers.BatchNormalization(), keras.layers.Dropout(1e-3)]
    model = keras.Sequential([keras.Input((64,)), *layers, keras.layers.Dense(10)])
    return compiled(model, keras.optimizers.Adam(3e-3), metrics=["accuracy"])


def test_history_and_all_state_go_on_where_they_were():
    model, hybrid = noisy(0), HybridCallback(BRISK)
    keep = Keep(hybrid)
    history = train(model, 100, hybrid, keep)
    assert keep.seen == set(Phase)
    for epoch, (state, _) in list(keep.states.items()):
        again, resumed = noisy(9), HybridCallback(BRISK)
        resumed.load_state_dict(state)
        assert resumed.epoch == epoch
        seen = Keep(resumed)
        to = min(epoch + 12, 100)
        rest = train(again, to, resumed, seen, initial_epoch=resumed.epoch)
        expected = {name: values[: to - epoch] for name, values in rows(history, epoch).items()}
        assert rows(rest, 0) == expected, epoch
        for at, (_, values) in seen.states.items():
            if at in keep.states:
                assert same(keep.states[at][1], values), (epoch, at)


def test_a_run_is_taken_back_to_where_it_was():
    model, hybrid = regression(), HybridCallback(BRISK)
    while not hybrid.engine.may_jump:
        train(model, 1, hybrid)
    state = hybrid.state_dict()
    losses = train(model, 50, hybrid)["loss"]
    hybrid.load_state_dict(state)
    assert train(model, 50, hybrid)["loss"] == losses
    memory = hybrid.statistics().memory
    assert memory["recovery"] > 0
    # A new one knows what the run has taken so far.
    again = HybridCallback(BRISK)
    again.load_state_dict(hybrid.state_dict())
    train(model, 1, again)
    assert again.statistics().memory["recovery"] == memory["recovery"]


def test_what_was_saved_without_snapshots_takes_new_ones_before_it_jumps():
    model, hybrid = regression(), HybridCallback(BRISK)
    while not hybrid.engine.may_jump:
        train(model, 1, hybrid)
    again = HybridCallback(BRISK)
    again.load_state_dict(hybrid.state_dict(snapshots=False))
    train(model, 1, again)
    assert again.statistics().predicted_steps == 0
    train(model, 1, again, steps_per_epoch=100)
    assert again.statistics().predicted_steps > 0


def test_shuffling_by_numpy_and_dropout_go_on_where_they_were(tmp_path):
    x, y = digits()

    def run(seed, epochs, load=False):
        model = perceptron(seed=seed, layers=lambda: [keras.layers.Dropout(0.5)])
        hybrid = HybridCallback(BRISK)
        if load:
            hybrid.load(tmp_path)
        hybrid.save_every(29, tmp_path)
        for epoch in range(hybrid.epoch, epochs):
            order = np.random.permutation(len(x))  # noqa: NPY002
            arguments = {"batch_size": 64, "shuffle": False, "verbose": 0}
            arguments |= {"epochs": epoch + 1, "initial_epoch": epoch}
            model.fit(x[order], y[order], callbacks=[hybrid], **arguments)
        return state_of(model), hybrid.statistics().steps

    whole = run(0, 5)
    assert whole[1] == 5 * 29
    for path in checkpoints_in(tmp_path):
        path.unlink()
    run(0, 2)
    went_on = run(7, 5, load=True)
    assert went_on[1] == whole[1]
    assert same(whole[0], went_on[0])


def test_the_seed_generators_of_keras_and_tensorflow_come_back():
    import tensorflow as tf

    def drawn():
        ours = keras.ops.convert_to_numpy(keras.random.uniform((3,)))
        return [*ours, *tf.random.get_global_generator().uniform((3,)).numpy()]

    keras.utils.set_random_seed(0)
    hybrid = HybridCallback()
    drawn()
    state = hybrid.state_dict()
    expected = drawn()
    keras.utils.set_random_seed(5)
    hybrid.load_state_dict(state)
    assert drawn() == expected
    assert drawn() != expected


# -- what is refused ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jumping():
    """State of a run in the middle of a jump, of a regression by Adam."""
    model, hybrid = regression(), HybridCallback(BRISK)
    while hybrid.engine.phase is not Phase.PREDICT:
        train(model, 1, hybrid)
    return hybrid.state_dict()


def other_models():
    swapped = regression()
    groups = [[swapped.layers[0].bias, swapped.layers[0].kernel]]
    return {
        "another model: 2 variables|another model: .*there": (perceptron(), {}),
        "optimizer Adam, and this model has SGD": (regression(keras.optimizers.SGD()), {}),
        "another optimizer: .* variables there": (
            regression(keras.optimizers.Adam(amsgrad=True)),
            {},
        ),
        "other layer groups": (swapped, {"layer_groups": groups}),
    }


def test_a_state_of_another_model_is_refused_when_fit_begins(jumping):
    for words, (model, arguments) in other_models().items():
        hybrid = HybridCallback(BRISK, **arguments)
        hybrid.load_state_dict(jumping)
        before, function = weights(model), model.train_function
        with pytest.raises(CheckpointError, match=words):
            train(model, 1, hybrid)
        assert same(before, weights(model)), words
        assert not model.optimizer.built or int(model.optimizer.iterations) == 0
        assert "train_step" not in vars(model)
        assert hybrid.statistics().steps == 0
        # What was loaded waits for the right model, and is saved again as it is.
        assert hybrid.state_dict() is jumping
        assert function is None
    model = regression(seed=4)
    again = HybridCallback(BRISK)
    again.load_state_dict(jumping)
    train(model, again.epoch + 40, again, initial_epoch=again.epoch)
    assert again.statistics().steps == jumping["engine"]["counters"]["steps"] + 40


def test_a_state_of_another_model_is_refused_at_once_where_the_model_is_known(jumping):
    model, hybrid = perceptron(), HybridCallback(BRISK)
    train(model, 3, hybrid)
    before = state_of(model)
    with pytest.raises(CheckpointError, match="another model"):
        hybrid.load_state_dict(jumping)
    assert same(before, state_of(model))
    train(model, 3, hybrid)
    assert hybrid.statistics().steps == 6


def test_frozen_layers_of_a_state_are_named():
    model, hybrid = perceptron(), HybridCallback(BRISK)
    train(model, 2, hybrid)
    state = hybrid.state_dict()
    frozen = perceptron()
    frozen.layers[0].trainable = False
    compiled(frozen)
    again = HybridCallback(BRISK)
    again.load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"kernel, .*bias differ, so freeze the same layers"):
        train(frozen, 1, again)


@pytest.mark.parametrize("part", ["average", "bank", "recovery", "logs", "beside", "model"])
def test_a_state_that_was_tampered_with_is_refused_when_fit_begins(jumping, part):
    broken = {"average": [np.zeros(3)], "bank": {"rows": 3}, "recovery": jumping["recovery"][1:]}
    broken |= {"logs": 7, "beside": {"pairs": 0}, "model": {"names": []}}
    hybrid, model = HybridCallback(BRISK), regression()
    hybrid.load_state_dict(jumping | {part: broken[part]})
    before = weights(model)
    with pytest.raises(CheckpointError):
        train(model, 1, hybrid)
    assert same(before, weights(model))
    assert hybrid.statistics().steps == 0


def test_a_state_of_version_2_is_read_beside_what_keras_saved(jumping):
    old = {name: jumping[name] for name in saving_keys_of_version_2()} | {"hybridcore_keras": 2}
    model, hybrid = regression(), HybridCallback(BRISK)
    values = jumping["model"]["values"], jumping["optimizer"]["values"]
    model.optimizer.build(model.trainable_variables)
    for owner, saved in zip((model, model.optimizer), values, strict=True):
        for variable, value in zip(owner.variables, saved, strict=True):
            variable.assign(value)
    hybrid.load_state_dict(old)
    losses = train(model, 40, hybrid)["loss"]
    again = HybridCallback(BRISK)
    again.load_state_dict(jumping)
    assert train(regression(seed=8), 40, again)["loss"] == losses


def saving_keys_of_version_2():
    return ["config", "engine", "beside", "skipped", "bank", "average", "secants", "recovery"]


def turned():
    x, y = digits()
    return tf.data.Dataset.from_tensors((x[:, ::-1].copy(), y)).repeat()


def test_saved_in_a_descent_it_goes_back_to_before_that_all_the_same(caplog):
    caplog.set_level("INFO", logger="hybridcore")
    model, hybrid = regression(), HybridCallback(CURVED)
    train(model, 60, hybrid)
    state = hybrid.state_dict()
    assert state["start"] is not None
    assert hybrid.state_dict(snapshots=False)["start"] is None
    train(model, 60, hybrid, data=turned())
    other, resumed = regression(seed=1), HybridCallback(CURVED)
    resumed.load_state_dict(state)
    train(other, 60, resumed, data=turned())
    assert caplog.text.count("back to before the quasi-Newton steps") == 2
    assert same(weights(model), weights(other))


def test_a_state_of_version_3_goes_on_from_where_it_is(caplog):
    caplog.set_level("INFO", logger="hybridcore")
    model, hybrid = regression(), HybridCallback(CURVED)
    train(model, 60, hybrid)
    state = hybrid.state_dict() | {"hybridcore_keras": 3}
    del state["start"]
    other, resumed = regression(seed=1), HybridCallback(CURVED)
    resumed.load_state_dict(state)
    # What pairs are taken since is not where they began.
    train(other, 5, resumed)
    assert resumed.hands.secants is not None
    assert resumed.hands.start is None
    train(other, 60, resumed, data=turned())
    assert "quasi-Newton steps end" in caplog.text
    assert "back to before" not in caplog.text


class Adam(keras.optimizers.Adam):
    """One of the user's own, which may do more."""


def test_a_state_of_a_descent_goes_on_with_an_optimizer_that_has_none():
    model, hybrid = regression(), HybridCallback(CURVED)
    train(model, 60, hybrid)
    state, taken = hybrid.state_dict(), hybrid.statistics().secant_steps
    assert state["secants"] is not None
    other, resumed = regression(Adam(1e-2), seed=1), HybridCallback(CURVED)
    resumed.load_state_dict(state)
    losses = train(other, 60, resumed)["loss"]
    assert resumed.statistics().secant_steps == taken
    assert losses[-1] < 0.2


# -- hybridcore off -------------------------------------------------------------------------------


def test_with_hybridcore_off_a_run_goes_on_and_another_s_state_is_refused(jumping, tmp_path):
    off = HybridTrainerConfig(enabled=False)
    with pytest.raises(CheckpointError, match="enabled is True there and False here"):
        HybridCallback(off).load_state_dict(jumping)
    x, y = digits()

    def run(epochs, seed, load=False):
        model = perceptron(seed=seed, layers=lambda: [keras.layers.Dropout(0.5)])
        hybrid = HybridCallback(off)
        if load:
            hybrid.load(tmp_path)
        hybrid.save_every(5, tmp_path)
        arguments = {"batch_size": 600, "shuffle": False, "verbose": 0, "callbacks": [hybrid]}
        model.fit(x, y, epochs=epochs, initial_epoch=hybrid.epoch, **arguments)
        return state_of(model), hybrid.statistics().steps

    whole = run(10, 0)
    assert whole[1] == 30
    for path in checkpoints_in(tmp_path):
        path.unlink()
    run(5, 0)
    went_on = run(10, 3, load=True)
    assert went_on[1] == whole[1]
    assert same(whole[0], went_on[0])


# -- saved by itself ------------------------------------------------------------------------------


def names(folder):
    return [int(path.stem.split("-")[1]) for path in checkpoints_in(folder)]


def test_saving_by_itself(tmp_path, caplog):
    model, hybrid = regression(), HybridCallback(BRISK)
    hybrid.save_every(10, tmp_path / "runs", keep=2)
    epochs = {}
    note = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: epochs.update({epoch: names(tmp_path / "runs")})
    )
    train(model, 4, hybrid, note, steps_per_epoch=15)
    # Where an epoch ends with the step, after all of it.
    assert epochs == {0: [10], 1: [30, 20], 2: [40, 30], 3: [60, 50]}
    newest = HybridCallback(BRISK)
    newest.load(tmp_path / "runs")
    assert newest.epoch == 4
    path = tmp_path / "runs" / "step-000000060.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    newest.load(tmp_path / "runs")
    # In the middle of an epoch: fit begins it anew.
    assert newest.epoch == 3
    assert "damaged" in caplog.text
    # A folder that is gone costs the checkpoints and nothing else.
    (tmp_path / "runs").rename(tmp_path / "there")
    before = hybrid.statistics().steps
    train(model, 1, hybrid, steps_per_epoch=30)
    assert hybrid.statistics().steps == before + 30
    assert "no checkpoint of step 80, training goes on" in caplog.text
    small = HybridCallback(BRISK)
    hybrid.save(tmp_path / "small", snapshots=False)
    hybrid.save(tmp_path / "large")
    sizes = [(tmp_path / name).stat().st_size for name in ("small", "large")]
    copy = 4 * sum(w.size for w in weights(model))
    assert sizes[1] - sizes[0] > 4 * copy
    small.load(tmp_path / "small")
    again = regression(seed=3)
    train(again, 1, small, steps_per_epoch=60)
    assert small.statistics().predicted_steps > hybrid.statistics().predicted_steps


def test_what_was_before_a_jump_is_saved(tmp_path):
    model, hybrid = regression(), HybridCallback(BRISK)
    hybrid.save_every(10_000, tmp_path, before_jumps=True)
    losses = train(model, 60, hybrid)["loss"]
    assert hybrid.statistics().predicted_steps > 0
    again = HybridCallback(BRISK)
    again.load(tmp_path)
    assert again.statistics().predicted_steps == 0
    first = again.epoch
    rest = train(regression(seed=2), 60, again, initial_epoch=first)["loss"]
    assert rest == losses[first:]
    assert again.statistics().predicted_steps == hybrid.statistics().predicted_steps


def test_weights_that_are_not_finite_take_no_checkpoint_s_place(tmp_path, caplog):
    model, hybrid = regression(), HybridCallback(BRISK)
    hybrid.save_every(2, tmp_path, keep=1)
    train(model, 2, hybrid)
    model.layers[0].bias.assign(np.full(10, np.nan))
    train(model, 2, hybrid)
    assert names(tmp_path) == [2]
    assert "weights are not finite" in caplog.text


def test_a_backup_of_another_step_is_an_error(tmp_path):
    """Two that put a model back have to agree on the step."""

    def run(hybrid, *order, epochs):
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
        found = {"hybrid": hybrid, "backup": backup}
        model = regression(seed=len(order))
        train(model, epochs, *(found[name] for name in order))
        return model

    first = HybridCallback(BRISK)
    run(first, "hybrid", "backup", epochs=12)
    first.save(tmp_path / "at-12")
    again = HybridCallback(BRISK)
    again.load(tmp_path / "at-12")
    run(again, "hybrid", "backup", epochs=15)
    assert again.statistics().steps == 15
    again = HybridCallback(BRISK)
    again.load(tmp_path / "at-12")
    with pytest.raises(CheckpointError, match="epoch 12, and BackupAndRestore begins at 15"):
        run(again, "backup", "hybrid", epochs=20)
    again = HybridCallback(BRISK)
    again.load(tmp_path / "at-12")
    with pytest.raises(CheckpointError, match="other weights into the model"):
        run(again, "hybrid", "backup", epochs=20)
