"""Hugging Face's Trainer with predicted steps: held against the same training without them."""

import pytest
import torch
from counting import Passes, figures, same_weights
from problems import BRISK, digits

from hybridcore import ClosureError, ConfigError, HybridTrainerConfig, ModelError

pytest.importorskip("transformers", reason="needs the extra [huggingface]")
pytest.importorskip("accelerate", reason="needs the extra [huggingface]")

import transformers
from accelerate.state import GradientState
from transformers import TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from hybridcore_torch.huggingface import FILE, Trainer

OFF = HybridTrainerConfig(enabled=False)


@pytest.fixture(scope="module")
def data():
    x, y = digits()
    return [
        {"pixel_values": image, "labels": label}
        for image, label in zip(x[:128].view(-1, 1, 8, 8), y[:128], strict=True)
    ]


def vision(dropout=0.0):
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=10,
        hidden_dropout_prob=dropout,
    )
    return ViTForImageClassification(config)


def arguments(folder, steps, **others):
    settings = {
        "per_device_train_batch_size": 128,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "logging_steps": 20,
    } | others
    return TrainingArguments(
        folder,
        max_steps=steps,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        **settings,
    )


@pytest.fixture
def train(tmp_path, data):
    def run(
        steps=200,
        *,
        cls=Trainer,
        model=None,
        path=None,
        hybrid=None,
        more=(),
        scaler=None,
        **settings,
    ):
        ours = {"hybrid": hybrid or {"config": BRISK}} if issubclass(cls, Trainer) else {}
        model = vision() if model is None else model
        trainer = cls(
            model,
            arguments(tmp_path, steps, **settings),
            train_dataset=data,
            callbacks=list(more),
            **ours,
        )
        if scaler is not None:
            # Accelerate takes fp16 on GPUs alone; what it does to a loss there needs none.
            trainer.accelerator.scaler = scaler
        trainer.train(resume_from_checkpoint=path)
        return trainer

    return run


def test_predicted_steps_have_no_backward_pass(train):
    model = vision()
    passes = Passes(model.classifier)
    trainer = train(model=model)
    passes.check(trainer.hybrid, steps=200)
    assert trainer.state.global_step == 200
    assert trainer.lr_scheduler.last_epoch == 200
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 10
    assert losses[-1] < 0.1 * losses[0]
    # Another loop of Accelerate's in this process must find it as it was.
    assert GradientState().sync_gradients


@pytest.mark.parametrize(
    "settings",
    [
        {"max_grad_norm": 0.1},
        {"max_grad_norm": 0.0},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 64},
        # The last batch of an epoch has one part of 32 and not three.
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 32},
        {"bf16": True},
        {"scaler": True, "max_grad_norm": 0.0},
        {"optim": "sgd", "label_smoothing_factor": 0.1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_switched_off_it_is_the_plain_trainer(train, settings):
    both = []
    for cls in (transformers.Trainer, Trainer):
        if "scaler" in settings:
            settings["scaler"] = torch.amp.GradScaler("cpu", 2.0**10, growth_interval=4)
        both.append(train(10, cls=cls, hybrid={"config": OFF}, **settings))
    plain, ours = both
    assert same_weights(plain.model, ours.model)
    if "scaler" in settings:
        assert ours.accelerator.scaler.get_scale() == 2.0**12
    for before, now in zip(plain.state.log_history, ours.state.log_history, strict=True):
        assert now.get("learning_rate") == before.get("learning_rate")
        assert now.get("train_loss") == pytest.approx(before.get("train_loss"), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 64}, 2),
        ({"bf16": True}, 1),
        ({"scaler": True}, 1),
    ],
)
def test_it_predicts_with_accumulation_and_mixed_precision(train, settings, parts):
    model = vision()
    passes = Passes(model.classifier)
    if "scaler" in settings:
        settings = {"scaler": torch.amp.GradScaler("cpu", init_scale=2.0**10)}
    passes.check(train(160, model=model, **settings).hybrid, steps=160, parts=parts)


