"""Fuzz the readers of checkpoints and settings for so long: python benchmarks/fuzz.py --minutes 3.

Strategies and checks are those of the tests. A case that fails is shown, and belongs there.
"""

import argparse
import importlib.util
import resource
import tempfile
from pathlib import Path
from time import monotonic

from hypothesis import HealthCheck, given, settings

TESTS = Path(__file__).parents[1] / "tests" / "core"
# By file of tests: a test, the strategy that it draws from, and whether it needs a folder.
TARGETS = {
    "test_checkpoint": (
        ("test_bytes_that_are_no_checkpoint", "BYTES", True),
        ("test_any_json_is_a_state_or_refused", "JSON", True),
    ),
    "test_config": (
        ("test_any_settings_are_taken_or_refused", "CHOSEN", False),
        ("test_any_file_is_taken_or_refused", "FILES", True),
    ),
}


class Folders:
    """Stands in for pytest's factory of temporary folders."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def getbasetemp(self):
        return self.folder


def load(name):
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fuzz(check, strategy, arguments, seconds):
    """Run `check` on ever new cases of `strategy`; return how many."""
    cases = 0

    @settings(
        max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def run(case):
        nonlocal cases
        cases += 1
        check(*arguments, case)

    end = monotonic() + seconds
    while monotonic() < end:
        run()
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=15.0, help="for each reader")
    minutes = parser.parse_args().minutes
    for name, tests in TARGETS.items():
        module = load(name)
        with tempfile.TemporaryDirectory() as folder:
            for test, strategy, needs_folder in tests:
                check = getattr(module, test).hypothesis.inner_test
                arguments = [Folders(folder)] if needs_folder else []
                seconds = 60.0 * minutes / len(tests)
                cases = fuzz(check, getattr(module, strategy), arguments, seconds)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                print(f"{name}: {test}: {cases} cases, {peak:.0f} MiB at most", flush=True)


if __name__ == "__main__":
    main()
