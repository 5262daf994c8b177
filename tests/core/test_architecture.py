"""The core knows no framework, an adapter does no numerics, and importing is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hybridcore

FRAMEWORKS = {"torch", "tensorflow", "keras", "jax", "hybridcore_torch", "hybridcore_keras"}
ROOT = Path(__file__).resolve().parents[2]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def test_import_loads_no_framework_and_no_compiler():
    code = (
        "import sys, hybridcore;"
        "print([m for m in ('torch', 'tensorflow', 'keras', 'jax', 'numba') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_core_imports_no_framework():
    files = [p for p in Path(hybridcore.__file__).parent.rglob("*.py") if "cli" not in p.parts]
    assert len(files) > 10
    for path in files:
        assert not FRAMEWORKS & set(imports(path)), path


def test_adapters_import_no_numerics():
    folder = ROOT / "adapters"
    if not folder.is_dir():
        pytest.skip("the source tree is not here: this runs on the wheel")
    files = list(folder.rglob("*.py"))
    assert files
    for path in files:
        assert not {"numba", "scipy"} & set(imports(path)), path


@pytest.mark.parametrize("name", hybridcore.__all__)
def test_public_names_are_documented(name):
    if name != "__version__":
        assert getattr(hybridcore, name).__doc__