def test_a_resumed_training_is_the_same_to_the_last_bit(train, tmp_path):
    results = []
    whole = train(
        150,
        # Too little to put jumps off, but drawn from torch's generator.
        model=vision(1e-5),
        hybrid={"config": BRISK, "callbacks": [lambda r: results.append(figures(r))]},
        save_strategy="steps",
        save_steps=29,
    )
    assert whole.hybrid.statistics().predicted_steps > 20
    for done in (29, 87, 116):
        rest, again = [], vision(1e-5)
        torch.manual_seed(done)
        path = tmp_path / f"checkpoint-{done}"
        assert (path / FILE).is_file()
        hybrid = {"config": BRISK, "callbacks": [lambda r, rest=rest: rest.append(figures(r))]}
        resumed = train(150, model=again, path=str(path), hybrid=hybrid)
        assert resumed.state.global_step == 150
        assert rest == results[done:], done
        assert same_weights(whole.model, again)


def test_an_epoch_of_several_shuffled_batches_is_resumed_too(train, tmp_path):
    settings = {"per_device_train_batch_size": 32}
    whole = train(60, model=vision(0.1), save_strategy="steps", save_steps=30, **settings)
    again = train(60, model=vision(0.1), path=str(tmp_path / "checkpoint-30"), **settings)
    assert same_weights(whole.model, again.model)
    assert again.hybrid.statistics().steps == 60


def test_a_checkpoint_of_the_plain_trainer_begins_anew(train, tmp_path, caplog):
    train(10, cls=transformers.Trainer, save_strategy="steps", save_steps=10)
    trainer = train(15, path=str(tmp_path / "checkpoint-10"))
    assert trainer.hybrid.statistics().steps == 5
    assert "hybridcore begins anew" in caplog.text


def test_the_diff_of_the_readme_runs(readme_sides, tmp_path, data):
    models = []
    for program in readme_sides("huggingface"):
        models.append(vision())
        exec(program, {"model": models[-1], "args": arguments(tmp_path, 10), "data": data})
    # Nothing is predicted in warm-up.
    assert same_weights(*models)


def test_train_can_be_called_again(train):
    trainer = train(30)
    trainer.train()
    assert trainer.hybrid.statistics().steps == 30


class OwnStep(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**inputs).loss
        self.accelerator.backward(loss)
        return loss.detach()


class Hidden(transformers.Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return self.compute_loss(model, inputs).detach()


class NoBackward(Trainer, Hidden):
    pass


class Meddles(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        raise AssertionError


@pytest.mark.parametrize(
    ("arguments", "error", "fix"),
    [
        ({"optim": "lomo"}, ConfigError, "adamw_torch"),
        ({"optim": "galore_adamw_layerwise"}, ConfigError, "adamw_torch"),
        ({"more": [Meddles()]}, ConfigError, r"use on_step_end\(\)"),
        ({"hybrid": {"scheduler": None}}, ConfigError, r"\['scheduler'\].*TrainingArguments"),
        ({"hybrid": BRISK}, ConfigError, r"got HybridTrainerConfig: give it as \{'config'"),
        ({"cls": OwnStep}, ModelError, r"call super\(\).training_step\(\)"),
        ({"cls": NoBackward}, ClosureError, r"accelerator.backward\(\)"),
    ],
    ids=["lomo", "layerwise", "callback", "scheduler", "settings", "own step", "no backward"],
)
def test_what_cannot_work_is_refused(train, arguments, error, fix):
    model = vision()
    before = vision()
    with pytest.raises(error, match=fix):
        train(model=model, **arguments)
    assert same_weights(model, before)


class Doubled(transformers.Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return 2.0 * super().compute_loss(model, inputs, *args, **kwargs)


class Mine(Trainer, Doubled):
    pass


def test_a_trainer_of_ones_own_takes_part(train):
    losses = [
        train(20, cls=cls, max_grad_norm=0.0).state.log_history[0]["loss"]
        for cls in (Doubled, Mine, Trainer)
    ]
    assert losses[1] == pytest.approx(losses[0])
    assert losses[1] > 1.5 * losses[2]
