"""The figures of the README and of the measurements beside it, from the recorded results.

python benchmarks/table.py          # print them
python benchmarks/table.py --write  # and put them into both README.md, between the markers
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.drills import SCRIPTS, TABLE  # noqa: E402
from benchmarks.harm import ratio  # noqa: E402
from benchmarks.proving_ground.results import Ground, tables  # noqa: E402
from benchmarks.proving_ground.runs import RESULTS  # noqa: E402

PAGES = (HERE.parent / "README.md", HERE / "README.md")
SMOOTH = {"siren": "SIREN fits china.jpg", "burgers": "PINN, viscous Burgers equation"}
NOISY = {"fashion": "MLP, Fashion-MNIST, batches of 64"}
# Of plain's steps: about as many as take its processor time, and as many as end at its loss.
LESS = (0.85, 0.75)
MODELS = {
    "discounted": "`linear`",
    "mixture": "the mixture alone",
    "mlp": "`mlp`",
    "rssm": "`rssm`",
}


def recorded(name: str) -> dict[str, Any]:
    return json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))


def spread(result: dict[str, Any], figure: str, form: str = ".2f") -> str:
    low, middle, high = result["quartiles"][figure]
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def gains() -> str:
    lines = [
        "| real task | cost to plain's lowest loss | wall-clock to it | steps predicted |",
        "|---|---|---|---|",
    ]
    for name, title in SMOOTH.items():
        result = recorded(f"cost-to-target-{name}")
        lines.append(
            f"| {title} | {spread(result, 'cost_ratio')} | {spread(result, 'seconds_ratio')} "
            f"| {spread(result, 'predicted_share')} |"
        )
    lines += ["", "| noisy task | held-out loss, plain | hybridcore | cost | processor time |"]
    lines.append("|---|---|---|---|---|")
    noisy = (
        NOISY
        | {
            f"{name}-{share:g}": f"the same, {share:.0%} of the steps"
            for name in NOISY
            for share in LESS
        }
        | {"fashion-0.8-fresh": "the same, 80% of the steps, seeds 5 to 9"}
    )
    for name, title in noisy.items():
        result = recorded(f"cost-to-target-{name}")
        lines.append(
            f"| {title} | {spread(result, 'plain_final', '.4f')} "
            f"| {spread(result, 'hybrid_final', '.4f')} | {spread(result, 'total_cost_ratio')} "
            f"| {spread(result, 'cpu_ratio')} |"
        )
    commands = [recorded(f"cost-to-target-{name}")["command"] for name in (*SMOOTH, *noisy)]
    lines += ["", "Recorded by " + ", ".join(f"`{command}`" for command in commands) + "."]
    return "\n".join(lines)


def in_keras() -> str:
    result = recorded("keras")
    smooth = [
        "| smooth task | cost to plain's lowest loss | processor time to it "
        "| for as many steps | steps predicted |",
        "|---|---|---|---|---|",
    ]
    noisy = [
        "| noisy task | held-out loss, plain | hybridcore | steps that Keras counts "
        "| processor time |",
        "|---|---|---|---|---|",
    ]
    for task in result["tasks"].values():

        def quartiles(figure: str, form: str, runs: list[Any] = task["runs"]) -> str:
            values = [math.inf if run[figure] is None else run[figure] for run in runs]
            low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
            return f"{middle:{form}} ({low:{form}} to {high:{form}})"

        time = quartiles("cpu_ratio", ".2f")
        if "cost_ratio" in task["runs"][0]:
            cost, share = quartiles("cost_ratio", ".2f"), quartiles("predicted_share", ".2f")
            total = quartiles("total_cpu_ratio", ".2f")
            smooth.append(f"| {task['title']} | {cost} | {time} | {total} | {share} |")
        else:
            plain, ours = quartiles("plain_final", ".4f"), quartiles("hybrid_final", ".4f")
            counted = statistics.median(run["iterations"] for run in task["runs"]) / task["steps"]
            noisy.append(f"| {task['title']} | {plain} | {ours} | {counted:.0%} | {time} |")
    return "\n".join([*smooth, "", *noisy, "", f"Recorded by `{result['command']}`."])


def moments() -> str:
    result = recorded("moments")
    lines = ["| Adam's moments after a jump | keep | decay by half | reset |", "|---|---|---|---|"]
    for name, title in SMOOTH.items():
        middles = [
            math.exp(statistics.median(map(math.log, result["lowest_loss"][f"{name}, {choice}"])))
            for choice in ("keep", "decay", "reset")
        ]
        lines.append(f"| {title}, lowest loss | " + " | ".join(f"{m:.2g}" for m in middles) + " |")
    lines += ["", f"Medians, recorded by `{result['command']}`."]
    return "\n".join(lines)


def parts() -> str:
    result = recorded("ablation")
    found = result["cost_ratios"]
    names = list(dict.fromkeys(key.split(", ")[1] for key in found))
    lines = [f"| | {' | '.join(SMOOTH.values())} |", "|---|---|---|"]
    for name in names:
        # A run that did not get there within half as much again counts as that.
        values = [
            statistics.median(1.5 if ratio is None else ratio for ratio in found[f"{task}, {name}"])
            for task in SMOOTH
        ]
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    lines += ["", f"Medians over 5 seeds, recorded by `{result['command']}`."]
    return "\n".join(lines)


def corrections() -> str:
    result = recorded("corrections")
    lines = [
        "| jumps made | variance of the miss, without probes on the way | with "
        "| way gone with them "
        "| progress without | with |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in SMOOTH.items():
        jumps = result["results"][name]["jumps"]
        for stretch, far in (("1x", "as far as chosen"), ("2x", "twice"), ("3x", "three times")):
            blind, seen = jumps[f"{stretch}, blind"], jumps[f"{stretch}, corrected"]
            gone = seen["share_mean"] * int(stretch[0])
            figures = (
                f"{blind['miss_variance']:.4f}",
                f"{seen['miss_variance']:.4f}",
                f"{gone:.2f}",
                f"{blind['progress_mean']:.2f}",
                f"{seen['progress_mean']:.2f}",
            )
            lines.append(f"| {title}, {far} | {' | '.join(figures)} |")
    removed = " and ".join(
        f"{math.floor(100 * result['results'][name]['group_scales_removed'])}%" for name in SMOOTH
    )
    count = " and ".join(
        str(result["results"][name]["jumps"]["1x, blind"]["jumps"]) for name in SMOOTH
    )
    lines += [
        "",
        f"{count} jumps, each made six times from the same start; misses and progress are in log "
        "loss, ways in those chosen. Of what the scales of layer groups should have been, their "
        f"forecasts explain {removed}. Recorded by `{result['command']}`.",
    ]
    return "\n".join(lines)


def models() -> str:
    chosen, fresh = (recorded(name) for name in ("forecast_skill", "forecast_skill-fresh"))
    lines = [
        "| runs | steps ahead | model | below persistence | below a line | below a power law "
        "| 90 % covers | calibration error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, result in (("fresh", fresh), ("chosen by", chosen)):
        for horizon in ("5", "15", "75"):
            for name, model in MODELS.items():
                scores = result["forecasters"][name][horizon]
                beats = scores["raw"]["beats"]
                # Rounded down, or a share just below a bar would stand at it.
                shares = " | ".join(
                    f"{math.floor(100 * beats[b])}%" for b in ("persistence", "linear", "power law")
                )
                lines.append(
                    f"| {title} | {horizon} | {model} | {shares} | {scores['coverage']:.0%} "
                    f"| {scores['calibration_error']:.2f} |"
                )
    counts = [len(result["recordings"]) for result in (fresh, chosen)]
    lines += [
        "",
        f"Share of windows of {counts[0]} and {counts[1]} recorded runs on which the forecast's "
        "error is below the baseline's, rounded down; fresh runs have seeds by which nothing was "
        f"chosen. Recorded by `{fresh['command']}` and `{chosen['command']}`.",
    ]
    return "\n".join(lines)


def memory() -> str:
    result = recorded("memory")
    lines = [
        f"| {result['parameters'] / 1e6:.0f}M parameters, AdamW | snapshots | copies, estimated "
        "| measured | whole peak by the estimate |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        told = row["estimate"]
        kept = f"{told['count']}, {told['kind']}" if told["count"] else "none"
        lines.append(
            f"| `{row['settings']}` | {kept} | {row['estimated_copies']:.2f} "
            f"| {row['measured_copies']:.2f} | {row['measured_peak_by_estimated']:.2f} |"
        )
    return "\n".join([*lines, "", "Recorded by `python benchmarks/memory.py`."])


def drills() -> str:
    result = recorded("drills")
    kills, times = result["kills"], result["times"]
    lines = ["| drill | survived | tests |", "|---|---|---|"]
    for drill, file, tests in TABLE:
        count = sum(times[f"{file}::test_{test}"] for test in tests)
        names = ", ".join(f"`test_{test}`" for test in tests)
        if drill in SCRIPTS:
            count = kills[drill]["kills"]
            names = f"`{SCRIPTS[drill].split('/')[1]}`, {names}"
        lines.append(f"| {drill} | {count} | `{file}`: {names} |")
    lines += [
        "",
        f"Times each was survived, recorded by `{result['command']}`. Where the kills were: "
        + "; ".join(
            ", ".join(f"{place} {n}" for place, n in done["by place"].items())
            for done in kills.values()
        )
        + " in Keras. "
        + " and ".join(str(done["whole runs compared"]) for done in kills.values())
        + " runs that went on after kills to the end came to the same as one that was not killed, "
        "to the last bit.",
        "",
        "| long run | steps | memory, MiB | open files | a step, µs of processor |",
        "|---|---|---|---|---|",
    ]
    long = recorded("soak")
    for name, title in {"engine": "the engine alone", "torch": "a PyTorch loop"}.items():
        run = long["runs"][name]
        quarters = [
            (statistics.median(run[figure][:5]), statistics.median(run[figure][-5:]))
            for figure in ("resident_mib", "handles", "step_us")
        ]
        ends = [f"{first:.4g} to {last:.4g}" for first, last in quarters]
        lines.append(f"| {title} | {run['steps']:,} | " + " | ".join(ends) + " |")
    fuzzed = recorded("fuzz")
    lines += [
        "",
        f"Medians over the first and the last quarter, recorded by `{long['command']}`.",
        "",
        "| reader, fuzzed | cases | memory at most, MiB |",
        "|---|---|---|",
    ]
    for reader, targets in fuzzed["readers"].items():
        cases = sum(target["cases"] for target in targets.values())
        peak = max(target["peak_mib"] for target in targets.values())
        lines.append(f"| {reader} | {cases:,} | {peak} |")
    lines += ["", f"Recorded by `{fuzzed['command']}`: no crash, no case of ten seconds."]
    return "\n".join(lines)


def harm() -> str:
    result = recorded("harm")
    lines = [
        "| loop | learning rate | loss at the end, plain | hybridcore | cost | processor time |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["results"]:
        ends = []
        for name in ("plain", "hybrid"):
            losses = [run["loss"] for run in row[name]]
            ends.append(f"{statistics.fmean(losses):.4g} ± {statistics.stdev(losses):.2g}")
        cost, seconds = ratio(row, "cost"), ratio(row, "cpu_seconds")
        lines.append(
            f"| {row['title']} | {row['rate']:g} | {ends[0]} | {ends[1]} "
            f"| {cost:.2f} | {seconds:.2f} |"
        )
    seeds = len(result["results"][0]["plain"])
    lines += ["", f"{seeds} seeds, recorded by `{result['command']}`."]
    return "\n".join(lines)


BLOCKS = {
    "gains": gains,
    "keras": in_keras,
    "harm": harm,
    "moments": moments,
    "parts": parts,
    "corrections": corrections,
    "models": models,
    "ground": lambda: tables(Ground(RESULTS)),
    "memory": memory,
    "drills": drills,
}


def updated(text: str) -> str:
    """Return `text` with all tables, between their markers, as the results give them."""
    for name, content in BLOCKS.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        block = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        new = f"{begin}\n{content()}\n{end}"
        # A template's backslashes would mean something.
        text = block.sub(new.replace("\\", "\\\\"), text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="update both README.md")
    if parser.parse_args().write:
        for page in PAGES:
            page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
    for content in BLOCKS.values():
        print(content() + "\n")


if __name__ == "__main__":
    main()
