"""The engine against a real descent in NumPy."""

import itertools
import json
import math

import numpy as np
import pytest
from descent import BRISK, Descent, Watched, text
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcore import (
    Action,
    Engine,
    HybridTrainerConfig,
    Observation,
    Phase,
    ProtocolError,
)


def test_smooth_descent_is_predicted_and_gains():
    hybrid = Descent()
    phases = hybrid.run(600)
    counters = hybrid.engine.counters
    plain = Descent(HybridTrainerConfig(warmup_steps=10**6))
    plain.run(counters.full_steps + counters.probes // 3)
    assert counters.predicted_steps > 150
    assert hybrid.loss(hybrid.x) - 1e-3 < 0.5 * (plain.loss(plain.x) - 1e-3)
    assert phases[:20] == [Phase.WARMUP] * 20
    # Runs of equal phases keep to the settings.
    runs = [[phases[0], 0]]
    for phase in phases:
        if phase is not runs[-1][0]:
            runs.append([phase, 0])
        runs[-1][1] += 1
    follows = {Phase.WARMUP: Phase.FULL, Phase.FULL: Phase.PREDICT, Phase.PREDICT: Phase.CORRECT}
    for (phase, count), (after, _) in itertools.pairwise(runs):
        assert after is follows.get(phase, Phase.FULL)
        if phase is Phase.FULL:
            assert count >= BRISK.min_full_steps
        if phase is Phase.PREDICT:
            assert count <= BRISK.horizon
        if phase is Phase.CORRECT:
            assert count <= BRISK.snapshot_interval
    statistics = hybrid.engine.statistics()
    assert statistics.measured_speedup > 1.0
    assert sum(statistics.arm_values.values()) > 0.0


def test_micro_corrections_come_every_interval():
    descent = Descent()
    descent.run(300)
    in_predict = [action for phase, action in descent.log if phase is Phase.PREDICT]
    since = 0
    for action in in_predict:
        since += action is Action.SKIP
        if action is Action.PROBE:
            since = 0
        assert since <= BRISK.correction_interval


def test_noise_is_left_alone():
    descent = Descent(HybridTrainerConfig(), noise=0.3)
    descent.run(1500)
    counters = descent.engine.counters
    # No jumps: outer steps alone, each of which stands for two.
    assert counters.predicted_steps <= 2 * counters.outer_steps
    assert counters.rollbacks == 0
    # The first ten outer steps are weighed by two probes, and one in 16 later.
    assert counters.probes <= 30 + 2 * (10 + counters.outer_steps / 16)
    assert descent.engine.statistics().measured_speedup == pytest.approx(1.0, abs=0.05)


def test_decisions_do_not_look_at_the_clock():
    fast, slow = Descent(seconds=1e-6), Descent(seconds=7.0)
    fast.run(400)
    slow.run(400)
    assert fast.log == slow.log
    assert np.array_equal(fast.x, slow.x)


@pytest.mark.parametrize("cut", range(15, 200, 7))
def test_state_resumes_exactly(cut):
    whole = Descent()
    whole.run(200)
    first, second = Descent(), Descent()
    first.run(cut)
    second.engine.load_state_dict(json.loads(text(first.engine.state_dict())))
    second.x, second.bank, second.saved = first.x, first.bank, first.saved
    second.run(200 - cut)
    assert np.array_equal(second.x, whole.x)
    assert second.engine.counters.predicted_steps == whole.engine.counters.predicted_steps
    assert first.log + second.log == whole.log


@pytest.mark.parametrize("victim", range(5, 150, 4))
def test_a_bad_batch_costs_itself_only(victim):
    clean, hurt = Descent(), Descent()
    for step in range(200):
        clean.step()
        hurt.step(bad=step == victim)
        assert np.isfinite(hurt.x).all()
    assert hurt.engine.counters.predicted_steps > 0.5 * clean.engine.counters.predicted_steps
    assert hurt.loss(hurt.x) < 2.0 * clean.loss(clean.x)
    assert hurt.engine.counters.rollbacks <= 1


def test_a_jump_that_hurts_is_rolled_back_and_not_tried_again_soon():
    descent = Descent()
    descent.penalty = 10.0
    descent.run(400)
    counters = descent.engine.counters
    assert counters.rollbacks >= 1
    assert descent.engine.controller.pace.patience > 1
    assert (Phase.CORRECT, Action.ROLLBACK) in descent.log
    # Each failure doubles the wait: far fewer attempts than there is room for.
    assert counters.rollbacks <= 5
    assert counters.predicted_steps < 150


def test_protocol():
    engine = Engine(BRISK)
    with pytest.raises(ProtocolError, match="next"):
        engine.observe(Observation())
    engine.next()
    with pytest.raises(ProtocolError, match="middle of a step"):
        engine.state_dict()
    engine.abandon()
    assert engine.state_dict()["counters"]["steps"] == 0


@pytest.mark.parametrize("at", [10, 40, 50, 60, 70, 80, 90])
def test_regroup_starts_over_in_any_phase(at):
    descent = Descent()
    descent.run(at)
    descent.engine.regroup()
    descent.bank, descent.saved = [], None
    phases = descent.run(300)
    assert Phase.PREDICT not in phases[: BRISK.min_full_steps]
    assert Phase.PREDICT in phases


# -- what every adapter may rely on ---------------------------------------------------------------


SETTINGS = {
    "brisk": BRISK,
    "default": HybridTrainerConfig(),
    "saver": HybridTrainerConfig.memory_saver(),
    "tight": HybridTrainerConfig(
        warmup_steps=1, min_full_steps=4, horizon=1, correction_interval=1, snapshots=10
    ),
    "odd": HybridTrainerConfig(
        warmup_steps=11, min_full_steps=31, horizon=23, correction_interval=7, snapshots=5
    ),
    "reckless": HybridTrainerConfig(
        warmup_steps=1, min_full_steps=8, confidence_threshold=0.0, horizon=20
    ),
    "timid": HybridTrainerConfig(warmup_steps=5, min_full_steps=12, confidence_threshold=1.0),
}


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("name", SETTINGS)
def test_directives_keep_to_the_protocol_and_to_the_settings(name, noise):
    config = SETTINGS[name]
    descent = Watched(config, noise=noise)
    phases = descent.run(700)
    counters = descent.engine.counters
    assert counters.steps == counters.full_steps + counters.predicted_steps == 700
    assert counters.predicted_steps == phases.count(Phase.PREDICT)
    assert counters.backward_passes == counters.full_steps
    assert phases[: config.warmup_steps] == [Phase.WARMUP] * config.warmup_steps
    spans = [(phase, len(list(steps))) for phase, steps in itertools.groupby(phases)]
    for (phase, count), (after, _) in itertools.pairwise(spans):
        allowed = {
            Phase.WARMUP: [Phase.FULL],
            Phase.FULL: [Phase.PREDICT],
            Phase.PREDICT: [Phase.CORRECT],
            Phase.CORRECT: [Phase.FULL],
        }
        assert after in allowed[phase]
        if phase is Phase.FULL:
            assert count >= config.min_full_steps
        elif phase is Phase.PREDICT:
            assert count <= config.horizon
        elif phase is Phase.CORRECT:
            assert count <= max(2, config.snapshot_interval)
    if noise == 0.0 and name not in ("timid", "tight"):
        assert counters.predicted_steps > 0


def test_a_quarter_of_a_smooth_descent_is_predicted():
    descent = Watched()
    descent.run(800)
    assert descent.engine.counters.predicted_steps >= 200
    assert descent.engine.counters.rollbacks == 0


def test_a_micro_correction_at_the_end_of_every_segment():
    descent = Watched()
    steps, first = [], 0
    for _ in range(300):
        phase = descent.step()
        if phase is Phase.PREDICT:
            steps.append([d.action for d in descent.directives[first:]])
        else:
            steps.append(None)
        first = len(descent.directives)
    flights = [list(g) for none, g in itertools.groupby(steps, lambda s: s is None) if not none]
    if steps[-1] is not None:
        # Cut off by the end of the run.
        flights.pop()
    assert len(flights) >= 2
    for flight in flights:
        for number, actions in enumerate(flight, start=1):
            last = number == len(flight)
            assert (Action.MOVE in actions) == (number % BRISK.correction_interval == 1)
            probed = actions[-2:] == [Action.PROBE, Action.SKIP]
            assert probed == (last or number % BRISK.correction_interval == 0)


# Losses that no real run should have, among some that it does.
ODD = [math.nan, math.inf, -math.inf, 0.0, -1.0, 5e-324, 1e-300, 1e300, 1.7e308, 0.5, 0.5, 0.5]


class Hostile(Watched):
    """A descent whose reports go wrong at random; the engine must carry on regardless."""

    def __init__(self, config, seed, share):
        super().__init__(config)
        self.dice, self.share = np.random.default_rng(seed), share

    def carry_out(self, directive, bad=False):
        seen = super().carry_out(directive, bad)
        if directive.action not in (Action.FULL, Action.PROBE) or self.dice.random() > self.share:
            return seen
        loss = ODD[self.dice.integers(len(ODD))]
        rate = [0.5, 0.0, math.nan, -1.0][self.dice.integers(4)]
        return Observation(loss, math.nan, rate, 0.0, seen.gram, seen.applied)


@settings(deadline=None, derandomize=True, database=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    share=st.sampled_from([0.01, 0.05, 0.3, 1.0]),
    name=st.sampled_from(sorted(SETTINGS)),
)
def test_no_report_whatever_raises_into_the_loop(seed, share, name):
    descent = Hostile(SETTINGS[name], seed, share)
    descent.run(250)
    counters = descent.engine.counters
    assert counters.steps == counters.full_steps + counters.predicted_steps == 250
    assert 0.0 <= descent.engine.confidence <= 1.0
    json.dumps(descent.engine.statistics().to_dict())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gram_matrix_that_is_not_finite_costs_a_jump_not_the_run(value):
    class Overflowing(Descent):
        def carry_out(self, directive, bad=False):
            seen = super().carry_out(directive, bad)
            if seen.gram is not None and len(self.log) < 120:
                seen.gram[0, 0, 0] = value
            return seen

    descent = Overflowing()
    phases = descent.run(300)
    assert Phase.PREDICT not in phases[:100]
    assert Phase.PREDICT in phases


# -- other losses, other parameters ---------------------------------------------------------------


def test_a_loss_of_zero_is_left_alone():
    class Solved(Watched):
        def carry_out(self, directive, bad=False):
            seen = super().carry_out(directive, bad)
            return Observation(0.0, 0.0, 0.5, 0.0, seen.gram)

    descent = Solved()
    assert set(descent.run(300)) == {Phase.WARMUP}
    assert descent.engine.counters.probes == 0


@pytest.mark.parametrize("at", range(2, 130, 4))
def test_regroup_needs_a_full_bank_again_and_no_longer(at):
    descent = Watched()
    descent.run(at)
    warming = descent.engine.phase is Phase.WARMUP
    descent.engine.regroup()
    assert not warming or descent.engine.controller.pace.wait == BRISK.min_full_steps
    descent.bank, descent.saved, descent.held, descent.begun = [], None, 0, False
    stretches = list(descent.engine.meter.stretches)
    phases = []
    while Phase.PREDICT not in phases:
        phases.append(descent.step())
    # A stretch across the change would compare the losses of two different models.
    newer = descent.engine.meter.stretches[len(stretches) :]
    assert not any(s.full_steps for s in newer if not s.predicting)
    # Taken in the warm-up, what is left of that comes first.
    wait = phases.index(Phase.PREDICT) - phases.index(Phase.FULL)
    # The trend starts over as well, and a stretch of snapshots must find it regular first.
    assert BRISK.min_full_steps <= wait <= 2 * BRISK.min_full_steps


def test_a_plain_run_is_counted_and_nothing_else():
    engine = Engine(HybridTrainerConfig(enabled=False))
    for loss in (1.0, math.nan, 0.5):
        engine.count_plain(Observation(loss, 1.0, 0.1, 0.01))
    statistics = engine.statistics()
    assert (statistics.steps, statistics.full_steps, statistics.predicted_steps) == (3, 3, 0)
    assert statistics.measured_speedup == 1.0
    assert statistics.probes == 0


def test_reading_the_totals_at_any_time_changes_nothing():
    asked, left_alone = Descent(), Descent()
    for step in range(300):
        asked.step()
        left_alone.step()
        statistics = asked.engine.statistics()
        assert statistics.steps == step + 1
        assert statistics.full_steps == sum(action is Action.FULL for _, action in asked.log), (
            "a quiet step is counted when it is asked for"
        )
    assert asked.log == left_alone.log
    assert np.array_equal(asked.x, left_alone.x)
    assert asked.engine.statistics() == left_alone.engine.statistics()


def test_a_summary_is_json_at_any_time():
    descent = Descent()
    for _ in range(120):
        descent.step()
        statistics = descent.engine.statistics()
        json.dumps(statistics.to_dict(), allow_nan=False)
        known = math.isfinite(statistics.measured_speedup_interval.high)
        assert ("not known yet" in str(statistics)) != known


def test_a_bad_batch_is_no_backward_pass_that_was_saved():
    descent = Descent()
    descent.run(3)
    descent.step(bad=True)
    summary = descent.engine.statistics()
    assert summary.backward_reduction == 0.25
    assert "4 steps: 4 full" in str(summary)
    assert "(0% fewer backward passes)" in str(summary)
