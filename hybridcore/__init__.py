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
