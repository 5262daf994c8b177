"""What the core costs: a step of the engine, a decision and its parts, an extrapolation."""

import tracemalloc

import numpy as np

from hybridcore import Engine, HybridTrainerConfig, Observation
from hybridcore.bandit import LinUCB
from hybridcore.corrector import Corrector
from hybridcore.decision import CONTEXT
from hybridcore.divergence import DivergenceMonitor
from hybridcore.dynamics import LinearDynamics
from hybridcore.extrapolation import EXTRAPOLATORS
from hybridcore.phases import TRANSITIONS, transition
from hybridcore.planning import Jump, missed_scales, path_confidence
from hybridcore.residuals import LowRank, ResidualStore
from hybridcore.search import arm_names

LOOPS = 200


def smooth_gram(snapshots: int) -> np.ndarray:
    """Gram matrix of a trajectory with ten decaying modes."""
    rates = np.linspace(0.5, 0.99, 10)
    points = np.array([rates**k for k in range(snapshots)])
    points -= points[-1]
    return points @ points.T


class EngineStep:
    """One full step without a snapshot: next() and observe(), 200 of them a sample."""

    def setup(self):
        self.engine = Engine(HybridTrainerConfig(warmup_steps=10**9))
        self.observation = Observation(loss=0.5, gradient_norm=1.0, learning_rate=1e-3)

    def time_step(self):
        engine, observation = self.engine, self.observation
        for _ in range(LOOPS):
            engine.next()
            engine.observe(observation)


class EngineMemory:
    """Bytes that 100,000 full steps leave behind."""

    timeout = 300

    def track_growth(self):
        engine = Engine(HybridTrainerConfig(warmup_steps=10**9))
        observation = Observation(loss=0.5, gradient_norm=1.0, learning_rate=1e-3)

        def steps(count):
            for _ in range(count):
                engine.next()
                engine.observe(observation)
            _ = engine.counters  # what was put off is read
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            before = steps(5_000)
            return steps(100_000) - before
        finally:
            tracemalloc.stop()

    track_growth.unit = "bytes"


class PhaseTransitions:
    """Every legal transition once."""

    def setup(self):
        self.pairs = list(TRANSITIONS)

    def time_all(self):
        for phase, event in self.pairs:
            transition(phase, event)


class Dynamics:
    """The loss model, 200 calls a sample."""

    def setup(self):
        self.model = LinearDynamics()
        for k in range(100):
            self.model.observe(Observation(0.99**k))

    def time_observe(self):
        observation = Observation(0.5)
        for _ in range(LOOPS):
            self.model.observe(observation)

    def time_forecast(self):
        for _ in range(LOOPS):
            self.model.forecast(75.0)

    def time_confidence(self):
        forecast = self.model.forecast(75.0)
        for _ in range(LOOPS):
            forecast.confidence(0.18)


class Decision:
    """What one decision takes beside its probes."""

    params = (4, 6, 10)
    param_names = ("snapshots",)

    def setup(self, snapshots):
        self.gram = smooth_gram(snapshots)

    def time_path_confidence(self, snapshots):
        path_confidence(self.gram)

    def time_all_extrapolators(self, snapshots):
        for extrapolate in EXTRAPOLATORS.values():
            extrapolate(self.gram, 9.0)

    def time_weight_delta(self, snapshots):
        Jump("dmd", 9.0).coefficients(self.gram[None])

    def time_missed_scales(self, snapshots):
        missed_scales(np.repeat(self.gram[None], 8, axis=0), "dmd")


class Learned:
    """What a decision asks of experience, and what a settled jump adds to it."""

    def setup(self):
        rng = np.random.default_rng(0)
        self.context = (1.0, 0.9, 0.8, -0.3, 0.0, 0.5)
        self.bandit = LinUCB(arm_names(), CONTEXT, exploration=0.1)
        self.monitor = DivergenceMonitor()
        self.corrector = Corrector(8, CONTEXT)
        self.store = ResidualStore()
        for k in range(256):
            context = rng.normal(size=CONTEXT)
            self.bandit.update(arm_names()[k % 3], context, float(rng.normal()))
            self.monitor.observe(0.99**k, 1.0)
            self.corrector.update(context, rng.normal(1.0, 0.1, (8, 2)))
            self.store.add(context, rng.normal(1.0, 0.1, (8, 2)))
        self.residual = np.tile([1.1, 0.9], (8, 1))
        self.matrix = rng.normal(size=(64, 256))
        self.low_rank = LowRank(2)

    def time_bandit_values(self):
        self.bandit.values(self.context)

    def time_bandit_update(self):
        self.bandit.update("dmd x1", self.context, 0.1)

    def time_monitor(self):
        for _ in range(LOOPS):
            self.monitor.observe(0.5, 1.0)

    def time_similar_residuals(self):
        self.store.nearest(self.context, 8)

    def time_compress_residuals(self):
        self.low_rank.compress(self.matrix)

    def time_corrector_predict(self):
        self.corrector.predict(self.context)

    def time_corrector_update(self):
        self.corrector.update(self.context, self.residual)


class ForecastError:
    """Error of each extrapolator 75 intervals ahead, relative to the distance moved."""

    params = tuple(sorted(EXTRAPOLATORS))
    param_names = ("extrapolator",)

    def track_relative_error(self, extrapolator):
        rates = np.linspace(0.5, 0.99, 5)
        points = np.array([rates**k for k in range(81)])
        bank = points[:6]
        moved = bank - bank[-1]
        ahead = EXTRAPOLATORS[extrapolator](moved @ moved.T, 75.0) @ bank
        return float(np.linalg.norm(ahead - points[80]) / np.linalg.norm(points[80] - bank[-1]))
