"""Make the benchmarks importable where the source tree is, and leave them out where it is not."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "benchmarks").is_dir():
    collect_ignore_glob = ["test_*.py"]
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
