import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("typer")

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Commands write beside where they are called."""
    import torch

    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
