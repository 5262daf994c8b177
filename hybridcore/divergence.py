"""Signs that training leaves its course, and how much is to be done about them.

Six signals are measured, each as a severity that is 1 at its trigger:

| signal | measured as | triggers at | leads at most to |
|---|---|---|---|
| loss deviation | EMA standard deviations above the EMA | > `sigma` | CRITICAL |
| gradient explosion | norm over its baseline | > 10 | CRITICAL |
| gradient vanishing | norm over its baseline | < 0.01 | WARNING |
| non-finite | NaN or Inf in what is observed | any | CRITICAL at once |
| prediction error | ``abs(forecast - probe) / abs(probe)`` | > 0.20 | WARNING |
| oscillation | share of sign changes in 33 loss differences | > 0.95 | WARNING |

A gradient that vanishes, a forecast that fails (also by being too gloomy) and a loss that goes up
and down on its way down are reasons not to predict, but nothing that older weights would cure:
these three never ask for a rollback.

**Escalation.** An observation is *triggered* if any signal measured in it has a severity above 1,
else it is *quiet*. With patience p:

- NORMAL becomes CAUTION at the first triggered observation.
- CAUTION becomes WARNING, and WARNING becomes CRITICAL, at the p-th triggered observation on that
  level, as far as the table above lets the triggered signals lead. Quiet ones between them do not
  reset the count, unless they lower the level.
- Every p quiet observations in a row lower the level by one; a non-finite one means CRITICAL.
- ``5 p`` further triggered observations on CRITICAL mean that rolling back did not help: STOP.

Independent noise triggers at some rate r. CAUTION then comes at that rate, but WARNING needs p
more triggers in close succession, about ``r (p r)^p`` a step: once in a million for Gaussian noise.
"""

from __future__ import annotations

import enum
import math
from typing import Any

GRADIENT_EXPLOSION = 10.0
GRADIENT_VANISHING = 0.01
PREDICTION_ERROR = 0.20
# Independent noise changes the sign of its differences in 2/3 of all places (turning points,
# Wallis & Moore 1941), with a standard deviation of 0.07 over 32 of them; a smooth descent in none;
# an oscillation of period two in all. Only 31 or 32 of 32 count, which noise reaches about once in
# 100,000 steps; half way to that would take noise for an oscillation.
OSCILLATION = 0.95
NOISE_OSCILLATION = 2.0 / 3.0
_PLACES = 32
# Relative change of a loss that may be rounding of a float32 sum.
_ROUNDING = 1e-6

MEAN_RATE = 0.05
# A variance takes more observations than a mean to be known to a tenth.
VARIANCE_RATE = 0.02
BASELINE_RATE = 0.01
LEAST_OBSERVATIONS = 20
# One part in a hundred: a loss without noise may rise by as much as that and mean nothing.
LEAST_DEVIATION = 0.01
# Innovations are clipped at so many standard deviations: one wild batch leaves the statistics as
# they were, and a lasting change still takes them along exponentially fast.
CLIP = 3.0
# After so many in a row that are not calm, the norm is taken as what it is now in this run.
BASELINE_PATIENCE = 100
HOPELESS = 5
MOST_SEVERITY = 100.0
_LARGEST = 1e100


class DivergenceLevel(enum.IntEnum):
    """How serious the signals of the recent past are, taken together."""

    NORMAL = 0
    CAUTION = 1
    WARNING = 2
    CRITICAL = 3


class RecoveryAction(enum.Enum):
    """What a level asks for: the first four by level, STOP where the fourth did not help."""

    CONTINUE = "continue"
    SHORTEN_HORIZON = "shorten horizon"
    FORCE_FULL = "force full steps"
    ROLL_BACK = "roll back"
    STOP = "stop"

    @property
    def bearable(self) -> bool:
        """Whether something may be predicted nevertheless."""
        return self in (RecoveryAction.CONTINUE, RecoveryAction.SHORTEN_HORIZON)


class Signal(enum.Enum):
    """What is watched."""

    LOSS_DEVIATION = "loss deviation"
    GRADIENT_EXPLOSION = "gradient explosion"
    GRADIENT_VANISHING = "gradient vanishing"
    NON_FINITE = "non-finite"
    PREDICTION_ERROR = "prediction error"
    OSCILLATION = "oscillation"


_DEVIATION, _EXPLOSION, _VANISHING, _NON_FINITE, _PREDICTION, _OSCILLATION = range(len(Signal))
_ACTIONS = tuple(RecoveryAction)[:4]


