"""The documents: each code block of README and CONTRIBUTING runs, and what they name is there."""

import dataclasses
import inspect
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from documents import BLOCK, ROOT, apply, block, blocks, document, sides

README, CONTRIBUTING = document("README"), document("CONTRIBUTING")
MEASURED = document("benchmarks/README")
if CONTRIBUTING is None:
    pytest.skip("the documents are in the source tree alone", allow_module_level=True)

FILE = re.compile(r"# file: (\S+)\n")
SECTIONS = re.split(r"^### How to add ", CONTRIBUTING, flags=re.MULTILINE)[1:]
LOOP = """
import torch
import torch.nn.functional as F

torch.manual_seed(0)
loader = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(30)]
model = torch.nn.Linear(4, 3)
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 30)
"""


def run(program, folder, paths, **environment):
    """Run a program in a process of its own."""
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_block_of_the_readme_is_run():
    """The diffs of Keras, Lightning, Hugging Face and Accelerate by their tests, others below."""
    kinds = [kind for kind, _ in blocks(README)]
    assert sorted(kinds) == [*5 * ["diff"], "mermaid", "python", "python"]


def test_the_first_diff_runs_and_begins_as_the_plain_loop(capsys):
    torch = pytest.importorskip("torch")
    ends = []
    for program in sides(block(README, "diff", "HybridTrainer")):
        scope = {}
        exec(LOOP + program, scope)
        ends.append(scope["model"].weight.detach())
    assert "steps" in capsys.readouterr().out
    # Nothing is predicted in warm-up.
    assert torch.equal(*ends)


