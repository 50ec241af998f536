"""Speed of one matrix product by weight type, through ggml's public interface, relative to Q4_0.

The time is that of a MUL_MAT in a graph, as llama.cpp runs it: the input is float32, its encoding counts.
For one token the weights come from memory, as in a model: the graph multiplies copies of the matrix, one
after the other, that take several last-level caches. For several tokens the graph multiplies one matrix
again and again (--from-memory changes that). A shape is rows x inputs. Inputs differ from product to product,
up to 64 tokens of them: a CPU would learn the order of one input's spikes by heart.

Activations are normal with some outlier channels. SPK4's silence threshold is set so that the shares of
silent inputs are those of --silent-shares; rows state what was encoded.
Limits are measured in the same run: bytes read from memory and bytes added per second (limits.py).
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
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
from limits import measure_limits
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from spikequant_gguf import codec
from spikequant_gguf.compare import BASELINE_TYPE
from spikequant_gguf.errors import SpikeQuantError, UnsupportedError
from spikequant_gguf.format import DEFAULT_SALIENCE, MAX_SILENCE, TYPE_SPK4
from spikequant_gguf.ggml_api import MAX_COPIES, PLAIN_BUFFER, MatMul, buffer_types
from spikequant_gguf.ggml_patch.progress import Progress
from spikequant_gguf.host import default_threads, host_facts
from spikequant_gguf.llama_log import redirect_log
from spikequant_gguf.native import NativeLibrary, bind, load
from spikequant_gguf.rotation import rotate
from spikequant_gguf.runtime import import_llama_cpp
from spikequant_gguf.variants import SPIKE_TYPE

TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8, "q4_k": 12, "iq4_nl": 20, "iq4_xs": 23, SPIKE_TYPE: TYPE_SPK4}
DEFAULT_TYPES = "q4_0,q4_k,iq4_xs,q8_0,f16,spk4"
DEFAULT_SHAPES = "576x576,1536x576,576x1536,2048x1024,2048x2048,3072x3072,4096x4096"
QUICK_SHAPES = "576x576,1536x576,2048x2048,4096x4096"
DEFAULT_TOKENS = "1,2,4,8,64,512"
QUICK_TOKENS = "1,8,64,512"
DEFAULT_SILENT_SHARES = "0.15,0.38"
_FEATURES = (
    *("avx", "avx2", "avx_vnni", "avx512", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "amx_int8"),
    *("neon", "dotprod", "matmul_int8", "sve", "sme", "riscv_v", "vsx", "vxe"),
)
_DISTINCT_ROWS = 256  # quantizing is slow, and the time does not depend on which rows repeat
_WEIGHT_STDEV = 0.02
_CACHES_OF_COPIES = 4.0  # the copies take so many last-level caches
_DISTINCT_TOKENS = 64  # of the inputs that products take in turns
_LARGEST_ERROR = 0.5  # relative, of a product that counts as right; silence is most of it
_PLOTTED_TOKENS = 64


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
        seconds_stdev: over the rounds.
        gproducts_per_s: 1e9 weight-activation pairs per second, of the median.
        ratio_q4_0: how many times as fast as Q4_0 in the same round, median; then the range over the rounds.
        silent_share, salient_share: of the encoded inputs; None but for SPK4.
        silent_target: the share of silent inputs that was asked for; None but for SPK4.
        read_share: weights read per second (without those of silent inputs), of the measured read
            bandwidth; None unless they come from memory. Several tokens read all of them.
        add_share: one byte added per weight and spike, of the measured byte additions per second; None but
            for SPK4.
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
    seconds_stdev: float
    gproducts_per_s: float
    ratio_q4_0: float
    ratio_q4_0_min: float
    ratio_q4_0_max: float
    silent_share: float | None
    salient_share: float | None
    silent_target: float | None
    read_share: float | None
    add_share: float | None


@dataclass(frozen=True)
class Coding:
    """How SPK4 encodes the inputs of a product, and what became of them."""

    silence: float
    silent_target: float
    silent_share: float
    salient_share: float


class Copies:
    """Products of one matrix or of equal copies, one after the other in a graph, as a model's layers are.

    Close it after use.

    Args:
        x: float32[sets, tokens, inputs], which products take in turns.
        least_bytes: of all copies together, as far as a graph takes them; 0: one matrix takes all inputs.
        coding: of SPK4 products.
    """

    def __init__(
        self,
        kind: str,
        shape: Shape,
        x: NDArray[np.float32],
        threads: int,
        buffer: str,
        least_bytes: int,
        coding: Coding | None,
    ) -> None:
        native = load()
        distinct = _distinct_weights(native, kind, shape)
        packed = np.resize(distinct, (shape.rows, distinct.shape[1]))  # repeats the rows
        self.matrix_bytes = packed.nbytes
        wanted = math.ceil(least_bytes / packed.nbytes) if least_bytes else len(x)
        self.number = min(MAX_COPIES, wanted)
        self._product = MatMul(
            *(TYPES[kind], packed, shape.inputs, x.shape[1]),
            buffer=buffer,
            threads=threads,
            salience=DEFAULT_SALIENCE if coding else 0.0,
            silence=coding.silence if coding else 0.0,
            copies=self.number,
            shared_weights=not least_bytes,
            library=native,
        )
        self._rounds = _inputs_of_rounds(x, self.number)
        self._changes = self.number < len(x)  # many copies have enough inputs, and their threads stay awake
        try:
            inputs = next(self._rounds)
            self._product.set_input(inputs)
            self._product.compute()
            _check_output(
                kind, native.dequantize(TYPES[kind], distinct, shape.inputs), inputs[-1], self._product
            )
        except BaseException:
            self.close()
            raise

    def sample(self, repeats: int) -> float:
        """Seconds per product, over `repeats` rounds of all copies."""
        seconds = 0.0
        for _ in range(repeats):
            if self._changes:
                self._product.set_input(next(self._rounds))
            seconds += self._product.compute()
        return seconds / (repeats * self.number)

    def close(self) -> None:
        self._product.close()

    def __enter__(self) -> Copies:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark with command-line arguments; returns 0, or raises SystemExit."""
    parser = new_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: two minutes or so")
    quick = f"with --quick {QUICK_SHAPES}"
    parser.add_argument("--shapes", type=_shapes, help=f"rows x inputs ({DEFAULT_SHAPES}; {quick})")
    parser.add_argument("--tokens", type=counts, help=f"({DEFAULT_TOKENS}; with --quick {QUICK_TOKENS})")
    parser.add_argument(
        "--silent-shares",
        type=_shares,
        default=DEFAULT_SILENT_SHARES,
        help="of SPK4's inputs; those after the first for one token only (%(default)s)",
    )
    parser.add_argument(
        "--from-memory",
        type=positive,
        default=1,
        metavar="TOKENS",
        help="weights come from memory for up to so many tokens (%(default)s)",
    )
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
    options.shapes = options.shapes or _shapes(QUICK_SHAPES if options.quick else DEFAULT_SHAPES)
    options.tokens = options.tokens or counts(QUICK_TOKENS if options.quick else DEFAULT_TOKENS)
    return run("matmul", argv, options, measure, render, plot)


