"""What the learned models cost, beside a NumPy oracle and beside torch where that is fair."""

import os
import subprocess
import sys
import tempfile

import numpy as np
import torch

from hybridcore import Observation
from hybridcore.dynamics import DynamicsModel, build
from hybridcore.dynamics.rssm.ensemble import RSSMEnsemble
from hybridcore.dynamics.rssm.params import (
    Sizes,
    aligned_zeros,
    initialize,
    parameter_count,
    side_by_side,
    split,
)
from hybridcore.kernels.cpu import bptt, rssm, training
from hybridcore.state import TrainingState

MEMBERS = 5
SIZES = Sizes()
HORIZONS = (1, 5, 10, 15, 25, 50, 75)


def weights() -> list[np.ndarray]:
    """Weights, and zeros for the gradients and Adam's moments, where an ensemble has them."""
    params, *rest = side_by_side(4, MEMBERS, parameter_count(SIZES))
    for member, row in enumerate(params):
        initialize(row, SIZES, np.random.default_rng(member))
    return [params, *rest]


def observations(count: int) -> list[Observation]:
    rng = np.random.default_rng(0)
    losses = np.exp(-0.002 * np.arange(count) + 0.1 * rng.normal(size=count))
    norms = np.exp(0.1 * rng.normal(size=count))
    return [Observation(float(a), float(b), 1e-3) for a, b in zip(losses, norms, strict=True)]


def trained(name: str) -> DynamicsModel:
    model = build(name, "cpu")
    for observation in observations(400):
        model.observe(observation)
    return model


class Rollout:
    """One sample path of each of five members."""

    params = (HORIZONS,)
    param_names = ("horizon",)

    def setup(self, horizon):
        rng = np.random.default_rng(0)
        self.params, *_ = weights()
        self.state = np.zeros((MEMBERS, SIZES.latent), np.float32)
        self.classes = np.zeros((MEMBERS, SIZES.categoricals), np.int64)
        self.uniforms = rng.random((MEMBERS, 1, horizon, SIZES.categoricals), dtype=np.float32)
        self.mean, self.variance = np.zeros((2, MEMBERS, 1, horizon), np.float32)
        self.work = aligned_zeros(rssm.work_size(SIZES))
        self.work_classes = np.zeros(SIZES.categoricals, np.int64)
        self.torch = TorchRollout(self.params, torch.from_numpy(self.uniforms[:, 0]))
        self.time_numba(horizon)

    def time_numba(self, horizon):
        rssm.rollout(
            self.params,
            SIZES,
            self.state,
            self.classes,
            self.uniforms,
            self.mean,
            self.variance,
            self.work,
            self.work_classes,
        )

    def time_torch(self, horizon):
        self.torch.run()


class TorchRollout:
    """The same in torch, its members in one batch."""

    def __init__(self, params: np.ndarray, uniforms: torch.Tensor) -> None:
        torch.set_num_threads(1)
        fields = zip(*(split(row, SIZES) for row in params), strict=True)
        self.w = [torch.from_numpy(np.stack(field).copy()) for field in fields]
        self.uniforms = uniforms

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        _, _, hidden_w, hidden_b, stochastic_w, stochastic_b, *_ = self.w
        n, k = SIZES.latent, SIZES.classes
        s = SIZES.categoricals * k
        state = torch.zeros(MEMBERS, 1, n)
        z = torch.zeros(MEMBERS, 1, s)
        z[..., ::k] = 1.0
        total = torch.zeros(MEMBERS)
        for step in range(self.uniforms.shape[1]):
            recurrent = torch.baddbmm(hidden_b[:, None], state, hidden_w)
            if step:
                logits = recurrent[..., 3 * n : 3 * n + s].reshape(MEMBERS, -1, k)
                share = torch.softmax(logits, -1) * 0.99 + 0.01 / k
                chosen = (share.cumsum(-1) <= self.uniforms[:, step - 1, :, None]).sum(-1)
                z = torch.nn.functional.one_hot(chosen.clamp(max=k - 1), k).reshape(MEMBERS, 1, s)
                z = z.float()
            gates = torch.baddbmm(stochastic_b[:, None], z, stochastic_w)
            total += recurrent[:, 0, 3 * n + s] + gates[:, 0, 3 * n]
            r, u = torch.sigmoid(gates[..., : 2 * n] + recurrent[..., : 2 * n]).chunk(2, -1)
            c = torch.tanh(gates[..., 2 * n : 3 * n] + r * recurrent[..., 2 * n : 3 * n])
            state = c + u * (state - c)
        return total


