"""Two processes that save sharded weights: ``python sharded_kills.py 40`` kills one 40 times.

It is killed before a random file operation of a save, the first one of its life, so that kills
follow each other without a whole save between them. Then a save fails on either rank.
"""

import hashlib
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path

# Imported here, and not in each child: their files would count as operations.
import numpy.ctypeslib  # noqa: F401
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.nn.functional as F
from safetensors.torch import save_file  # noqa: F401
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hybridcore import CheckpointError
from hybridcore_torch import HybridTrainer, sharded

WORLD, EVERY = 2, 3
# File operations that a rank makes in a save, about: what CPython's audit events tell of.
OPERATIONS = {0: 31, 1: 3}
TOUCHING = ("open", "os.", "shutil.")


class Plan(torch.optim.lr_scheduler.LambdaLR):
    """A schedule with something in its state that no file can hold, if it is told so."""

    odd = False

    def state_dict(self):
        return super().state_dict() | {"odd": {1, 2} if self.odd else 0}


def build(folder):
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 32).unsqueeze(1)
    model = nn.Sequential(nn.Linear(1, 7), nn.Tanh(), nn.Linear(7, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    plan = Plan(optimizer, lambda step: 1.0)
    if sharded.is_folder_of_shards(folder):
        trainer = HybridTrainer.load(folder, model, optimizer, scheduler=plan)
    else:
        trainer = HybridTrainer(model, optimizer, scheduler=plan)
    return trainer, lambda: F.mse_loss(model(x), torch.sin(3 * x))


def digest(trainer):
    """Step, and a digest of weights and moments."""
    states = trainer.optimizer.state.values()
    values = [*trainer.model.parameters(), *(s["exp_avg"] for s in states)]
    found = hashlib.sha256()
    for value in values:
        found.update(value.detach().full_tensor().numpy().tobytes())
    return trainer.engine.counters.steps, found.hexdigest()


def whole(folder, tell, steps):
    """Train without a save, and tell of each step."""
    trainer, closure = build(folder)
    for _ in range(steps):
        trainer.step(closure)
        tell(digest(trainer))


def killed(folder, tell, rank, operation):
    """Go on from what is there, save, and be killed before that operation of the save."""
    trainer, closure = build(folder)
    tell(["there", *digest(trainer)])
    for _ in range(EVERY):
        trainer.step(closure)
    if dist.get_rank() == rank and operation:
        left = operation

        def count(event, _):
            nonlocal left
            left -= event.startswith(TOUCHING)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
    trainer.save(folder)
    tell(["saved", trainer.engine.counters.steps])
    if dist.get_rank() == 0:
        names = sorted(path.name for path in folder.rglob("*") if path.is_file())
        assert names == [".metadata", "__0_0.distcp", "__1_0.distcp", "rest.safetensors"]
        assert not list(folder.parent.glob(".*")), "something was left over"


def failing(folder, tell):
    """Let saves fail on either rank: both say so, and what was there is whole."""
    trainer, closure = build(folder)
    first, synced, fsync = dist.get_rank() == 0, [], os.fsync

    def watched(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = watched
    trainer.save(folder)
    os.fsync = fsync
    (shards,) = (path.parent for path in folder.rglob(".metadata"))
    # What has been renamed or made is on the disk only when its folder is.
    folders = {folder, folder.parent, shards} if first else {shards}
    assert folders <= {Path(path) for path in synced}, synced
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    refusals = 0

    def refused(where, error, text):
        nonlocal refusals
        refusals += 1
        trainer.step(closure)
        with pytest.raises(error, match=re.escape(text)):
            trainer.save(where)
        dist.barrier()
        assert {path: path.read_bytes() for path in before} == before
        assert {path for path in folder.rglob("*") if path.is_file()} == set(before)
        dist.barrier()

    trainer.scheduler.odd = True
    if first:
        refused(folder, CheckpointError, "odd is a builtins.set")
    else:
        refused(folder, OSError, "because rank 0 failed: CheckpointError: scheduler.odd is a")
    trainer.scheduler.odd = False
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for short in range(WORLD):
        if dist.get_rank() == short:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, unlimited[1]))
        refused(folder, OSError, f"could not be written: rank {short}: ")
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    refused(folder / "rest.safetensors", OSError, "rest.safetensors")
    trainer.save(folder)
    assert digest(build(folder)[0]) == digest(trainer)
    tell(refusals)


def child(rank, meeting, pipe, task, folder, arguments):
    try:
        signal.alarm(60)
        timeout = timedelta(seconds=30)
        dist.init_process_group("gloo", f"file://{meeting}", timeout, world_size=WORLD, rank=rank)

        def tell(what):
            if rank == 0:
                os.write(pipe, (json.dumps(what) + "\n").encode())

        task(folder, tell, *arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status)


def start(task, folder, *arguments):
    """Run `task` on all ranks; return which one ended first, and how, and what the first one told.

    When one ends otherwise than well the others are ended too, as whoever started them does.
    """
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory() as meeting:
        pids = {}
        for rank in range(WORLD):
            pid = os.fork()
            if pid == 0:
                os.close(reading)
                child(rank, f"{meeting}/point", writing, task, folder, arguments)
            pids[pid] = rank
        os.close(writing)
        told, ended = b"", None
        while pids:
            while select.select([reading], [], [], 0.0)[0] and (block := os.read(reading, 1 << 16)):
                told += block
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                select.select([], [], [], 0.005)
                continue
            rank = pids.pop(pid)
            if ended is None or (status and not ended[1]):
                ended = rank, os.waitstatus_to_exitcode(status)
            for other in pids if status else ():
                os.kill(other, signal.SIGKILL)
        while block := os.read(reading, 1 << 16):
            told += block
        os.close(reading)
    return ended, [json.loads(line) for line in told.splitlines()]


def drill(kills, seed, folder):
    """Kill that often; return the counts after checking all that must hold."""
    rng, run = random.Random(seed), folder / "run"
    (_, status), told = start(whole, run, EVERY * (2 * kills + 2))
    assert status == 0
    expected, newest, done, saves = dict(told), 0, Counter(), 0
    while sum(done.values()) < kills or saves < 2:
        rank, operation = 0, 0
        # The first save and the last are whole.
        if saves and sum(done.values()) < kills:
            rank = rng.choice((0, 0, 0, 1))
            operation = rng.randint(1, OPERATIONS[rank])
        (first, status), told = start(killed, run, rank, operation)
        (_, step, found), *saved = told
        assert step >= newest, f"step {newest} was saved, {step} is there"
        assert step == 0 or found == expected[step], f"step {step} is not as it was"
        newest = saved[0][1] if saved else step
        if status == 0:
            saves += 1
        else:
            assert (first, status) == (rank, -signal.SIGKILL), "it was not killed"
            done[f"rank {rank}"] += 1
    shutil.rmtree(run)
    (_, status), (refusals,) = start(failing, run)
    assert status == 0
    counts = {"kills": kills, "by rank": dict(sorted(done.items()))}
    return counts | {"whole saves": saves, "failed saves": refusals}


def main(kills="40", seed="0"):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(json.dumps(drill(int(kills), int(seed), Path(folder))) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
