"""Where the tests of this folder run: on a GPU, or in numba's simulator of one.

    NUMBA_ENABLE_CUDASIM=1 NUMBA_DISABLE_JIT=1 pytest tests/cuda

The simulator runs the kernels as Python, a Python thread for each of the GPU's: it shows that the
logic is right, not that a GPU's compiler takes it.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def simulated():
    from numba import config

    return bool(config.ENABLE_CUDASIM)


def available():
    from hybridcore.kernels.dispatch import gpu_available

    return gpu_available()


@pytest.fixture(autouse=True)
def _skip_without_gpu(request):
    if request.node.get_closest_marker("gpu") and (simulated() or not available()):
        pytest.skip("needs a CUDA GPU")


@pytest.fixture
def kernels_run(monkeypatch):
    if not available():
        pytest.skip(
            "there is no CUDA GPU; NUMBA_ENABLE_CUDASIM=1 NUMBA_DISABLE_JIT=1 runs it simulated"
        )
    if simulated():
        from hybridcore.kernels.cuda import rssm

        # Quicker, and fewer than columns: the loops over them turn more than once.
        monkeypatch.setattr(rssm, "MAX_THREADS", 8)