def test_the_loop_for_the_command_line_is_one(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    testing = pytest.importorskip("typer.testing")
    from hybridcore.cli import app

    monkeypatch.chdir(tmp_path)
    Path("loop.py").write_text(block(README, "python", "def build"))
    result = testing.CliRunner().invoke(
        app, ["compare", "loop.py", "--steps", "60", "--seeds", "1", "--json"]
    )
    assert result.exit_code == 0, result.output


def test_the_recorded_run_can_be_read(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from hybridcore import read_stream

    monkeypatch.chdir(tmp_path)
    exec(block(README, "python", "JsonLines"), {})
    assert len(read_stream("run.jsonl").steps) == 500


def test_the_figure_is_the_phase_table():
    from hybridcore.phases import TRANSITIONS, Phase

    figure = block(README, "mermaid", "-->")
    names = "|".join(phase.name for phase in Phase)
    drawn = re.findall(rf"^ *({names}) --> ({names}): (.+)$", figure, re.MULTILINE)
    table = {}
    for (before, event), after in TRANSITIONS.items():
        table.setdefault((before.name, after.name), []).append(event.value)
    assert {(a, b): text.split(" / ") for a, b, text in drawn} == table


def test_what_the_documents_name_is_there():
    text = README + CONTRIBUTING + MEASURED
    targets = re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make (\w+)`", text)) <= set(targets)
    assert set(targets) - {"help"} <= set(re.findall(r"`make (\w+)`", CONTRIBUTING))
    for path in re.findall(r"`python ([\w/]+\.py)", text):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"`((?:hybridcore|tests|benchmarks|examples)/[\w/]+(?:\.\w+|/))`", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"`python -m ([\w.]+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for folder, page in ((ROOT, README + CONTRIBUTING), (ROOT / "benchmarks", MEASURED)):
        for link in re.findall(r"\]\((?!http)([^)#]+)", re.sub(BLOCK, "", page)):
            assert (folder / link).exists(), link
    headings = re.findall(r"^## (.*)$", MEASURED, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-").replace("'", "") for heading in headings}
    assert set(re.findall(r"benchmarks/README\.md#([\w-]+)", README)) <= anchors


def test_every_example_is_in_the_index():
    index = (ROOT / "examples" / "README.md").read_text()
    listed = re.findall(r"^\| `(\w+\.py)` \|", index, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def test_the_commands_and_settings_that_the_readme_names_are_there():
    pytest.importorskip("typer")
    from hybridcore import HybridTrainerConfig
    from hybridcore.cli import app

    commands = {c.name or c.callback.__name__ for c in app.registered_commands}
    assert set(re.findall(r"`hybridcore (\w+)", README)) == commands
    assert len(dataclasses.fields(HybridTrainerConfig)) == 17
    assert "`HybridTrainerConfig` has seventeen" in README


@pytest.mark.parametrize("section", SECTIONS, ids=lambda text: text.splitlines()[0].split()[-1])
def test_how_to_add_something(section, tmp_path):
    """Work through the section in a copy of the repository."""
    lines = [line for line in section.splitlines() if line]
    assert len(lines) < 60
    for name in ("hybridcore", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*_adapter")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    ran = 0
    for kind, text in blocks(section):
        file = FILE.match(text)
        if kind == "diff":
            apply(text, tmp_path)
        elif file:
            assert not (tmp_path / file[1]).exists()
            (tmp_path / file[1]).write_text(text[file.end() :])
        else:
            assert kind == "python"
            settings = re.match(r"# run with: (.*)\n", text)
            environment = dict(pair.split("=") for pair in settings[1].split()) if settings else {}
            paths = [tmp_path, tmp_path / "tests", tmp_path / "tests/core"]
            run(text, tmp_path, paths, **environment)
            ran += 1
    assert ran


def cards():
    """Objects whose docstring holds a card, and the figures that it may quote: text."""
    from hybridcore import corrector, quasi_newton
    from hybridcore.averaging import Averaging
    from hybridcore.dynamics.mixture import ExpertMixture
    from hybridcore.dynamics.rssm import RSSMDynamics
    from hybridcore.extrapolation import EXTRAPOLATORS
    from hybridcore.outer import OuterMomentum

    others = (corrector, quasi_newton, OuterMomentum, Averaging, ExpertMixture, RSSMDynamics)
    return EXTRAPOLATORS, others


def recorded_costs():
    """Median, least and greatest cost of each arm alone, as the cards write them."""
    path = ROOT / "benchmarks/results/arms.json"
    ratios = json.loads(path.read_text())["cost_ratios"]
    found = {}
    for title, values in ratios.items():
        name, arm = title.split(", ")
        numbers = sorted(1.5 if value is None else value for value in values)
        found.setdefault(arm, {})[name] = [
            f"{number:.2f}" for number in (numbers[0], statistics.median(numbers), numbers[-1])
        ]
    return found


def test_every_method_has_a_card_and_every_figure_of_it_is_recorded():
    extrapolators, others = cards()
    costs = recorded_costs()
    log = (ROOT / "benchmarks/proving_ground/LOG.md").read_text()
    known = set(re.findall(r"\d+\.\d\d+", README + MEASURED + log))
    together = {number for arm in costs.values() for task in arm.values() for number in task}
    for method in (*extrapolators.values(), *others):
        text = inspect.getdoc(method)
        for part in ("Predicts", "Pays", "Hurts", "Source"):
            assert text.count(f"- *{part}*") == 1, (method, part)
        card = text[text.index("- *Predicts*") :].split("\n\n")[0]
        assert set(re.findall(r"\d+\.\d\d+", card)) <= known | together, method
        for path in re.findall(r"``(benchmarks/[\w/.-]+)``", card):
            assert (ROOT / path).exists(), path
    for arm, function in extrapolators.items():
        if arm in costs:
            siren, burgers = costs[arm]["siren"][1], costs[arm]["burgers"][1]
            assert f"- *Alone*: {siren} / {burgers}." in inspect.getdoc(function)
    from hybridcore import extrapolation

    both = [costs["together"][name][1] for name in ("siren", "burgers")]
    assert f"come to {' / '.join(both)}." in " ".join(extrapolation.__doc__.split())
    alone = [costs["nesterov"][name][1] for name in ("siren", "burgers")]
    said = f"default comes to {' and '.join(both)}, and `nesterov` alone to {' and '.join(alone)} "
    assert said in " ".join(MEASURED.split())


def test_every_public_name_has_a_docstring():
    """Of modules, functions and methods ruff says it (rules D100 to D107)."""
    pytest.importorskip("torch")
    import hybridcore
    import hybridcore_torch

    for package in (hybridcore, hybridcore_torch):
        for name in set(package.__all__) - {"__version__"}:
            thing = getattr(package, name)
            assert inspect.getdoc(thing), name
            for attribute, value in vars(thing).items() if inspect.isclass(thing) else ():
                if not attribute.startswith("_") and (
                    callable(value) or isinstance(value, property)
                ):
                    assert inspect.getdoc(value), f"{name}.{attribute}"


def test_there_are_sections_for_all_that_can_be_added():
    titles = [section.splitlines()[0] for section in SECTIONS]
    kinds = ["a predictor", "an extrapolator", "a phase", "a CUDA kernel", "an adapter"]
    assert titles == kinds
