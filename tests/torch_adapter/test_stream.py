"""The stream of a run: whole, true to the run, and of no influence on it."""

import copy
import io
import json
import math
import subprocess
import sys

import pytest
import torch
from problems import BRISK, noisy, regression, weights

from hybridcore import HybridTrainerConfig, JsonLines, StreamError, read_stream
from hybridcore.progress import ProgressLine
from hybridcore.stream import BLOCK
from hybridcore_torch import HybridTrainer, TensorBoard


def train(steps, *, callbacks=(), config=BRISK):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, config, callbacks=callbacks)
    results = [trainer.step(closure) for _ in range(steps)]
    return trainer, results


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream") / "run.jsonl"
    seen = []
    with JsonLines(path) as stream:
        trainer, results = train(450, callbacks=[stream, seen.append])
    assert results == seen
    return path, trainer, results


def test_the_stream_holds_every_step_and_ends_in_the_statistics(recorded):
    path, trainer, results = recorded
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["config"] == BRISK.to_dict()
    assert lines[-1] == {
        "statistics": trainer.statistics().to_dict(),
        "step": 450,
        "final": True,
    }
    steps = [line for line in lines[1:] if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 451))
    for line, result in zip(steps, results, strict=True):
        assert line["phase"] == result.phase.name
        assert line["learning_rate"] == result.metrics["learning_rate"]
        for name in ("loss", "confidence", "was_predicted", "prediction_error", "gradient_norm"):
            assert line[name] == getattr(result, name)
    names = [event["event"] for line in steps for event in line["events"]]
    assert names.count("leap") + names.count("jump") > 1
    assert sum(line["was_predicted"] for line in steps) == trainer.statistics().predicted_steps > 0


def test_the_reader_gives_back_what_was_written(recorded):
    path, trainer, results = recorded
    stream = read_stream(path)
    assert stream.complete
    assert len(stream.steps) == 450
    assert stream.config == BRISK.to_dict()
    assert stream.column("loss") == [result.loss for result in results]
    errors = stream.column("prediction_error")
    assert [math.isnan(e) for e in errors] == [r.prediction_error is None for r in results]
    assert stream.statistics[-1] == {**trainer.statistics().to_dict(), "step": 450}
    assert repr(stream) == "Stream(450 steps, complete=True)"
    assert [s["step"] for s in stream.statistics] == sorted({s["step"] for s in stream.statistics})


def test_recording_changes_no_bit_of_the_run(tmp_path):
    plain, _ = train(300)
    with JsonLines(tmp_path / "run.jsonl") as stream:
        watched, _ = train(300, callbacks=[stream])
    assert all(map(torch.equal, weights(plain.model), weights(watched.model)))


def test_jumps_and_what_became_of_them_are_events(tmp_path):
    config = HybridTrainerConfig.from_dict({**BRISK.to_dict(), "secant_pairs": 0})
    trainer, results = train(400, config=config)
    events = [event for result in results for event in result.events]
    jumps = [event for event in events if event["event"] == "jump"]
    ends = [e for e in events if e["event"] in ("jump kept", "jump rolled back")]
    begun = [
        i for i, r in enumerate(results[1:], 1) if r.was_predicted > results[i - 1].was_predicted
    ]
    assert len(jumps) == len(begun) > 1
    assert len(jumps) - len(ends) in (0, 1)
    rolled_back = sum(e["event"] == "jump rolled back" for e in ends)
    assert rolled_back == trainer.statistics().rollbacks


def test_a_bad_batch_is_an_event_and_its_loss_is_null(tmp_path):
    path = tmp_path / "run.jsonl"
    model, optimizer, closure = regression()
    with JsonLines(path) as stream:
        trainer = HybridTrainer(model, optimizer, callbacks=[stream])
        for step in range(110):
            trainer.step(closure if step != 105 else lambda: closure() * float("nan"))
    steps = read_stream(path).steps
    assert steps[105]["loss"] is None
    events = [event for step in steps[104:108] for event in step["events"]]
    assert {"event": "batch left out"} in events
    assert {"event": "divergence level", "level": "CRITICAL"} in events


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_cut_last_line_is_left_out(recorded, tmp_path, cut):
    path, _, _ = recorded
    cut_off = tmp_path / "cut.jsonl"
    cut_off.write_bytes(path.read_bytes()[:-cut])
    stream = read_stream(cut_off)
    assert not stream.complete
    assert len(stream.steps) == 450
    assert stream.statistics[-1]["step"] == 400


