"""The callback's own state as a file, beside what Keras saves."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras_problems import BRISK, CURVED, regression, train, weights

from hybridcore import CheckpointError, Phase, checkpoint
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
