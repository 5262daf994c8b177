"""CUDA twins of the CPU kernels: one block for each member or sample path of the ensemble.

`device` compiles the CPU's own serial functions for the GPU, and a thread calls them on the part of
the arrays that is its own: a column, a categorical. Written anew are the loops that threads share,
and with them what the CPU chains of ``bodies`` inside such a loop: the loss of a step, its slopes
in the heads and in the class probabilities. ``api`` calls the kernels with host arrays.

In the kernels, `lane` is the number of a thread in its block and `lanes` that of all of them; every
loop over columns or rows runs ``range(lane, n, lanes)``, so any number of threads is right.

Importing needs no driver, and nothing compiles before the first launch. Compiled kernels are not
cached on disk: numba's cache would not see a change of the CPU functions that they are made of.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import numba.cuda

cuda: Any = numba.cuda  # its types name none of what kernels use


@functools.cache
def device(function: Callable[..., Any]) -> Any:
    """Compile a function of the CPU kernels, and all that it calls, as a device function.

    numba could call the CPU's functions from a kernel as they are, but would read their fastmath
    flags as a wish for approximate division.

    Parameters
    ----------
    function : callable
        Plain Python, or compiled by ``njit``.
    """
    plain: Any = getattr(function, "py_func", function)
    scope = dict(plain.__globals__)
    for name in plain.__code__.co_names:
        if hasattr(scope.get(name), "py_func"):
            scope[name] = device(scope[name])
    return cuda.jit(device=True)(types.FunctionType(plain.__code__, scope, plain.__name__))


def kernel(function: Callable[..., Any]) -> Any:
    """Make a kernel of `function`, compiled for the types of its arguments at its first launch."""
    return cuda.jit(function)
