"""Settings: frozen, validated, and few."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from hybridcore.errors import ConfigError

Dynamics = Literal["linear", "mlp", "rssm"]
Device = Literal["auto", "cpu", "cuda"]
OnDivergence = Literal["recover", "raise"]


@dataclass(frozen=True, slots=True)
class HybridTrainerConfig:
    """Settings of a hybrid run; the defaults are meant to work everywhere.

    Attributes
    ----------
    enabled : bool
        False runs the plain loop, bit for bit.
    warmup_steps : int
        Full steps before anything is measured, at least 1.
    min_full_steps : int
        Full steps between two jumps, at least 4. Snapshots are spread over the last of them.
    horizon : int
        Most steps that one predict phase covers, at least 1.
    correction_interval : int
        Predicted steps between two micro-corrections, at least 1.
    confidence_threshold : float
        Least confidence for a jump, in [0, 1].
    divergence_sigma : float
        Standard deviations of the loss's own noise that count as a rise, positive.
    snapshots : int
        Copies of the trainable parameters that are kept, 4 to 10.
    dynamics : {"linear", "mlp", "rssm"}
        Model of the loss, which decides how far the loss's trend is trusted: a discounted line, or
        a mixture of simple forecasts corrected by a network or by an ensemble of recurrent
        state-space models, which learn while the run goes on. The learned ones forecast better, by
        the mixture rather than by what corrects it, but gained no jumps where it was measured, and
        cost each step more (``benchmarks/ablation.py``, ``benchmarks/forecast_skill.py``).
    device : {"auto", "cpu", "cuda"}
        Where the kernels of the "rssm" model run; "cuda" needs that model and a GPU. "auto" is the
        CPU until a recorded measurement says from which size on a GPU pays.
    group_correction : bool
        Learn a factor on each layer group's displacement from what forecasts of the bank's own end
        missed, and probe the corrected jump too. Off: it gained nothing where it was measured, and
        costs a probe for each jump (``benchmarks/ablation.py``).
    outer_momentum : bool
        Move the weights on by Nesterov's momentum over the displacements of ten full steps, where
        loss or path are too irregular for a jump.
    secant_pairs : int
        Most pairs of displacement and change of gradient, 0 to 50, two copies of the trainable
        parameters each, by which quasi-Newton steps are taken while every batch is the same; with
        fewer than 3 there are none. The PyTorch adapter keeps fewer where the weights are many; the
        Keras adapter does not take such steps yet.
    averaging : bool
        Keep a running average of the weights, one more copy, for the trainer's ``averaged()``.
    on_divergence : {"recover", "raise"}
        What a loss or gradient that is not finite does: cost its batch, or raise
        :class:`hybridcore.errors.DivergenceError` once the batch has been left out.

    Raises
    ------
    ConfigError
        If a value has the wrong type or is out of range.
    """

    enabled: bool = True
    warmup_steps: int = 100
    min_full_steps: int = 50
    horizon: int = 75
    correction_interval: int = 15
    confidence_threshold: float = 0.60
    divergence_sigma: float = 2.2
    snapshots: int = 6
    dynamics: Dynamics = "linear"
    device: Device = "auto"
    group_correction: bool = False
    outer_momentum: bool = True
    secant_pairs: int = 20
    averaging: bool = True
    on_divergence: OnDivergence = "recover"

    def __post_init__(self) -> None:
        for name in ("enabled", "group_correction", "outer_momentum", "averaging"):
            if not isinstance(getattr(self, name), bool):
                raise _error(name, getattr(self, name), "True or False")
        _check_integer("warmup_steps", self.warmup_steps, 1)
        _check_integer("min_full_steps", self.min_full_steps, 4)
        _check_integer("horizon", self.horizon, 1)
        _check_integer("correction_interval", self.correction_interval, 1)
        _check_integer("snapshots", self.snapshots, 4, 10)
        _check_integer("secant_pairs", self.secant_pairs, 0, 50)
        _check_real("confidence_threshold", self.confidence_threshold, 0.0, 1.0)
        _check_real("divergence_sigma", self.divergence_sigma, 0.0, float("inf"))
        if self.divergence_sigma == 0.0:
            raise _error("divergence_sigma", self.divergence_sigma, "a positive number")
        if self.dynamics not in get_args(Dynamics):
            raise _error("dynamics", self.dynamics, "'linear', 'mlp' or 'rssm'")
        if self.device not in get_args(Device):
            raise _error("device", self.device, "'auto', 'cpu' or 'cuda'")
        if self.device == "cuda" and self.dynamics != "rssm":
            raise _error("device", self.device, "'auto' or 'cpu' unless dynamics is 'rssm'")
        if self.on_divergence not in get_args(OnDivergence):
            raise _error("on_divergence", self.on_divergence, "'recover' or 'raise'")

    @classmethod
    def memory_saver(cls) -> HybridTrainerConfig:
        """Preset with the fewest snapshots, no pairs, no average, and short predict phases."""
        return cls(horizon=15, snapshots=4, secant_pairs=0, averaging=False)

    @property
    def snapshot_interval(self) -> int:
        """Full steps between two snapshots, so that a bank fits into `min_full_steps`."""
        return max(1, self.min_full_steps // self.snapshots)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a plain dictionary that :meth:`from_dict` takes back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> HybridTrainerConfig:
        """Build from a mapping; a name that is not a setting raises :class:`ConfigError`."""
        if not isinstance(settings, Mapping):
            raise _error("settings", settings, "a mapping of names to values")
        known = [f.name for f in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                meant = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(
                    f"unknown setting {name!r}; known settings: {', '.join(known)}{meant}"
                )
        return cls(**settings)

    @classmethod
    def from_toml(cls, path: str | Path) -> HybridTrainerConfig:
        """Build from the top level of a TOML file, or from its table ``[hybridcore]``."""
        try:
            with Path(path).open("rb") as file:
                document = tomllib.load(file)
        # Not only the decoder's own: numbers may be too long, and brackets nested too deeply.
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
        settings = document.get("hybridcore", document)
        if not isinstance(settings, Mapping):
            raise _error("hybridcore", settings, "a table of settings")
        return cls.from_dict(settings)


def _error(name: str, value: object, expected: str) -> ConfigError:
    return ConfigError(f"{name} must be {expected}, got {value!r}")


def _check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    expected = f"an integer of at least {least}" + ("" if most is None else f" and at most {most}")
    if isinstance(value, bool) or not isinstance(value, int):
        raise _error(name, value, expected)
    if value < least or (most is not None and value > most):
        raise _error(name, value, expected)


def _check_real(name: str, value: object, least: float, most: float) -> None:
    expected = f"a number from {least:g} to {most:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _error(name, value, expected)
    if not least <= value <= min(most, sys.float_info.max):
        raise _error(name, value, expected)
