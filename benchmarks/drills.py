"""Run the fault drills and record how often each was survived, in results/drills.json.

python benchmarks/drills.py               # with 200 kills of each adapter
python benchmarks/drills.py --kills 20

A drill counts once for each case of its tests, or as often as the test itself counts.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

FAULTS = "torch_adapter/test_faults.py"
DRILLS = "torch_adapter/test_drills.py"
LOOP = "torch_adapter/test_acceptance.py"
KERAS = "keras_adapter/test_keras_acceptance.py"
KERAS_FAULTS = "keras_adapter/test_keras_faults.py"
ROOM = "keras_adapter/test_keras_memory.py"
# Drill, file of its tests and their names; of those in SCRIPTS the whole is run by a script.
KILLS = "SIGKILL at a random line of save, predict, correct or rollback, or at any moment"
KERAS_KILLS = "the same, in Keras"
SCRIPTS = {KILLS: "torch_adapter/kills.py", KERAS_KILLS: "keras_adapter/keras_kills.py"}
TABLE: list[tuple[str, str, tuple[str, ...]]] = [
    # What may happen to the process.
    (KILLS, FAULTS, ("a_run_that_is_killed_again_and_again_loses_nothing",)),
    (KERAS_KILLS, KERAS_FAULTS, ("a_fit_that_is_killed_again_and_again_loses_nothing",)),
    (
        "SIGKILL in a jump, saved before it",
        FAULTS,
        ("what_was_before_a_jump_is_there_after_a_kill_in_it",),
    ),
    (
        "the disk is full, by a limit on file size",
        FAULTS,
        ("a_full_disk_costs_the_checkpoints_and_nothing_else",),
    ),
    (
        "the folder is gone, or may not be written",
        FAULTS,
        ("a_folder_that_is_gone_or_closed_costs_the_checkpoints_and_nothing_else",),
    ),
    (
        "SIGINT at a random line of a step",
        FAULTS,
        ("an_interrupted_step_can_be_taken_again",),
    ),
    (
        "SIGINT at a random line of fit, in Keras",
        KERAS_FAULTS,
        ("an_interrupted_fit_can_be_begun_again",),
    ),
    (
        "the loop's own code raises, at each pass of each step",
        "torch_adapter/test_abandoned.py",
        ("a_step_that_fails_at_each_of_its_passes_comes_to_the_same",),
    ),
    (
        "SIGKILL or an error on one rank, while sharded weights are saved",
        "torch_adapter/test_ranks.py",
        ("sharded_saves_that_are_killed_or_fail_lose_nothing_and_no_rank_waits",),
    ),
    (
        "memory runs out",
        FAULTS,
        (
            "where_memory_runs_out_training_goes_on",
            "an_allocator_that_refuses_gets_fewer_snapshots_and_then_none",
            "memory_that_runs_out_at_any_call_costs_no_step",
        ),
    ),
    (
        "memory runs out, in Keras",
        ROOM,
        (
            "an_allocator_that_refuses_gets_fewer_snapshots_and_then_none",
            "memory_that_runs_out_in_any_call_costs_no_step",
            "a_jump_that_cannot_be_validated_is_taken_back",
        ),
    ),
    # Numbers.
    ("NaN or Inf in the loss", LOOP, ("a_bad_batch_costs_itself_and_nothing_else",)),
    (
        "NaN or Inf in the gradients",
        LOOP,
        ("a_finite_loss_with_a_bad_gradient_leaves_the_batch_out",),
    ),
    (
        "NaN or Inf in a batch, in Keras",
        KERAS,
        ("a_bad_batch_costs_itself_and_nothing_else", "a_bad_batch_can_raise"),
    ),
    (
        "NaN or Inf in a single parameter",
        DRILLS,
        ("a_parameter_that_is_not_finite_is_said_and_the_last_good_state_is_kept",),
    ),
    ("NaN or Inf in a snapshot", DRILLS, ("what_is_not_finite_in_a_snapshot_makes_no_jump",)),
    ("NaN, Inf or 1e38 in a probe", DRILLS, ("a_probe_that_goes_wrong_costs_jumps_at_most",)),
    (
        "the loss scale overflows",
        DRILLS,
        ("an_overflow_of_the_loss_scale_is_no_divergence",),
    ),
    (
        "the loss is 100 times as high for a step",
        DRILLS,
        ("a_spike_of_a_hundred_times_the_loss_is_survived",),
    ),
    ("a dead network", DRILLS, ("a_dead_network_stays_where_it_is",)),
    (
        "a rate at which plain training diverges too",
        DRILLS,
        ("a_rate_that_diverges_in_plain_training_is_said",),
    ),
    # The loop.
    (
        "layers are frozen and thawed",
        DRILLS,
        ("freezing_and_thawing_again_and_again",),
    ),
    (
        "a head is replaced, a parameter group added",
        "torch_adapter/test_loop.py",
        ("structure_may_change_at_any_time",),
    ),
    (
        "a head is replaced in its parameter group",
        DRILLS,
        ("a_head_that_is_replaced_in_its_group_leaves_its_state_behind",),
    ),
    (
        "the user loads weights",
        DRILLS,
        (
            "weights_that_the_user_loads_are_kept_in_any_phase",
            "weights_that_the_user_loads_are_kept_between_any_two_steps",
        ),
    ),
    (
        "the optimizer is swapped",
        DRILLS,
        (
            "what_a_trainer_was_built_from_cannot_be_swapped_unseen",
            "a_new_trainer_goes_on_with_another_optimizer",
        ),
    ),
    (
        "the learning rate is changed by hand",
        DRILLS,
        ("a_rate_that_is_changed_by_hand_holds",),
    ),
    (
        "the loader is made anew, evaluation mode toggled",
        DRILLS,
        ("evaluation_and_a_new_loader_inside_the_loop_do_no_harm",),
    ),
    (
        "another callback writes weights, in Keras",
        "keras_adapter/test_compatibility.py",
        ("weights_that_another_callback_writes_are_kept",),
    ),
    (
        "layers are frozen between two calls of fit, in Keras",
        "keras_adapter/test_compatibility.py",
        ("freezing_a_layer_between_two_fits_starts_over",),
    ),
]


def run_tests() -> dict[str, int]:
    """Run the tests of the table; return how often each drill was survived, by file and test."""
    names = {f"tests/{file}::test_{test}" for _, file, tests in TABLE for test in tests}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # The family of reports that takes properties.
        options = ["-q", f"--junitxml={report}", "-o", "junit_family=xunit1"]
        command = [sys.executable, "-m", "pytest", *options, *sorted(names)]
        done = subprocess.run(command, cwd=HERE.parent, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    if done.returncode or any(case.find("skipped") is not None for case in cases):
        sys.exit("a drill failed or was skipped")
    counts: dict[str, int] = {}
    for case in cases:
        file = case.attrib["classname"].replace(".", "/").removeprefix("tests/")
        test = re.sub(r"\[.*", "", case.attrib["name"])
        times = [int(p.attrib["value"]) for p in case.iter("property") if p.get("name") == "times"]
        key = f"{file}.py::{test}"
        counts[key] = counts.get(key, 0) + sum(times or [1])
    return counts


def start(script: str, kills: int) -> subprocess.Popen[str]:
    """Begin to kill, by one of the scripts."""
    command = [sys.executable, str(HERE.parent / "tests" / script), str(kills)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def outcome(killing: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what a script counted, when it has ended."""
    printed, _ = killing.communicate()
    if killing.returncode:
        sys.exit("a kill was not survived")
    return dict(json.loads(printed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "drills.json")
    arguments = parser.parse_args()
    from hybridcore.cli.common import environment

    # One beside the tests, the other after them.
    with start(SCRIPTS[KILLS], arguments.kills) as killing:
        counts = run_tests()
        killed = {KILLS: outcome(killing)}
    with start(SCRIPTS[KERAS_KILLS], arguments.kills) as killing:
        killed[KERAS_KILLS] = outcome(killing)
    document = environment() | {
        "command": f"python benchmarks/drills.py --kills {arguments.kills}",
        "times": dict(sorted(counts.items())),
        "kills": killed,
    }
    arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document["kills"]))


if __name__ == "__main__":
    main()
