"""A run in PyTorch that is killed again and again: ``python kills.py 200`` kills it 200 times."""

import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from drilling import drill
from resuming import build, figures

from hybridcore import Action, Phase
from hybridcore.rotation import checkpoints_in
from hybridcore_torch import HybridTrainer, files, hands

KIND = "adamw, schedule, clipping"
STEPS, EVERY = 170, 8
# Lines of Python that a child spends there, about: the kill is at a random one of them.
PLACES = {"save": 20_000, "predict": 20_000, "correct": 9_000, "rollback": 6_000, "any moment": 1}


def lie_in_wait(killer):
    if killer.place == "save":
        killer.around(HybridTrainer, "save")
    elif killer.place == "rollback":
        killer.around(hands.Hands, "carry_out", lambda _, d, c: d.action is Action.ROLLBACK)
    elif killer.place != "any moment":
        phase = Phase[killer.place.upper()]
        killer.around(HybridTrainer, "step", lambda trainer, _: trainer.engine.phase is phase)


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
    lie_in_wait(killer)
    for step in range(first, STEPS):
        trainer.step(hurt)
        if (step + 1) % EVERY == 0:
            tell(step + 1)
            assert not list(folder.glob(".*")), "something was left over"
    return figures(trainer, [])


def main(kills="200", seed="0"):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        done = drill(run, PLACES, 0.6, files.read, int(kills), int(seed), Path(folder))
    sys.stdout.write(json.dumps(done) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
