"""A slow, obvious oracle of the training state: everything from the whole history, every time.

It never imports a kernel. A history is a list of rows ``(loss, gradient norm, learning rate, Gram
matrices or None, restarted before)``. Below it, a network in plain NumPy for real histories.
"""

import itertools
import math

import numpy as np

SCALES = [2, 4, 8, 16, 32, 64, 128, 256]
TINY = 1e-20


def ewm(x, scale):
    """Exponential average of x at each step: weights (1 - 1/scale)^age, over their sum."""
    n = len(x)
    age = np.arange(n)[:, None] - np.arange(n)
    weight = np.where(age >= 0, (1 - 1 / scale) ** np.maximum(age, 0), 0.0)
    return weight @ x / weight.sum(axis=1)


def filled_log(x):
    """Logarithms; what has none repeats the one before, and before the first one the first."""
    x = np.asarray(x, dtype=float)
    good = (x > 0) & (x < np.inf)
    if not good.any():
        return np.zeros(len(x))
    last = np.maximum.accumulate(np.where(good, np.arange(len(x)), -1))
    return np.log(x[np.where(last >= 0, last, np.argmax(good))])


def moves(y, restarted):
    difference = np.clip(np.diff(y, prepend=y[0]), -8, 8)
    return np.where(restarted, 0.0, difference)


class Averaged:
    """A series without its jumps, averaged up to three times at one scale, and its residuals."""

    def __init__(self, move, scale):
        y = np.cumsum(move)
        once = ewm(y, scale)
        twice = ewm(once, scale)
        self.gap = y - once
        self.trend = once - twice
        self.curvature = self.trend - (twice - ewm(twice, scale))
        # Level and slope of the double exponential smoothing, as a forecast of the next value.
        forecast = 2 * once - twice + (once - twice) / (scale - 1)
        self.residual = np.append(0.0, y[1:] - forecast[:-1])
        before = np.append(0.0, self.residual[:-1])
        turn = np.diff(move, prepend=0.0)
        self.variance = ewm(self.residual**2, scale)
        self.covariance = ewm(self.residual * before, scale)
        self.cubes = ewm(self.residual**3, scale)
        self.roughness = np.log((ewm(turn**2, scale) + TINY) / (ewm(move**2, scale) + TINY))


def signed_log(x):
    return np.sign(x) * np.log1p(np.abs(x))


def values(history):
    """Raw features of all steps, (steps, 64)."""
    loss, norm, rate, grams, restarted = zip(*history, strict=True)
    restarted = np.array(restarted)
    n = len(restarted)
    y, z, r = filled_log(loss), filled_log(norm), filled_log(rate)
    by_scale = [Averaged(moves(y, restarted), s) for s in SCALES]
    f = dict(zip(SCALES, by_scale, strict=True))
    g = {s: Averaged(moves(z, restarted), s) for s in SCALES}
    h = {s: Averaged(moves(r, np.zeros(n, bool)), s) for s in SCALES}
    length = r - r[0] + z - z[0]
    first_order = length + z - z[0] - (y - y[0])

    columns = [f[s].trend for s in SCALES]
    columns += [f[s].curvature for s in (8, 32, 128)]
    columns += [f[s].gap for s in (2, 16, 128)]
    smooth = y - f[8].gap
    columns += [smooth - np.minimum.accumulate(np.append(y[0], smooth))[:-1]]
    columns += [0.5 * np.log(f[s].variance + TINY) for s in (16, 128)]
    columns += [(f[8].variance - f[64].variance) / (f[8].variance + f[64].variance + TINY)]
    columns += [signed_log(f[s].trend / np.sqrt(f[s].variance + TINY)) for s in (16, 128)]
    columns += [f[s].roughness for s in (16, 128)]
    columns += [f[32].covariance / (f[32].variance + TINY)]
    columns += [f[64].cubes / (f[64].variance + TINY) ** 1.5]
    ratio = f[64].residual ** 2 / (f[64].variance + TINY)
    columns += [[np.log1p(max(ratio[i] * (1 - 1 / 64) ** (t - i) for i in range(t + 1)))
                 for t in range(n)]]  # fmt: skip
    columns += [g[s].trend for s in (4, 16, 64)]
    columns += [g[32].curvature, g[4].gap, g[64].gap]
    columns += [0.5 * np.log(g[32].variance + TINY), g[32].roughness]
    columns += [g[32].covariance / (g[32].variance + TINY)]
    for s in (16, 128):
        both = (f[s].variance + TINY) * (g[s].variance + TINY)
        columns += [ewm(f[s].residual * g[s].residual, s) / np.sqrt(both)]
    columns += [g[s].trend + h[s].trend for s in (8, 128)]
    gain = np.exp(np.clip(first_order, -80, 80))
    columns += [signed_log(-f[s].trend / ewm(gain, s)) for s in (16, 128)]
    peak = np.maximum.accumulate(r) - r[0]
    columns += [y - y[0], z - z[0], length - g[16].gap - h[16].gap - peak, first_order - peak]
    columns += [np.log(np.cumsum(np.exp(np.clip(length, -80, 80)))) - length]
    columns += [np.log(np.cumsum(np.exp(np.clip(r - r[0], -80, 80)))) - (r - r[0])]
    columns += [np.log(np.arange(1, n + 1))]
    last = np.maximum.accumulate(np.where(restarted, np.arange(n), 0))
    columns += [32 / (32 + np.arange(n) - last + 1)]
    gaps = [np.zeros(n)] + [g[s].gap + h[s].gap for s in SCALES]
    columns += [b - a for a, b in itertools.pairwise(gaps)]
    columns += [-g[s].trend / np.sqrt(g[s].trend ** 2 + g[s].variance + TINY) for s in SCALES]
    out = np.stack([np.asarray(c) for c in columns], axis=1)

    seen, tail = False, np.zeros(16)
    for t, gram in enumerate(grams):
        if gram is not None and len(gram[0]) >= 3:
            seen = True
            tail = gram_values(gram, tail)
        if seen:
            out[t, 48:] = tail
    return out


