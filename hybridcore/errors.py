"""Exceptions that name the argument, the value and the fix."""

from __future__ import annotations


class HybridCoreError(Exception):
    """Base of every error that hybridcore raises on purpose."""


class ConfigError(HybridCoreError, ValueError, TypeError):
    """A setting is unknown, of another type or out of range."""


class ClosureError(HybridCoreError, TypeError):
    """The closure given to ``step`` or as ``probe`` does not return a usable loss."""


class ModelError(HybridCoreError, ValueError):
    """Model, optimizer or layer groups do not fit together."""


class TransitionError(HybridCoreError, RuntimeError):
    """A phase was asked to take an event that the phase table does not allow."""


class ProtocolError(HybridCoreError, RuntimeError):
    """Directives and observations were exchanged out of order."""


class CheckpointError(HybridCoreError, ValueError):
    """A saved state cannot be restored into this trainer."""


class StreamError(HybridCoreError, ValueError):
    """A file is no stream of a run, or cannot be written as one."""


class DivergenceError(HybridCoreError, FloatingPointError):
    """Training left the finite numbers, and the user asked for ``on_divergence="raise"``."""
