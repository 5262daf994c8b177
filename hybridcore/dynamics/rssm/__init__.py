"""A recurrent state-space model of a training run: an ensemble, learned while the run goes on."""

from hybridcore.dynamics.rssm.model import RSSMDynamics

__all__ = ["RSSMDynamics"]
