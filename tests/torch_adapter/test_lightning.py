"""The callback in Lightning: real fits of a real Trainer, held against the same fits without it."""

import math

import pytest
import torch
import torch.nn.functional as F
from counting import Passes, figures, same_weights
from problems import BRISK, digits
from torch import nn
from torch.utils.data import DataLoader

from hybridcore import CheckpointError, ClosureError, ConfigError, HybridTrainerConfig

pytest.importorskip("lightning", reason="needs the extra [lightning]")

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy

from hybridcore_torch.lightning import HybridCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # A resumed run saves nothing here.
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*`dataloader_iter` step flavor"),
]
OFF = HybridTrainerConfig(enabled=False)
EPOCH = 25


class Digits(pl.LightningModule):
    """Logs its loss, and draws a little noise: too little to put jumps off."""

    def __init__(self, noise=1e-4, rate=1e-2):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(64, 16), nn.Tanh(), nn.BatchNorm1d(16), nn.Linear(16, 10)
        )
        self.noise, self.rate, self.logged = noise, rate, 0
        self.passes = Passes(self.net[0])

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x + self.noise * torch.randn(64)), y)
        self.log("loss", loss)
        return {"loss": loss, "size": len(x)}

    def log(self, *args, **kwargs):
        self.logged += 1
        super().log(*args, **kwargs)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class GoesOn:
    """A loader that can be resumed in the middle, and draws random numbers to begin."""

    def __init__(self):
        self.at, self.batch = 0, digits()

    def __len__(self):
        return EPOCH

    def __iter__(self):
        torch.randn(3)
        self.at %= EPOCH
        return self.rest()

    def rest(self):
        while self.at < EPOCH:
            self.at += 1
            yield self.batch

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def shuffled(length=EPOCH, parts=1):
    x, y = digits()
    batches = [(x[part::parts][:800], y[part::parts][:800]) for part in range(parts)]
    return DataLoader(batches * length, batch_size=None, shuffle=parts == 1)


def fit(module, data, *callbacks, path=None, epochs=10, saving=(), **arguments):
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=bool(saving),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, *saving],
        **arguments,
    )
    trainer.fit(module, data, ckpt_path=path)
    return trainer


def test_predicted_steps_have_no_backward_pass():
    module, callback, outputs = Digits(), HybridCallback(BRISK), []
    watch = pl.callbacks.LambdaCallback(
        on_train_batch_end=lambda trainer, module, out, batch, index: outputs.append(out)
    )
    trainer = fit(module, shuffled(), callback, watch)
    module.passes.check(callback.hybrid, steps=250)
    assert trainer.global_step == 250
    rate = 0.5e-2 * (1 + math.cos(math.pi * 250 / 1000))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)
    # What only looked where a jump leads is in no log.
    assert module.logged == module.passes.forward
    assert module.passes.probes > 0
    assert float(outputs[-1]["loss"]) < 0.1 * float(outputs[0]["loss"])
    assert [out["size"] for out in outputs if "size" in out] == [800] * module.passes.backward


def mixed(scaled):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
    return MixedPrecision("16-mixed" if scaled else "bf16-mixed", "cpu", scaler)


CASES = {
    "plain": {},
    "clipped": {"gradient_clip_val": 0.1},
    "accumulated": {"accumulate_grad_batches": 2},
    "bfloat16": {"precision": "bf16-mixed"},
    "scaled": {"scaled": True, "gradient_clip_val": 0.5},
}


def case(name):
    arguments = dict(CASES[name])
    if arguments.pop("scaled", False):
        arguments["plugins"] = [mixed(scaled=True)]
    return arguments, 2 if "accumulate_grad_batches" in arguments else 1


@pytest.mark.parametrize("name", CASES)
def test_switched_off_it_is_the_plain_fit(name):
    modules = []
    for callbacks in ((), (HybridCallback(OFF),)):
        arguments, parts = case(name)
        modules.append(Digits())
        trainer = fit(modules[-1], shuffled(10, parts), *callbacks, epochs=2, **arguments)
        assert trainer.global_step == 20
    assert same_weights(*modules)


@pytest.mark.parametrize("name", ["accumulated", "bfloat16", "scaled"])
def test_it_predicts_with_accumulation_and_mixed_precision(name):
    arguments, parts = case(name)
    module, callback = Digits(noise=0.0), HybridCallback(BRISK)
    trainer = fit(module, shuffled(250, parts), callback, epochs=1, **arguments)
    assert trainer.global_step == 250
    module.passes.check(callback.hybrid, steps=250, parts=parts)


