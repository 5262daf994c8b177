"""What may happen to a process: it is killed or interrupted, disk or memory run out."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from drilling import Interrupter
from problems import BRISK, regression, weights

from hybridcore import Phase
from hybridcore.rotation import checkpoints_in
from hybridcore_torch import HybridTrainer, files

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and limits are those of POSIX")


def run(script, *arguments, **variables):
    done = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | variables,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_loses_nothing():
    # python tests/torch_adapter/kills.py 200 is the whole drill.
    done, _ = run("kills.py", 8, 3)
    assert done["kills"] == 8


KILLED_IN_A_JUMP = """
import sys
sys.path.insert(0, sys.argv[1])
from kills import lie_in_wait
from drilling import Killer
from problems import BRISK, regression
from hybridcore_torch import HybridTrainer
import dataclasses
model, optimizer, closure = regression()
trainer = HybridTrainer(model, optimizer, dataclasses.replace(BRISK, secant_pairs=0))
trainer.save_every(10_000, sys.argv[2], before_jumps=True)
lie_in_wait(Killer("predict", 400))
for step in range(200):
    trainer.step(closure)
"""


def test_what_was_before_a_jump_is_there_after_a_kill_in_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED_IN_A_JUMP, str(HERE), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, dataclasses.replace(BRISK, secant_pairs=0))
    results = []
    while not results or not results[-1].was_predicted:
        results.append(trainer.step(closure))
    other, optimizer, again = regression(seed=5)
    resumed = HybridTrainer.load(tmp_path, other, optimizer)
    assert resumed.statistics().steps == len(results) - 1
    assert resumed.engine.phase is Phase.FULL
    for _ in range(60):
        results.append(trainer.step(closure))
        assert resumed.step(again)[:5] == results[-2][:5]


# -- the disk -------------------------------------------------------------------------------------

NO_SPACE = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from problems import BRISK, regression, weights
from hybridcore_torch import HybridTrainer
import torch
model, optimizer, closure = regression()
trainer = HybridTrainer(model, optimizer, BRISK)
trainer.save_every(10, sys.argv[2])
for step in range(25):
    trainer.step(closure)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, unlimited[1]))
for step in range(55):
    trainer.step(closure)
try:
    trainer.save(sys.argv[2] + "/step-000000020.safetensors")
except OSError as error:
    assert "File too large" in str(error), error
else:
    raise AssertionError("there was room")
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
sys.stdout.write(f"{[p.double().sum().item().hex() for p in model.parameters()]}")
"""


@pytest.mark.slow
def test_a_full_disk_costs_the_checkpoints_and_nothing_else(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", NO_SPACE, str(HERE), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    for _ in range(80):
        trainer.step(closure)
    assert done.stdout == str([p.double().sum().item().hex() for p in model.parameters()])
    assert done.stderr.count("training goes on") == 6
    assert [p.name for p in checkpoints_in(tmp_path)] == [
        "step-000000020.safetensors",
        "step-000000010.safetensors",
    ]
    assert not list(tmp_path.glob(".*"))
    for path in checkpoints_in(tmp_path):
        files.read(path)


def test_a_folder_that_is_gone_or_closed_costs_the_checkpoints_and_nothing_else(tmp_path, caplog):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    folder = tmp_path / "here"
    trainer.save_every(5, folder)
    for _ in range(5):
        trainer.step(closure)
    folder.rename(tmp_path / "there")
    for _ in range(5):
        trainer.step(closure)
    assert "no checkpoint of step 10, training goes on" in caplog.text
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    if os.access(closed, os.W_OK):
        # Root may write anywhere but in /proc.
        closed = Path("/proc")
    with pytest.raises(OSError, match=r"Permission|No such file|closed|proc"):
        trainer.save(closed / "run")
    for _ in range(5):
        trainer.step(closure)
    assert trainer.statistics().steps == 15
    files.read(tmp_path / "there" / "step-000000005.safetensors")


# -- SIGINT ---------------------------------------------------------------------------------------


def taken(optimizer):
    return [int(state["step"]) for state in optimizer.state.values()]


@pytest.mark.parametrize("pairs", [0, 20])
def test_an_interrupted_step_can_be_taken_again(pairs, record_property):
    rng = random.Random(pairs)
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, dataclasses.replace(BRISK, secant_pairs=pairs))
    interrupted, phases = 0, set()
    # Which phases are hit in 300 depends on how many lines a step has.
    while (taken_so_far := trainer.engine.counters.steps) < 300 or phases != set(Phase):
        assert taken_so_far < 3000
        phase, before, steps = trainer.engine.phase, weights(model), taken(optimizer)
        pushed = trainer.engine.controller.outer.active
        try:
            with Interrupter(round(10 ** rng.uniform(0.0, 3.7))):
                trainer.step(closure)
        except KeyboardInterrupt:
            interrupted += 1
            phases.add(phase)
            assert all(torch.isfinite(p).all() for p in model.parameters())
            # Where the weights may move only by a step, they have not moved, or by a step.
            if not pairs and phase is not Phase.PREDICT and taken(optimizer) == steps:
                # Or by a jump or its rollback, or by an outer step.
                elsewhere = pushed or trainer.engine.phase is not phase
                assert elsewhere or all(map(torch.equal, before, weights(model)))
            trainer.state_dict()
    assert interrupted > 60
    assert phases == set(Phase)
    assert closure().item() < 0.2
    record_property("times", interrupted)


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, as Linux does")
def test_where_memory_runs_out_training_goes_on():
    # With every tensor in pages of its own, what the heap's fragments leave room for plays no part:
    # between 3 and 12 copies this holds.
    (loss, summary), log = run("short_of_memory.py", 7, MALLOC_MMAP_THRESHOLD_="65536")
    assert summary["steps"] == 83
    assert summary["snapshots"] < 6
    assert loss < 0.34
    assert "memory has run out, so from now on there are 5 snapshots" in log


