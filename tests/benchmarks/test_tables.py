"""The tables of the documents are those of the recorded results, and each drill has its tests."""

import ast
import re

import pytest

from benchmarks import drills, table


def test_the_tables_of_both_pages_are_those_of_the_results():
    pages = [page.read_text(encoding="utf-8") for page in table.PAGES]
    together = "".join(pages)
    for name in table.BLOCKS:
        for marker in (f"<!-- {name} -->", f"<!-- end of {name} -->"):
            assert together.count(marker) == 1, marker
    assert [table.updated(text) for text in pages] == pages


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