def gram_values(gram, before):
    """Growth and cosine of displacements, by way of positions that have these inner products."""
    tail = before.copy()
    for j in range(8):
        b = gram[j * len(gram) // 8]
        eigenvalues, vectors = np.linalg.eigh(b)
        steps = np.diff(vectors * np.sqrt(np.maximum(eigenvalues, 0)), axis=0)
        lengths = np.linalg.norm(steps, axis=1)
        if lengths[-1] > 0:
            tail[j] = max(-5.0, np.log(lengths[-1] / np.sqrt(np.mean(lengths**2))))
            if lengths[-2] > 0:
                tail[8 + j] = steps[-1] @ steps[-2] / (lengths[-1] * lengths[-2])
    return tail


def normalised(raw, memory, limit):
    """The last step's features from all raw ones (steps, k), by weights of the whole history.

    The i-th value weighs 1 / min(i, memory) when it comes, and fades by what every
    later one weighs.
    """
    shares = 1 / np.minimum(np.arange(1, len(raw) + 1), memory)
    fading = np.append(np.cumprod((1 - shares[1:])[::-1])[::-1], 1.0)
    weight = shares * fading
    mean = weight @ raw
    variance = weight @ (raw - mean) ** 2
    return np.clip((raw[-1] - mean) / np.sqrt(variance + 1e-14), -limit, limit)


def network(rng, widths):
    shapes = list(itertools.pairwise(widths))
    weights = [rng.standard_normal(s) * math.sqrt(2.0 / s[0]) for s in shapes]
    return [p for w in weights for p in (w, np.zeros(w.shape[1]))]


def loss_and_gradients(parameters, x, labels):
    """Cross-entropy of a ReLU network and its gradients, by hand."""
    inputs = [x]
    layers = [parameters[i : i + 2] for i in range(0, len(parameters), 2)]
    for w, b in layers[:-1]:
        inputs.append(np.maximum(inputs[-1] @ w + b, 0.0))
    logits = inputs[-1] @ layers[-1][0] + layers[-1][1]
    logits -= logits.max(axis=1, keepdims=True)
    p = np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    rows = np.arange(len(x))
    loss = -np.mean(np.log(p[rows, labels]))
    p[rows, labels] -= 1.0
    back, gradients = p / len(x), []
    for (w, _), below in zip(reversed(layers), reversed(inputs), strict=True):
        gradients = [below.T @ back, back.sum(axis=0), *gradients]
        back = (back @ w.T) * (below > 0)
    return loss, gradients
