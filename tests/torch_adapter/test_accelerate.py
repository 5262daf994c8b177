"""Loops of Accelerate's: held against the same loop with accelerator.backward()."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from counting import Passes, figures, same_weights
from problems import BRISK, digits
from torch import nn

from hybridcore import ConfigError, HybridTrainerConfig, ModelError

pytest.importorskip("accelerate", reason="needs the extra [huggingface]")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType

from hybridcore_torch.accelerate import hybrid_trainer

OFF = HybridTrainerConfig(enabled=False)


@pytest.fixture
def prepared():
    """Return what builds an accelerator and what it prepares: it is one for the process."""

    def build(mixed_precision="no", **arguments):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        scaled = mixed_precision == "scaled"
        accelerator = Accelerator(
            cpu=True, mixed_precision="no" if scaled else mixed_precision, **arguments
        )
        if scaled:
            # Accelerate takes fp16 on GPUs alone; what it does to a loss there needs none.
            accelerator.scaler = torch.amp.GradScaler("cpu", 2.0**10, growth_interval=4)
        torch.manual_seed(0)
        # Too little dropout to put jumps off, but drawn from torch's generator.
        model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Dropout(1e-6), nn.Linear(16, 10))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
        return accelerator, *accelerator.prepare(model, optimizer, schedule)

    yield build
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


X, Y = digits()


@pytest.mark.parametrize("precision", ["no", "bf16", "scaled"])
@pytest.mark.parametrize("parts", [1, 2])
def test_switched_off_it_is_the_plain_loop(prepared, precision, parts):
    accelerator, plain, optimizer, schedule = prepared(
        mixed_precision=precision, gradient_accumulation_steps=parts
    )
    for _ in range(20):
        for part in range(parts):
            with accelerator.accumulate(plain):
                accelerator.backward(F.cross_entropy(plain(X[part::2]), Y[part::2]))
                if accelerator.sync_gradients and precision != "scaled":
                    accelerator.clip_grad_norm_(plain.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    scale = accelerator.scaler and accelerator.scaler.get_scale()
    accelerator, ours, optimizer, schedule = prepared(mixed_precision=precision)
    clip = {} if precision == "scaled" else {"max_grad_norm": 0.5}
    trainer = hybrid_trainer(accelerator, ours, optimizer, OFF, scheduler=schedule, **clip)
    closures = [
        lambda part=part: F.cross_entropy(ours(X[part::2]), Y[part::2]) for part in range(parts)
    ]
    for _ in range(20):
        trainer.step(closures)
    assert same_weights(plain, ours)
    assert scale == (accelerator.scaler and accelerator.scaler.get_scale())


@pytest.mark.parametrize(("precision", "parts"), [("no", 1), ("no", 2), ("bf16", 1), ("scaled", 1)])
def test_predicted_steps_have_no_backward_pass(prepared, precision, parts):
    accelerator, model, optimizer, schedule = prepared(mixed_precision=precision)
    passes = Passes(model[0])
    trainer = hybrid_trainer(accelerator, model, optimizer, BRISK, scheduler=schedule)
    for _ in range(250):
        trainer.step([lambda: F.cross_entropy(model(X), Y)] * parts)
    passes.check(trainer, steps=250, parts=parts)
    assert schedule.scheduler.last_epoch == 250


def test_a_resumed_loop_is_the_same_to_the_last_bit(prepared, tmp_path):
    def run(done=0):
        accelerator, model, optimizer, schedule = prepared()
        trainer = hybrid_trainer(accelerator, model, optimizer, BRISK, scheduler=schedule)
        if done:
            accelerator.load_state(tmp_path / str(done))
        results = []
        for step in range(done, 200):
            results.append(figures(trainer.step(lambda: F.cross_entropy(model(X), Y))))
            if not done and step % 37 == 36:
                accelerator.save_state(tmp_path / str(step + 1))
        return trainer, results

    whole, results = run()
    assert whole.statistics().predicted_steps > 20
    for done in (37, 74, 111, 148, 185):
        torch.manual_seed(done)
        resumed, rest = run(done)
        assert rest == results[done:], done
        assert same_weights(whole.model, resumed.model)


def test_the_diff_of_the_readme_runs(readme_sides, prepared):
    models = []
    for program in readme_sides("accelerator.prepare"):
        # The diff prepares by itself: what it begins with is as it was before.
        accelerator, model, optimizer, _ = prepared()
        accelerator.free_memory()
        loader = torch.utils.data.DataLoader([(X, Y)] * 10, batch_size=None)
        scope = {"accelerator": accelerator, "model": model, "loader": loader, "F": F}
        exec(program, scope | {"optimizer": optimizer.optimizer})
        models.append(model)
    # Nothing is predicted in warm-up.
    assert same_weights(*models)


def test_what_cannot_work_is_refused(prepared):
    accelerator, model, optimizer, _ = prepared(gradient_accumulation_steps=4)
    with pytest.raises(ConfigError, match=r"steps=4.*give step\(\) a list of closures"):
        hybrid_trainer(accelerator, model, optimizer)
    accelerator, model, optimizer, schedule = prepared()
    with pytest.raises(ModelError, match="got Adam: prepare model and optimizer first"):
        hybrid_trainer(accelerator, model, optimizer.optimizer)
    plateau = accelerator.prepare(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer.optimizer))
    with pytest.raises(ModelError, match="ReduceLROnPlateau needs a metric"):
        hybrid_trainer(accelerator, model, optimizer, scheduler=plateau)
    assert accelerator._custom_objects == []
    # What Accelerate says where these were launched; their libraries are not here.
    accelerator.state.distributed_type = DistributedType.DEEPSPEED
    with pytest.raises(ConfigError, match=r"distributed_type DEEPSPEED.*data parallelism"):
        hybrid_trainer(accelerator, model, optimizer, scheduler=schedule)
    accelerator.state.distributed_type = DistributedType.NO
    accelerator.state._mixed_precision = "fp8"
    with pytest.raises(ConfigError, match=r"'fp8'.*use one of no, bf16, fp16"):
        hybrid_trainer(accelerator, model, optimizer, scheduler=schedule)


def test_the_integrations_are_loaded_only_when_asked_for():
    code = (
        "import hybridcore_torch, sys;"
        "print([m for m in ('accelerate', 'lightning', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
