"""Host side of the CUDA kernels: arrays in, launch, arrays out.

The functions of this module take what their namesakes in ``cpu.rssm`` and ``cpu.training`` take, so
that one can stand for the other; scratch arrays are accepted and left alone. Every call of them
copies the weights both ways where they change. An :class:`Ensemble` keeps the weights, the moments
and all buffers on the device, and copies only what goes in and out of a step.

Uniform numbers and generators stay on the host: they belong to the checkpoint, and both devices
draw the same.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numba.core.errors import NumbaPerformanceWarning
from numpy.typing import NDArray

from hybridcore.dynamics.rssm.params import FloatArray, Sizes
from hybridcore.kernels.cpu.bptt import Trace, Window
from hybridcore.kernels.cpu.rssm import Classes
from hybridcore.kernels.cpu.training import Objective, Replay
from hybridcore.kernels.cuda import bptt, cuda, rssm, training


class Ensemble:
    """Weights, gradients and Adam's moments of an ensemble, kept on the device between calls.

    Parameters
    ----------
    params : (M, P) ndarray of float32
        Weights of the members, copied.
    sizes : Sizes
        Sizes of the model.
    first, second : (M, P) ndarray of float32, optional
        Moments of Adam, copied; 0 without them.
    grads : (M, P) ndarray of float32, optional
        Gradients to add to, copied; 0 without them.
    """

    def __init__(
        self,
        params: FloatArray,
        sizes: Sizes,
        first: FloatArray | None = None,
        second: FloatArray | None = None,
        grads: FloatArray | None = None,
    ) -> None:
        self.sizes = sizes
        self.members = params.shape[0]
        zeros = np.zeros_like(params)
        self._params = cuda.to_device(params)
        self._grads = cuda.to_device(zeros if grads is None else grads)
        self._first = cuda.to_device(zeros if first is None else first)
        self._second = cuda.to_device(zeros if second is None else second)
        self._threads = rssm.threads(sizes)
        self._shared = rssm.shared_bytes(sizes)
        self._buffers: dict[str, Any] = {}
        self._traces: dict[int, Any] = {}
        self._launched: set[tuple[Any, ...]] = set()

    def copy_to(
        self, params: FloatArray, first: FloatArray | None = None, second: FloatArray | None = None
    ) -> None:
        """Copy the weights, and the moments where asked for, into arrays of the host."""
        self._params.copy_to_host(params)
        if first is not None:
            self._first.copy_to_host(first)
        if second is not None:
            self._second.copy_to_host(second)

    def encode(self, features: FloatArray, out: FloatArray) -> None:
        """Encode `features` (F,) by every member into `out` (M, L)."""
        sent = self._send("features", features)
        encoded = self._buffer("encodings", out.shape, out.dtype)
        self._launch(rssm.encode, self.members, 0, sent, self._params, self.sizes, encoded)
        encoded.copy_to_host(out)

    def observe_step(
        self, features: FloatArray, uniforms: FloatArray, hidden: FloatArray, classes: Classes
    ) -> None:
        """Move every member one observed step on; see ``cpu.rssm.observe_step``."""
        sent = self._send("features", features), self._send("uniforms", uniforms)
        states = self._send("hidden", hidden), self._send("classes", classes)
        arguments = (self._params, self.sizes, *sent, *states)
        self._launch(rssm.observe_step, self.members, self._shared, *arguments)
        states[0].copy_to_host(hidden)
        states[1].copy_to_host(classes)

    def rollout(
        self,
        hidden: FloatArray,
        classes: Classes,
        uniforms: FloatArray,
        mean: FloatArray,
        variance: FloatArray,
    ) -> None:
        """Sample all paths of all members in one launch; see ``cpu.rssm.rollout``."""
        blocks = self.members * mean.shape[1]
        if blocks == 0:
            return
        states = self._send("hidden", hidden), self._send("classes", classes)
        sent = self._send("path_uniforms", uniforms)
        sums = [self._buffer(name, mean.shape, mean.dtype) for name in ("mean", "variance")]
        arguments = (self._params, self.sizes, *states, sent, *sums)
        self._launch(rssm.rollout, blocks, self._shared, *arguments)
        sums[0].copy_to_host(mean)
        sums[1].copy_to_host(variance)

    def delta_outputs(self, hidden: FloatArray, classes: Classes, out: FloatArray) -> None:
        """Write the mapped outputs of every member's delta head to `out` (M, D)."""
        states = self._send("hidden", hidden), self._send("classes", classes)
        outputs = self._buffer("outputs", out.shape, out.dtype)
        arguments = (self._params, self.sizes, *states, outputs)
        self._launch(rssm.delta_outputs, self.members, 0, *arguments)
        outputs.copy_to_host(out)

    def window_gradients(
        self,
        windows: Window,
        hidden: FloatArray,
        classes: Classes,
        whole: NDArray[np.bool_],
        dynamics: float,
        representation: float,
        free: float,
        losses: NDArray[np.float64],
        divergences: FloatArray | None = None,
    ) -> None:
        """Add the gradients of W windows for each member to those kept here.

        Parameters
        ----------
        windows, hidden, classes, whole, dynamics, representation, free, losses
            See ``cuda.bptt.window_gradients``.
        divergences : (M, k) ndarray of float32, optional
            Receive the KL divergences in nats at the steps of each member's last window.
        """
        steps = windows.changes.shape[2]
        if steps not in self._traces:
            host = bptt.traces(self.sizes, steps, self.members)
            self._traces[steps] = Trace(*(cuda.to_device(field) for field in host))
        work = self._traces[steps]
        sent = Window(*(self._send(f"window_{i}", field) for i, field in enumerate(windows)))
        states = self._send("first_hidden", hidden), self._send("first_classes", classes)
        used = self._send("whole", whole)
        out = self._buffer("losses", losses.shape, losses.dtype)
        self._launch(
            bptt.window_gradients,
            self.members,
            0,
            self._params,
            self.sizes,
            sent,
            *states,
            used,
            work,
            dynamics,
            representation,
            free,
            self._grads,
            out,
        )
        out.copy_to_host(losses)
        if divergences is not None:
            work.divergences.copy_to_host(divergences)

    def copy_gradients_to(self, grads: FloatArray) -> None:
        """Copy the gradients added up so far into `grads` (M, P) of the host."""
        self._grads.copy_to_host(grads)

    def adam_updates(
        self, steps: NDArray[np.int64], objective: Objective, norms: NDArray[np.float64]
    ) -> None:
        """One step of Adam for every member of ``steps[m] > 0``; gradients are 0 afterwards.

        Parameters
        ----------
        steps : (M,) ndarray of int64
            Number of this step, from 1; 0 leaves a member as it is.
        objective : Objective
            Settings of Adam.
        norms : (M,) ndarray of float64
            Receive the norms of the gradients. A member whose norm is not finite does not move.
        """
        sent, out = self._send("steps", steps), self._send("norms", norms)
        self._launch(
            training.adam_updates,
            self.members,
            training.shared_bytes(self._threads),
            self._params,
            self._grads,
            self._first,
            self._second,
            sent,
            objective.learning_rate,
            objective.beta1,
            objective.beta2,
            objective.epsilon,
            objective.max_norm,
            out,
        )
        out.copy_to_host(norms)

    def update(
        self,
        updates: NDArray[np.int64],
        generators: NDArray[np.uint64],
        replay: Replay,
        observed: int,
        unit: float,
        windows: int,
        steps: int,
        objective: Objective,
        losses: NDArray[np.float64],
    ) -> None:
        """Draw windows of `steps` steps and learn from them, as ``cpu.training.update`` does."""
        drawn, hidden, classes, whole = training.draw_windows(
            generators, self.sizes, replay, observed, unit, windows, steps
        )
        each = np.zeros((self.members, windows))
        self.window_gradients(
            drawn,
            hidden,
            classes,
            whole,
            objective.dynamics / windows,
            objective.representation / windows,
            objective.free,
            each,
        )
        used = whole.sum(axis=1)
        losses[:] = np.nan
        np.divide(each.sum(axis=1) * windows, used, out=losses, where=used > 0)
        norms = np.zeros(self.members)
        self.adam_updates(np.where(used > 0, updates + 1, 0), objective, norms)
        updates += (used > 0) & np.isfinite(norms)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """Device array of that name, made anew only when its shape or type changed."""
        known = self._buffers.get(name)
        if known is None or known.shape != shape or known.dtype != dtype:
            self._buffers[name] = known = cuda.device_array(shape, dtype)
        return known

    def _send(self, name: str, array: NDArray[Any]) -> Any:
        buffer = self._buffer(name, array.shape, array.dtype)
        buffer.copy_to_device(array)
        return buffer

    def _launch(self, kernel: Any, blocks: int, shared: int, *arguments: Any) -> None:
        configuration = (blocks, self._threads, 0, shared)
        if (kernel, configuration) not in self._launched:
            self._launched.add((kernel, configuration))
            # numba warns of few blocks when it meets a configuration; members are few by nature.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NumbaPerformanceWarning)
                launch = kernel[configuration]
        else:
            launch = kernel[configuration]
        launch(*arguments)


