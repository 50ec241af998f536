"""Speed of one matrix product by weight type, through ggml's public interface, relative to Q4_0.

The time is that of a graph with one MUL_MAT, as llama.cpp runs it: the input is float32, its encoding counts.
For one token the weights come from memory, as in a model: copies of the matrix, in rotation, exceed the
last-level cache. For several tokens one copy is used again and again. A shape is rows x inputs.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from ctypes import c_int
from dataclasses import asdict, dataclass

import numpy as np
import rich.console
from common import (
    REPACK_BUFFER,
    SPIKE_BUFFER,
    counts,
    in_turns,
    last_level_cache,
    names,
    new_parser,
    positive,
    ratio_text,
    ratios,
    require_fast_path,
    run,
    show_notes,
    show_table,
    with_baseline,
)
from numpy.typing import NDArray

from spikequant_gguf.compare import BASELINE_TYPE
from spikequant_gguf.errors import SpikeQuantError, UnsupportedError
from spikequant_gguf.format import TYPE_SPK4
from spikequant_gguf.ggml_api import PLAIN_BUFFER, MatMul, buffer_types
from spikequant_gguf.ggml_patch.progress import Progress
from spikequant_gguf.host import default_threads, host_facts
from spikequant_gguf.llama_log import redirect_log
from spikequant_gguf.native import NativeLibrary, bind, load
from spikequant_gguf.runtime import import_llama_cpp
from spikequant_gguf.variants import SPIKE_TYPE

TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8, "q4_k": 12, "iq4_nl": 20, "iq4_xs": 23, SPIKE_TYPE: TYPE_SPK4}
DEFAULT_TYPES = "q4_0,q4_k,iq4_xs,q8_0,f16,spk4"
DEFAULT_SHAPES = "576x576,1536x576,576x1536,2048x2048,4096x4096"
DEFAULT_TOKENS = "1,8,64,512"
_FEATURES = (
    *("avx", "avx2", "avx_vnni", "avx512", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "amx_int8"),
    *("neon", "dotprod", "matmul_int8", "sve", "sme", "riscv_v", "vsx", "vxe"),
)
_DISTINCT_ROWS = 256  # quantizing is slow, and the time does not depend on which rows repeat
_WEIGHT_STDEV = 0.02
_CACHES_OF_COPIES = 2.0  # the copies take so many last-level caches
_LARGEST_ERROR = 0.3  # relative, of a product that counts as right; 4-bit activations are within 0.15


@dataclass(frozen=True)
class Shape:
    """A weight matrix of `rows` outputs and `inputs` inputs."""

    rows: int
    inputs: int


@dataclass(frozen=True)
class Row:
    """One measured product.

    Attributes:
        rows, inputs: of the weight matrix.
        path: buffer type that the weights are in.
        isa: what computes: the spike kernel, or the instruction sets that ggml was compiled for.
        weights_from: ``memory`` or ``cache``.
        seconds, seconds_min: per product, median and smallest of the rounds.
        gproducts_per_s: 1e9 weight-activation pairs per second, of the median.
        ratio_q4_0: how many times as fast as Q4_0 in the same round, median; then the range over the rounds.
    """

    rows: int
    inputs: int
    tokens: int
    threads: int
    type: str
    path: str
    isa: str
    weights_from: str
    seconds: float
    seconds_min: float
    gproducts_per_s: float
    ratio_q4_0: float
    ratio_q4_0_min: float
    ratio_q4_0_max: float


class Copies:
    """Products of equal copies of one matrix, computed in rotation. Close it after use.

    Args:
        x: float32[tokens, inputs].
        least_bytes: of all copies together; 0 makes one.
    """

    def __init__(
        self, kind: str, shape: Shape, x: NDArray[np.float32], threads: int, buffer: str, least_bytes: int
    ) -> None:
        native = load()
        distinct = _distinct_weights(native, kind, shape)
        packed = np.resize(distinct, (shape.rows, distinct.shape[1]))  # repeats the rows
        self._next = 0
        with ExitStack() as stack:
            self._products: list[MatMul] = []
            for _ in range(max(1, math.ceil(least_bytes / packed.nbytes))):
                product = MatMul(
                    *(TYPES[kind], packed, shape.inputs, len(x)),
                    buffer=buffer,
                    threads=threads,
                    library=native,
                )
                self._products.append(stack.enter_context(product))
                product.set_input(x)
                product.compute()
            _check_output(kind, native.dequantize(TYPES[kind], distinct, shape.inputs), x, self._products[0])
            self._stack = stack.pop_all()

    def __len__(self) -> int:
        return len(self._products)

    def sample(self, repeats: int) -> float:
        """Seconds per product, over `repeats` products of successive copies."""
        total = 0.0
        for _ in range(repeats):
            total += self._products[self._next].compute()
            self._next = (self._next + 1) % len(self._products)
        return total / repeats

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Copies:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark with command-line arguments; returns 0, or raises SystemExit."""
    parser = new_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: two minutes or so")
    parser.add_argument("--shapes", type=_shapes, default=DEFAULT_SHAPES, help="rows x inputs (%(default)s)")
    parser.add_argument("--tokens", type=counts, default=DEFAULT_TOKENS, help="(%(default)s)")
    parser.add_argument("-t", "--threads", type=counts, help="(1 and 2, as far as there are cores)")
    parser.add_argument("--types", type=names, default=DEFAULT_TYPES, help="(%(default)s)")
    parser.add_argument("-r", "--rounds", type=positive, help="(15, with --quick 5)")
    parser.add_argument(
        "--sample-ms", type=positive, help="least time of a measurement (50, with --quick 10)"
    )
    parser.add_argument("--outlier-share", type=float, default=0.01, help="of input channels (%(default)s)")
    parser.add_argument("--outlier-factor", type=float, default=6.0, help="scale of outliers (%(default)s)")
    options = parser.parse_args(argv)
    for kind in options.types:
        if kind not in TYPES:
            parser.error(f"there is no type '{kind}'; choose from {', '.join(TYPES)}")
    if not 0 <= options.outlier_share <= 1:
        parser.error("--outlier-share is between 0 and 1")
    options.rounds = options.rounds or (5 if options.quick else 15)
    options.sample_ms = options.sample_ms or (10 if options.quick else 50)
    options.threads = options.threads or sorted({1, min(2, default_threads())})
    return run("matmul", argv, options, measure, render)


