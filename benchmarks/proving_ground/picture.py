"""The picture of the proving ground: speed-ups by workload and method."""

from __future__ import annotations

from pathlib import Path

from benchmarks.proving_ground.methods import METHODS
from benchmarks.proving_ground.results import PEERS, Ground
from benchmarks.proving_ground.workloads import GROUND


def draw(ground: Ground, path: Path) -> None:
    """Write a PNG with one panel against the tuned loop and one against the loop as written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = ground.workloads
    figure, panels = plt.subplots(1, 2, figsize=(12, 1.5 + 0.5 * len(names)), sharey=True)
    for panel, baseline in zip(panels, ("tuned", "written"), strict=True):
        for index, method in enumerate(PEERS):
            offset = 0.13 * (index - (len(PEERS) - 1) / 2)
            rows, middles, errors = [], [], []
            hollow_x, hollow_y = [], []
            for row, name in enumerate(names):
                spread = ground.speedup(name, method, baseline)
                if spread is None:
                    continue
                rows.append(row + offset)
                middles.append(spread.middle)
                if spread.sign:
                    hollow_x.append(spread.middle)
                    hollow_y.append(row + offset)
                errors.append((spread.middle - spread.low, spread.high - spread.middle))
            if rows:
                panel.errorbar(
                    middles,
                    rows,
                    xerr=list(zip(*errors, strict=True)),
                    fmt="o" if method == "hybridcore" else "s",
                    markersize=8 if method == "hybridcore" else 4,
                    label=METHODS[method].title,
                    linewidth=1,
                )
                # Hollow where the speed-up is only known to be above or below what is shown.
                panel.plot(hollow_x, hollow_y, "o", color="white", markersize=3, zorder=5)
        panel.axvline(1.0, color="grey", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_xlabel(f"speed-up against {METHODS[baseline].title}")
        panel.grid(axis="x", alpha=0.3)
    kind = {False: "smooth", True: "noisy"}
    panels[0].set_yticks(range(len(names)))
    panels[0].set_yticklabels([f"{GROUND[n].title} ({kind[GROUND[n].noisy]})" for n in names])
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(PEERS), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
