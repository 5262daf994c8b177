"""Train by real steps and predicted ones, and measure whether predicting pays."""

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
    TransitionError,
)
from hybridcore.metrics import TrainingStatistics
from hybridcore.phases import Event, Phase
from hybridcore.quasi_newton import Secants
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
    "ModelError",
    "Observation",
    "Phase",
    "ProtocolError",
    "Secants",
    "StepResult",
    "TrainingStatistics",
    "TransitionError",
    "__version__",
]
