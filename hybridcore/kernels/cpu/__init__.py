"""Serial numba kernels for the CPU. They take microseconds: threads would cost more than gain.

The decorators below fix the options for all of them. ``error_model="numpy"`` lets loops with a
division vectorise. Of fastmath only what NaN and Inf survive is on: ``contract`` fuses a product
and a sum; ``reassoc``, only where a long sum must vectorise, lets the compiler order its terms.

Much of compiling is for what no one calls: entries from C, which none of them has, and from Python,
which a ``part`` has not, because only other kernels call it. What is ``inlined`` is compiled within
its one caller, and not once more by itself.

numba's cache watches the file of a kernel, not the files of the functions it calls: after a change
of ``bodies`` or ``params``, delete ``__pycache__`` of this folder.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

# Any: numba's type stubs do not list the last two.
_OPTIONS: dict[str, Any] = {
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract"},
    "no_cfunc_wrapper": True,
}
_PART = _OPTIONS | {"no_cpython_wrapper": True}


def jit(function: Kernel) -> Kernel:
    """Compile a kernel."""
    return cast(Kernel, njit(**_OPTIONS)(function))


def inlined(function: Kernel) -> Kernel:
    """Compile a long kernel within its one caller."""
    return cast(Kernel, njit(inline="always", **_OPTIONS)(function))


def part(function: Kernel) -> Kernel:
    """Compile a kernel that only kernels call."""
    return cast(Kernel, njit(**_PART)(function))


def part_sums(function: Kernel) -> Kernel:
    """Compile a part with a long sum."""
    return cast(Kernel, njit(**_PART | {"fastmath": {"contract", "reassoc"}})(function))