def measure(options: argparse.Namespace, progress: Progress) -> dict:
    """The document of all products: settings, limits, notes, rows."""
    redirect_log(import_llama_cpp())  # ggml reports every tensor that it repacks
    notes: list[str] = []
    rows: list[dict] = []
    types = {shape: _fitting_types(with_baseline(options.types), shape, notes) for shape in options.shapes}
    memory_bytes = int(_CACHES_OF_COPIES * last_level_cache())
    progress.step("limits", "read bandwidth, byte additions")
    limits = options.journal.rows("limits", lambda: measure_limits(sorted(options.threads), memory_bytes))
    # Helper threads that have been started spin for a while, so products of one thread come first.
    for threads in sorted(options.threads):
        limit = next(row for row in limits if row["threads"] == threads)
        for shape in options.shapes:
            for tokens in options.tokens:
                case = f"{shape.rows}x{shape.inputs}, {tokens} tokens, {threads} threads"
                progress.step("matmul", case)
                rows += options.journal.rows(
                    case,
                    lambda shape=shape, tokens=tokens, limit=limit: _measure_case(
                        shape, tokens, types[shape], limit, options, progress
                    ),
                )
    places = {shape: place for place, shape in enumerate(options.shapes)}
    rows.sort(key=lambda row: (places[Shape(row["rows"], row["inputs"])], row["tokens"], row["threads"]))
    settings = ("rounds", "sample_ms", "outlier_share", "outlier_factor", "silent_shares", "from_memory")
    return {
        "settings": {name: getattr(options, name) for name in settings},
        "limits": limits,
        "notes": notes,
        "rows": rows,
    }


