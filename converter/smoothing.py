"""Per-channel scalings that make inputs and weights of a site alike in size, folded into earlier tensors.

For channel j: t_j = (norm of the weights that read it)^a / (root mean square of its values)^b, with geometric
mean 1. The exponents come from a study on SmolLM2-135M; they differ by site, and little depends on them: on
web text that was not calibrated on, none of a grid has outputs better by 2 % (docs/accuracy.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .recipe import Scaling
from .source import Source
from .structure import Site

__all__ = ["fold", "scaling_factors"]

_EXPONENTS = {
    "attention input": (0.25, 0.45),
    "attention output": (0.25, 0.30),
    "MLP input": (0.25, 0.37),
    "down projection": (0.50, 0.35),
}
_LIMIT = 20.0
_SMALLEST = 1e-6
_ROWS_AT_A_TIME = 4096


def scaling_factors(
    site: Site, mean_squares: NDArray[np.float32], source: Source
) -> NDArray[np.float32] | None:
    """t of each input channel, float32[n_in]; None where the site cannot be scaled.

    Args:
        mean_squares: of the inputs, float32[n_in].
        source: to read the weights from.
    """
    if not site.can_scale or site.kind not in _EXPONENTS:
        return None
    a, b = _EXPONENTS[site.kind]
    squares = np.zeros(len(mean_squares), np.float64)
    for name in site.readers:
        tensor = source.tensors[name]
        for first in range(0, tensor.n_rows, _ROWS_AT_A_TIME):
            rows = source.read_rows(name, first, min(_ROWS_AT_A_TIME, tensor.n_rows - first))
            squares += np.square(rows, dtype=np.float64).sum(axis=0)
    norms = np.sqrt(squares) + _SMALLEST
    sizes = np.sqrt(np.maximum(mean_squares.astype(np.float64), _SMALLEST**2))
    factors = norms**a / sizes**b
    # Query heads that read the same value head share its factors: their geometric mean.
    by_head = np.log(factors).reshape(*site.heads, -1)
    factors = np.exp(np.broadcast_to(by_head.mean(axis=1, keepdims=True), by_head.shape)).reshape(-1)
    factors /= np.exp(np.log(factors).mean())
    return np.clip(factors, 1 / _LIMIT, _LIMIT).astype(np.float32)


def fold(sites: Mapping[Site, NDArray[np.float32]]) -> dict[str, Scaling]:
    """Transforms, by tensor, that scale the input channels of sites and leave the model the same.

    Args:
        sites: factors float32[n_in] of each site that is scaled.
    """
    columns: dict[str, NDArray[np.float32]] = {}
    rows: dict[str, NDArray[np.float32]] = {}
    for site, factors in sites.items():
        for name in site.readers:
            columns[name] = np.float32(1) / factors
        for name in site.gains:
            columns[name] = factors
        written = np.ascontiguousarray(factors.reshape(*site.heads, -1)[:, 0]).reshape(-1)
        for name in site.writers:
            target = rows if name.endswith(".weight") else columns
            target[name] = written
    return {name: Scaling(columns.get(name), rows.get(name)) for name in {**columns, **rows}}
