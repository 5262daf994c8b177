"""The scripts for GPUs run, at toy sizes on the CPU: what they would record there is no result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import kernels, training


@pytest.mark.slow
@pytest.mark.parametrize("part", ["overhead", "memory", "cost"])
def test_a_script_for_a_gpu_runs_at_toy_size(part, tmp_path, monkeypatch):
    output = tmp_path / "result.json"
    arguments = ["training.py", part, "--toy", "--device", "cpu", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    training.main()
    rows = json.loads(output.read_text())["rows"]
    if part == "overhead":
        assert rows[0]["ratio"] > 0.0
    elif part == "memory":
        taken = {row["kind"]: row["components"]["snapshots"] for row in rows}
        assert taken["plain"] == 0 < taken["int8"] < taken["bfloat16"] < taken["exact"]
    else:
        assert [row["hybrid"] for row in rows] == [False, True]
        assert rows[0]["curve"][-1][2] < rows[0]["curve"][0][2]


@pytest.mark.slow
def test_the_script_of_the_kernels_runs_in_the_simulator(tmp_path):
    output = tmp_path / "kernels.json"
    command = [sys.executable, str(Path(kernels.__file__)), "--toy", "--output", str(output)]
    simulated = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(command, env=simulated, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(output.read_text())["rows"]
    assert {row["kernel"] for row in rows} >= {"rollout"}


def test_what_is_not_of_a_gpu_is_not_recorded(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training.py", "memory", "--toy", "--device", "cpu"])
    with pytest.raises(SystemExit):
        training.main()
    assert "name --output" in capsys.readouterr().err
