"""The recorded runs are whole: what the models of training dynamics are judged on."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
recordings = pytest.importorskip(
    "benchmarks.recordings", reason="the source tree is not here: this runs on the wheel"
)
FOLDERS = (recordings.FOLDER, recordings.FRESH)
if not (recordings.FOLDER / recordings.INDEX).is_file():
    pytest.skip("no runs are recorded", allow_module_level=True)

RECORDED = recordings.load()
FRESH = recordings.load(recordings.FRESH)


@pytest.fixture(
    params=[*RECORDED, *FRESH],
    ids=lambda recording: recording.name,
)
def recording(request):
    return request.param


def test_there_are_enough_of_them():
    assert len(RECORDED) >= 14
    assert len({recording.workload for recording in RECORDED}) >= 7
    for setting, least in (("optimizer", 3), ("schedule", 4), ("learning_rate", 6), ("batch", 6)):
        assert len({recording.settings[setting] for recording in RECORDED}) >= least, setting


def test_the_index_names_every_file_and_no_other():
    for folder, recorded in zip(FOLDERS, (RECORDED, FRESH), strict=True):
        files = [path.stem for path in folder.glob("*.npz")]
        assert sorted(files) == sorted(recordings.index(folder)) == [r.name for r in recorded]


def kinds(recorded):
    """Workload and settings but the seed, with the number of runs that have them."""
    return Counter((r.workload, *sorted((r.settings | {"seed": None}).items())) for r in recorded)


def test_fresh_runs_are_the_same_but_for_their_seeds():
    assert kinds(RECORDED).keys() == kinds(FRESH).keys()
    for recorded in (RECORDED, FRESH):
        assert len(set(kinds(recorded).values())) == 1
    assert {r.settings["seed"] for r in RECORDED}.isdisjoint(r.settings["seed"] for r in FRESH)


def test_they_stay_small():
    for folder, recorded in zip(FOLDERS, (RECORDED, FRESH), strict=True):
        size = sum(path.stat().st_size for path in folder.glob("*.npz"))
        assert size < 20_000 * len(recorded)


def test_a_series_has_one_finite_positive_figure_a_step(recording):
    for name in recordings.SERIES:
        series = getattr(recording, name)
        assert series.shape == (recording.settings["steps"],)
        assert series.dtype == np.float32
        assert np.isfinite(series).all()
        assert (series >= 0.0).all()
    assert 1000 <= recording.settings["steps"] <= 2500
    assert (recording.loss > 0.0).all()
    assert (recording.gradient_norm > 0.0).all()


def test_the_index_belongs_to_the_arrays(recording):
    folder = FOLDERS[any(recording is fresh for fresh in FRESH)]
    entry = recordings.index(folder)[recording.name]
    assert entry["first_loss"] == recording.loss[0]
    assert entry["last_loss"] == recording.loss[-1]
    assert set(entry["versions"]) == {"python", "torch", "numpy"}


def test_training_went_down(recording):
    assert np.median(recording.loss[-50:]) < 0.8 * np.median(recording.loss[:20])


def test_the_learning_rate_follows_the_named_schedule(recording):
    peak, steps = recording.settings["learning_rate"], recording.settings["steps"]
    t = np.arange(steps)
    period = steps // 4
    expected = {
        "constant": np.full(steps, peak),
        "linear": peak * (1.0 - t / steps),
        "cosine": peak * 0.5 * (1.0 + np.cos(np.pi * t / steps)),
        "restarts": peak * 0.5 * (1.0 + np.cos(np.pi * (t % period) / period)),
    }[recording.settings["schedule"]]
    np.testing.assert_allclose(recording.learning_rate, expected, rtol=1e-4, atol=1e-7 * peak)


def test_a_missing_index_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"benchmarks\.record_runs"):
        recordings.load(tmp_path)