class DivergenceMonitor:
    """Watches losses, gradient norms and forecasts; a few floats of state, O(1) an observation.

    Losses are compared on a logarithmic scale, so that neither their size nor their decrease over
    a run matters; at the first negative loss the statistics start again on a linear scale, until
    :meth:`forget_losses`, which the engine calls as it counts losses from a floor then. Losses
    and norms are compared with earlier ones once there are ``LEAST_OBSERVATIONS`` of them.

    Parameters
    ----------
    sigma : float
        EMA standard deviations above the EMA at which a loss deviates, positive.
    patience : int
        Triggered observations that raise the `level`, and quiet ones that lower it; at least 1.
        ``ValueError`` where one of the two is out of range.
    """

    def __init__(self, sigma: float = 2.2, patience: int = 3) -> None:
        if not 0.0 < sigma < math.inf:
            raise ValueError(f"sigma must be positive and finite, got {sigma!r}; 2.2 is usual")
        if not (isinstance(patience, int) and patience >= 1):
            raise ValueError(f"patience must be an integer of at least 1, got {patience!r}")
        self._sigma = float(sigma)
        self._patience = patience
        self.level = DivergenceLevel.NORMAL
        self._severities = [0.0] * len(Signal)
        self._triggers = self._quiet = 0
        self._logarithmic = True
        self._losses = self._norms = self._restless = self._turns = 0
        self._mean = self._baseline = 0.0
        # Mean and variance of the innovations: a trend gives them a mean, only noise a variance.
        self._bias = self._variance = 0.0
        self._last = self._difference = 0.0

    @property
    def signals(self) -> dict[Signal, float]:
        """Severity of each signal when last measured: in [0, 100], above 1 if triggered."""
        return dict(zip(Signal, self._severities, strict=True))

    def action(self) -> RecoveryAction:
        """Return what the level asks for; due when it changes: one rollback, not one a step."""
        if self.level is DivergenceLevel.CRITICAL and self._triggers >= HOPELESS * self._patience:
            return RecoveryAction.STOP
        return _ACTIONS[self.level]

    def observe(self, loss: float, gradient_norm: float = math.nan) -> DivergenceLevel:
        """Take the loss of one full step, return the level.

        `gradient_norm` is the Euclidean norm of all gradients before clipping, NaN where it was
        not measured. Where it was measured and is NaN, call ``observe_delta(False)`` instead.
        """
        loss, norm = float(loss), float(gradient_norm)
        if not math.isfinite(loss) or math.isinf(norm):
            return self.observe_delta(finite=False)
        severities = self._severities
        severities[_NON_FINITE] = 0.0
        deviation = severities[_DEVIATION] = self._deviation(loss)
        oscillation = severities[_OSCILLATION] = self._oscillation()
        explosion = vanishing = 0.0
        if norm >= 0.0:
            calm = deviation <= 1.0 and oscillation <= 1.0
            explosion, vanishing = self._follow_norm(norm, calm)
            severities[_EXPLOSION], severities[_VANISHING] = explosion, vanishing
        return self._judge(deviation > 1.0 or explosion > 1.0, oscillation > 1.0 or vanishing > 1.0)

    def observe_prediction(self, forecast_loss: float, probe_loss: float) -> DivergenceLevel:
        """Take one probe, the loss forecast for it and the loss seen; return the level."""
        forecast, probe = float(forecast_loss), float(probe_loss)
        if not (math.isfinite(forecast) and math.isfinite(probe)):
            return self.observe_delta(finite=False)
        missed = abs(forecast - probe)
        allowed = PREDICTION_ERROR * abs(probe)
        # Compared before it is divided: a probe may be zero.
        severity = missed / allowed if missed < MOST_SEVERITY * allowed else MOST_SEVERITY
        self._severities[_NON_FINITE] = 0.0
        self._severities[_PREDICTION] = severity if missed > 0.0 else 0.0
        return self._judge(False, missed > allowed)

    def observe_delta(self, finite: bool) -> DivergenceLevel:
        """Take whether a weight delta, parameters or gradients are finite; return the level.

        That they are says nothing about the other signals, so it is not a quiet observation.
        """
        if not finite:
            self._severities[_NON_FINITE] = MOST_SEVERITY
            self._quiet = 0
            self._triggers += 1
            if self.level is not DivergenceLevel.CRITICAL:
                self._enter(DivergenceLevel.CRITICAL)
        return self.level

    def forget_losses(self) -> None:
        """Start over with the statistics of the losses: they are measured otherwise from now on."""
        self._logarithmic = True
        self._losses = self._turns = 0
        self._mean = self._bias = self._variance = 0.0

    def _judge(self, serious: bool, doubtful: bool) -> DivergenceLevel:
        """Apply the escalation rule; `doubtful` signals lead to WARNING at most."""
        level = self.level
        if not (serious or doubtful):
            if level > 0:
                self._quiet += 1
                if self._quiet >= self._patience:
                    self._enter(DivergenceLevel(level - 1))
            return self.level
        self._quiet = 0
        if level is DivergenceLevel.NORMAL:
            self._enter(DivergenceLevel.CAUTION)
        elif serious or level is DivergenceLevel.CAUTION:
            self._triggers += 1
            if self._triggers >= self._patience and level is not DivergenceLevel.CRITICAL:
                self._enter(DivergenceLevel(level + 1))
        return self.level

    def _enter(self, level: DivergenceLevel) -> None:
        self.level = level
        self._triggers = self._quiet = 0

    def _deviation(self, loss: float) -> float:
        """Feed the statistics of the loss and return the severity of its deviation."""
        if loss <= 0.0 and self._logarithmic:
            if loss == 0.0:
                # Below every other loss, and without a logarithm that could be averaged.
                return 0.0
            self.forget_losses()
            self._logarithmic = False
        value = math.log(loss) if self._logarithmic else min(max(loss, -_LARGEST), _LARGEST)
        seen = self._losses
        self._losses += 1
        if seen == 0:
            self._mean, self._last, self._difference = value, value, 0.0
            return 0.0
        unit = 1.0 if self._logarithmic else abs(self._mean)
        self._turn(value, _ROUNDING * unit)
        innovation = value - self._mean
        surprise = innovation - self._bias
        severity = 0.0
        if seen >= LEAST_OBSERVATIONS:
            # The least of all: nothing may be divided by zero.
            spread = max(math.sqrt(self._variance), LEAST_DEVIATION * unit, 1e-300)
            if innovation > 0.0:
                severity = min(innovation / (self._sigma * spread), MOST_SEVERITY)
            if abs(surprise) > CLIP * spread:
                surprise = math.copysign(CLIP * spread, surprise)
        # Plain averages at first, of one innovation less than there are losses.
        mean_rate, rate = MEAN_RATE, VARIANCE_RATE
        if seen * VARIANCE_RATE < 1.0:
            mean_rate, rate = max(1.0 / (seen + 1), mean_rate), 1.0 / seen
        self._mean += mean_rate * (self._bias + surprise)
        self._bias += rate * surprise
        # Exponentially weighted variance about the running mean (West 1979).
        self._variance = (1.0 - rate) * (self._variance + rate * surprise * surprise)
        return severity

    def _turn(self, value: float, rounding: float) -> None:
        """Note in one bit whether the loss turned here."""
        before, difference = self._difference, value - self._last
        if abs(difference) <= rounding:
            difference = 0.0
        turned = difference > 0.0 > before or difference < 0.0 < before
        self._turns = (self._turns << 1 | turned) & ((1 << _PLACES) - 1)
        self._last, self._difference = value, difference

    def _oscillation(self) -> float:
        """Severity of the oscillation: 0 for noise and below, 1.18 for a perfect one."""
        share = self._turns.bit_count() / _PLACES
        return max(0.0, (share - NOISE_OSCILLATION) / (OSCILLATION - NOISE_OSCILLATION))

    def _follow_norm(self, norm: float, calm: bool) -> tuple[float, float]:
        """Severities of gradient explosion and vanishing; the baseline follows usual norms."""
        above = (math.log(norm) if norm > 0.0 else -math.inf) - self._baseline
        explosion = vanishing = 0.0
        if self._norms >= LEAST_OBSERVATIONS:
            # Limited before the exponential, which would overflow.
            ratio = math.exp(min(max(above, -100.0), 100.0))
            explosion = min(ratio / GRADIENT_EXPLOSION, MOST_SEVERITY) if norm else 0.0
            vanishing = min(GRADIENT_VANISHING / ratio, MOST_SEVERITY)
        usual = explosion <= 1.0 and vanishing <= 1.0
        self._restless = 0 if usual else self._restless + 1
        if self._restless >= BASELINE_PATIENCE:
            self._norms = self._restless = 0
        # Slowly: a norm may fall 100 times in a run, not in a moment.
        if norm > 0.0 and ((calm and usual) or self._norms == 0):
            self._norms += 1
            rate = BASELINE_RATE if self._norms > 1.0 / BASELINE_RATE else 1.0 / self._norms
            self._baseline += rate * above
        return explosion, vanishing

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state, without the settings, as numbers and lists."""
        state = {name.lstrip("_"): value for name, value in vars(self).items()}
        del state["sigma"], state["patience"]
        return state | {"level": int(self.level), "severities": list(self._severities)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        values = {f"_{name}": type(v)(state[name]) for name, v in self.state_dict().items()}
        self.level = DivergenceLevel(values.pop("_level"))
        vars(self).update(values)
