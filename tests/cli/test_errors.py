"""Every error path of every command: one line that says the fix, exit code 2, no traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import HEAD, SMOOTH, call, check_lines, write

from hybridcore import StepResult, __version__
from hybridcore.cli import own

MODEL = "    model = nn.Linear(1, 1)\n    optimizer = torch.optim.SGD(model.parameters(), 0.1)\n"
DATA = "    data = [(torch.zeros(4, 1), torch.zeros(4, 1))]\n"


def build(returned="model, optimizer, data, loss", more=""):
    loss = "    loss = nn.MSELoss()\n"
    return f"{HEAD}def build():\n{MODEL}{DATA}{loss}{more}    return {returned}\n"


FILES = {
    "no build": (HEAD, "defines no build()"),
    "syntax": ("def build(:\n", "own.py:1"),
    "null bytes": ("x = 1\0\n", "own.py: source code string cannot contain null bytes"),
    "import": ("import no_such_thing_at_all\n", "no_such_thing_at_all is missing"),
    "raises at import": ("1 / 0\n", "own.py:1: import raised ZeroDivisionError"),
    "exits": ("raise SystemExit(3)\n", "raised SystemExit"),
    "build raises": (build(more="    {}['key']\n"), "build() raised KeyError"),
    "three values": (build("model, optimizer, data"), "returned 3 values"),
    "nothing": (build("None"), "returned NoneType"),
    "dictionary lacks": (build("{'model': model}"), "lacks 'optimizer'"),
    "dictionary has more": (
        build("dict(model=model, optimizer=optimizer, data=data, loss=loss, lr=1)"),
        "unknown 'lr'",
    ),
    "no module": (build("lambda x: x, optimizer, data, loss"), "model must be"),
    "no optimizer": (build("model, 'adam', data, loss"), "optimizer must be"),
    "another optimizer": (
        build("nn.Linear(1, 1), optimizer, data, loss"),
        "do not fit",
    ),
    "no data": (build("model, optimizer, 7, loss"), "data is a int"),
    "empty data": (build("model, optimizer, [], loss"), "data is empty"),
    "an iterator": (build("model, optimizer, iter(data), loss"), "gone through once"),
    "a class that is gone through once": (
        build(
            "model, optimizer, Once(), loss",
            "    class Once:\n        rest = iter(3 * data)\n"
            "        def __iter__(self):\n            return self.rest\n",
        ),
        "data can be gone through once only",
    ),
    "with one batch": (
        build(
            "model, optimizer, Once(), loss",
            "    class Once:\n        rest = iter(data)\n"
            "        def __iter__(self):\n            return self.rest\n",
        ),
        "data can be gone through once only",
    ),
    "a batch by names": (build("model, optimizer, {'x': data}, loss"), "put it into a list"),
    "weights of an earlier call": (
        f"{HEAD}{MODEL.replace('    ', '')}{DATA.strip()}\n"
        "def build():\n    return model, optimizer, data, nn.MSELoss()\n",
        "make the model in build()",
    ),
    "loss without a signature": (
        build("model, optimizer, data, torch.mean"),
        "write it as def loss(model, batch)",
    ),
    "no loss": (build("model, optimizer, data, 0.5"), "loss is a float"),
    "loss of three": (build(more="    loss = lambda a, b, c: 0\n"), "takes 3 arguments"),
    "loss is a number": (build(more="    loss = lambda m, b: 0.5\n"), "loss returned float"),
    "loss is a vector": (
        build(more="    loss = lambda m, b: m(b[0])\n"),
        "tensor of shape (4, 1)",
    ),
    "loss is detached": (
        build(more="    loss = lambda m, b: m(b[0]).mean().detach()\n"),
        "without gradients",
    ),
    "loss raises": (
        build(more="    loss = lambda m, b: m(b[0]).mean() + no_name\n"),
        "NameError: name 'no_name'",
    ),
    "criterion without labels": (build("model, optimizer, [torch.zeros(4, 1)], loss"), "(x, y)"),
    "held out": (
        build("dict(model=model, optimizer=optimizer, data=data, loss=loss, held_out=[])"),
        "held_out is empty",
    ),
}

ARGUMENTS = {
    "compare: no argument": (["compare"], "Missing argument"),
    "compare: no file": (["compare", "no_file.py"], "no such file"),
    "compare: a folder": (["compare", "."], ". is a folder"),
    "compare: suffix": (["compare", "good.py", "--output", "o.xyz"], "name one of png, svg"),
    "compare: no module": (["compare", "no_module_at_all"], "no file or module"),
    "compare: no name": (["compare", "what is this"], "neither a file nor a module"),
    "compare: no steps": (["compare", "good.py", "--steps", "0"], "--steps"),
    "compare: no number": (["compare", "good.py", "--seeds", "two"], "--seeds"),
    "compare: no folder": (["compare", "good.py", "--output", "no/c.png"], "make it first"),
    "compare: folder": (["compare", "good.py", "--output", "."], "is a folder"),
    "compare: no config": (["compare", "good.py", "--config", "no.toml"], "name a TOML file"),
    "compare: bad config": (["compare", "good.py", "--config", "bad.toml"], "unknown setting"),
    "compare: unknown option": (["compare", "good.py", "--fast"], "--fast"),
    "demo: unknown workload": (["demo", "--only", "mnist"], "siren"),
    "demo: no folder": (["demo", "--output", "no/d.png"], "make it first"),
    "demo: suffix": (["demo", "--output", "o.xyz"], "name one of png, svg"),
    "report: no argument": (["report"], "Missing argument"),
    "report: no file": (["report", "no.jsonl"], "name a file that JsonLines wrote"),
    "report: no stream": (["report", "good.py"], "no stream of a run"),
    "report: a folder": (["report", "."], "name a file that JsonLines wrote"),
    "report: no step": (["report", "begun.jsonl"], "holds no step yet"),
    "report: no folder": (["report", "one.jsonl", "--html", "no/r.html"], "make it first"),
    "report: suffix": (["report", "one.jsonl", "--png", "z.xyz"], "name one of png, svg"),
    "report: over itself": (
        ["report", "one.jsonl", "--html", "./one.jsonl"],
        "same file as the recording",
    ),
    "report: one for both": (
        ["report", "one.jsonl", "--html", "o.png", "--png", "o.png"],
        "same file as --html",
    ),
    "report: no room": (["report", "one.jsonl", "--html", "/dev/full"], "No space left"),
    "sweep: no equals": (["sweep", "good.py", "--set", "horizon"], "NAME=VALUE"),
    "sweep: no setting": (["sweep", "good.py", "--set", "speed=1,2"], "no setting 'speed'"),
    "sweep: no value": (["sweep", "good.py", "--set", "horizon=0,1"], "horizon must be"),
    "sweep: wrong kind": (["sweep", "good.py", "--set", "horizon=soon"], "horizon must be"),
    "sweep: a list": (["sweep", "good.py", "--set", "horizon=[1]"], "a value is a number"),
    "sweep: twice": (["sweep", "good.py", "--set", "horizon=1,1"], "given twice"),
    "sweep: same setting": (
        ["sweep", "good.py", "--set", "horizon=1", "--set", "horizon=2"],
        "given twice",
    ),
    "sweep: four": (
        [
            *("sweep", "good.py", "--set", "horizon=1", "--set", "snapshots=4"),
            *("--set", "warmup_steps=1", "--set", "min_full_steps=4"),
        ],
        "at most 3",
    ),
    "sweep: suffix": (["sweep", "good.py", "--output", "o.xyz"], "name one of png, svg"),
    "sweep: one for both": (
        ["sweep", "good.py", "--output", "o.png", "--results", "o.png"],
        "same file as --results",
    ),
    "sweep: jobs": (["sweep", "good.py", "--jobs", "0"], "--jobs 0"),
    "sweep: results": (["sweep", "good.py", "--results", "good.py"], "no file of a sweep"),
    "doctor: dtype": (["doctor", "--dtype", "int8"], "float32"),
    "doctor: optimizer": (["doctor", "--optimizer", "adamwww"], "adamw"),
    "doctor: momentum": (["doctor", "--momentum", "0.9"], "sgd and rmsprop"),
    "doctor: no model": (["doctor", "--optimizer", "sgd"], "give --model-params too"),
    "doctor: parameters": (["doctor", "--model-params", "0"], "from 1 to"),
    "doctor: no number": (["doctor", "--model-params", "B"], "such as 1.2e9 or 7B"),
    "doctor: nothing": (["doctor", "--model-params", ""], "such as 1.2e9 or 7B"),
    "doctor: NaN": (["doctor", "--model-params", "nan"], "from 1 to"),
    "no such command": (["train"], "No such command"),
}


@pytest.mark.parametrize(("text", "words"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_a_file_that_cannot_be_run(command, text, words):
    path = write(text)
    check_lines(call(command, path, "--steps", 8, "--quiet"), words)
    assert not list(Path().glob("*.png"))


@pytest.mark.parametrize(("arguments", "words"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_that_make_no_sense(arguments, words):
    write(SMOOTH, "good.py")
    write("horizont = 3\n", "bad.toml")
    head = json.dumps({"stream": 1, "config": {}}) + "\n"
    result = StepResult(0.5, "FULL", False, None, 0.0, 1.0, 1.0, {})
    step = {"step": 1} | result._asdict()
    del step["metrics"]
    write(head, "begun.jsonl")
    write(head + json.dumps(step) + "\n", "one.jsonl")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    check_lines(call(*arguments), words)
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_a_data_set_that_is_not_here(command, monkeypatch, tmp_path):
    monkeypatch.setattr(own, "FASHION", tmp_path / "none")
    check_lines(call(command, "fashion", "--quiet"), "dataset-fashion-mnist")


def test_what_goes_wrong_in_the_middle_is_one_line_too():
    path = write(
        SMOOTH.replace("nn.MSELoss()", "failing")
        + """
