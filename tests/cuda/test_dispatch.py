"""Which device is chosen, and what is imported to choose it."""

import subprocess
import sys

import pytest
from conftest import available

from hybridcore.kernels import dispatch


def test_auto_is_the_cpu_until_a_measurement_says_otherwise():
    for work in (0, 5 * 32 * 75, 10**15):
        assert dispatch.resolve("auto", work) == "cpu"
    assert dispatch.resolve("cpu", 10**15) == "cpu"


def test_auto_takes_a_gpu_that_is_there_from_the_crossover_on(monkeypatch):
    monkeypatch.setattr(dispatch, "CROSSOVER", 100)
    assert dispatch.resolve("auto", 99) == "cpu"
    assert dispatch.resolve("auto", 100) == ("cuda" if available() else "cpu")


def test_cuda_without_a_gpu_is_an_error_that_names_the_fix():
    if available():
        assert dispatch.resolve("cuda") == "cuda"
    else:
        with pytest.raises(RuntimeError, match=r"hybridcore\[cuda\].*device='auto'"):
            dispatch.resolve("cuda")


@pytest.mark.parametrize("device", ["gpu", "", "CUDA", None, 0])
def test_unknown_devices_are_refused(device):
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu' or 'cuda'"):
        dispatch.resolve(device)


def test_negative_work_is_refused():
    with pytest.raises(ValueError, match="work must be at least 0, but is -1"):
        dispatch.resolve("auto", -1)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_nothing_is_imported_until_cuda_is_asked_for(device):
    code = (
        "import sys; from hybridcore.kernels import dispatch;"
        f"print(dispatch.resolve({device!r}, 10**9), 'numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cpu", "False"]


def test_the_kernels_import_without_a_driver_and_compile_nothing():
    code = (
        "from hybridcore.kernels.cuda import api, bptt, rssm, training;"
        "kernels = [rssm.encode, rssm.rollout, bptt.window_gradients, training.adam_updates];"
        "print(all(not getattr(kernel, 'overloads', {}) for kernel in kernels))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
