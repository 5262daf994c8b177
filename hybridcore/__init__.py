"""Train by real steps and predicted ones, and measure whether predicting pays.

A loop in PyTorch needs `hybridcore_torch.HybridTrainer`, Keras's ``fit`` needs
`hybridcore_keras.HybridCallback`. This is what stands behind both: the engine that decides, and
what crosses the boundary to an adapter.

Each method has a card: what it predicts, when it pays, when it hurts, what it costs and what was
measured.

- Jumps: `hybridcore.extrapolation.linear`, `hybridcore.extrapolation.nesterov`,
  `hybridcore.extrapolation.anderson`, `hybridcore.extrapolation.dmd`, judged by
  `hybridcore.extrapolation.average`, corrected by `hybridcore.corrector`
- Quasi-Newton steps: `hybridcore.quasi_newton`
- Outer momentum: `hybridcore.outer.OuterMomentum`
- Averaged weights: `hybridcore.averaging.Averaging`
- Models of the loss: `hybridcore.dynamics.mixture.ExpertMixture`,
  `hybridcore.dynamics.rssm.RSSMDynamics`
"""

from hybridcore.config import HybridTrainerConfig
from hybridcore.engine import Engine
from hybridcore.errors import (
    CheckpointError,
    ClosureError,
    ConfigError,
    DivergenceError,
    HybridCoreError,
    ModelError,
    ProtocolError,
    StreamError,
    TransitionError,
)
from hybridcore.metrics import TrainingStatistics
from hybridcore.phases import Event, Phase
from hybridcore.quasi_newton import Secants
from hybridcore.stream import JsonLines, Stream, read_stream
from hybridcore.types import Action, Directive, Observation, StepResult

__version__ = "0.1.0"

__all__ = [
    "Action",
    "CheckpointError",
    "ClosureError",
    "ConfigError",
    "Directive",
    "DivergenceError",
    "Engine",
    "Event",
    "HybridCoreError",
    "HybridTrainerConfig",
    "JsonLines",
    "ModelError",
    "Observation",
    "Phase",
    "ProtocolError",
    "Secants",
    "StepResult",
    "Stream",
    "StreamError",
    "TrainingStatistics",
    "TransitionError",
    "__version__",
    "read_stream",
]
