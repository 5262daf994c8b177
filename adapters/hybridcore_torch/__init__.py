"""hybridcore inside PyTorch loops."""

from hybridcore import HybridTrainerConfig, JsonLines, Phase, read_stream
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
    "read_stream",
]
