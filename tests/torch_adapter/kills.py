"""A run that is killed again and again: ``python kills.py 200`` kills it 200 times.

Each child takes up the newest checkpoint and trains on, saving every few steps, until SIGKILL
reaches it at a random line inside save, predict, correct or rollback, or at a random moment.
"""

import json
import math
import os
import random
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from resuming import build, figures

from hybridcore import Action, Phase
from hybridcore.rotation import checkpoints_in
from hybridcore_torch import HybridTrainer, files, hands

KIND = "adamw, schedule, clipping"
STEPS, EVERY = 170, 8
# Lines of Python that a child spends there, about: the kill is at a random one of them.
PLACES = {"save": 20_000, "predict": 20_000, "correct": 9_000, "rollback": 6_000, "any moment": 1}


class Killer:
    """Ends this process by SIGKILL at line number `lines` that is run inside `place`."""

    def __init__(self, place, lines):
        self.place, self.left, self.depth = place, lines, 0

    def line(self, frame, event, argument):
        if self.depth and event == "line":
            self.left -= 1
            if self.left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.line

    def around(self, owner, name, here=lambda *arguments: True):
        """Count the lines that `owner.name` runs, where `here` says that this is the place."""
        plain = getattr(owner, name)

        def counted(*arguments, **named):
            if not here(*arguments):
                return plain(*arguments, **named)
            self.depth += 1
            sys.settrace(self.line)
            try:
                return plain(*arguments, **named)
            finally:
                self.depth -= 1
                sys.settrace(None)

        setattr(owner, name, counted)

    def lie_in_wait(self):
        if self.place == "save":
            self.around(HybridTrainer, "save")
        elif self.place == "rollback":
            self.around(hands.Hands, "carry_out", lambda _, d, c: d.action is Action.ROLLBACK)
        elif self.place != "any moment":
            phase = Phase[self.place.upper()]
            self.around(HybridTrainer, "step", lambda trainer, _: trainer.engine.phase is phase)


def run(folder, killer, tell):
    """Train to the end, from the newest checkpoint if there is one; return the last figures."""
    path = folder if checkpoints_in(folder) else None
    trainer, closure = build(KIND, seed=0 if path is None else 9, path=path)

    def hurt():
        # The first jump must be taken back.
        early = trainer.engine.counters.steps < 120
        bad = trainer.engine.phase is Phase.CORRECT and early
        return 1e3 * closure() if bad else closure()

    trainer.save_every(EVERY, folder, keep=2, before_jumps=True)
    first = trainer.engine.counters.steps
    killer.lie_in_wait()
    for step in range(first, STEPS):
        trainer.step(hurt)
        if (step + 1) % EVERY == 0:
            tell(step + 1)
            assert not list(folder.glob(".*")), "something was left over"
    return figures(trainer, [])


def child(folder, killer, pipe):
    try:
        last = run(folder, killer, lambda step: os.write(pipe, f"{step}\n".encode()))
        os.write(pipe, (json.dumps(last) + "\n").encode())
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status)


def start(folder, killer, moment=None):
    """Run a child until it ends, or for `moment` seconds; return status and what it told."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        child(folder, killer, writing)
    os.close(writing)
    told, until = b"", None if moment is None else time.monotonic() + moment
    while True:
        left = None if until is None else max(0.0, until - time.monotonic())
        if not select.select([reading], [], [], left)[0]:
            os.kill(pid, signal.SIGKILL)
            until = None
            continue
        block = os.read(reading, 1 << 16)
        if not block:
            break
        told += block
    os.close(reading)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), told.decode().split("\n")[:-1]


def drill(kills, seed, folder):
    """Kill `kills` times; return the counts, by place, after checking all that must hold."""
    rng, done, runs = random.Random(seed), Counter(), 0
    status, told = start(folder / "whole", Killer("any moment", 0))
    assert status == 0, told
    expected, whole, killed = told[-1], folder / "killed-0", 0
    whole.mkdir()
    while killed < kills:
        place = rng.choice(list(PLACES))
        moment = rng.uniform(0.0, 0.6) if place == "any moment" else None
        # As often in the first ten lines as in the next ninety, and so on.
        lines = round(math.exp(rng.uniform(0.0, math.log(PLACES[place]))))
        status, told = start(whole, Killer(place, lines), moment)
        found = checkpoints_in(whole)
        saved = [int(line) for line in told if line.isdigit()]
        newest = int(found[0].stem.split("-")[1]) if found else 0
        assert newest >= max(saved, default=0), f"step {saved} was saved, {newest} is there"
        for path in found:
            files.read(path)
        if status == -signal.SIGKILL:
            killed += 1
            done[place] += 1
            continue
        assert status == 0, f"the child ended with {status}"
        assert told[-1] == expected, "the run came to something else"
        assert not list(whole.glob(".*")), "something was left over"
        runs += 1
        whole = folder / f"killed-{runs}"
        whole.mkdir()
    return {"kills": killed, "by place": dict(sorted(done.items())), "whole runs compared": runs}


def main(kills="200", seed="0"):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "whole").mkdir()
        sys.stdout.write(json.dumps(drill(int(kills), int(seed), Path(folder))) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