@pytest.mark.parametrize(
    ("data", "saving"),
    [
        (shuffled, {"every_n_epochs": 1}),
        (GoesOn, {"every_n_train_steps": 23}),
        (shuffled, {"every_n_train_steps": EPOCH}),
    ],
    ids=["between epochs", "in an epoch", "at the last batch"],
)
def test_a_resumed_fit_is_the_same_to_the_last_bit(tmp_path, data, saving):
    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **saving)
    results, module = [], Digits()
    whole = HybridCallback(BRISK, callbacks=[lambda r: results.append(figures(r))])
    fit(module, data(), whole, saving=[save], epochs=8)
    assert whole.hybrid.statistics().predicted_steps > 20
    paths = sorted(tmp_path.iterdir(), key=lambda path: int(path.stem.split("=")[1]))[:-1]
    assert len(paths) > 4
    states = [torch.load(path, weights_only=True)["callbacks"]["HybridCallback"] for path in paths]
    inside = [p for p, s in zip(paths, states, strict=True) if s["recovery"] is not None]
    assert inside or data is GoesOn
    for path in {paths[2], paths[-1], *inside[:1]}:
        done, rest, again = int(path.stem.split("=")[1]), [], Digits()
        torch.manual_seed(done)
        callback = HybridCallback(BRISK, callbacks=[lambda r, rest=rest: rest.append(figures(r))])
        trainer = fit(again, data(), callback, path=path, epochs=8)
        assert trainer.global_step == 200
        assert rest == results[done:], path.name
        assert same_weights(module, again)
        assert callback.hybrid.statistics().predicted_steps == (
            whole.hybrid.statistics().predicted_steps
        )


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
def test_the_diff_of_the_readme_runs(readme_sides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    modules = []
    for program in readme_sides("hybridcore_torch.lightning"):
        modules.append(Digits())
        exec(program, {"Trainer": pl.Trainer, "module": modules[-1], "loader": shuffled(2)})
    # Nothing is predicted in warm-up.
    assert same_weights(*modules)
    assert modules[0].passes.backward == modules[1].passes.backward == 20


def test_a_checkpoint_holds_what_both_need_only_once(tmp_path):
    module, callback = Digits(), HybridCallback(BRISK)
    trainer = fit(module, shuffled(), callback, epochs=1)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    state = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    mine = state["callbacks"]["HybridCallback"]
    for name, tensor in state["state_dict"].items():
        assert tensor.data_ptr() == mine["model"][name].data_ptr()


def test_a_state_is_for_the_fit_that_it_was_loaded_for(tmp_path):
    trainer = fit(Digits(), shuffled(), HybridCallback(BRISK), epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    module, callback = Digits(), HybridCallback(BRISK)
    module.validation_step = lambda batch, batch_idx: None
    trainer = fit(module, shuffled(), callback, epochs=1)
    trainer.validate(module, shuffled(2, parts=2), ckpt_path=tmp_path / "one.ckpt", verbose=False)
    again = fit(module, shuffled(), callback, epochs=1)
    assert callback.hybrid.statistics().steps == again.global_step == EPOCH
    other = HybridCallback(BRISK, callbacks=[])
    with pytest.raises(CheckpointError, match="saved with other settings"):
        fit(Digits(), shuffled(), HybridCallback(), path=tmp_path / "one.ckpt", epochs=2)
    fit(Digits(), shuffled(), other, path=tmp_path / "one.ckpt", epochs=2)
    assert other.hybrid.statistics().steps == 2 * EPOCH


def test_the_steps_are_lent_for_one_fit():
    module, callback = Digits(), HybridCallback(BRISK)
    trainer = fit(module, shuffled(), callback, epochs=1)
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    assert type(loop).__module__.startswith("lightning.")
    assert trainer.global_step == loop.optim_progress.optimizer_steps == EPOCH
    passes = module.passes.backward
    trainer.callbacks.remove(callback)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, shuffled())
    assert trainer.global_step == 2 * EPOCH
    assert callback.hybrid.statistics().steps == EPOCH
    assert module.passes.backward == passes + EPOCH


def test_an_error_of_the_module_gives_the_steps_back():
    class Fails(Digits):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx < 5 else None

    callback = HybridCallback(BRISK)
    trainer = fit(Digits(), shuffled(), callback, epochs=1)
    trainer.fit_loop.max_epochs = 2
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    with pytest.raises(ClosureError, match="NoneType"):
        trainer.fit(Fails(), shuffled())
    assert trainer.fit_loop.epoch_loop.automatic_optimization is loop
    assert trainer.global_step == EPOCH + 5


class Manual(Digits):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Iterates(Digits):
    def training_step(self, dataloader_iter):
        raise AssertionError


def overriding(hook):
    return type("Own", (Digits,), {hook: lambda self, *args, **kwargs: None})


class OwnStrategy(SingleDeviceStrategy):
    pass


class OwnPrecision(Precision):
    pass


@pytest.mark.parametrize(
    ("module", "arguments", "fix"),
    [
        (Manual, {}, "set it to True"),
        (Iterates, {}, "let it take batch"),
        *(
            (overriding(hook), {}, rf"overrides {hook}\(\).*Take the override out")
            for hook in (
                "backward",
                "configure_gradient_clipping",
                "optimizer_step",
                "optimizer_zero_grad",
                "on_before_optimizer_step",
                "on_after_backward",
            )
        ),
        (Digits, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "'norm'"),
        (Digits, {"strategy": OwnStrategy("cpu")}, "strategy='auto'"),
        (Digits, {"plugins": [OwnPrecision()]}, "'32-true', 'bf16-mixed'"),
        (Digits, {"more": StochasticWeightAveraging(1e-2)}, r"averaged\(\)"),
        (
            Digits,
            {"more": pl.callbacks.LambdaCallback(on_before_zero_grad=lambda *args: None)},
            r"LambdaCallback overrides on_before_zero_grad\(\)",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(module, arguments, fix):
    own, callback = module(), HybridCallback(BRISK)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    arguments = dict(arguments)
    more = [arguments.pop("more")] if "more" in arguments else []
    with pytest.raises(ConfigError, match=fix):
        fit(own, shuffled(), callback, *more, **arguments)
    assert callback.hybrid is None
    assert own.passes.forward == 0
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