def test_a_run_that_is_killed_leaves_all_but_its_last_block(tmp_path):
    killed, ended = tmp_path / "killed.jsonl", tmp_path / "ended.jsonl"
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from problems import regression, HybridTrainer\n"
        "from hybridcore import JsonLines\n"
        "child = os.fork()\n"
        "path = sys.argv[2 if child == 0 else 3]\n"
        "model, optimizer, closure = regression()\n"
        "trainer = HybridTrainer(model, optimizer, callbacks=[JsonLines(path)])\n"
        "for step in range(250): trainer.step(closure)\n"
        "if child == 0: os._exit(9)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9\n"
    )
    folder = __file__.rpartition("/")[0]
    command = [sys.executable, "-c", code, folder, str(killed), str(ended)]
    subprocess.run(command, check=True)
    assert not read_stream(killed).complete
    # On a slow machine blocks end at other steps, because a second has passed.
    assert len(read_stream(killed).steps) > 250 - BLOCK
    assert read_stream(ended).complete
    assert len(read_stream(ended).steps) == 250


def test_a_resumed_run_goes_on_in_its_stream(tmp_path):
    path, saved = tmp_path / "run.jsonl", tmp_path / "state.pt"
    with JsonLines(path) as stream:
        model, optimizer, closure = regression()
        trainer = HybridTrainer(model, optimizer, BRISK, callbacks=[stream])
        for step in range(90):
            if step == 70:
                trainer.save(saved)
            trainer.step(closure)
    with path.open("a") as file:
        file.write('{"step": 91, "lo')
    with JsonLines(path, append=True) as stream:
        model, optimizer, closure = regression()
        trainer = HybridTrainer.load(saved, model, optimizer, callbacks=[stream])
        for _ in range(30):
            trainer.step(closure)
    found = read_stream(path)
    assert found.complete
    assert found.steps[-1]["step"] == 100
    assert [step["step"] for step in found.steps] == list(range(1, 101))
    assert found.column("loss")[:90] == pytest.approx(_losses(90), rel=1e-6)


def test_a_stream_may_be_given_to_one_run_after_another(tmp_path):
    # As by a callback whose fit is called twice.
    path, kept = tmp_path / "run.jsonl", []
    with JsonLines(path) as stream:
        for steps in (150, 130):
            trainer, results = train(steps, callbacks=[stream])
            kept.append([result.loss for result in results])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    written = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert written == [pair for losses in kept for pair in enumerate(losses, start=1)]
    found = read_stream(path)
    assert found.column("loss") == kept[1]
    assert found.statistics[-1] == {**trainer.statistics().to_dict(), "step": 130}


def _losses(steps):
    _, results = train(steps)
    return [result.loss for result in results]


def test_what_is_no_stream_is_refused(recorded, tmp_path):
    path, _, _ = recorded
    other = tmp_path / "other.jsonl"
    with pytest.raises(StreamError, match="name a file that JsonLines wrote"):
        read_stream(other)
    other.write_text("")
    with pytest.raises(StreamError, match="is empty"):
        read_stream(other)
    for text in ("step,loss\n1,2\n", '{"loss": 1}\n', "\x00\n", "[1]\n"):
        other.write_text(text)
        with pytest.raises(StreamError, match="no stream of a run"):
            read_stream(other)
    lines = path.read_text().splitlines()
    other.write_text("\n".join([lines[0].replace('"stream": 1', '"stream": 7'), *lines[1:], ""]))
    with pytest.raises(StreamError, match="version 7"):
        read_stream(other)
    for damaged in (lines[5][:20], '{"step": 5}', '{"loss": 1.0}', ""):
        other.write_text("\n".join([*lines[:5], damaged, *lines[6:], ""]))
        with pytest.raises(StreamError, match="damaged in line 6"):
            read_stream(other)
    other.write_text("\n".join([*lines[:5], lines[5][:20], *lines[6:], ""]))
    with pytest.raises(StreamError, match="damaged in line 6"):
        read_stream(other)


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    for path in (tmp_path / "no" / "run.jsonl", tmp_path):
        with pytest.raises(StreamError, match="cannot be written"):
            JsonLines(path)
    other = tmp_path / "notes.txt"
    other.write_text("mine\n")
    with pytest.raises(StreamError, match="no stream"):
        JsonLines(other, append=True)
    assert other.read_text() == "mine\n"