def test_a_jump_is_taken_back_where_memory_runs_out_in_it():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, dataclasses.replace(BRISK, secant_pairs=0))
    while trainer.engine.phase is not Phase.CORRECT:
        if trainer.engine.may_jump:
            before = weights(model)
        trainer.step(closure)
    jumped, seen = weights(model), []

    def short():
        seen.append(weights(model))
        if len(seen) == 1:
            raise torch.OutOfMemoryError
        return closure()

    steps = trainer.statistics().steps
    assert trainer.step(short).phase is Phase.FULL
    assert all(map(torch.equal, seen[0], jumped))
    assert all(map(torch.equal, seen[1], before))
    assert not trainer.engine.may_roll_back
    assert trainer.statistics().steps == steps + 1


@pytest.mark.parametrize(("rows", "room"), [(5, 5), (4, 4), (3, 0)])
def test_an_allocator_that_refuses_gets_fewer_snapshots_and_then_none(
    rows, room, monkeypatch, caplog
):
    zeros, empty, taken = torch.zeros, torch.empty, weakref.WeakSet()

    def refusing(*shape, **named):
        if len(shape) == 2 and shape[0] > 20:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return zeros(*shape, **named)

    def refusing_rows(*shape, **named):
        """No more rows of the bank than that at a time."""
        if shape != (650,):
            return empty(*shape, **named)
        if len(taken) == rows:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        row = empty(*shape, **named)
        taken.add(row)
        return row

    monkeypatch.setattr(torch, "zeros", refusing)
    monkeypatch.setattr(torch, "empty", refusing_rows)
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    for _ in range(300):
        trainer.step(closure)
    statistics = trainer.statistics()
    assert statistics.steps == 300
    assert statistics.snapshots == trainer.engine.snapshots == room
    assert statistics.secant_steps == 0
    assert (statistics.predicted_steps > 50) == (room > 0)
    assert "from now on there are no secant pairs" in caplog.text
    assert ("no snapshots and no jumps" in caplog.text) == (room == 0)
    assert closure().item() < 0.2
    # What was given up stays so in a run that goes on.
    monkeypatch.undo()
    other, optimizer, again = regression(seed=5)
    resumed = HybridTrainer(other, optimizer, BRISK)
    resumed.load_state_dict(trainer.state_dict())
    for _ in range(60):
        assert trainer.step(closure).loss == resumed.step(again).loss
    assert all(map(torch.equal, weights(model), weights(other)))


def test_memory_that_runs_out_at_any_call_costs_no_step(caplog, record_property):
    """The closure fails, at each call in turn; copies are given up, and it is called again."""
    calls_that_fail = range(20, 130, 7)
    for fatal in calls_that_fail:
        model, optimizer, closure = regression()
        calls = 0

        def short(fatal=fatal, closure=closure):
            nonlocal calls
            calls += 1
            if calls == fatal:
                raise MemoryError
            return closure()

        trainer = HybridTrainer(model, optimizer, BRISK)
        for step in range(140):
            trainer.step(short)
            assert trainer.statistics().steps == step + 1
        assert closure().item() < 0.6
    assert "memory has run out" in caplog.text
    record_property("times", len(calls_that_fail))


def test_other_errors_and_plain_runs_are_none_of_this():
    model, optimizer, closure = regression()

    def failing(error):
        raise error

    trainer = HybridTrainer(model, optimizer, BRISK)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        trainer.step(lambda: failing(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    # Once there is nothing left to give up, the error is the user's.
    with pytest.raises(MemoryError):
        trainer.step(lambda: failing(MemoryError()))
    assert trainer.statistics().steps == 0
    trainer.step(closure)