def render(out: rich.console.Console, document: dict) -> None:
    titles = ("rows", "inputs", "tokens", "threads", "type", "path")
    titles += ("silent", "µs", "Gproducts/s", "× Q4_0 (range)", "of limit")
    cells = []
    for row in document["rows"]:
        ratio = ratio_text(row["ratio_q4_0"], row["ratio_q4_0_min"], row["ratio_q4_0_max"])
        silent = "" if row["silent_share"] is None else f"{row['silent_share']:.0%}"
        shares = {"read": row["read_share"], "add": row["add_share"]}
        limit = " ".join(f"{name} {share:.0%}" for name, share in shares.items() if share is not None)
        numbers = (silent, f"{row['seconds'] * 1e6:.1f}", f"{row['gproducts_per_s']:.1f}", ratio, limit)
        cells.append([*(str(row[name]) for name in titles[:6]), *numbers])
    show_table(out, titles, cells)
    for limit in document["limits"]:
        out.print(
            f"{limit['threads']} threads: {limit['read_bytes_per_s'] / 1e9:.1f} GB/s read from memory, "
            f"{limit['byte_adds_per_s'] / 1e9:.0f} G byte additions/s",
            highlight=False,
        )
    rounds, most = document["settings"]["rounds"], document["settings"]["from_memory"]
    tokens = "one token" if most == 1 else f"up to {most} tokens"
    out.print(f"Median of {rounds} rounds in turns; {tokens}: weights from memory.", highlight=False)
    show_notes(out, document)


def plot(figure: Figure, document: dict) -> None:
    """Ratios to Q4_0: over tokens for the largest matrix, over inputs for 64 tokens (else the most)."""
    first_share = document["settings"]["silent_shares"][0]
    rows = [row for row in document["rows"] if row["silent_target"] in (None, first_share)]
    all_threads = sorted({row["threads"] for row in rows})
    shape = max((row["inputs"] * row["rows"], row["rows"], row["inputs"]) for row in rows)[1:]
    tokens = max(row["tokens"] for row in rows)
    tokens = _PLOTTED_TOKENS if any(row["tokens"] == _PLOTTED_TOKENS for row in rows) else tokens
    axes = figure.subplots(len(all_threads), 2, squeeze=False, sharey=True)
    for line, threads in zip(axes, all_threads, strict=True):
        mine = [row for row in rows if row["threads"] == threads]
        over_tokens = [row for row in mine if (row["rows"], row["inputs"]) == shape]
        over_inputs = [row for row in mine if row["tokens"] == tokens]
        _curves(line[0], over_tokens, "tokens", f"{shape[0]} x {shape[1]}, {threads} threads")
        _curves(line[1], over_inputs, "inputs", f"{tokens} tokens, {threads} threads")
    axes[0][0].legend(fontsize=8)


def _curves(axes: Axes, rows: Sequence[dict], over: str, title: str) -> None:
    for kind in dict.fromkeys(row["type"] for row in rows):
        # of several matrices with the same inputs the one with most rows
        mine = {row[over]: row for row in sorted(rows, key=lambda row: row["rows"]) if row["type"] == kind}
        points = sorted((place, row["ratio_q4_0"]) for place, row in mine.items())
        width = 2.5 if kind == SPIKE_TYPE else 1.0
        color = f"C{list(TYPES).index(kind)}"  # the same in all panels
        axes.plot(*zip(*points, strict=True), marker="o", linewidth=width, color=color, label=kind.upper())
    axes.set_xscale("log", base=2)
    axes.set_xlabel(over)
    axes.set_ylabel("speed, Q4_0 = 1")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)


