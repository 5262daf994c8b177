"""Serial numba kernels for the CPU. They take microseconds: threads would cost more than gain.

The decorators below fix the options for all of them. ``error_model="numpy"`` lets loops with a
division vectorise. Of fastmath only what NaN and Inf survive is on: ``contract`` fuses a product
and a sum; ``reassoc``, only where a long sum must vectorise, lets the compiler order its terms.

numba's cache watches the file of a kernel, not the files of the functions it calls: after a change
of ``bodies`` or ``params``, delete ``__pycache__`` of this folder.
"""

from numba import njit

jit = njit(cache=True, error_model="numpy", fastmath={"contract"})
jit_sums = njit(cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
