"""``hybridcore sweep``: every combination once, kept as it is done, here and on a cluster."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import SMOOTH, call, check_lines, figures, is_png, write

from hybridcore import HybridTrainerConfig
from hybridcore.cli.cells import combinations, describe, parse_grid
from hybridcore.cli.own import Source

SMALL = ("--set", "horizon=10,20", "--set", "secant_pairs=0,20", "--set", "warmup_steps=30")


def test_the_default_grid_has_three_settings_and_sixty_combinations():
    grid = parse_grid([])
    cells = combinations(grid, HybridTrainerConfig())
    assert len(grid) == 3
    assert len(cells) == len({tuple(cell.items()) for cell in cells}) == 60
    defaults = HybridTrainerConfig().to_dict()
    assert {name: defaults[name] for name in grid} in cells


def test_values_are_read_as_what_they_are():
    grid = parse_grid(["dynamics=linear,mlp", "averaging=true,False", "divergence_sigma=1.5,3"])
    assert grid == {
        "dynamics": ("linear", "mlp"),
        "averaging": (True, False),
        "divergence_sigma": (1.5, 3),
    }


def test_a_sweep_goes_on_where_it_was_stopped():
    path = write(SMOOTH)
    whole = figures("sweep", path, *SMALL, "--steps", 120, "--results", "a.jsonl")
    assert [row["settings"] for row in whole["cells"]]
    assert len(whole["cells"]) == 4
    ratios = [row["cost_ratio"] for row in whole["cells"] if row["cost_ratio"] is not None]
    assert ratios == sorted(ratios)
    assert is_png("hybridcore-sweep.png")

    lines = Path("a.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 6
    # As if it had been killed in the middle of its third run.
    Path("b.jsonl").write_text("".join(lines[:4]) + lines[4][:30])
    again = figures("sweep", path, *SMALL, "--steps", 120, "--results", "b.jsonl")
    resumed = Path("b.jsonl").read_text().splitlines(keepends=True)
    assert resumed[:4] == lines[:4]
    assert len(resumed) == 6
    figures_of = lambda rows: {str(r["settings"]): r["lowest"] for r in rows}  # noqa: E731
    assert figures_of(again["cells"]) == figures_of(whole["cells"])

    # What is there is not run again, and more can be asked for.
    more = figures("sweep", path, *SMALL, "--steps", 120, "--results", "b.jsonl", "--seeds", 2)
    assert [row["seeds"] for row in more["cells"]] == [2, 2, 2, 2]
    assert Path("b.jsonl").read_text().startswith("".join(resumed))


def test_an_interrupt_keeps_what_is_done():
    path = write(
        SMOOTH.replace("nn.MSELoss()", "stopping")
        + """
calls = 0
def stopping(model, batch):
    global calls
    calls += 1
    if calls == 250:
        raise KeyboardInterrupt
    return F.mse_loss(model(batch[0]), batch[1])
