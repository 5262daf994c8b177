"""The core knows no framework, an adapter does no numerics, and importing is light."""

import ast
import inspect
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


def test_the_scan_sees_imports_wherever_they_stand(tmp_path):
    path = tmp_path / "example.py"
    path.write_text("import a.b as c\nfrom . import d\ndef f():\n    from e.f import g\n")
    assert set(imports(path)) == {"a", "e"}


def test_nothing_imports_the_command_line():
    files = [p for p in Path(hybridcore.__file__).parent.rglob("*.py") if "cli" not in p.parts]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            assert not any(name.startswith("hybridcore.cli") for name in names), path


def test_import_loads_nothing_heavy_else():
    code = "import hybridcore, sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"hybridcore", "numpy"} <= loaded
    heavy = {"llvmlite", "matplotlib", "sklearn", "PIL", "typer", "rich", "pandas"}
    assert not loaded & (heavy | FRAMEWORKS)


CLASSES = [name for name in hybridcore.__all__ if inspect.isclass(getattr(hybridcore, name))]


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_public_of_a_class_is_documented(name):
    member = getattr(hybridcore, name)
    # A dataclass without a docstring gets one that only repeats its signature.
    assert not member.__doc__.startswith(f"{name}(")
    for attribute, value in vars(member).items():
        inner = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if attribute.startswith("_"):
            continue
        if inspect.isfunction(inner) or isinstance(inner, property):
            assert inspect.getdoc(inner), f"{name}.{attribute}"


def test_adapters_is_not_a_package():
    # The name belongs to another well-known package; ours would shadow it.
    assert not (ROOT / "adapters" / "__init__.py").exists()