def test_a_recording_is_not_overwritten(recorded, tmp_path):
    path = tmp_path / "run.jsonl"
    path.touch()
    JsonLines(path).close()
    path.write_bytes(recorded[0].read_bytes())
    with pytest.raises(StreamError, match="append=True"):
        JsonLines(path)
    assert path.read_bytes() == recorded[0].read_bytes()


def test_watchers_refuse_what_they_cannot_use(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").touch()
    with pytest.raises(StreamError, match="is a file: name a folder"):
        TensorBoard(tmp_path / "file")
    with pytest.raises(ValueError, match="total must be"):
        ProgressLine(total=0)


def test_a_run_without_steps_saved_nothing():
    trainer, _ = train(0)
    assert trainer.statistics().backward_reduction == 0.0
    assert "(0% fewer backward passes)" in str(trainer.statistics())


def test_a_full_disk_does_not_end_the_training(caplog):
    stream = JsonLines("/dev/full")
    train(250, callbacks=[stream])
    stream.close()
    assert "is not recorded" in caplog.text


def test_the_line_shows_phase_and_speedup():
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with ProgressLine(total=450, console=console) as line:
        trainer, results = train(450, callbacks=[line])
    shown = console.file.getvalue()
    assert results[-1].phase.name in shown
    assert "450/450" in shown
    assert f"{trainer.statistics().measured_speedup_interval[0]:.2f}" in shown


def test_tensorboard_reads_back_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path) as board:
        trainer, results = train(250, callbacks=[board])
    read = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "tensors": 0})
    read.Reload()
    real = read.Scalars("loss/real")
    expected = [(i, r.loss) for i, r in enumerate(results, 1) if not r.was_predicted]
    assert [e.step for e in real] == [i for i, _ in expected]
    assert [e.value for e in real] == pytest.approx([loss for _, loss in expected])
    assert len(read.Scalars("loss/predicted")) == trainer.statistics().predicted_steps > 0
    assert read.Scalars("run/cost")[-1].value == pytest.approx(trainer.statistics().cost, rel=1e-6)
    phases = [e.tensor_proto.string_val[0].decode() for e in read.Tensors("phase/text_summary")]
    changes = [r.phase.name for i, r in enumerate(results) if r.phase is not results[i - 1].phase]
    assert phases == (changes if results[0].phase is not results[-1].phase else ["WARMUP"])


def test_the_summary_reads_as_the_numbers_are():
    trainer, closure, _ = noisy()
    for _ in range(120):
        trainer.step(closure)
    text, statistics = str(trainer.statistics()), trainer.statistics()
    assert text.startswith(f"120 steps: {statistics.full_steps} full")
    assert "none, nothing was predicted" in text
    assert max(map(len, text.splitlines())) < 110


def test_a_resumed_run_that_died_at_once_is_not_complete(tmp_path):
    path = tmp_path / "run.jsonl"
    with JsonLines(path) as stream:
        train(30, callbacks=[stream])
    assert read_stream(path).complete
    head = path.read_text().splitlines()[0]
    with path.open("a") as file:
        file.write(head + "\n")
    stream = read_stream(path)
    assert len(stream.steps) == 30
    assert not stream.complete


def test_a_trainer_that_is_given_an_earlier_state_is_recorded_on_from_there(tmp_path):
    path = tmp_path / "run.jsonl"
    with JsonLines(path) as stream:
        model, optimizer, closure = regression()
        trainer = HybridTrainer(model, optimizer, BRISK, callbacks=[stream])
        losses = {}
        for step in range(1, 181):
            if step == 91:
                state = copy.deepcopy(trainer.state_dict())
            losses[step] = trainer.step(closure).loss
        trainer.load_state_dict(state)
        for step in range(91, 231):
            # So that the two accounts can be told apart.
            losses[step] = trainer.step(lambda: 2.0 * closure()).loss
    stream = read_stream(path)
    assert {row["step"]: row["loss"] for row in stream.steps} == losses
    assert [record["steps"] for record in stream.statistics][-1] == 230
