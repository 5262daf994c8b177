"""The decision rule: probes, what experience makes of them, and the groups' corrections."""

import math

import numpy as np
import pytest
from descent import BRISK, Descent, Watched

from hybridcore import Action, HybridTrainerConfig, Observation, Phase
from hybridcore.decision import DecisionRule
from hybridcore.dynamics import LinearDynamics
from hybridcore.extrapolation import MOMENTUM
from hybridcore.planning import ARMS, missed_scales
from hybridcore.search import arm_names

SURE = dict.fromkeys(ARMS, 1.0)
GROUPS = 3


def make(config=None):
    return DecisionRule(config or HybridTrainerConfig(), LinearDynamics())


def path(seed=0, m=6):
    """Snapshots (groups, m, 5) of decays, each group at its own rates; the newest is the origin."""
    rates = np.random.default_rng(seed).uniform(0.9, 0.99, (GROUPS, 1, 5))
    points = rates ** (8 * np.arange(m)[:, None])
    return points - points[:, -1:]


def gram(points):
    return points @ points.transpose(0, 2, 1)


def choose(rule, loss_of, points=None, here=1.0, slope=-0.01, reach=5.0, confidences=SURE):
    """Answer the probes of a choice with ``loss_of(arm, point)``; return the flight and all tried.

    `arm` is the number of the probe, since what a probe is for is not said.
    """
    points = path() if points is None else points
    context = rule.context(1.0, 1.0, slope, 1.0)
    choice = rule.choose(gram(points), confidences, context, here, slope, reach)
    tried = []
    try:
        directive = next(choice)
        while True:
            assert directive.action is Action.PROBE
            assert directive.coefficients.shape == points.shape[:2]
            place = np.einsum("gm,gmd->gd", directive.coefficients, points)
            tried.append(loss_of(len(tried), place))
            directive = choice.send(Observation(tried[-1]))
    except StopIteration as done:
        return done.value, tried


def first_arms(losses):
    """Losses of the first trials by number; all further ones are no better than the start."""
    return lambda number, _: losses[number] if number < len(losses) else 1.0


def test_without_experience_the_lowest_probe_is_taken():
    for best, name in enumerate(ARMS):
        losses = [0.8] * len(ARMS)
        losses[best] = 0.7
        flight, _ = choose(make(), first_arms(losses))
        assert flight.jump.extrapolator == name
        assert flight.arm == f"{name} x1"
        assert flight.log_target == pytest.approx(math.log(0.7))
        assert flight.promise == pytest.approx(-math.log(0.7) / 0.01)


def test_probes_that_are_not_below_the_start_mean_do_not_predict():
    for losses in ([1.0] * 4, [1.3] * 4, [math.nan] * 4, [math.inf, -1.0, 0.0, 2.0]):
        flight, tried = choose(make(), first_arms(losses))
        assert flight is None
        assert len(tried) == len(ARMS)


def test_a_jump_worth_less_than_its_settling_is_not_taken():
    config = HybridTrainerConfig()
    short = math.exp(-0.01 * (config.snapshot_interval / 2))
    assert choose(make(config), first_arms([short] * 4))[0] is None
    long = math.exp(-0.01 * (config.snapshot_interval * 2))
    assert choose(make(config), first_arms([long] * 4))[0] is not None


def test_arms_below_the_threshold_are_not_probed():
    confidences = {**SURE, ARMS[0]: 0.1}
    flight, tried = choose(make(), first_arms([0.8, 0.7]), confidences=confidences)
    assert flight.jump.extrapolator == ARMS[2]
    _, all_tried = choose(make(), first_arms([2.0] * 4))
    assert len(tried) >= len(ARMS) - 1 == len(all_tried) - 1


def test_an_arm_that_settles_badly_is_passed_over_though_its_probe_is_lower():
    rule = make()
    losses = first_arms([0.78] + [0.8] * (len(ARMS) - 1))
    for _ in range(4):
        flight, _ = choose(rule, losses)
        if flight.jump.extrapolator != ARMS[0]:
            break
        rule.reward(flight, progress=0.0, spent=16, probes=9)
        good, _ = choose(rule, first_arms([0.9] + [0.8] * (len(ARMS) - 1)))
        assert good.jump.extrapolator != ARMS[0]
        rule.reward(good, progress=0.4, spent=16, probes=9)
    flight, tried = choose(rule, losses)
    assert flight.jump.extrapolator != ARMS[0]
    assert math.exp(flight.log_target) > min(tried)


