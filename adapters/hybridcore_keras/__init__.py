"""hybridcore inside Keras's ``fit``."""

from hybridcore import HybridTrainerConfig, Phase
from hybridcore_keras.callback import HybridCallback

__all__ = ["HybridCallback", "HybridTrainerConfig", "Phase"]
