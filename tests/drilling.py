"""Signals at random lines of hybridcore, and a run that is killed by them again and again.

Each child takes up the newest checkpoint and trains on, saving every few steps, until SIGKILL
reaches it at a random line inside save, predict, correct or rollback, or at a random moment.
"""

import json
import linecache
import math
import os
import random
import select
import signal
import sys
import time
import traceback
from collections import Counter

from hybridcore.rotation import checkpoints_in


class Interrupter:
    """Raises SIGINT at a line of hybridcore's that is run in the block."""

    def __init__(self, line):
        self.left = line

    def trace(self, frame, event, argument):
        if "hybridcore" not in frame.f_code.co_filename:
            return None
        if event == "line":
            # CPython looks for signals at calls and loops: not at a bare try, nor as a block ends.
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            here = not line.startswith(("try:", "with "))
            self.left -= here
            if self.left == 0 and here:
                signal.raise_signal(signal.SIGINT)
        return self.trace

    def __enter__(self):
        # A process in the background of a shell is started with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.before = sys.gettrace()
        sys.settrace(self.trace)

    def __exit__(self, *error):
        sys.settrace(self.before)


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


def child(run, folder, killer, pipe):
    try:
        last = run(folder, killer, lambda step: os.write(pipe, f"{step}\n".encode()))
        os.write(pipe, (json.dumps(last) + "\n").encode())
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status)


def start(run, folder, killer, moment=None):
    """Run a child until it ends, or for `moment` seconds; return status and what it told."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        child(run, folder, killer, writing)
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


def drill(run, places, longest, check, kills, seed, folder):
    """Kill `kills` times; return the counts, by place, after checking all that must hold.

    Parameters
    ----------
    run : callable
        ``run(folder, killer, tell)`` trains to the end, from the newest checkpoint in `folder` if
        there is one, tells which steps were saved, and returns the last figures.
    places : dict
        Lines of Python that a child spends in each place, about.
    longest : float
        Seconds to the last of the random moments.
    check : callable
        Reads a checkpoint, or raises.
    """
    rng, done, runs = random.Random(seed), Counter(), 0
    (folder / "whole").mkdir()
    status, told = start(run, folder / "whole", Killer("any moment", 0))
    assert status == 0, told
    expected, whole, killed = told[-1], folder / "killed-0", 0
    whole.mkdir()
    while killed < kills:
        place = rng.choice(list(places))
        moment = rng.uniform(0.0, longest) if place == "any moment" else None
        # As often in the first ten lines as in the next ninety, and so on.
        lines = round(math.exp(rng.uniform(0.0, math.log(places[place]))))
        status, told = start(run, whole, Killer(place, lines), moment)
        found = checkpoints_in(whole)
        saved = [int(line) for line in told if line.isdigit()]
        newest = int(found[0].stem.split("-")[1]) if found else 0
        assert newest >= max(saved, default=0), f"step {saved} was saved, {newest} is there"
        for path in found:
            check(path)
        if status == -signal.SIGKILL:
            killed += 1
            done[place] += 1
            continue
        assert status == 0, f"the child ended with {status}"
        assert told[-1] == expected, f"the run came to something else: {told[-1]}, not {expected}"
        assert not list(whole.glob(".*")), "something was left over"
        runs += 1
        whole = folder / f"killed-{runs}"
        whole.mkdir()
    return {"kills": killed, "by place": dict(sorted(done.items())), "whole runs compared": runs}
