"""The rotation: a Walsh-Hadamard transform of each block of 64 values."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import UnsupportedError
from .format import QK_SPK

__all__ = ["rotate"]


def rotate(x: ArrayLike) -> NDArray[np.float32]:
    """Rotates every block of 64 values along the last axis. It is its own inverse, up to rounding.

    Args:
        x: float[..., n], n a multiple of 64; taken as float32.

    Returns:
        float32[..., n], a new array. Overflow gives infinities, as float32 arithmetic does.

    Raises:
        UnsupportedError: n is not a multiple of 64.
    """
    x = np.asarray(x, np.float32)
    if x.ndim == 0 or x.shape[-1] % QK_SPK != 0:
        raise UnsupportedError(f"cannot rotate {x.shape[-1] if x.ndim else 1} values in blocks of {QK_SPK}")
    # one column per block, so that each stage is a few additions of long contiguous vectors
    columns = x.reshape(-1, QK_SPK).T.copy()
    with np.errstate(all="ignore"):
        for h in (1, 2, 4, 8, 16, 32):  # the order fixes the rounding
            pairs = columns.reshape(QK_SPK // (2 * h), 2, h, -1)
            a, b = pairs[:, 0], pairs[:, 1]
            difference = a - b
            a += b
            b[...] = difference
        columns *= np.float32(0.125)
    return columns.T.copy().reshape(x.shape)
