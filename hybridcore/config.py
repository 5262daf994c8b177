"""Settings: frozen, validated, and few."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from hybridcore.errors import ConfigError

Dynamics = Literal["linear", "mlp", "rssm"]
Device = Literal["auto", "cpu", "cuda"]
OnDivergence = Literal["recover", "raise"]
SnapshotKind = Literal["auto", "exact", "bfloat16", "int8", "host"]

_MEMORY = re.compile(r"(\d+(?:\.\d+)?)(x|B|[kMGT]B|[KMGT]iB)")
_UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_UNITS |= {unit: 1024.0 ** (power + 1) for power, unit in enumerate(("KiB", "MiB", "GiB", "TiB"))}
# Bytes of float32 parameters that a share is one of at least: below, copies cost next to nothing.
_LEAST_MODEL = 2**26


def _knowing_its_names(config: type[HybridTrainerConfig]) -> type[HybridTrainerConfig]:
    """Let the constructor name what it does not know, and what may have been meant."""
    build = config.__init__

    @functools.wraps(build)
    def checked(self: HybridTrainerConfig, *values: Any, **settings: Any) -> None:
        _check_known(settings)
        build(self, *values, **settings)

    config.__init__ = checked  # type: ignore[method-assign]
    return config


@_knowing_its_names
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
        Move the weights on by a momentum over the displacements of ten full steps, where loss or
        path are too irregular for a jump, and predict the steps that this stands for: after
        `min_full_steps` or somewhat more, up to `horizon` and fewer than `correction_interval`.
        Not while the learning rate rises, nor once it has fallen to 0.15 of its highest, nor, in
        PyTorch, with an optimizer that averages by itself (`train()` and `eval()`). Where
        those of all parameter groups have fallen, full steps are taken at higher ones, but not
        above the highest that there were, and as many more are predicted as this makes up for.
    secant_pairs : int
        Most pairs of displacement and change of gradient, 0 to 50, two copies of the trainable
        parameters each, by which quasi-Newton steps are taken while every batch is the same; with
        fewer than 3 there are none. The adapters keep fewer where the weights are many.
    averaging : bool
        Keep a running average of the weights, one more copy, for the trainer's ``averaged()``.
    memory : str
        Most that all copies of the weights may take together, the optimizer's state during a jump
        among them: bytes, as ``"2GiB"`` or ``"800MB"``, or so many copies of the trainable
        parameters in float32, as ``"4x"``, of a model of 64 MiB at least, since on smaller ones
        copies cost next to nothing. What does not fit is kept in fewer bits or left out.
    snapshot_kind : {"auto", "exact", "bfloat16", "int8", "host"}
        How snapshots are kept: in the parameters' own precision; one exactly and the others as
        displacements in bfloat16, or in 8 bits with a scale for each 256 values; or exactly in the
        host's memory, where a GPU trains. "auto" is the first of exact, int8 and, on a GPU, host
        that fits into `memory`. The Keras adapter refuses "host".
    on_divergence : {"recover", "raise"}
        What a loss or gradient that is not finite does: cost its batch, or raise
        :class:`hybridcore.errors.DivergenceError` once the batch has been left out.

    Raises
    ------
    ConfigError
        If a name is unknown, or a value has the wrong type or is out of range.
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
    memory: str = "4x"
    snapshot_kind: SnapshotKind = "auto"
    on_divergence: OnDivergence = "recover"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.generic):
                # A sweep over an array has NumPy's numbers, which JSON does not.
                object.__setattr__(self, field.name, value.item())
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
        asked = isinstance(self.memory, str) and _MEMORY.fullmatch(self.memory)
        if not (asked and float(asked[1])):
            raise _error("memory", self.memory, "a size as '2GiB', or a number of copies as '4x'")
        if self.snapshot_kind not in get_args(SnapshotKind):
            raise _error(
                "snapshot_kind", self.snapshot_kind, "'auto', 'exact', 'bfloat16', 'int8' or 'host'"
            )
        if self.on_divergence not in get_args(OnDivergence):
            raise _error("on_divergence", self.on_divergence, "'recover' or 'raise'")

    @classmethod
    def memory_saver(cls) -> HybridTrainerConfig:
        """Preset with the memory of one copy, the fewest snapshots, no pairs, short predict phases.

        Of a model that is large, and no GPU with a host's memory beside it, that is the average.
        """
        return cls(horizon=15, snapshots=4, secant_pairs=0, memory="1x")

    @property
    def snapshot_interval(self) -> int:
        """Full steps between two snapshots, so that a bank fits into `min_full_steps`."""
        return max(1, self.min_full_steps // self.snapshots)

    def accumulating(self, steps: int) -> HybridTrainerConfig:
        """Return the same settings for a loop in which an update takes so many `steps`.

        All that are numbers of steps count updates; snapshots lie whole updates apart.
        """
        if steps == 1:
            return self
        return dataclasses.replace(
            self,
            warmup_steps=steps * self.warmup_steps,
            min_full_steps=steps * self.snapshot_interval * self.snapshots,
            horizon=steps * self.horizon,
            correction_interval=steps * self.correction_interval,
        )

    def memory_limit(self, weights: float) -> float:
        """Return `memory` in bytes, for trainable parameters of so many bytes in float32."""
        number, unit = re.findall(_MEMORY, self.memory)[0]
        return float(number) * (max(weights, _LEAST_MODEL) if unit == "x" else _UNITS[unit])

    def differences(self, settings: Mapping[str, Any]) -> list[str]:
        """Say where saved `settings` are others; what an earlier version did not know is default.

        Returns
        -------
        list of str
            One phrase for each, none where they are the same.
        """
        try:
            there, here = self.from_dict(settings).to_dict(), self.to_dict()
        except ConfigError as error:
            return [f"of which one is not known here ({error})"]
        return [
            f"{name} is {there[name]!r} there and {here[name]!r} here"
            for name in here
            if there[name] != here[name]
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a plain dictionary that :meth:`from_dict` takes back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> HybridTrainerConfig:
        """Build from a mapping; a name that is not a setting raises :class:`ConfigError`."""
        if not isinstance(settings, Mapping):
            raise _error("settings", settings, "a mapping of names to values")
        # Here too, as a name may be no string.
        _check_known(settings)
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
        try:
            if not isinstance(settings, Mapping):
                raise _error("hybridcore", settings, "a table of settings")
            return cls.from_dict(settings)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def _check_known(names: Iterable[object]) -> None:
    known = [field.name for field in dataclasses.fields(HybridTrainerConfig)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"unknown setting {name!r}; known settings: {', '.join(known)}{meant}"
            )


def _error(name: str, value: object, expected: str) -> ConfigError:
    return ConfigError(f"{name} must be {expected}, got {value!r}")


def _check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    expected = f"an integer of at least {least}" + ("" if most is None else f" and at most {most}")
    if isinstance(value, bool) or not isinstance(value, int):
        raise _error(name, value, expected)
    if value < least or (most is not None and value > most):
        raise _error(name, value, expected)


def _check_real(name: str, value: object, least: float, most: float) -> None:
    beyond = f"a finite number of at least {least:g}"
    expected = beyond if math.isinf(most) else f"a number from {least:g} to {most:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _error(name, value, expected)
    if not least <= value <= min(most, sys.float_info.max):
        raise _error(name, value, expected)
