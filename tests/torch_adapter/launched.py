"""What each of two processes does: ``torchrun --nproc_per_node 2 launched.py``.

Each integration trains a model by data parallelism, with gradients accumulated over two parts.
"""

import json
import os
import sys
import warnings

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from counting import Passes
from problems import BRISK, digits
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from hybridcore_torch.accelerate import hybrid_trainer
from hybridcore_torch.huggingface import Trainer
from hybridcore_torch.lightning import HybridCallback

STEPS = 150
RANK = int(os.environ["RANK"])
X, Y = (values[RANK::2][:800] for values in digits())
# On both ranks two parts, each a batch of its own.
PARTS = [(X[:400], Y[:400]), (X[400:], Y[400:])]


class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(RANK)
        self.layer = torch.nn.Linear(64, 10)

    def forward(self, x, labels):
        return {"loss": F.cross_entropy(self.layer(x), labels)}


class Digits(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(*batch)["loss"]

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def accelerate(model, folder):
    accelerator = Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 1e-2))
    trainer = hybrid_trainer(accelerator, wrapped, optimizer, BRISK)
    for _ in range(STEPS):
        trainer.step([lambda part=part: wrapped(*part)["loss"] for part in PARTS])
    return trainer


def lightning(model, folder):
    callback = HybridCallback(BRISK)
    pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        accumulate_grad_batches=2,
        callbacks=[callback],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Digits(model), DataLoader(PARTS * STEPS, batch_size=None))
    return callback.hybrid


def huggingface(model, folder):
    x, y = digits()
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=400,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    rows = [{"x": a, "labels": b} for a, b in zip(x[:1600], y[:1600], strict=True)]
    trainer = Trainer(model, arguments, train_dataset=rows, hybrid={"config": BRISK})
    trainer.train()
    return trainer.hybrid


def main(folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seen = {}
    for run in (accelerate, huggingface, lightning):
        model = Classifier()
        passes = Passes(model.layer)
        trainer = run(model, folder)
        passes.check(trainer, STEPS, parts=2)
        seen[run.__name__] = [model.layer.weight.tolist(), trainer.statistics().predicted_steps]
    with open(f"{folder}/{RANK}.json", "w", encoding="utf-8") as file:
        json.dump(seen, file)


if __name__ == "__main__":
    main(sys.argv[1])
