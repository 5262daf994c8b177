"""Data parallelism of the libraries: two processes, which have to end at the same weights."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

LIBRARIES = ("accelerate", "lightning", "transformers")
pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(library) is None for library in LIBRARIES),
        reason="needs the extras [lightning,huggingface]",
    ),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.slow,
]


def test_two_processes_predict_alike_in_every_library(tmp_path):
    script = Path(__file__).with_name("launched.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first.keys() == {"accelerate", "huggingface", "lightning"}
    assert first == second
    # Each rank checked its own passes; on accelerate and lightning the batches are the same.
    assert first["accelerate"] == first["lightning"]
