"""Models of how the loss moves: what they must do, and the implementations."""

from hybridcore.dynamics.linear import LinearDynamics
from hybridcore.dynamics.protocol import DynamicsModel, Forecast

__all__ = ["DynamicsModel", "Forecast", "LinearDynamics"]