"""
    )
    told = figures("sweep", path, "--set", "horizon=5,10,15,20,25,30", "--steps", 40, code=130)
    assert not told["complete"]
    done = Path("hybridcore-sweep.jsonl").read_text().count('"cell"')
    assert 1 <= len(told["cells"]) == done < 6
    assert is_png("hybridcore-sweep.png")


def test_runs_of_another_sweep_are_not_mixed_in():
    path = write(SMOOTH)
    arguments = ("--set", "horizon=10", "--steps", 20, "--quiet")
    assert call("sweep", path, *arguments).exit_code == 0
    before = Path("hybridcore-sweep.jsonl").read_text()
    write(SMOOTH + "\n# changed\n")
    check_lines(call("sweep", path, *arguments), "another content of the file")
    write(SMOOTH)
    check_lines(call("sweep", path, *arguments, "--steps", 30), "another steps")
    Path("c.toml").write_text("snapshots = 4\n")
    check_lines(call("sweep", path, *arguments, "--config", "c.toml"), "another --config")
    assert Path("hybridcore-sweep.jsonl").read_text() == before


def test_a_run_without_a_finite_loss_is_read_back():
    path = write(SMOOTH)
    arguments = ("sweep", path, "--set", "horizon=10", "--steps", 20, "--seeds", 2)
    assert figures(*arguments)["cells"]
    kept = Path("hybridcore-sweep.jsonl")
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    for line in lines:
        if "cell" in line:
            line["cell"] |= {"lowest": None, "cost_ratio": None}
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,) = figures(*arguments)["cells"]
    assert row["cost_ratio"] is row["lowest"] is None
    assert len(kept.read_text().splitlines()) == len(lines)


BROKEN = {
    "a line is a list": lambda lines: lines.insert(1, []),
    "a line is of another kind": lambda lines: lines.insert(1, {"other": {}}),
    "a run is a number": lambda lines: lines.insert(1, {"plain": 3}),
    "a plain run without a target": lambda lines: lines[1]["plain"].pop("target"),
    "a cell without settings": lambda lines: lines[2]["cell"].pop("settings"),
    "a cell whose ratio is a word": lambda lines: lines[2]["cell"].update(cost_ratio="1"),
    "a head without a price": lambda lines: lines[0].pop("forward_cost"),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_file_of_runs_that_is_damaged_is_told(change):
    path = write(SMOOTH)
    described = describe(Source.of(path), 20, HybridTrainerConfig())
    plain = {"seed": 0, "target": 0.5, "cost": 20.0, "total_cost": 20.0}
    cell = {"settings": {"horizon": 10}, "seed": 0, "cost_ratio": 1.0, "predicted_share": 0.0}
    lines = [{**described, "forward_cost": 0.3}, {"plain": plain}, {"cell": {**cell, "lowest": 1}}]
    arguments = ("sweep", path, "--set", "horizon=10", "--steps", 20, "--results", "r.jsonl")
    kept = Path("r.jsonl")
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert figures(*arguments)["cells"][0]["lowest"] == 1
    change(lines)
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = kept.read_text()
    check_lines(call(*arguments, "--quiet"), "no file of a sweep, or damaged")
    assert kept.read_text() == before


def test_it_says_which_combination_is_the_default():
    path = write(SMOOTH)
    arguments = ("--steps", 20, "--results", "one.jsonl")
    result = call("sweep", path, "--set", "horizon=10,75", *arguments)
    assert result.exit_code == 0
    (row,) = (line for line in result.stdout.splitlines() if "default" in line)
    assert "75" in row
    assert "horizon" in result.stdout


@pytest.mark.slow
def test_runs_side_by_side_are_those_one_after_another(tmp_path):
    # A cluster on this machine, of two processes.
    distributed = pytest.importorskip("distributed")
    path = write(SMOOTH)
    grid = ("--set", "horizon=10,20", "--steps", 60)
    alone = figures("sweep", path, *grid, "--results", "alone.jsonl")
    # The measured price of a forward pass decides when a run is looked at.
    Path("shared.jsonl").write_text(Path("alone.jsonl").read_text().partition("\n")[0] + "\n")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path)
    ) as cluster:
        address = cluster.scheduler_address
        shared = figures("sweep", path, *grid, "--results", "shared.jsonl", "--dask", address)
    assert {str(r["settings"]): r["lowest"] for r in shared["cells"]} == {
        str(r["settings"]): r["lowest"] for r in alone["cells"]
    }


def test_an_address_that_is_none_is_told_in_one_line():
    # In a process of its own: what is thrown away there complains at its end.
    pytest.importorskip("distributed")
    command = [sys.executable, "-c", "from hybridcore.cli import app; app()"]
    arguments = ["sweep", write(SMOOTH), "--dask", "nonsense", "--quiet"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no scheduler answers" in line


def test_a_scheduler_that_is_not_there_is_told():
    pytest.importorskip("distributed")
    path = write(SMOOTH)
    result = call("sweep", path, "--dask", "tcp://127.0.0.1:9", "--quiet")
    check_lines(result, "no scheduler answers")
    assert not list(Path().glob("*.jsonl"))
