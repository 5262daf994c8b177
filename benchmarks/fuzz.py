"""Fuzz the readers of checkpoints, settings and streams, guided by what they cover.

python benchmarks/fuzz.py --minutes 15              # for each reader; record in results/fuzz.json
python benchmarks/fuzz.py settings --minutes 15     # this one anew

Needs atheris, which is for Python 3.11 and Linux: pip install atheris. Each target runs in a
process of its own that a crash, ten seconds for one case or 500 MB end. Then the case is left in
the present folder, and belongs into the tests, from which strategies and checks are.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
sys.path.insert(0, str(HERE.parent))
MOST_MB, MOST_SECONDS = 500, 10
# Longer cases are cut, seeds among them.
MOST_BYTES = 32768
# Not tomllib, which atheris 2.3 rewrites into code that crashes.
COVERED = ["hybridcore", "hybridcore_torch"]

Check = Callable[[bytes], object]


class Folders:
    """Stands in for pytest's factory of temporary folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def getbasetemp(self) -> Path:
        return self.folder


def tests_of(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, TESTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(module, test: str, strategy: str, folder: Path | None) -> tuple[Check, list[bytes]]:
    """Return what runs `test` on cases of `strategy` that are made from the fuzzer's bytes."""
    from hypothesis import HealthCheck, given, settings

    check = getattr(module, test).hypothesis.inner_test
    arguments = [] if folder is None else [Folders(folder)]

    @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(getattr(module, strategy))
    def run(case: object) -> None:
        check(*arguments, case)

    rng = random.Random(0)
    return run.hypothesis.fuzz_one_input, [rng.randbytes(2**size) for size in range(4, 12)]


# -- the targets: each makes a check, and cases to begin with -------------------------------------


def checkpoint_bytes(folder: Path) -> tuple[Check, list[bytes]]:
    from hybridcore import CheckpointError, checkpoint
    from hybridcore_torch import files

    state = tests_of("core/test_checkpoint").STATE
    checkpoint.write(folder / "seed", state)
    old = TESTS / "torch_adapter" / "data" / "version-2.pt"

    def check(content: bytes) -> None:
        (folder / "run").write_bytes(content)
        with contextlib.suppress(CheckpointError):
            files.read(folder / "run")

    return check, [(folder / "seed").read_bytes(), old.read_bytes()]


def checkpoint_signed(folder: Path) -> tuple[Check, list[bytes]]:
    """What has been changed on purpose, with a checksum that fits."""
    from hybridcore import checkpoint

    check, seeds = checkpoint_bytes(folder)

    def signed(content: bytes) -> None:
        file = io.BytesIO(content)
        with contextlib.suppress(ValueError):
            at, _ = checkpoint._stamp(file)
            digest = checkpoint._digest(file, at)
            file.seek(at)
            file.write(digest.encode())
        check(file.getvalue())

    return signed, seeds[:1]


def checkpoint_states(folder: Path) -> tuple[Check, list[bytes]]:
    module = tests_of("core/test_checkpoint")
    return drawn(module, "test_any_json_is_a_state_or_refused", "JSON", folder)


def settings_bytes(folder: Path) -> tuple[Check, list[bytes]]:
    from hybridcore import HybridTrainerConfig

    check = tests_of("core/test_config").test_any_file_is_taken_or_refused.hypothesis.inner_test
    lines = [f"{k} = {json.dumps(v)}\n" for k, v in HybridTrainerConfig().to_dict().items()]
    seeds = ["".join(lines), "[hybridcore]\n" + "".join(lines)]
    return lambda content: check(Folders(folder), content), [seed.encode() for seed in seeds]


def settings_values(folder: Path) -> tuple[Check, list[bytes]]:
    module = tests_of("core/test_config")
    return drawn(module, "test_any_settings_are_taken_or_refused", "CHOSEN", None)


def stream_bytes(folder: Path) -> tuple[Check, list[bytes]]:
    module = tests_of("cli/test_reading")
    seed = module.written(folder / "seed", module.LINES).read_bytes()
    return lambda content: module.any_content(folder / "run", content), [seed]


def stream_lines(folder: Path) -> tuple[Check, list[bytes]]:
    module = tests_of("cli/test_reading")
    return drawn(module, "test_any_lines_are_a_stream_or_refused", "STREAMS", folder)


READERS = {
    "checkpoint": (checkpoint_bytes, checkpoint_signed, checkpoint_states),
    "settings": (settings_bytes, settings_values),
    "stream": (stream_bytes, stream_lines),
}


def fuzz(target: str, seconds: int, folder: Path) -> None:
    """Fuzz in this process, until time is up or something is found; does not return."""
    import atheris

    with atheris.instrument_imports(include=COVERED):
        check, seeds = globals()[target](folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    assert max(map(len, seeds)) <= MOST_BYTES
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = {
        "max_total_time": seconds,
        "timeout": MOST_SECONDS,
        "rss_limit_mb": MOST_MB,
        "max_len": MOST_BYTES,
        "print_final_stats": 1,
        "artifact_prefix": f"fuzz-{target}-",
    }
    atheris.Setup([sys.argv[0], str(corpus), *(f"-{k}={v}" for k, v in options.items())], check)
    atheris.Fuzz()


def run(target: str, seconds: int) -> dict[str, int]:
    """Fuzz in a process of its own; return what it came to."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--target", target, "--seconds", str(seconds)]
        command += ["--folder", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{target} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    figure = {name: int(n) for name, n in re.findall(r"stat::(\w+):\s+(\d+)", done.stderr)}
    return {
        "seconds": seconds,
        "cases": figure["number_of_executed_units"],
        "covered": int(re.findall(r"cov: (\d+)", done.stderr)[-1]),
        "slowest_seconds": figure["slowest_unit_time_sec"],
        "peak_mib": figure["peak_rss_mb"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("readers", nargs="*", help=f"of {', '.join(READERS)}; all if none is named")
    parser.add_argument("--minutes", type=float, default=15.0, help="for each reader")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "fuzz.json")
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.target:
        fuzz(arguments.target, arguments.seconds, arguments.folder)
    if importlib.util.find_spec("atheris") is None:
        sys.exit("atheris is missing: pip install atheris, with Python 3.11 on Linux")
    from hybridcore.cli.common import environment

    for reader in arguments.readers or READERS:
        targets = READERS[reader]
        seconds = round(60 * arguments.minutes / len(targets))
        found = {target.__name__: run(target.__name__, seconds) for target in targets}
        print(f"{reader}: {json.dumps(found)}", flush=True)
        before = arguments.output.read_text(encoding="utf-8") if arguments.output.exists() else "{}"
        document = environment() | {
            "command": f"python benchmarks/fuzz.py --minutes {arguments.minutes:g}",
            "readers": json.loads(before).get("readers", {}) | {reader: found},
        }
        arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
