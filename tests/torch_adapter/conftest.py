import os
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
# Processes that tests start have to take the same sums as this one.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def readme_sides():
    """Return what gives the two programs of the README's diff in which a word stands."""
    import documents

    readme = documents.document("README")
    if readme is None:
        pytest.skip("the documents are in the source tree alone")
    return lambda word: documents.sides(documents.block(readme, "diff", word))
