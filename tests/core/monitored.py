"""Monitors that have seen a quiet run."""

import math

import numpy as np
from hypothesis import settings

from hybridcore.divergence import DivergenceLevel, DivergenceMonitor

NORMAL, CAUTION, WARNING, CRITICAL = DivergenceLevel
steady = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def settled(losses=60, **options):
    """A monitor that has seen a quiet run: loss near 1 with noise of a tenth, norm near 1."""
    monitor = DivergenceMonitor(**options)
    rng = np.random.default_rng(3)
    for noise in 0.1 * np.clip(rng.standard_normal(losses), -1.5, 1.5):
        monitor.observe(math.exp(noise), math.exp(noise))
    assert monitor.level is NORMAL
    return monitor


def severity(monitor, signal):
    return monitor.signals[signal]
