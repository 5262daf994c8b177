"""The kernels that an ensemble calls, as in ``kernels.cuda.api``."""

from hybridcore.kernels.cpu.rssm import delta_outputs, encode, observe_step, rollout
from hybridcore.kernels.cpu.training import update

__all__ = ["delta_outputs", "encode", "observe_step", "rollout", "update"]