class Encoding:
    """Features of one step, and their encoding by each of five members."""

    def setup(self):
        self.params, *_ = weights()
        self.state = TrainingState()
        self.seen = observations(200)
        self.out = np.zeros((MEMBERS, SIZES.latent), np.float32)
        for observation in self.seen:
            self.state.update(observation)
        self.time_encode()

    def time_features(self):
        for observation in self.seen:
            self.state.update(observation)

    def time_encode(self):
        rssm.encode(self.state.features(), self.params, SIZES, self.out)


class OnlineUpdate:
    """One step of Adam of five members on one window of `steps` steps each."""

    params = ((1, 3, 8),)
    param_names = ("steps",)

    def setup(self, steps):
        rng = np.random.default_rng(0)
        self.params, *self.rest = weights()
        self.updates = np.zeros(MEMBERS, np.int64)
        self.generators = rng.integers(1, 2**63, MEMBERS, dtype=np.uint64)
        self.replay = training.empty_replay(SIZES, MEMBERS, 256)
        self.replay.features[:] = rng.normal(size=self.replay.features.shape)
        self.replay.changes[:] = rng.normal(size=256)
        self.replay.change_weights[:] = 1.0
        self.replay.follows[:] = True
        self.window = training.empty_window(SIZES, steps)
        self.trace = bptt.trace(SIZES, steps)
        self.losses = np.zeros(MEMBERS)
        self.time_update(steps)

    def time_update(self, steps):
        training.update(
            self.params,
            *self.rest,
            self.updates,
            self.generators,
            SIZES,
            self.replay,
            256,
            1.0,
            1,
            self.window,
            self.trace,
            training.Objective(),
            self.losses,
        )


class Step:
    """All that a full step costs in a model of the loss: 400 of them."""

    params = (("linear", "mlp", "rssm"),)
    param_names = ("model",)

    def setup(self, model):
        self.seen = observations(400)
        self.model = trained(model)

    def time_observe(self, model):
        for observation in self.seen:
            self.model.observe(observation)

    def time_forecast(self, model):
        self.model.observe(self.seen[0])
        self.model.forecast(75)

    def time_confidence(self, model):
        """Cached: the same question 400 times."""
        forecast = self.model.forecast(15)
        for _ in self.seen:
            forecast.confidence(0.18)

    def peakmem_trained(self, model):
        trained(model)

    def track_state(self, model):
        def size(value):
            if isinstance(value, dict):
                return sum(map(size, value.values()))
            if isinstance(value, list | tuple):
                return sum(map(size, value))
            return value.nbytes if isinstance(value, np.ndarray) else 8

        return size(self.model.state_dict())

    track_state.unit = "bytes"


class WeightDelta:
    """The head of ten outputs."""

    def setup(self):
        self.ensemble = RSSMEnsemble()
        self.ensemble.observe(np.zeros(SIZES.features), 0.0)
        self.ensemble.delta()

    def time_delta(self):
        self.ensemble.delta()


class Compilation:
    """Seconds until a model has used all of its kernels, in a fresh process; imports included."""

    params = (("linear", "mlp", "rssm"), ("cold", "cached"))
    param_names = ("model", "cache")
    timeout = 600
    CODE = """
import sys
import time
start = time.perf_counter()
import numpy as np
from hybridcore import Observation
from hybridcore.dynamics import DeltaHead, build
model = build(sys.argv[1], "cpu")
for k in range(120):
    model.observe(Observation(0.99**k, 1.0, 1e-3, gram=np.eye(6)[None] if k == 50 else None))
model.forecast(75)
if isinstance(model, DeltaHead):
    model.teach_delta(np.ones((1, 2)))
    model.delta()
print(time.perf_counter() - start)
"""

    def setup_cache(self):
        """Measure all of it once, because it takes long: the second process finds the cache."""
        seconds = {}
        for model in self.params[0]:
            with tempfile.TemporaryDirectory() as folder:
                for cache in self.params[1]:
                    seconds[model, cache] = self.seconds(model, folder)
        return seconds

    def track_first_forecast(self, seconds, model, cache):
        return seconds[model, cache]

    def seconds(self, model: str, folder: str) -> float:
        environment = os.environ | {"NUMBA_CACHE_DIR": folder}
        command = [sys.executable, "-c", self.CODE, model]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(done.stdout)

    track_first_forecast.unit = "s"


class Cuda:
    """Largest difference between the kernels of the CPU and of the GPU, where there is one."""

    def setup(self):
        from hybridcore.kernels.dispatch import gpu_available

        if not gpu_available():
            raise NotImplementedError("no GPU")

    def track_rollout_difference(self):
        models = [RSSMEnsemble(device=device) for device in ("cpu", "cuda")]
        state = TrainingState()
        for observation in observations(60):
            state.update(observation)
            for model in models:
                model.observe(state.features(), 0.01)
        cpu, cuda = (model.forecast(75).mean for model in models)
        return float(np.abs(cpu - cuda).max())
