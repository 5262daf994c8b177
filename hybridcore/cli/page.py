"""The report as one HTML page that needs nothing else: no script, no font, no request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from hybridcore import Stream, __version__
from hybridcore.cli.charts import CHARTS, draw_svg
from hybridcore.cli.palette import COLOURS
from hybridcore.cli.reading import calibration, figure, history, jumps, phases, speedup_text

MOST_ROWS = 300

_STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .25rem; }
p, figcaption { color: var(--muted); margin: .25rem 0 .75rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr));
  gap: 1.5rem 2rem; margin-top: 2rem; }
section, figure { margin: 0; min-width: 0; }
main > h2 { margin-top: 2.5rem; }
svg { width: 100%; height: auto; display: block; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0 0; }
dl div { border: 1px solid var(--grid); border-radius: .5rem; padding: .6rem .8rem; }
dt { color: var(--muted); font-size: .85rem; }
dd { margin: 0; font-size: 1.15rem; font-weight: 600; }
summary { cursor: pointer; color: var(--full); }
:focus-visible { outline: 3px solid var(--full); outline-offset: 2px; border-radius: .25rem; }
.scroll { overflow: auto; max-height: 24rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: .5rem; background: var(--paper); padding: .3rem .6rem; }
"""


def render(stream: Stream, title: str) -> str:
    """Return the page for a run."""
    shown = [chart for chart in CHARTS if chart.shown(stream)]
    sections = "\n".join(
        f'<section><figure><h2 id="{c.name}-title">{escape(c.title)}</h2>{draw_svg(c, stream)}'
        f'<figcaption id="{c.name}-caption">{escape(c.caption)}</figcaption></figure>'
        f"{_numbers(c.name, c.title, stream)}</section>"
        for c in shown
    )
    state = (
        "The run was closed."
        if stream.complete
        else "The run was not closed: it was killed, or is still going on."
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{escape(title)} - hybridcore</title>
<style>
:root {{ {_variables(0)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(1)} }} }}
{_STYLE}</style>
</head>
<body>
<a class="skip" href="#charts">Skip to the charts</a>
<header>
<h1>{escape(title)}</h1>
<p>A run of hybridcore {escape(__version__)}. {state}</p>
</header>
<main>
{_tiles(stream)}
<div class="charts" id="charts">
{sections}
</div>
<h2>More</h2>
{_details("Jumps", _jump_table(stream))}
{_details("Events", _event_table(stream))}
{_details("Settings", _table(("setting", "value"), sorted(stream.config.items())))}
</main>
</body>
</html>
"""


def _variables(theme: int) -> str:
    return " ".join(f"--{name}: {values[theme]};" for name, values in COLOURS.items())


def _tiles(stream: Stream) -> str:
    tiles: list[tuple[str, str]] = [("steps", f"{len(stream.steps)}")]
    if stream.steps:
        losses = [line["loss"] for line in stream.steps if line["loss"] is not None]
        tiles.append(("last loss", _number(losses[-1]) if losses else "not finite"))
    if stream.statistics:
        last = stream.statistics[-1]
        seconds = sum(spent or 0.0 for spent in last["phase_seconds"].values())
        tiles += [
            ("measured speed-up", speedup_text(last)),
            ("backward passes saved", figure(last["backward_reduction"], ".0%")),
            ("predicted steps", f"{last['predicted_steps']}"),
            ("cost in full steps, its own time with it", figure(last["cost"], ".0f")),
            (
                "time",
                f"{seconds:.1f} s, {_share(last['overhead_seconds'] or 0.0, seconds)} its own",
            ),
            ("rollbacks", f"{last['rollbacks']}"),
            ("bad batches", f"{last['divergences']}"),
            ("divergence level", last["divergence_level"].lower()),
        ]
    inner = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in tiles)
    return f"<dl>{inner}</dl>"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "0%"


def _numbers(name: str, title: str, stream: Stream) -> str:
    if name in ("loss", "time"):
        head: tuple[str, ...] = (
            "phase",
            "steps",
            "seconds",
            "median ms",
            "first loss",
            "last",
            "lowest",
        )
        rows: Iterable[Sequence[Any]] = [
            (p.phase.lower(), p.steps, p.seconds, p.median_ms, p.first, p.last, p.lowest)
            for p in phases(stream)
        ]
    elif name == "speedup":
        head = ("step", "speed-up", "at least", "at most")
        intervals = history(stream, "measured_speedup_interval")[1]
        rows = [
            (step, value, low, "open" if high is None else high)
            for step, value, (low, high) in zip(
                *history(stream, "measured_speedup"), intervals, strict=True
            )
        ]
    elif name == "calibration":
        head = ("confidence", "forecasts", "within 20 %", "at least", "at most")
        rows = [(b.confidence, b.count, b.share, b.low, b.high) for b in calibration(stream)]
    elif name == "signals":
        steps, values = history(stream, "divergence_signals")
        head = ("step", *values[-1])
        rows = [(step, *value.values()) for step, value in zip(steps, values, strict=True)]
    else:
        return ""
    return _details(f"Numbers: {title.lower()}", _table(head, rows))


def _jump_table(stream: Stream) -> str:
    rows = [(j.step, j.kind, j.arm or "quasi-Newton", j.steps, j.outcome) for j in jumps(stream)]
    return _table(("step", "kind", "by", "predicted steps", "outcome"), rows)


def _event_table(stream: Stream) -> str:
    rows = [
        (
            line["step"],
            event["event"],
            ", ".join(f"{k} {_number(v)}" for k, v in event.items() if k != "event" and v != []),
        )
        for line in stream.steps
        for event in line["events"]
    ]
    return _table(("step", "event", "figures"), rows)


def _details(title: str, content: str) -> str:
    region = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">'
    return f"<details><summary>{escape(title)}</summary>{region}{content}</div></details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    rows = list(rows)
    if not rows:
        return "<p>None.</p>"
    left_out = len(rows) - MOST_ROWS
    note = f"<p>The newest {MOST_ROWS} of {len(rows)}.</p>" if left_out > 0 else ""
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_number(cell))}</td>" for cell in row) + "</tr>"
        for row in rows[max(0, left_out) :]
    )
    return f"{note}<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def _number(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(_number(item) for item in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "not finite" if value is None else str(value)
