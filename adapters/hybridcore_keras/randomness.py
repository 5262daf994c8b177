"""The global random states that a run in Keras draws from."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

# There is no public way to see the generator without making one, which draws from Python's.
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR

from hybridcore import randomness


def random_states() -> dict[str, Any]:
    """Return the global states of Python, NumPy, Keras and the backend, as numbers and arrays.

    The seed generators of layers are state of the model. Operations of TensorFlow that keep their
    state to themselves, as ``tf.random.shuffle``, cannot be looked into.
    """
    generator = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)
    return {
        **randomness.random_states(),
        "keras": None if generator is None else np.array(ops.convert_to_numpy(generator.state)),
        keras.backend.backend(): _of_backend(),
    }


def check_random_states(state: dict[str, Any]) -> None:
    """Raise ``ValueError``, ``TypeError`` or ``LookupError`` unless `state` can be restored."""
    randomness.check_random_states(state)
    if state["keras"] is not None and np.shape(state["keras"]) != (2,):
        raise ValueError("the state of Keras's seed generator is two numbers")


def restore_random_states(state: dict[str, Any]) -> None:
    """Take back what :func:`random_states` returned; of another backend, what is not its own."""
    randomness.restore_random_states(state)
    if state["keras"] is not None:
        generator = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)
        if generator is None:
            generator = keras.random.SeedGenerator(0)
            global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, generator)
        generator.state.assign(np.asarray(state["keras"]))
    of_backend = state.get(keras.backend.backend())
    if of_backend is not None:
        _restore_of_backend(of_backend)


def _of_backend() -> Any:
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        return torch.get_rng_state().numpy().copy()
    if backend == "tensorflow":
        from tensorflow.python.ops import stateful_random_ops

        generator = stateful_random_ops.global_generator
        return None if generator is None else np.array(generator.state.numpy())
    return None


def _restore_of_backend(state: Any) -> None:
    if keras.backend.backend() == "torch":
        import torch

        torch.set_rng_state(torch.tensor(np.asarray(state, dtype=np.uint8)))
    else:
        import tensorflow as tf

        tf.random.get_global_generator().reset(np.asarray(state, dtype=np.int64))