def measure(options: argparse.Namespace, progress: Progress) -> dict:
    """The document of all products: settings, notes, rows."""
    redirect_log(import_llama_cpp())  # ggml reports every tensor that it repacks
    notes: list[str] = []
    rows: list[Row] = []
    # Helper threads that have been started spin for a while, so products of one thread come first.
    for threads in sorted(options.threads):
        for shape in options.shapes:
            types = _fitting_types(with_baseline(options.types), shape, notes)
            for tokens in options.tokens:
                progress.step("matmul", f"{shape.rows}x{shape.inputs}, {tokens} tokens, {threads} threads")
                rows += _measure_case(shape, tokens, threads, types, options, progress)
    places = {shape: place for place, shape in enumerate(options.shapes)}
    rows.sort(key=lambda row: (places[Shape(row.rows, row.inputs)], row.tokens, row.threads))
    settings = ("rounds", "sample_ms", "outlier_share", "outlier_factor")
    return {
        "settings": {name: getattr(options, name) for name in settings},
        "notes": notes,
        "rows": [asdict(row) for row in rows],
    }


def render(out: rich.console.Console, document: dict) -> None:
    titles = ("rows", "inputs", "tokens", "threads", "type", "path", "µs", "Gproducts/s", "× Q4_0 (range)")
    cells = []
    for row in document["rows"]:
        ratio = ratio_text(row["ratio_q4_0"], row["ratio_q4_0_min"], row["ratio_q4_0_max"])
        numbers = (f"{row['seconds'] * 1e6:.1f}", f"{row['gproducts_per_s']:.1f}", ratio)
        cells.append([*(str(row[name]) for name in titles[:6]), *numbers])
    show_table(out, titles, cells)
    rounds = document["settings"]["rounds"]
    out.print(f"Median of {rounds} rounds in turns; one token: weights from memory.", highlight=False)
    show_notes(out, document)


