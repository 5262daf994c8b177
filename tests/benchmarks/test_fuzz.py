"""What the fuzzer begins with."""

import pytest

from benchmarks import fuzz

TARGETS = [target for targets in fuzz.READERS.values() for target in targets]


@pytest.mark.parametrize("target", TARGETS, ids=[target.__name__ for target in TARGETS])
def test_every_seed_is_a_whole_case(target, tmp_path):
    check, seeds = target(tmp_path)
    assert seeds
    for seed in seeds:
        assert 0 < len(seed) <= fuzz.MOST_BYTES
        check(seed)