def test_experience_goes_only_so_far_against_a_probe_that_is_much_lower():
    rule = make()
    for progress in (0.4, 0.1, 0.4, 0.1):
        flight, _ = choose(rule, first_arms([0.78] + [0.8] * (len(ARMS) - 1)))
        rule.reward(flight, progress, spent=16, probes=9)
    flight, _ = choose(rule, first_arms([0.2] + [0.95] * (len(ARMS) - 1)))
    assert flight.jump.extrapolator == ARMS[0]


def test_of_trials_at_the_ceiling_of_worth_the_lowest_is_taken():
    # With a loss that rises no progress has a price in steps, and all worths are the same.
    losses = [0.8, 0.6] + [0.7] * (len(ARMS) - 2)
    flight, _ = choose(make(), first_arms(losses), slope=0.01)
    assert flight.log_target == pytest.approx(math.log(0.6))


def test_every_arm_that_a_choice_can_name_is_known_to_the_bandit():
    rule = make()
    names = set()
    for best in range(len(ARMS)):
        for farthest in range(6):

            def losses(number, _, best=best, farthest=farthest):
                if number < len(ARMS):
                    return 0.7 if number == best else 0.8
                return 0.7 - 0.01 * number if number < len(ARMS) + farthest else 0.9

            names.add(choose(rule, losses)[0].arm)
    assert names <= set(arm_names())
    assert len(names) > len(ARMS)


# -- corrections of the layer groups ---------------------------------------------------------------


def stumbling(points):
    """The same snapshots, but that the second group went only half as far at the end."""
    points = points.copy()
    points[1, -2:] = points[1, -3] + 0.5 * (points[1, -2:] - points[1, -3])
    return points - points[:, -1:]


def taught(config):
    rule = make(config)
    for seed in range(12):
        matrix = gram(stumbling(path(seed)))
        rule.learn(matrix, SURE, rule.context(1.0, 1.0, -0.01, 1.0))
    return rule


def test_the_corrected_jump_is_taken_only_where_its_probe_is_lower():
    for gain, corrected in ((-0.05, True), (0.05, False)):
        rule = taught(HybridTrainerConfig(group_correction=True))
        expected = rule.corrector.predict(rule.context(1.0, 1.0, -0.01, 1.0))
        assert expected[1] < 0.9
        seen = []

        def losses(number, _, gain=gain, seen=seen):
            seen.append(0.7 if number == 0 else 0.8)
            return seen[-1] if number <= len(ARMS) + 1 else 0.7 + gain

        flight, tried = choose(rule, losses)
        # One doubling in vain, one in between, and the corrected jump.
        assert len(tried) == len(ARMS) + 3
        assert flight.jump.scales == (tuple(expected.tolist()) if corrected else ())
        assert flight.log_target == pytest.approx(math.log(min(0.7, 0.7 + gain)))


def test_a_correction_scales_the_displacement_of_its_group():
    rule = taught(HybridTrainerConfig(group_correction=True))
    places = []

    def losses(number, place):
        places.append(place)
        return (0.7, 0.8, 0.8, 0.8, 0.9, 0.6)[number]

    flight, _ = choose(rule, losses)
    scales = np.array(flight.jump.scales)
    # Displacements are about the newest snapshot, the origin here.
    np.testing.assert_allclose(places[-1], scales[:, None] * places[0], rtol=1e-9, atol=1e-12)


def test_without_the_setting_nothing_is_learned_and_nothing_more_is_probed():
    rule = taught(HybridTrainerConfig())
    assert rule.corrector is None
    _, tried = choose(rule, first_arms([0.7, 0.8, 0.8, 0.8]))
    assert len(tried) == len(ARMS) + 1


def test_what_is_learned_is_what_the_surest_forecaster_missed():
    points = stumbling(path())
    # By hand: the last two intervals, forecast from the snapshots before them.
    moved = points[:, -1] - points[:, -3]
    mean = (points[:, -3] - points[:, 0]) / (points.shape[1] - 3)
    steps = np.diff(points[:, :-2], axis=1)
    weights = MOMENTUM ** np.arange(steps.shape[1] - 1, -1, -1)
    recent = np.einsum("k,gkd->gd", weights / weights.sum(), steps)
    for name, forecast in (("linear", 2.0 * mean), ("nesterov", 2.0 * recent)):
        rule = make(HybridTrainerConfig(group_correction=True))
        sure = {**dict.fromkeys(ARMS, 0.1), name: 0.9}
        rule.learn(gram(points), sure, rule.context(1.0, 1.0, -0.01, 1.0))
        factors = np.einsum("gd,gd->g", moved, forecast) / np.einsum("gd,gd->g", forecast, forecast)
        learned = rule.state_dict()["corrector"]["store"]["residuals"][0][:, 0]
        np.testing.assert_allclose(learned, np.clip(factors, 0.0, 2.0), rtol=1e-9)


