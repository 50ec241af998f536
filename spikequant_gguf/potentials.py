"""Membrane potentials of spike-coded layers, and the one multiplication by a scale per output."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .activations import SPIKE_STEPS, activation_values, activations_rotated, spike_train
from .errors import InputError
from .format import QK_SPK
from .weights import weight_values, weights_rotated

__all__ = ["matmul", "potentials", "potentials_by_spikes", "readout"]

_F = np.float32


def _check_pair(weights: NDArray[np.void], activations: NDArray[np.void]) -> None:
    if weights.ndim != 2 or activations.ndim != 2 or weights.shape[1] != activations.shape[1]:
        raise InputError(
            f"weights of {weights.shape} blocks and activations of {activations.shape} blocks do not fit",
            f"both need two dimensions and the same number of blocks of {QK_SPK} inputs",
        )


def potentials(
    weights: NDArray[np.void], activations: NDArray[np.void]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The integer dot products of weight values with activation codes.

    Args:
        weights: BLOCK_SPK4[rows, n_blocks].
        activations: BLOCK_SPKA[tokens, n_blocks].

    Returns:
        int32[tokens, rows] N over standard and fine salient activations, and the same of S over coarse ones.

    Raises:
        InputError: the shapes do not fit.
    """
    _check_pair(weights, activations)
    # float64 holds these integers and all their partial sums exactly, and its product is the fast one
    w = weight_values(weights)[0].T.astype(np.float64)
    fine, coarse, _, _ = activation_values(activations)
    return (fine.astype(np.float64) @ w).astype(np.int32), (coarse.astype(np.float64) @ w).astype(np.int32)


def potentials_by_spikes(
    weights: NDArray[np.void], activations: NDArray[np.void]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """What potentials() computes, by integrate-and-fire neurons: additions only, spike by spike.

    Each step adds the weights of the inputs that fire then to the input current (inhibitory ones are
    subtracted), and the current to the membrane potential. So an input of magnitude m, firing m steps before
    the end, counts m times. Fine and coarse spikes feed potentials of their own.
    """
    _check_pair(weights, activations)
    w = weight_values(weights)[0].astype(np.int32)
    train = spike_train(activations)
    shape = (len(activations), len(weights))
    membranes = np.zeros((2, *shape), np.int32)
    for token in range(len(activations)):
        for membrane, of_class in zip(membranes, (~train.coarse[token], train.coarse[token]), strict=True):
            current = np.zeros(len(weights), np.int32)
            for step in range(SPIKE_STEPS):
                fires = of_class & (train.time[token] == step)
                current += w[:, fires & (train.polarity[token] > 0)].sum(axis=1, dtype=np.int32)
                current -= w[:, fires & (train.polarity[token] < 0)].sum(axis=1, dtype=np.int32)
                membrane[token] += current
    return membranes[0], membranes[1]


def readout(
    threshold: ArrayLike, step: ArrayLike, fine: ArrayLike, coarse: ArrayLike, shift: ArrayLike
) -> NDArray[np.float32]:
    """The outputs y = (threshold * step) * (float(N) + float(S) * 2^shift), in float32 and this order.

    Args:
        threshold: float32[rows], of the weights.
        step: float32[tokens], of the activations.
        fine: int32[tokens, rows] potentials N.
        coarse: int32[tokens, rows] potentials S.
        shift: int[tokens].

    Returns:
        float32[tokens, rows].
    """
    threshold, step = np.asarray(threshold, _F), np.asarray(step, _F)
    power = np.ldexp(_F(1), np.asarray(shift, np.int32))
    with np.errstate(all="ignore"):
        scale = threshold[None, :] * step[:, None]
        potential = np.asarray(fine).astype(_F) + np.asarray(coarse).astype(_F) * power[:, None]
        return scale * potential


def matmul(weights: NDArray[np.void], activations: NDArray[np.void]) -> NDArray[np.float32]:
    """The outputs of a linear layer: float32[tokens, rows] of BLOCK_SPK4[rows, n] and BLOCK_SPKA[tokens, n].

    Where one of the two is rotated and the other is not, the output is NaN.
    """
    fine, coarse = potentials(weights, activations)
    _, _, step, shift = activation_values(activations)
    y = readout(weight_values(weights)[1], step, fine, coarse, shift)
    mismatch = activations_rotated(activations)[:, None] != weights_rotated(weights)[None, :]
    return np.where(mismatch, _F(np.nan), y)
