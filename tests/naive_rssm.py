"""Slow, obvious NumPy oracle of one RSSM. Nothing here imports the code under test.

Everything is float64 with explicit one-hot vectors, one matrix for each part of the model, and
every formula as the papers write it. ``p`` is a dictionary of named matrices (in, out) and biases.
"""

import numpy as np

UNIFORM_SHARE = 0.01
LOG_SCALE_LIMIT = 7.0


def parts(weights, sizes):
    """Named float64 parts out of the packed views of one member (see ``params.Weights``)."""
    n_l = sizes.latent
    n_s = sizes.categoricals * sizes.classes
    gru, prior, loss = slice(3 * n_l), slice(3 * n_l, 3 * n_l + n_s), 3 * n_l + n_s
    packed = {
        "encoder_w": weights.encoder_weight,
        "encoder_b": weights.encoder_bias,
        "gru_input_w": weights.stochastic_weight[:, gru],
        "gru_input_b": weights.stochastic_bias[gru],
        "gru_hidden_w": weights.hidden_weight[:, gru],
        "gru_hidden_b": weights.hidden_bias[gru],
        "prior_w": weights.hidden_weight[:, prior],
        "prior_b": weights.hidden_bias[prior],
        "posterior_w": weights.posterior_weight,
        "posterior_b": weights.posterior_bias,
        "loss_hidden_w": weights.hidden_weight[:, loss : loss + 2],
        "loss_stochastic_w": weights.stochastic_weight[:, 3 * n_l : 3 * n_l + 2],
        "loss_b": weights.hidden_bias[loss : loss + 2],
        "delta_w": weights.delta_weight,
        "delta_b": weights.delta_bias,
    }
    return {name: np.array(part, dtype=np.float64) for name, part in packed.items()}


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def softplus(x):
    return np.logaddexp(0.0, x)


def one_hot(classes, n_classes):
    return np.concatenate([np.eye(n_classes)[k] for k in classes])


def gru(x, h, p):
    gi = x @ p["gru_input_w"] + p["gru_input_b"]
    gh = h @ p["gru_hidden_w"] + p["gru_hidden_b"]
    n = len(h)
    r = sigmoid(gi[:n] + gh[:n])
    z = sigmoid(gi[n : 2 * n] + gh[n : 2 * n])
    c = np.tanh(gi[2 * n :] + r * gh[2 * n :])
    return (1.0 - z) * c + z * h


def encode(features, p):
    return np.tanh(features @ p["encoder_w"] + p["encoder_b"])


def probabilities(logits, n_classes):
    groups = logits.reshape(-1, n_classes)
    e = np.exp(groups - groups.max(axis=1, keepdims=True))
    softmax = e / e.sum(axis=1, keepdims=True)
    return (1.0 - UNIFORM_SHARE) * softmax + UNIFORM_SHARE / n_classes


def sample(probs, uniforms):
    """Classes by inverse CDF, and how close a uniform number came to an edge."""
    classes, margin = [], np.inf
    for row, u in zip(probs, uniforms, strict=True):
        edges = np.cumsum(row)[:-1]
        classes.append(int(np.sum(u >= edges)))
        margin = min(margin, np.min(np.abs(edges - u), initial=np.inf))
    return classes, margin


def prior(h, p, n_classes):
    return probabilities(h @ p["prior_w"] + p["prior_b"], n_classes)


def posterior(h, e, p, n_classes):
    return probabilities(np.concatenate([h, e]) @ p["posterior_w"] + p["posterior_b"], n_classes)


def loss_head(h, s, p):
    """Mean and log-scale of the change of the log loss."""
    mean, raw = h @ p["loss_hidden_w"] + s @ p["loss_stochastic_w"] + p["loss_b"]
    return mean, LOG_SCALE_LIMIT * np.tanh(raw / LOG_SCALE_LIMIT)


def delta_head(h, s, p):
    raw = np.concatenate([h, s]) @ p["delta_w"] + p["delta_b"]
    mapped = softplus(raw)
    mapped[1] = sigmoid(raw[1])
    return mapped


def observe(h, classes, features, uniforms, p, n_classes):
    """State after one observed step, and the margin of its draws."""
    h = gru(one_hot(classes, n_classes), h, p)
    classes, margin = sample(posterior(h, encode(features, p), p, n_classes), uniforms)
    return h, classes, margin


def rollout(h, classes, uniforms, p, n_classes):
    """Running sums of mean and variance of the change along one path; margin of its draws."""
    means, variances, margin = [], [], np.inf
    for step in uniforms:
        s = one_hot(classes, n_classes)
        mean, log_scale = loss_head(h, s, p)
        means.append(mean)
        variances.append(2.0 * np.exp(log_scale) ** 2)
        h = gru(s, h, p)
        classes, nearest = sample(prior(h, p, n_classes), step)
        margin = min(margin, nearest)
    return np.cumsum(means), np.cumsum(variances), margin


def kl(q, p):
    return float(np.sum(q * np.log(q / p)))


def window_loss(h, classes, window, p, n_classes, dynamics, representation, free):
    """Loss of a window, its KL terms, and the margin of its draws.

    ``window`` is a list of (features, change, change weight, delta, delta weight, uniforms).
    """
    total, divergences, margin = 0.0, [], np.inf
    for features, change, change_weight, delta, delta_weight, uniforms in window:
        h = gru(one_hot(classes, n_classes), h, p)
        q = posterior(h, encode(features, p), p, n_classes)
        divergences.append(kl(q, prior(h, p, n_classes)))
        classes, nearest = sample(q, uniforms)
        margin = min(margin, nearest)
        s = one_hot(classes, n_classes)
        mean, log_scale = loss_head(h, s, p)
        nll = abs(change - mean) / np.exp(log_scale) + np.log(2.0) + log_scale
        error = np.sum((delta_head(h, s, p) - delta) ** 2)
        total += change_weight * nll + delta_weight * error
        total += (dynamics + representation) * max(free, divergences[-1])
    return total, divergences, margin
