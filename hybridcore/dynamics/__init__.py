"""Models of how the loss moves: what they must do, and the implementations."""

from typing import Literal

from hybridcore.dynamics.linear import LinearDynamics
from hybridcore.dynamics.protocol import DeltaHead, DynamicsModel, Forecast

__all__ = ["DeltaHead", "DynamicsModel", "Forecast", "LinearDynamics", "build"]


def build(name: str, device: Literal["auto", "cpu", "cuda"]) -> DynamicsModel:
    """Return a new model: ``"linear"``, ``"mlp"`` or ``"rssm"``, the last with its kernels' device.

    The learned ones are imported here, because they compile their kernels when first used.
    """
    if name == "linear":
        return LinearDynamics()
    if name == "mlp":
        from hybridcore.dynamics.mlp import MLPDynamics

        return MLPDynamics()
    from hybridcore.dynamics.rssm import RSSMDynamics

    return RSSMDynamics(device=device)