calls = 0
def failing(model, batch):
    global calls
    calls += 1
    assert calls < 100, "enough"
    return F.mse_loss(model(batch[0]), batch[1])
"""
    )
    result = call("compare", path, "--steps", 80, "--quiet")
    check_lines(result, "raised AssertionError: enough")
    assert "own.py:" in result.stderr


def test_a_plain_run_that_diverges_is_told():
    path = write(SMOOTH.replace("lr=3e-3", "lr=1e30").replace("Adam", "SGD"))
    check_lines(call("sweep", path, "--steps", 8, "--set", "horizon=5", "--quiet"), "not finite")
    check_lines(call("compare", path, "--steps", 8, "--seeds", 1, "--quiet"), "not finite")


def test_a_plain_run_that_diverged_is_told_again():
    path = write(SMOOTH.replace("lr=3e-3", "lr=1e30").replace("Adam", "SGD"))
    for _ in range(2):
        result = call("sweep", path, "--steps", 8, "--set", "horizon=5", "--quiet")
        check_lines(result, "not finite")


def test_a_loss_that_is_never_a_number_is_one_line():
    # In a process of its own, where nobody else handles what is logged.
    path = write(SMOOTH.replace("nn.MSELoss()", "lambda m, b: m(b[0]).mean() * float('nan')"))
    command = [sys.executable, "-c", "from hybridcore.cli import app; app()", "compare", path]
    arguments = ["--steps", "12", "--seeds", "1", "--quiet"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "loss is not finite" in line


def test_an_error_in_a_module_beside_the_loop_is_told_of_that_module():
    write("def broken(:\n", "broken_beside.py")
    result = call("compare", write("import broken_beside\n"), "--quiet")
    check_lines(result, "broken_beside.py:1: invalid syntax")


def test_without_the_extra_one_line_says_what_to_install():
    code = (
        "import sys; sys.modules['typer'] = None; sys.argv = ['hybridcore', 'demo']\n"
        "from hybridcore.cli import app"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        'hybridcore: typer is missing: pip install "hybridcore[torch,cli]"'
    )


@pytest.mark.parametrize("command", ["demo", "compare", "sweep", "report", "doctor"])
def test_every_command_has_help_with_json_and_quiet(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert "--quiet" in result.stdout


def test_it_tells_its_version():
    result = call("--version")
    assert result.exit_code == 0
    assert result.stdout == f"hybridcore {__version__}\n"


def test_figures_are_out_before_the_picture_is_drawn():
    Path("full.png").symlink_to("/dev/full")
    arguments = ("--steps", 12, "--seeds", 1, "--output", "full.png", "--json")
    result = call("compare", write(SMOOTH), *arguments)
    assert result.exit_code == 2
    assert "No space left" in result.stderr
    assert json.loads(result.stdout)["pairs"]


def test_without_a_command_there_is_help():
    result = call()
    assert result.exit_code == 0
    assert "compare" in result.stdout
    assert result.stderr == ""


def test_the_shell_can_complete():
    result = call("--help")
    assert result.exit_code == 0
    assert "--install-completion" in result.stdout