def encode(features: FloatArray, params: FloatArray, sizes: Sizes, out: FloatArray) -> None:
    """``cpu.rssm.encode`` on the GPU."""
    Ensemble(params, sizes).encode(features, out)


def observe_step(
    params: FloatArray,
    sizes: Sizes,
    features: FloatArray,
    uniforms: FloatArray,
    hidden: FloatArray,
    classes: Classes,
    work: FloatArray,
) -> None:
    """``cpu.rssm.observe_step`` on the GPU."""
    Ensemble(params, sizes).observe_step(features, uniforms, hidden, classes)


def rollout(
    params: FloatArray,
    sizes: Sizes,
    hidden: FloatArray,
    classes: Classes,
    uniforms: FloatArray,
    mean: FloatArray,
    variance: FloatArray,
    work: FloatArray,
    work_classes: Classes,
) -> None:
    """``cpu.rssm.rollout`` on the GPU."""
    Ensemble(params, sizes).rollout(hidden, classes, uniforms, mean, variance)


def delta_outputs(
    params: FloatArray, sizes: Sizes, hidden: FloatArray, classes: Classes, out: FloatArray
) -> None:
    """``cpu.rssm.delta_outputs`` on the GPU."""
    Ensemble(params, sizes).delta_outputs(hidden, classes, out)


