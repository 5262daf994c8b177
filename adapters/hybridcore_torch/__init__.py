"""hybridcore inside PyTorch loops."""

from hybridcore import HybridTrainerConfig, Phase
from hybridcore_torch.trainer import HybridTrainer

__all__ = ["HybridTrainer", "HybridTrainerConfig", "Phase"]