def test_after_a_restart_there_may_be_other_groups():
    rule = taught(HybridTrainerConfig(group_correction=True))
    rule.restart()
    context = rule.context(1.0, 1.0, -0.01, 1.0)
    fewer = gram(stumbling(path()))[: GROUPS - 1]
    rule.learn(fewer, SURE, context)
    # Of those nothing is known yet.
    assert np.array_equal(rule.corrector.predict(context), np.ones(GROUPS - 1))


def test_the_missed_scales_of_the_bank_itself():
    scales = missed_scales(gram(stumbling(path())), "dmd")
    assert scales.shape == (GROUPS, 2)
    assert scales[1, 0] < 0.8
    assert np.abs(scales[[0, 2], 0] - 1.0).max() < 0.35


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("correct", [False, True])
def test_a_copy_from_the_state_decides_alike(correct):
    config = HybridTrainerConfig(group_correction=correct)
    rule, copy = taught(config), make(config)
    losses = first_arms([0.78] + [0.8] * (len(ARMS) - 1))
    for progress in (0.3, 0.0, 0.1):
        flight, _ = choose(rule, losses)
        rule.reward(flight, progress, spent=16, probes=9)
    copy.load_state_dict(rule.state_dict())
    for progress in (0.2, 0.0, 0.5):
        flight, tried = choose(rule, losses)
        assert choose(copy, losses) == (flight, tried)
        rule.reward(flight, progress, spent=16, probes=9)
        copy.reward(flight, progress, spent=16, probes=9)
        assert copy.pace.state_dict() == rule.pace.state_dict()


def test_a_context_is_finite_whatever_is_known():
    rule = make()
    for numbers in (
        (0.0, 0.0, 0.0, 1.0),
        (1.0, 1.0, math.inf, math.nan),
        (1.0, 1.0, -math.inf, 9.0),
    ):
        context = rule.context(*numbers)
        assert context[0] == 1.0
        assert np.isfinite(context).all()


# -- the monitor and the way -----------------------------------------------------------------------


def test_caution_halves_the_distance_and_a_warning_forbids_the_jump():
    """Probes before a decision raise the monitor's level; the decision heeds it."""
    calm = Descent()
    while calm.saved is None:
        calm.step()
    decided = calm.engine.counters.steps - 1
    for misses, halved in ((1, True), (4, None)):
        descent = Descent()
        descent.run(decided)
        for _ in range(misses):
            descent.engine.controller.monitor.observe_prediction(1.0, 9.0)
        first = len(descent.log)
        descent.step()
        actions = [action for _, action in descent.log[first:]]
        if halved is None:
            assert actions == [Action.FULL]
        else:
            assert Action.SAVE in actions
            ways = [d.engine.controller.state_dict()["flight"]["jump"] for d in (calm, descent)]
            assert ways[1]["reach"] <= ways[0]["reach"]
            assert math.log2(ways[1]["reach"] / ways[0]["reach"]) % 1.0 == 0.0


def test_under_caution_arms_are_probed_at_half_the_distance():
    calm = Watched()
    while calm.saved is None:
        first = len(calm.directives)
        calm.step()
    careful = Watched()
    careful.run(calm.engine.counters.steps - 1)
    careful.engine.controller.monitor.observe_prediction(1.0, 9.0)
    start = len(careful.directives)
    careful.step()
    ways = []
    for descent, number in ((calm, first), (careful, start)):
        probes = [d.coefficients for d in descent.directives[number:] if d.action is Action.PROBE]
        # The first two are at the weights and at the mean, the third is the straight way.
        (straight,) = probes[2]
        ways.append(straight[-1] - 1.0)
    assert ways[1] == pytest.approx(0.5 * ways[0])


def test_a_probe_above_its_forecast_shortens_the_way_in_proportion():
    class Late(Watched):
        """Probes on the way see a loss above its forecast."""

        excess = 0.0

        def carry_out(self, directive, bad=False):
            seen = super().carry_out(directive, bad)
            if self.engine.phase is Phase.PREDICT and directive.action is Action.PROBE:
                return Observation(self.engine.controller.forecast_loss * math.exp(self.excess))
            return seen

    lengths = []
    for excess in (0.0, 0.05, 0.12, 0.5):
        descent = Late()
        descent.excess = excess
        phases = []
        while phases[-1:] != [Phase.CORRECT]:
            phases.append(descent.step())
        lengths.append(phases.count(Phase.PREDICT))
    assert lengths[0] == BRISK.horizon
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < BRISK.horizon