def window_gradient(
    params: FloatArray,
    sizes: Sizes,
    window: Window,
    tr: Trace,
    dynamics: float,
    representation: float,
    free: float,
    grad: FloatArray,
) -> float:
    """``cpu.bptt.window_gradient`` on the GPU; of `tr`, only the divergences are written."""
    ensemble = Ensemble(params.reshape(1, -1), sizes, grads=grad.reshape(1, -1))
    losses = np.zeros((1, 1))
    ensemble.window_gradients(
        Window(*(field.reshape(1, 1, *field.shape) for field in window)),
        tr.hidden[0].reshape(1, 1, -1),
        tr.classes[0].reshape(1, 1, -1),
        np.ones((1, 1), np.bool_),
        dynamics,
        representation,
        free,
        losses,
        tr.divergences.reshape(1, -1),
    )
    ensemble.copy_gradients_to(grad.reshape(1, -1))
    return float(losses[0, 0])


def adam_update(
    params: FloatArray,
    grad: FloatArray,
    first: FloatArray,
    second: FloatArray,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    max_norm: float,
) -> float:
    """``cpu.training.adam_update`` on the GPU."""
    weights, moments = params.reshape(1, -1), (first.reshape(1, -1), second.reshape(1, -1))
    ensemble = Ensemble(weights, Sizes(), *moments, grad.reshape(1, -1))
    norms = np.zeros(1)
    objective = Objective(
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        max_norm=max_norm,
    )
    ensemble.adam_updates(np.array([step]), objective, norms)
    ensemble.copy_to(weights, *moments)
    grad[:] = 0.0
    return float(norms[0])


def update(
    params: FloatArray,
    grads: FloatArray,
    first: FloatArray,
    second: FloatArray,
    updates: NDArray[np.int64],
    generators: NDArray[np.uint64],
    sizes: Sizes,
    replay: Replay,
    observed: int,
    unit: float,
    windows: int,
    window: Window,
    tr: Trace,
    objective: Objective,
    losses: NDArray[np.float64],
) -> None:
    """``cpu.training.update`` on the GPU; of `window`, only the number of steps is read."""
    ensemble = Ensemble(params, sizes, first, second, grads)
    steps = len(window.changes)
    ensemble.update(updates, generators, replay, observed, unit, windows, steps, objective, losses)
    ensemble.copy_to(params, first, second)
    ensemble.copy_gradients_to(grads)
