"""What the core costs: a step of the engine, a decision, an extrapolation."""

import numpy as np

from hybridcore import Engine, HybridTrainerConfig, Observation
from hybridcore.dynamics import LinearDynamics
from hybridcore.extrapolation import EXTRAPOLATORS
from hybridcore.planning import path_confidence

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
