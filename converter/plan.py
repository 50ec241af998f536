"""Decides which type each tensor of a model gets, and says why.

Matrices of linear layers become SPK4. Everything else gets the type that llama-quantize gives it in a Q4_0
model, so that the two differ in their linear layers only. Rules and names follow src/llama-quant.cpp and
src/llama-arch.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from spikequant_gguf.errors import InputError, UnsupportedError
from spikequant_gguf.format import MAX_INPUTS, QK_SPK, TYPE_SPK4

__all__ = [
    "FLOATS",
    "INTEGERS",
    "ConversionPlan",
    "TensorPlan",
    "TensorRow",
    "TypeRule",
    "make_plan",
    "parse_type_rules",
]

TensorRow = tuple[str, tuple[int, ...], GGMLQuantizationType]
"""Name, shape (as ggml counts dimensions, inputs first) and stored type of a tensor."""

_T = GGMLQuantizationType
_SPK4 = _T(TYPE_SPK4)

# Parts of the names of tensors that llama-quantize never quantizes: small, sensitive, or no matrix.
_KEPT = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)
_KEPT_NAMES = ("position_embd.weight", "token_types.weight")
_GLM5_NEXT = "glm5-next"
_KEPT_GLM5_NEXT = (
    "hc_",
    "indexer.attn_q_b",
    "indexer.attn_k",
    "indexer.proj",
    "indexer_compressor_gate",
    "indexer_compressor_ape",
    "ssm_f_a.weight",
    "ssm_f_b.weight",
    "ssm_g_a.weight",
    "ssm_g_b.weight",
    "ssm_beta.weight",
    "attn_kv_a_mqa.weight",
    "attn_k_b.weight",
    "attn_v_b.weight",
)
# Tensors of glm5-next that llama-quantize does not store in fewer than 8 bits.
_PRECISE_GLM5_NEXT = ("attn_q_a", "attn_q_b", "nextn.eh_proj")
# Weights of two or more dimensions that no matrix product uses: convolutions, vectors, tables that are added.
_NO_PRODUCT = re.compile(
    r"conv1d|\.conv[12]\.|^convnext\.\d+\.dw|_conv_base|_res_score|_compressor_ape|masked_embd"
    r"|time_mix_(lerp|decay\.|r_k|k_k|k_a)|channel_mix_lerp|ssm_a\b|ssm_d\b|attn_sinks|exp_probs_b|layer_output_scale"
)
# Tables of which rows are looked up.
_LOOKUP = re.compile(
    r"^(per_layer_)?token_embd\.weight$|nextn\.embed_tokens|^markov_w1\.|^selector_(predecessor|successor)\.|^d2t\b"
)
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_OUTPUT = "output.weight"

# Where rows are no whole number of blocks, llama-quantize takes the type on the right.
_FALLBACK = {
    **dict.fromkeys(
        ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), _T.IQ4_NL
    ),
    **dict.fromkeys(("SPK4", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), _T.Q4_0),
    "Q4_K": _T.Q5_0,
    "Q5_K": _T.Q5_1,
    "Q6_K": _T.Q8_0,
}
# Types that a model may be quantized to; the others have no quantizer.
_TARGETS = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *(
        "IQ1_S",
        "IQ1_M",
        "IQ2_XXS",
        "IQ2_XS",
        "IQ2_S",
        "IQ3_XXS",
        "IQ3_S",
        "IQ4_NL",
        "IQ4_XS",
        "TQ1_0",
        "TQ2_0",
    ),
    *("MXFP4", "SPK4"),
)
_NEED_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
FLOATS = (_T.F32, _T.F16, _T.BF16, _T.F64)
INTEGERS = (_T.I8, _T.I16, _T.I32, _T.I64)


@dataclass(frozen=True)
class TensorPlan:
    """What becomes of one tensor.

    Attributes:
        name: of the tensor.
        shape: as ggml counts dimensions, inputs first.
        source_type: stored type.
        target_type: type that it gets; SPK4 for linear layers.
        source_bytes: size of its data before.
        target_bytes: and after.
        reason: why it gets this type, in a few words.
    """

    name: str
    shape: tuple[int, ...]
    source_type: GGMLQuantizationType
    target_type: GGMLQuantizationType
    source_bytes: int
    target_bytes: int
    reason: str

    @property
    def n_weights(self) -> int:
        return int(np.prod(self.shape, dtype=object))

    @property
    def is_spiking(self) -> bool:
        """Whether it becomes SPK4."""
        return self.target_type == _SPK4

    def line(self, name_width: int = 0) -> str:
        """One line for a listing: name, shape, types, sizes, reason."""
        shape = " x ".join(str(size) for size in self.shape)
        types = f"{self.source_type.name} -> {self.target_type.name}"
        sizes = f"{self.source_bytes / 2**20:9.2f} -> {self.target_bytes / 2**20:8.2f} MiB"
        return f"{self.name:<{name_width}}  {shape:>20}  {types:<14} {sizes}  {self.reason}"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": list(self.shape),
            "source_type": self.source_type.name,
            "target_type": self.target_type.name,
            "source_bytes": self.source_bytes,
            "target_bytes": self.target_bytes,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class ConversionPlan:
    """What becomes of all tensors of a model.

    Attributes:
        architecture: general.architecture of the model, for example ``llama``.
        tensors: in the order of the output file.
        warnings: sentences that the user should read.
    """

    architecture: str
    tensors: tuple[TensorPlan, ...]
    warnings: tuple[str, ...] = ()

    @property
    def spiking(self) -> tuple[TensorPlan, ...]:
        """The tensors that become SPK4."""
        return tuple(tensor for tensor in self.tensors if tensor.is_spiking)

    @property
    def n_weights(self) -> int:
        return sum(tensor.n_weights for tensor in self.tensors)

    @property
    def source_bytes(self) -> int:
        return sum(tensor.source_bytes for tensor in self.tensors)

    @property
    def target_bytes(self) -> int:
        """Bytes of all tensor data, without header and padding."""
        return sum(tensor.target_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Of the whole model, all tensors counted."""
        return 8 * self.target_bytes / self.n_weights

    def lines(self) -> list[str]:
        """A line per tensor, then the totals."""
        width = max(len(tensor.name) for tensor in self.tensors)
        spiking = self.spiking
        share = sum(tensor.n_weights for tensor in spiking) / self.n_weights
        return [
            *(tensor.line(width) for tensor in self.tensors),
            f"{len(spiking)} of {len(self.tensors)} tensors become SPK4: {share:.1%} of all weights",
            f"{self.source_bytes / 2**20:.2f} MiB -> {self.target_bytes / 2**20:.2f} MiB, "
            f"{8 * self.source_bytes / self.n_weights:.2f} -> {self.bits_per_weight:.2f} bits per weight",
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "source_bytes": self.source_bytes,
            "target_bytes": self.target_bytes,
            "bits_per_weight": self.bits_per_weight,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class TypeRule:
    """Gives tensors whose name contains a match of `pattern` the type `type`."""

    pattern: re.Pattern[str]
    type: GGMLQuantizationType


def parse_type_rules(texts: Iterable[str]) -> tuple[TypeRule, ...]:
    """Rules of the form ``REGEX=TYPE``, as in ``ffn_down=q8_0``. Raises InputError for any other form."""
    return tuple(_parse_type_rule(text) for text in texts)


def _parse_type_rule(text: str) -> TypeRule:
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern or not name:
        raise InputError(
            f"tensor type '{text}' is not of the form REGEX=TYPE", "for example --tensor-type ffn_down=q8_0"
        )
    name = name.strip().upper()
    if name not in _TARGETS or name not in _T.__members__:
        raise InputError(
            f"tensor type '{text}': '{name}' is no type to quantize to", f"choose of {', '.join(_TARGETS)}"
        )
    try:
        return TypeRule(re.compile(pattern), _T[name])
    except re.error as error:
        raise InputError(
            f"tensor type '{text}': the expression is wrong: {error}",
            "see Python's syntax of regular expressions",
        ) from error


def make_plan(
    architecture: str,
    tensors: Sequence[TensorRow],
    rules: Sequence[TypeRule] = (),
    *,
    pure: bool = False,
    has_importance: bool = False,
) -> ConversionPlan:
    """Plans a conversion.

    Args:
        architecture: general.architecture of the model.
        tensors: name, shape (ggml's order, inputs first) and type of each.
        rules: types that the user wants; of those that match a name the last one counts. Tensors that are
        never
            quantized, as norms, keep their type.
        pure: make embeddings and output SPK4, too.
        has_importance: whether there is an importance matrix, which some types need.

    Raises:
        InputError: a rule matches no tensor, or a wanted type needs an importance matrix.
        UnsupportedError: no tensor can become SPK4.
    """
    names = {name for name, _, _ in tensors}
    chooser = _Chooser(architecture, tied=_OUTPUT not in names, pure=pure)
    planned = []
    used: set[int] = set()
    for name, shape, kind in tensors:
        target, reason = chooser.choose(name, shape, kind)
        rule = next(
            (number for number in reversed(range(len(rules))) if rules[number].pattern.search(name)), None
        )
        if rule is not None and chooser.why_kept(name, shape, kind) is None:
            used |= {number for number in range(len(rules)) if rules[number].pattern.search(name)}
            target, reason = _fit(rules[rule].type, shape, f"asked for by '{rules[rule].pattern.pattern}'")
            if target.name in _NEED_IMPORTANCE and not has_importance:
                raise InputError(
                    f"tensor '{name}': type {target.name} needs an importance matrix",
                    "give one with --imatrix",
                )
        elif kind not in FLOATS and target != _SPK4 and _n_bytes(shape, kind) <= _n_bytes(shape, target):
            target, reason = kind, "already quantized and not larger" if target != kind else reason
        planned.append(
            TensorPlan(name, shape, kind, target, _n_bytes(shape, kind), _n_bytes(shape, target), reason)
        )
    unused = [rule.pattern.pattern for number, rule in enumerate(rules) if number not in used]
    if unused:
        raise InputError(
            f"tensor type '{unused[0]}' matches no tensor that can be quantized",
            "list the names with --dry-run",
        )
    if not any(tensor.is_spiking for tensor in planned):
        raise UnsupportedError(
            "no tensor of this model can become SPK4",
            f"SPK4 is for matrices whose rows are multiples of {QK_SPK} weights, at most {MAX_INPUTS}",
        )
    return ConversionPlan(architecture, tuple(planned), _warnings(planned))


class _Chooser:
    """The type of a tensor by name, shape and stored type, before the user's rules."""

    def __init__(self, architecture: str, tied: bool, pure: bool) -> None:
        self.architecture = architecture
        self.tied = tied
        self.pure = pure

    def why_kept(self, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> str | None:
        """Why a tensor keeps its type whatever the user wants; None if it can be quantized."""
        if kind in INTEGERS:
            return "integers"
        if all(size == 1 for size in shape[1:]):  # as ggml counts dimensions
            return "one-dimensional"
        if not name.endswith("weight"):
            return "not a weight"
        if name in _KEPT_NAMES or any(part in name for part in _KEPT):
            return "never quantized by llama.cpp"
        if self.architecture == _GLM5_NEXT and any(part in name for part in _KEPT_GLM5_NEXT):
            return "never quantized by llama.cpp"
        if _NO_PRODUCT.search(name):
            return "not part of a matrix product"
        return None

    def choose(
        self, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType
    ) -> tuple[GGMLQuantizationType, str]:
        kept = self.why_kept(name, shape, kind)
        if kept is not None:
            return kind, kept
        if self.pure:
            return _fit(_SPK4, shape, "linear layer" if not _LOOKUP.search(name) else "pure")
        if self.architecture == _GLM5_NEXT and any(part in name for part in _PRECISE_GLM5_NEXT):
            return _fit(_T.Q8_0, shape, "sensitive in this architecture")
        if name == _OUTPUT or (self.tied and name in _EMBEDDINGS):
            # llama-quantize gives the vocabulary more bits, Falcon's rows do not suit Q6_K
            wanted = _T.Q8_0 if self.architecture == "falcon" else _T.Q6_K
            return _fit(wanted, shape, "output" if name == _OUTPUT else "embedding shared with the output")
        if _LOOKUP.search(name):
            return _fit(_T.Q4_0, shape, "rows are looked up, not multiplied")
        return _fit(_SPK4, shape, "linear layer")


def _fit(
    wanted: GGMLQuantizationType, shape: tuple[int, ...], reason: str
) -> tuple[GGMLQuantizationType, str]:
    """`wanted`, or the type that llama-quantize falls back to where rows do not fit into its blocks."""
    n_in = shape[0]
    if wanted == _SPK4 and n_in > MAX_INPUTS:
        reason = f"rows of {n_in} weights are longer than SPK4's {MAX_INPUTS}"
        wanted = _T.Q4_0
    kind = wanted
    if n_in % GGML_QUANT_SIZES[kind][0] != 0:
        kind = _FALLBACK.get(kind.name, kind)
    if n_in % GGML_QUANT_SIZES[kind][0] != 0:
        kind = _T.F16
    if kind == wanted:
        return kind, reason
    return kind, f"rows of {n_in} weights are no multiple of {wanted.name}'s {GGML_QUANT_SIZES[wanted][0]}"


def _n_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape, dtype=object)) // block * size


def _warnings(tensors: Sequence[TensorPlan]) -> tuple[str, ...]:
    """What the user should know about the source."""
    lossy = {tensor.source_type.name: None for tensor in tensors if tensor.is_spiking}
    lossy = [name for name in lossy if _T[name] not in FLOATS and name != "Q8_0"]
    if not lossy:
        return ()
    return (
        f"the source is quantized already ({', '.join(lossy)}), and its errors add up: "
        "an F16, BF16 or Q8_0 model gives better results",
    )
