"""hybridcore inside Keras's ``fit``."""

from hybridcore_keras.callback import HybridCallback

__all__ = ["HybridCallback"]
