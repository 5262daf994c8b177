"""The reader of streams: whatever the file holds, figures or one clear error."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcore import Engine, HybridTrainerConfig, Phase, StepResult, StreamError, read_stream
from hybridcore.cli.page import render
from hybridcore.cli.reading import calibration, history, jumps, phases, speedup_text
from hybridcore.stream import _STEP, VERSION, _line

HEAD = {
    "hybridcore": "0.1",
    "stream": VERSION,
    "config": HybridTrainerConfig().to_dict(),
}
JUMP = {"event": "jump", "arm": "linear", "steps": 30, "promise": 12.5, "scales": [1.0, 0.5]}
STEPS = [
    json.loads(_line(step, StepResult(0.5, phase, predicted, 0.1, 0.9, 1.0, 2.0, {}, events)))
    for step, (phase, predicted, events) in enumerate(
        [
            (Phase.WARMUP, False, ()),
            (Phase.FULL, False, ({"event": "divergence level", "level": "CAUTION"},)),
            (Phase.PREDICT, True, (JUMP,)),
            (Phase.CORRECT, False, ({"event": "jump kept", "arm": "linear"},)),
        ],
        start=1,
    )
]
SUMMARY = {
    "statistics": Engine(HybridTrainerConfig()).statistics().to_dict(),
    "step": 4,
    "final": True,
}
LINES = [HEAD, *STEPS, SUMMARY]


def written(path, lines):
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    path.write_text(text, encoding="utf-8")
    return path


def figures(path):
    """All that a report says of the stream at `path`, without drawing it."""
    stream = read_stream(path)
    for name in {name for line in stream.steps for name in line} - {"phase", "events"}:
        assert len(stream.column(name)) == len(stream.steps)
    steps = [line["step"] for line in stream.steps]
    assert steps == sorted(set(steps))
    for name in SUMMARY["statistics"]:
        history(stream, name)
    speedup_text(stream.statistics[-1] if stream.statistics else None)
    return jumps(stream), calibration(stream), phases(stream)


def test_a_whole_stream_gives_its_figures(tmp_path):
    (jump,), (bin_,), found = figures(written(tmp_path / "run", LINES))
    assert (jump.arm, jump.steps, jump.outcome, jump.scales) == ("linear", 1, "kept", (1.0, 0.5))
    assert (bin_.count, bin_.share) == (1, 1.0)
    assert [p.phase for p in found] == [phase.name for phase in Phase]
    assert set(_STEP) == {"step", *StepResult._fields} - {"metrics"}


# A value of each kind, of which every field takes but a few.
OTHERS = [None, True, -1, 0.5, 10**400, float("nan"), "other", [], [1], [None, None], {}, {"a": 1}]


@pytest.mark.parametrize("number", range(len(LINES)))
def test_a_field_of_another_kind_is_damage_or_harmless(tmp_path, number):
    line = LINES[number]
    complaints = []
    places = [(line, name) for name in line]
    places += [(line["statistics"], name) for name in line.get("statistics", ())]
    places += [(event, name) for event in line.get("events", ()) for name in event]
    for holder, name in places:
        before = holder[name]
        for other in [*OTHERS, ...]:
            if other is ...:
                del holder[name]
            else:
                holder[name] = other
            text = json.dumps(line)
            holder[name] = before
            lines = [*LINES[:number], text, *LINES[number + 1 :]]
            try:
                figures(written(tmp_path / "run", lines))
            except StreamError as error:
                complaints.append(str(error))
    assert len(complaints) > (20 if number else 8)
    assert number == 0 or all(f"damaged in line {number + 1}" in text for text in complaints)


def test_a_report_of_figures_that_are_not_finite(tmp_path):
    def emptied(value):
        if isinstance(value, float):
            return None
        if isinstance(value, dict):
            return {key: emptied(item) for key, item in value.items()}
        return [emptied(item) for item in value] if isinstance(value, list) else value

    lines = [HEAD, *STEPS[:3], *emptied([STEPS[3], SUMMARY])]
    assert "not finite" in render(read_stream(written(tmp_path / "run", lines)), "run")


def test_a_first_line_of_a_resumed_run_is_no_statistics_whatever_else_it_holds(tmp_path):
    odd = HEAD | {"statistics": {}, "final": True}
    stream = read_stream(written(tmp_path / "run", [HEAD, *STEPS, odd]))
    assert not stream.complete
    assert not stream.statistics
    assert read_stream(written(tmp_path / "run", [HEAD, odd, *STEPS, SUMMARY])).complete


def test_brackets_that_are_nested_too_deeply_are_damage(tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    with pytest.raises(StreamError, match="no stream"):
        read_stream(written(tmp_path / "run", [deep]))
    with pytest.raises(StreamError, match="damaged in line 2"):
        read_stream(written(tmp_path / "run", [HEAD, deep]))


def test_a_run_that_went_back_again_and_again_is_read_in_time(tmp_path):
    # Each account of a step takes the place of one; for all of them together that is linear.
    lines = [STEPS[0] | {"step": step} for step in (*range(5_000), *[4_999] * 5_000)]
    lines += [SUMMARY | {"step": 1}] * 3
    stream = read_stream(written(tmp_path / "run", [HEAD, *lines]))
    assert len(stream.steps) == 5_000
    assert len(stream.statistics) == 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=4,
)
NAMES = st.sampled_from(sorted({*HEAD, *STEPS[0], *SUMMARY, *SUMMARY["statistics"], *JUMP}))
CHANGED = st.tuples(
    st.sampled_from(LINES), st.dictionaries(NAMES | st.text(max_size=9), VALUES, max_size=2)
)
STREAMS = st.lists(
    CHANGED.map(lambda pair: pair[0] | pair[1])
    | CHANGED.map(lambda pair: SUMMARY | {"statistics": SUMMARY["statistics"] | pair[1]})
    | CHANGED.map(lambda pair: STEPS[2] | {"events": [JUMP | pair[1]]})
    | VALUES.map(json.dumps)
    | st.text(max_size=40),
    max_size=6,
)


def any_content(path, content):
    """Read a file of bytes, or of `content` after the first line of a stream."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        written(path, [HEAD, *content])
    with contextlib.suppress(StreamError):
        figures(path)


@settings(max_examples=150, deadline=None)
@given(STREAMS)
def test_any_lines_are_a_stream_or_refused(tmp_path_factory, lines):
    any_content(tmp_path_factory.getbasetemp() / "lines.jsonl", lines)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_stream_or_refused(tmp_path_factory, content):
    any_content(tmp_path_factory.getbasetemp() / "bytes.jsonl", content)
