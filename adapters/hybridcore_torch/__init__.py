"""hybridcore inside PyTorch loops."""

from hybridcore import HybridTrainerConfig, JsonLines, Phase
from hybridcore.progress import ProgressLine
from hybridcore_torch.tensorboard import TensorBoard
from hybridcore_torch.trainer import HybridTrainer

__all__ = [
    "HybridTrainer",
    "HybridTrainerConfig",
    "JsonLines",
    "Phase",
    "ProgressLine",
    "TensorBoard",
]
