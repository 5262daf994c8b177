"""Hugging Face: the same ``Trainer`` with predicted steps, a tiny vision transformer on digits.

python examples/huggingface_trainer.py
"""

import argparse
import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from hybridcore_torch.huggingface import Trainer

parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true", help="fewer steps")
steps = 300 if parser.parse_args().quick else 600

torch.set_num_threads(1)
digits = load_digits()
images = torch.tensor(digits.images[:256] / 16.0, dtype=torch.float32).unsqueeze(1)
data = [{"pixel_values": x, "labels": y} for x, y in zip(images, digits.target, strict=False)]
sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
config = ViTConfig(hidden_size=32, intermediate_size=64, hidden_dropout_prob=0.0, **sizes, **layers)

with tempfile.TemporaryDirectory() as folder:
    training = TrainingArguments(folder, max_steps=steps, logging_steps=50, learning_rate=3e-3)
    training = training.set_dataloader(256, pin_memory=False).set_save("no")
    trainer = Trainer(ViTForImageClassification(config), training, train_dataset=data)
    trainer.train()
print(trainer.hybrid.statistics())