def _measure_case(
    shape: Shape,
    tokens: int,
    types: Sequence[str],
    limit: dict,
    options: argparse.Namespace,
    progress: Progress,
) -> list[dict]:
    """Rows of all types; limit: of the machine with the number of threads that compute."""
    threads = limit["threads"]
    sets = max(1, _DISTINCT_TOKENS // tokens)
    x = _activations((sets, tokens, shape.inputs), options.outlier_share, options.outlier_factor)
    from_memory = tokens <= options.from_memory
    least_bytes = int(_CACHES_OF_COPIES * last_level_cache()) if from_memory else 0
    shares = options.silent_shares if tokens == 1 else options.silent_shares[:1]
    with ExitStack() as stack:
        subjects, paths, codings, sizes = {}, {}, {}, {}
        for kind in types:
            buffer = _buffer(kind, shape, tokens)
            for coding in [_coding(x, share) for share in shares] if kind == SPIKE_TYPE else [None]:
                copies = stack.enter_context(Copies(kind, shape, x, threads, buffer, least_bytes, coding))
                repeats = max(1, round(options.sample_ms / 1e3 / (copies.number * copies.sample(1))))
                name = kind if coding is None else f"{kind} {coding.silence}"
                subjects[name] = lambda copies=copies, repeats=repeats: copies.sample(repeats)
                paths[name], codings[name], sizes[name] = buffer, coding, copies.matrix_bytes
        measured = in_turns(subjects, options.rounds, progress.advance)
    rows: list[Row] = []
    for name, seconds in measured.items():
        kind, coding = name.partition(" ")[0], codings[name]
        ratio, low, high = ratios(seconds, measured[BASELINE_TYPE])
        median = statistics.median(seconds)
        firing = 1 - coding.silent_share if coding else 1.0
        bytes_per_s = sizes[name] * (firing if tokens == 1 else 1.0) / median
        adds_per_s = shape.rows * shape.inputs * firing * tokens / median
        rows.append(
            Row(
                rows=shape.rows,
                inputs=shape.inputs,
                tokens=tokens,
                threads=threads,
                type=kind,
                path=paths[name],
                isa=load().kernel if kind == SPIKE_TYPE else _compiled_features(load()),
                weights_from="memory" if from_memory else "cache",
                seconds=median,
                seconds_min=min(seconds),
                seconds_stdev=statistics.stdev(seconds) if len(seconds) > 1 else 0.0,
                gproducts_per_s=shape.rows * shape.inputs * tokens / median / 1e9,
                ratio_q4_0=ratio,
                ratio_q4_0_min=low,
                ratio_q4_0_max=high,
                silent_share=coding.silent_share if coding else None,
                salient_share=coding.salient_share if coding else None,
                silent_target=coding.silent_target if coding else None,
                read_share=bytes_per_s / limit["read_bytes_per_s"] if from_memory else None,
                add_share=adds_per_s / limit["byte_adds_per_s"] if coding else None,
            )
        )
    return [asdict(row) for row in rows]


def _inputs_of_rounds(x: NDArray[np.float32], copies: int) -> Iterator[NDArray[np.float32]]:
    """The inputs of all copies for one round after the other: float32[copies, tokens, inputs]."""
    for first in itertools.count(step=copies):
        yield x[np.arange(first, first + copies) % len(x)]


def _coding(x: NDArray[np.float32], silent_share: float) -> Coding:
    """The silence threshold that gives a share of silent inputs, and the shares as encoded."""
    x = x.reshape(-1, x.shape[-1])
    rotated = np.abs(rotate(x))
    steps = np.median(rotated, axis=1, keepdims=True) * (DEFAULT_SALIENCE / 7.5)
    silence = float(min(np.quantile(rotated / steps, silent_share), MAX_SILENCE))
    blocks = load().encode_activations(x, silence=silence)
    fine, coarse, _, _ = codec.activation_values(blocks)
    salient = np.unpackbits(blocks["salient_mask"].copy().view(np.uint8))
    return Coding(silence, silent_share, float(np.mean((fine == 0) & (coarse == 0))), float(salient.mean()))


def _activations(shape: tuple[int, int, int], share: float, factor: float) -> NDArray[np.float32]:
    """Normal values; some channels are larger in every token, as in the residual stream of models.

    Returns float32 of the shape: sets, tokens, inputs.
    """
    rng = np.random.default_rng(1)
    x = rng.standard_normal(shape).astype(np.float32)
    x[..., rng.permutation(shape[-1])[: round(share * shape[-1])]] *= factor
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


def _shares(text: str) -> list[float]:
    try:
        found = list(dict.fromkeys(float(share) for share in text.split(",")))
    except ValueError:
        found = [-1.0]
    if not all(0 <= share < 1 for share in found):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of shares, like 0.15,0.38")
    return found


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
