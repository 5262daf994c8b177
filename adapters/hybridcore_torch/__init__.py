"""hybridcore inside PyTorch loops."""

from hybridcore_torch.trainer import HybridTrainer

__all__ = ["HybridTrainer"]
