"""The README's tables are those of the recorded results, and each drill has its tests."""

import ast
import re

import pytest

from benchmarks import drills, table


def test_the_readme_s_tables_are_those_of_the_results():
    text = table.README.read_text(encoding="utf-8")
    for name in table.BLOCKS:
        assert text.count(f"<!-- {name} -->") == text.count(f"<!-- end of {name} -->") == 1, name
    assert table.updated(text) == text


@pytest.mark.parametrize(
    ("drill", "file", "tests"), drills.TABLE, ids=[row[0] for row in drills.TABLE]
)
def test_each_drill_has_its_tests(drill, file, tests):
    tree = ast.parse((drills.HERE.parent / "tests" / file).read_text(encoding="utf-8"))
    there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert {f"test_{test}" for test in tests} <= there


@pytest.mark.parametrize("name", ["soak", "fuzz", "drills"])
def test_a_record_names_the_versions_that_it_depends_on(name):
    document = table.recorded(name)
    for package in ("hybridcore", "python", "torch", "numpy"):
        assert re.match(r"\d+\.\d+", document[package]), package
