"""``hybridcore report``: a page that stands alone, and figures that are those of the stream."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_line import call, figures, is_png
from matplotlib.figure import Figure
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from torch import nn

from hybridcore import HybridTrainerConfig, JsonLines, read_stream
from hybridcore.cli.page import render
from hybridcore.cli.palette import COLOURS, scale_by
from hybridcore.cli.reading import calibration, jumps, phases, thinned, wilson
from hybridcore_torch import HybridTrainer

BRISK = {"warmup_steps": 20, "min_full_steps": 24, "horizon": 30, "correction_interval": 10}


def record(path, steps, *, batch=None, **settings):
    digits = load_digits()
    x = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    config = HybridTrainerConfig.from_dict({**BRISK, **settings})
    with JsonLines(path) as stream:
        trainer = HybridTrainer(model, optimizer, config, callbacks=[stream])
        for _ in range(steps):
            rows = slice(None) if batch is None else torch.randint(0, len(x), (batch,))
            inputs, labels = x[rows], y[rows]
            trainer.step(lambda i=inputs, t=labels: F.cross_entropy(model(i), t))
    return path


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        "jumps": record(folder / "jumps.jsonl", 500, secant_pairs=0, group_correction=True),
        "leaps": record(folder / "leaps.jsonl", 300),
        "noisy": record(folder / "noisy.jsonl", 300, batch=16),
        "off": record(folder / "off.jsonl", 20, enabled=False),
    }


@pytest.fixture(scope="module")
def pages(recorded):
    return {kind: render(read_stream(path), "run <&> 1") for kind, path in recorded.items()}


class Page(HTMLParser):
    VOID = ("meta", "link", "br", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.attributes = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("kind", ["jumps", "leaps", "noisy", "off"])
def test_the_page_stands_alone_and_is_well_formed(pages, kind):
    text = pages[kind]
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert value.startswith(("#", "data:")), (tag, name, value)
        if name == "aria-labelledby":
            assert set(value.split()) <= set(page.ids)
        if name in ("href", "xlink:href") and value.startswith("#"):
            assert value[1:] in page.ids
    for address in re.findall(r"url\(([^)]*)\)", text):
        assert address.strip("'\"").startswith("#")
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert "run &lt;&amp;&gt; 1" in text


def test_light_and_dark_swap_every_colour(pages):
    text = pages["jumps"]
    light, dark = re.search(
        r":root \{ (.*?) \}\n@media \(prefers-color-scheme: dark\) \{ :root \{ (.*?) \} \}", text
    ).groups()
    for name, (in_light, in_dark) in COLOURS.items():
        assert f"--{name}: {in_light};" in light
        assert f"--{name}: {in_dark};" in dark
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--ink)" in drawn
    assert not re.findall(r"#[0-9a-f]{6}\b", drawn), "a colour that does not follow the scheme"


def contrast(one, other):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_what_is_written_and_drawn_can_be_told_from_the_paper(scheme):
    paper = COLOURS["paper"][scheme]
    for name in ("ink", "muted"):
        assert contrast(COLOURS[name][scheme], paper) >= 4.5
    for name in ("warmup", "full", "predict", "correct", "rose", "gold"):
        assert contrast(COLOURS[name][scheme], paper) >= 3.0


def test_what_can_be_scrolled_or_opened_can_be_reached_by_keys(pages):
    page = Page(pages["jumps"])
    scrolled = sum(1 for tag, n, v in page.attributes if tag == "div" and n == "tabindex")
    assert scrolled == page.tags.count("details") == page.tags.count("summary") > 4
    assert page.tags.count("svg") == page.tags.count("figcaption") >= 7
    assert ("html", "lang", "en") in page.attributes


def test_the_command_writes_page_picture_and_figures(recorded):
    told = figures("report", recorded["jumps"], "--html", "r.html", "--png", "r.png")
    assert is_png("r.png")
    assert Path("r.html").read_text().startswith("<!DOCTYPE html>")
    stream = read_stream(recorded["jumps"])
    assert told["steps"] == 500
    assert told["statistics"]["predicted_steps"] == sum(j["steps"] for j in told["jumps"])
    assert told["statistics"]["rollbacks"] == sum(
        j["outcome"] == "rolled back" for j in told["jumps"]
    )
    assert len(told["jumps"]) > 3
    assert [p["phase"] for p in told["phases"]] == ["WARMUP", "FULL", "PREDICT", "CORRECT"]
    for figure in phases(stream):
        assert figure.steps == stream.statistics[-1]["phase_counts"][figure.phase]
        assert figure.seconds == pytest.approx(
            stream.statistics[-1]["phase_seconds"][figure.phase], rel=0.05
        )


def test_confidence_is_left_out_where_it_decided_nothing(pages):
    shown = {kind: "confidence-title" in text for kind, text in pages.items()}
    assert shown == {"jumps": True, "leaps": False, "noisy": True, "off": True}


def test_group_scales_are_in_the_stream_where_there_are_any(recorded, pages):
    stream = read_stream(recorded["jumps"])
    scaled = [jump for jump in jumps(stream) if jump.scales]
    assert ("Scales of the layer groups" in pages["jumps"]) == bool(scaled)
    assert scaled
    assert not any(jump.scales for jump in jumps(read_stream(recorded["leaps"])))


def test_calibration_counts_forecasts_of_jumps_alone(recorded):
    lines = [json.loads(line) for line in recorded["jumps"].read_text().splitlines()]
    compared = [
        line for line in lines if line.get("was_predicted") and line["prediction_error"] is not None
    ]
    bins = calibration(read_stream(recorded["jumps"]))
    assert sum(b.count for b in bins) == len(compared) > 5
    within = sum(line["prediction_error"] <= 0.2 for line in compared)
    assert sum(b.share * b.count for b in bins) == pytest.approx(within)
    assert calibration(read_stream(recorded["leaps"])) == []


@pytest.mark.parametrize(("hits", "count"), [(0, 3), (3, 3), (5, 9), (40, 200)])
def test_the_interval_of_a_share_is_wilsons(hits, count):
    expected = binomtest(hits, count).proportion_ci(0.9, method="wilson")
    assert wilson(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_thinning_keeps_peaks_and_ends():
    values = np.random.default_rng(0).normal(size=5000)
    values[3210], values[777] = 50.0, np.nan
    kept = thinned(values, 200)
    assert len(kept) <= 203
    assert {0, 777, 3210, 4999} <= set(kept.tolist())
    assert np.nanmin(values) in values[kept]


def test_a_run_that_was_cut_can_be_reported(recorded):
    content = recorded["jumps"].read_bytes()
    Path("cut.jsonl").write_bytes(content[: len(content) // 20])
    told = call("report", "cut.jsonl")
    assert told.exit_code == 0
    assert "measured speed-up not recorded" in " ".join(told.stdout.split())
    assert "was not closed" in Path("cut.html").read_text()
    assert is_png("cut.png")


@pytest.mark.parametrize("name", ["run[final]", "a :smile:", "x[/red]"])
def test_a_name_that_looks_like_markup_is_told_as_it_is(recorded, name):
    path = Path(f"{name}.jsonl")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(recorded["off"].read_bytes())
    result = call("report", path)
    assert result.exit_code == 0, result.output
    assert f"Page: {name}.html\nPicture: {name}.png" in result.stdout


@pytest.mark.slow
def test_losses_that_are_not_finite_or_not_positive_are_drawn(recorded):
    lines = recorded["off"].read_text().splitlines()
    bad = [json.loads(line) for line in lines]
    for line in bad[3:8]:
        line["loss"] = None
    bad[10]["loss"] = -1.0
    Path("bad.jsonl").write_text("\n".join(map(json.dumps, bad)) + "\n")
    assert "Loss by phase" in render(read_stream("bad.jsonl"), "bad")
    for line in bad[1:-1]:
        line["loss"] = None
    Path("none.jsonl").write_text("\n".join(map(json.dumps, bad)) + "\n")
    assert figures("report", "none.jsonl")["phases"][0]["first"] is None


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([2.0, 1.0, np.nan], "log"),
        ([np.nan], "log"),
        ([0.5, -1.0, np.inf, 1e4], "symlog"),
        ([0.0, 0.0], "symlog"),
    ],
)
def test_a_spike_does_not_flatten_losses_below_zero(losses, scale):
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot(losses)
    scale_by(axes, np.array(losses))
    assert axes.get_yscale() == scale
    figure.canvas.draw()
    if -1.0 in losses:
        heights = axes.transAxes.inverted().transform(axes.transData.transform([[0, 0.5], [0, -1]]))
        assert heights[0, 1] - heights[1, 1] > 0.1
