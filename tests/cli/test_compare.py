"""``hybridcore compare``: the same runs by hand, and verdicts that say what the figures say."""

import json
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from command_line import HEAD, NOISY, SMOOTH, call, figures, is_png, write

from hybridcore.cli.comparing import verdict


def by_hand(path, seed, steps):
    torch.manual_seed(seed)
    model, optimizer, (x, y), criterion = runpy.run_path(path)["build"]()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(criterion(model(x), y).item())
    return losses


def test_it_says_that_it_helped_and_the_figures_are_those_of_the_loop():
    path = write(SMOOTH)
    told = figures("compare", path, "--steps", 300, "--seeds", 2, "--output", "c.png")
    assert told["helped"]
    assert told["verdict"].startswith("hybridcore helped: ")
    assert is_png("c.png")
    for seed, pair in enumerate(told["pairs"]):
        losses = by_hand(path, seed, 300)
        assert losses == sorted(losses, reverse=True)
        # The median of the last five evaluations of a loss that falls, some steps apart.
        assert losses[-1] <= pair["target"] <= losses[-40]
        assert pair["plain_total_cost"] == 300.0
        statistics = pair["statistics"]
        assert pair["hybrid_total_cost"] >= statistics["backward_passes"]
        assert pair["cost_ratio"] == pytest.approx(
            pair["hybrid_cost_to_target"] / pair["plain_cost_to_target"]
        )
        assert pair["cost_ratio"] < 0.9


def test_a_run_too_short_to_help_is_told_with_the_figure():
    path = write(SMOOTH)
    told = figures("compare", path, "--steps", 60, "--seeds", 1)
    assert not told["helped"]
    assert "did not help here" in told["verdict"]
    # Whether the probe of the one look adds a hundredth hangs on the measured price of a forward.
    assert re.search(r"1\.0[01] of its cost", told["verdict"])
    assert told["pairs"][0]["predicted_share"] == 0.0
    text = call("compare", path, "--steps", 60, "--seeds", 1)
    assert text.exit_code == 0
    assert "did not help here" in " ".join(text.stdout.split())


def test_both_runs_see_the_same_batches_and_the_same_dropout():
    path = write(NOISY)
    Path("off.toml").write_text("enabled = false\n")
    told = figures("compare", path, "--steps", 120, "--seeds", 1, "--config", "off.toml")
    assert told["judged_by"] == "held-out loss"
    (pair,) = told["pairs"]
    assert pair["cost_ratio"] == 1.0
    assert pair["plain_at_equal_cost"] == pair["hybrid_at_equal_cost"]
    assert pair["hybrid_total_cost"] == pair["plain_total_cost"] == 120.0


