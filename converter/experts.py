"""Calibration of a mixture's experts: each for the inputs of those tokens that are routed to it.

The source model alone is run. An expert sees few of the tokens, fewer perhaps than it has inputs, and weights
fitted to these alone would be worse for others. So its second moments are mixed with those of all tokens of
the layer, and these with moments of inputs that know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spikequant_gguf.format import BLOCK_SPK4
from spikequant_gguf.ggml_api import TensorStruct, operation_number, tensor_at, tensor_values
from spikequant_gguf.native import NativeLibrary

from .inputs import moments
from .layer_journal import LayerJournal
from .lockstep import BatchModel
from .plan import ConversionPlan
from .source import Source

__all__ = ["RoutedModel", "calibrate_experts", "expert_tensors"]

_PRIOR_ROWS = 1.0  # tokens per input that what is mixed in counts as
_WEIGHTS, _INPUT, _EXPERTS = 0, 1, 2  # of MUL_MAT_ID's sources

_Quantize = Callable[[NDArray[np.float32], NDArray[np.float32]], "NDArray[np.void]"]


def expert_tensors(planned: ConversionPlan) -> list[str]:
    """Spiking tensors with a matrix per expert, in their order."""
    return [tensor.name for tensor in planned.spiking if len(tensor.shape) == 3]


def calibrate_experts(
    path: Path,
    tokens: NDArray[np.int32],
    names: Collection[str],
    source: Source,
    journal: LayerJournal,
    quantize: _Quantize,
    library: NativeLibrary,
    *,
    threads: int,
    report: Callable[[str], None],
) -> None:
    """Quantizes expert tensors into the journal, those that are not in it yet.

    Args:
        path: of the source model.
        tokens: int32[stretches, ctx] of the calibration text.
        names: of the tensors.
        source: to read their weights from.
        journal: gets BLOCK_SPK4[experts * rows, n_blocks] of each.
        quantize: one matrix, float32[rows, n_in], for second moments of its rotated inputs,
            float32[n_in, n_in].
        library: native functions.
        threads: that compute.
        report: called with the name of each tensor that is finished.
    """
    left = {name for name in names if name not in journal}
    for name in set(names) - left:
        report(name)
    if not left:
        return

    def on_routed(name: str, x: NDArray[np.float32], experts: NDArray[np.int32]) -> None:
        if name in left:
            journal.add(name, _quantize_tensor(source, name, x, experts, quantize, library, threads))
            left.remove(name)
            report(name)
            if not left:
                model.stop()

    stretches, ctx = tokens.shape
    model = RoutedModel(path, stretches, ctx, threads, left, on_routed)
    with model:
        model.run(tokens)


def _quantize_tensor(
    source: Source,
    name: str,
    x: NDArray[np.float32],
    experts: NDArray[np.int32],
    quantize: _Quantize,
    library: NativeLibrary,
    threads: int,
) -> NDArray[np.void]:
    """Blocks of all matrices. x: float32[tokens, 1 or used, n_in]; experts: int32[tokens, used]."""
    tensor = source.tensors[name]
    n_experts = tensor.shape[2]
    rows = tensor.n_rows // n_experts
    layer = np.ascontiguousarray(x).reshape(-1, tensor.n_in)
    everything = _mixed_moments(layer, None, library, threads)
    routed = np.broadcast_to(x, (*experts.shape, tensor.n_in))
    blocks: list[NDArray[np.void]] = []
    for expert in range(n_experts):
        seen = np.ascontiguousarray(routed[experts == expert])
        own = _mixed_moments(seen, everything, library, threads)
        blocks.append(quantize(source.read_rows(name, expert * rows, rows), own))
    return np.concatenate(blocks, dtype=BLOCK_SPK4)


def _mixed_moments(
    seen: NDArray[np.float32],
    prior: NDArray[np.float32] | None,
    library: NativeLibrary,
    threads: int,
) -> NDArray[np.float32]:
    """Mean of x xᵀ over float32[tokens, n_in], mixed with `prior`, float32[n_in, n_in].

    prior: None for the inputs' own mean square on the diagonal.
    """
    n_tokens, n_in = seen.shape
    if n_tokens == 0 and prior is not None:
        return prior
    found, _ = moments(seen, seen, None, library, threads, deviations=False)
    if prior is None:
        prior = np.diag(np.full(n_in, np.diag(found).mean(), np.float32))
    share = np.float32(n_tokens / (n_tokens + _PRIOR_ROWS * n_in))
    found *= share
    found += prior * (1 - share)
    return found


class RoutedModel(BatchModel):
    """Shows what goes into the products that choose a matrix for each token.

    on_routed: called with the name of the tensor, float32[tokens, 1 or used, n_in] and int32[tokens, used],
    valid until it returns.
    """

    def __init__(
        self,
        path: Path,
        stretches: int,
        ctx: int,
        threads: int,
        names: Collection[str],
        on_routed: Callable[[str, NDArray[np.float32], NDArray[np.int32]], None],
    ) -> None:
        self._on_routed = on_routed
        super().__init__(
            path,
            stretches=stretches,
            ctx=ctx,
            threads=threads,
            names=dict.fromkeys(names),
            on_input=lambda *_: None,
        )

    def _on_product(self, node: TensorStruct, ask: bool) -> bool:
        if node.op != operation_number("MUL_MAT_ID"):
            return not ask
        sources = [tensor_at(node.src[i]) for i in (_WEIGHTS, _INPUT, _EXPERTS)]
        name = self._names.get(sources[_WEIGHTS].name)
        if name is None:
            return not ask
        if not ask:
            x, experts = tensor_values(sources[_INPUT])[0], tensor_values(sources[_EXPERTS])[0, 0]
            self._on_routed(name, x, experts)
        return True