def _measure_case(
    shape: Shape,
    tokens: int,
    threads: int,
    types: Sequence[str],
    options: argparse.Namespace,
    progress: Progress,
) -> list[Row]:
    x = _activations(tokens, shape.inputs, options.outlier_share, options.outlier_factor)
    least_bytes = int(_CACHES_OF_COPIES * last_level_cache()) if tokens == 1 else 0
    with ExitStack() as stack:
        subjects, paths = {}, {}
        for kind in types:
            paths[kind] = buffer = _buffer(kind, shape, tokens)
            copies = stack.enter_context(Copies(kind, shape, x, threads, buffer, least_bytes))
            repeats = max(1, round(options.sample_ms / 1e3 / copies.sample(len(copies))))
            subjects[kind] = lambda copies=copies, repeats=repeats: copies.sample(repeats)
        measured = in_turns(subjects, options.rounds, progress.advance)
    rows = []
    for kind, seconds in measured.items():
        ratio, low, high = ratios(seconds, measured[BASELINE_TYPE])
        median = statistics.median(seconds)
        rows.append(
            Row(
                rows=shape.rows,
                inputs=shape.inputs,
                tokens=tokens,
                threads=threads,
                type=kind,
                path=paths[kind],
                isa=load().kernel if kind == SPIKE_TYPE else _compiled_features(load()),
                weights_from="memory" if tokens == 1 else "cache",
                seconds=median,
                seconds_min=min(seconds),
                gproducts_per_s=shape.rows * shape.inputs * tokens / median / 1e9,
                ratio_q4_0=ratio,
                ratio_q4_0_min=low,
                ratio_q4_0_max=high,
            )
        )
    return rows


def _activations(tokens: int, inputs: int, share: float, factor: float) -> NDArray[np.float32]:
    """Normal values; some channels are larger in every token, as in the residual stream of models."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((tokens, inputs)).astype(np.float32)
    x[:, rng.permutation(inputs)[: round(share * inputs)]] *= factor
    return x


def _distinct_weights(native: NativeLibrary, kind: str, shape: Shape) -> NDArray[np.uint8]:
    """The first rows of the matrix, quantized: uint8[rows, row bytes]; the matrix repeats them."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((min(shape.rows, _DISTINCT_ROWS), shape.inputs)) * _WEIGHT_STDEV
    return native.quantize(TYPES[kind], values.astype(np.float32))


def _check_output(kind: str, weights: NDArray[np.float32], x: NDArray[np.float32], product: MatMul) -> None:
    """Raises SpikeQuantError if the last token's outputs are wrong: the speed of nonsense is no speed."""
    expected = weights.astype(np.float64) @ x[-1].astype(np.float64)
    found = product.output()[-1, : len(expected)]
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    if not error <= _LARGEST_ERROR:
        raise SpikeQuantError(
            f"a product of {kind.upper()} weights is wrong by {error:.0%}", "run `spikequant doctor`"
        )


def _buffer(kind: str, shape: Shape, tokens: int) -> str:
    """Buffer type that llama.cpp would choose for such a product."""
    candidates = [SPIKE_BUFFER] if kind == SPIKE_TYPE else [REPACK_BUFFER, PLAIN_BUFFER]
    native = load()
    packed = np.zeros((shape.rows, native.row_bytes(TYPES[kind], shape.inputs)), np.uint8)
    for buffer in candidates:
        try:
            MatMul(TYPES[kind], packed, shape.inputs, tokens, buffer=buffer, library=native).close()
        except UnsupportedError:
            continue
        require_fast_path(kind, [buffer], host_facts())
        return buffer
    raise SpikeQuantError(
        f"no buffer type of {', '.join(buffer_types())} takes a {shape.rows}x{shape.inputs} product of "
        f"{kind.upper()} weights on its fast path",
        "run `spikequant doctor`, or use other shapes",
    )


def _fitting_types(types: Sequence[str], shape: Shape, notes: list[str]) -> list[str]:
    """The types whose blocks divide a row; the first and SPK4 must. Says in a note which do not."""
    native, fitting = load(), []
    for kind in types:
        try:
            native.row_bytes(TYPES[kind], shape.inputs)
        except UnsupportedError as error:
            if kind in (BASELINE_TYPE, SPIKE_TYPE):
                raise
            note = f"{kind.upper()} is left out at {shape.inputs} inputs: {error.message}"
            if note not in notes:
                notes.append(note)
        else:
            fitting.append(kind)
    return fitting


def _compiled_features(native: NativeLibrary) -> str:
    """Instruction sets that the stock kernels were compiled for and this CPU has, as in ``avx2+avx512``."""
    functions = {f"ggml_cpu_has_{feature}": (c_int, ()) for feature in _FEATURES}
    bind(native.cpu, functions)
    present = [feature for feature in _FEATURES if getattr(native.cpu, f"ggml_cpu_has_{feature}")()]
    return "+".join(present) or "none"


def _shapes(text: str) -> list[Shape]:
    try:
        found = [Shape(*map(int, shape.lower().split("x"))) for shape in text.split(",")]
    except (TypeError, ValueError):
        found = [Shape(0, 0)]
    if any(min(shape.rows, shape.inputs) < 1 for shape in found):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of shapes, like 576x576,1536x576")
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    raise SystemExit(main())