LOSSES = {
    "loss(model, batch)": "def loss(model, b): return F.mse_loss(model(b[0]), b[1])",
    "loss(batch)": "loss = lambda b: F.mse_loss(model(b[0]), b[1])",
    "loss()": "loss = lambda: F.mse_loss(model(x), y)",
    "a criterion": "loss = nn.MSELoss()",
    "a function of torch": "loss = F.mse_loss",
    "derivatives inside": (
        "def loss(model, b):\n        x = b[0].clone().requires_grad_()\n        u = model(x)\n"
        "        (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)\n"
        "        return F.mse_loss(u, b[1]) + 0.01 * g.square().mean()"
    ),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("data", ["(x, y)", "[(x, y)]"])
def test_a_loss_may_be_written_in_several_ways(loss, data):
    path = write(
        HEAD
        + "def build():\n    x = torch.linspace(-1, 1, 32).unsqueeze(1)\n    y = x.sin()\n"
        + "    model = nn.Linear(1, 1)\n    optimizer = torch.optim.SGD(model.parameters(), 0.1)\n"
        + f"    {loss}\n    return model, optimizer, {data}, loss\n"
    )
    told = figures("compare", path, "--steps", 12, "--seeds", 1)
    assert 0.0 < told["pairs"][0]["target"] < 1.0


def test_an_interrupt_leaves_what_is_done():
    path = write(
        SMOOTH.replace("nn.MSELoss()", "stopping")
        + """
calls = 0
def stopping(model, batch):
    global calls
    calls += 1
    if calls == 700:
        raise KeyboardInterrupt
    return F.mse_loss(model(batch[0]), batch[1])
"""
    )
    told = figures("compare", path, "--steps", 150, "--seeds", 3, "--output", "c.png", code=130)
    assert 1 <= len(told["pairs"]) < 3
    assert is_png("c.png")


def test_modules_and_built_in_workloads_can_be_compared(monkeypatch):
    write(SMOOTH, "mine_to_compare.py")
    monkeypatch.syspath_prepend(".")
    assert figures("compare", "mine_to_compare", "--steps", 12, "--seeds", 1)["steps"] == 12
    assert figures("compare", "digits", "--steps", 12, "--seeds", 1)["pairs"]


def test_what_the_loop_prints_is_not_among_the_figures():
    text = SMOOTH.replace("nn.MSELoss()", "telling").replace("def build", "print('m')\ndef build")
    text = text.replace("    table", "    print('b')\n    table")
    telling = "\ndef telling(model, b):\n    print('l')\n    return F.mse_loss(model(b[0]), b[1])\n"
    result = call("compare", write(text + telling), "--steps", 12, "--seeds", 1, "--json")
    assert json.loads(result.stdout)["pairs"]
    assert {"m", "b", "l"} <= set(result.stderr.splitlines())


def test_quiet_prints_nothing():
    result = call("compare", write(SMOOTH), "--steps", 12, "--seeds", 1, "--quiet")
    assert result.exit_code == 0
    assert result.stdout == result.stderr == ""


def summary(ratio, seconds=None):
    return {
        "cost_ratio": ratio,
        "seconds_ratio": ratio if seconds is None else seconds,
        "predicted_share": 0.25,
        "plain_at_equal_cost": 2.0,
        "hybrid_at_equal_cost": 1.0,
        "plain_final": 2.0,
        "hybrid_final": 1.0,
    }


@pytest.mark.parametrize(
    ("summaries", "helped", "words"),
    [
        ([summary(0.5), summary(0.6), summary(0.7)], True, "hybridcore helped"),
        ([summary(1.2)], False, "did not help here: it reached"),
        ([summary(math.inf)], False, "did not help here: it did not reach"),
        ([summary(0.99)], False, "did not help here, and did no harm"),
        ([summary(0.99, seconds=1.24)], False, "did not help here, and cost 24% more wall-clock"),
        ([summary(0.0042)], True, "at 0.0042 of its cost"),
        ([summary(0.8), summary(0.9), summary(1.1)], False, "not for every seed"),
        ([summary(0.8, seconds=1.3)], False, "saved passes and no time"),
    ],
)
def test_the_verdict_follows_the_figures(summaries, helped, words):
    found, text = verdict(summaries, "training loss")
    assert found is helped
    assert words in text
    assert "\n" not in text


def test_a_run_that_is_too_short_is_told_so():
    _, text = verdict([summary(0.99, seconds=1.24)], "training loss", too_short=True)
    assert "such a run is too short for it" in text
    assert "steps as short as these" not in text


@pytest.mark.parametrize(
    ("plain", "hybrid", "told"),
    [(2.0, 2.1, True), (2.0, 2.01, False), (-2.0, -1.9, True), (-2.0, -2.1, False)],
)
@pytest.mark.parametrize("ratio", [0.5, 1.2])
def test_a_run_that_ends_worse_is_told(ratio, plain, hybrid, told):
    figures = summary(ratio) | {"plain_final": plain, "hybrid_final": hybrid}
    _, text = verdict([figures] * 3, "held-out loss")
    assert (
        f"At the end its held-out loss is {hybrid:.4g} and your loop's {plain:.4g}" in text
    ) is told


def test_of_losses_below_zero_there_is_no_ratio():
    below = "lambda model, batch: F.mse_loss(model(batch[0]), batch[1]) - 9.0"
    text = SMOOTH.replace("nn.MSELoss()", below)
    assert text != SMOOTH
    result = call("compare", write(text), "--steps", 12, "--seeds", 1)
    (row,) = (line for line in result.stdout.splitlines() if "loss at the end" in line)
    *_, plain, hybrid = row.replace("│", " ").split()
    assert plain == hybrid
    assert -9.0 < float(plain) < -7.0
    result = call("compare", write(SMOOTH), "--steps", 12, "--seeds", 1)
    (row,) = (line for line in result.stdout.splitlines() if "loss at the end" in line)
    assert row.replace("│", " ").split()[-1] == "1.00"
