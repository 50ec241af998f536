"""The metadata of a converted model: those of the source, and how it was made.

Nothing in here depends on the machine, the time or the number of threads: the same source and options give
the same bytes. Of paths only the last component is kept.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import gguf

import spikequant_gguf
from spikequant_gguf import format as f
from spikequant_gguf.errors import InputError
from spikequant_gguf.files import file_sha256

from .importance import Importance
from .metadata import RawMetadata, encode_f32, encode_f32s, encode_text, encode_texts, encode_u32
from .progress import HASH, Progress
from .recipe import EncoderSettings, TensorStatistics

__all__ = ["Provenance", "command_line", "output_metadata", "source_digest"]

# Of the source, and not true of the result: how it was quantized, and how it was split into files.
_REPLACED = (b"general.file_type", b"general.quantization_version")
_DROPPED = (b"split.", b"spikequant.")
_IMATRIX = b"quantize.imatrix."


@dataclass(frozen=True)
class Provenance:
    """How a model was made.

    Attributes:
        source: name of the source, without its path.
        source_sha256: hex digest.
        command: see command_line.
        calibration: name of the text, or "none".
        salience: salience threshold of the model.
        silence: silence threshold of the model, in steps.
        encoder: settings of single layers, by the name of their weight tensor.
        importance: that was used, or None.
        overrides: encoded metadata that the user wants, by key.
    """

    source: str
    source_sha256: str
    command: str
    calibration: str = "none"
    salience: float = f.DEFAULT_SALIENCE
    silence: float = f.DEFAULT_SILENCE
    encoder: Mapping[str, EncoderSettings] = field(default_factory=dict)
    importance: Importance | None = None
    overrides: RawMetadata = field(default_factory=dict)


def source_digest(files: Mapping[str, Path], progress: Progress) -> str:
    """sha256 (hex) of a file. Of several files that of the lines ``name NUL sha256 LF``, sorted by name.

    Raises:
        InputError: a file cannot be read.
    """
    try:
        sizes = {name: path.stat().st_size for name, path in files.items()}
    except OSError as error:
        raise InputError(
            f"{error.filename}: {error.strerror}", "check the path and its permissions"
        ) from error
    lines, before = [], 0
    for name, path in sorted(files.items()):

        def report(done: int, _: int, name: str = name, before: int = before) -> None:
            progress(HASH, name, before + done, sum(sizes.values()))

        lines.append((name, file_sha256(path, report)))
        before += sizes[name]
    if len(lines) == 1:
        return lines[0][1]
    return hashlib.sha256("".join(f"{name}\0{digest}\n" for name, digest in lines).encode()).hexdigest()


def command_line(source: str, options: Sequence[str]) -> str:
    """The command that makes this file again, and the version that ran it."""
    command = shlex.join(["spikequant", "convert", source, *options])
    return f"{command} # spikequant-gguf {spikequant_gguf.__version__}"


def output_metadata(
    source: RawMetadata, provenance: Provenance, statistics: Mapping[str, TensorStatistics]
) -> dict[bytes, bytes]:
    """All metadata of the output file, encoded.

    Args:
        source: metadata of the source, carried over as they are but for what is not true any more.
        provenance: how the model was made.
        statistics: of every SPK4 tensor, in the order of the file. Their values do not change the size.
    """
    dropped = _DROPPED if provenance.importance is None else (*_DROPPED, _IMATRIX)
    metadata = {
        key: value for key, value in source.items() if key not in _REPLACED and not key.startswith(dropped)
    }
    ours = {
        "general.quantization_version": encode_u32(gguf.GGML_QUANT_VERSION),
        "general.file_type": encode_u32(f.FTYPE_SPK4),
        f.KEY_VERSION: encode_u32(f.FORMAT_VERSION),
        f.KEY_TYPE_NAME: encode_text(f.TYPE_NAME),
        f.KEY_SALIENCE_THRESHOLD: encode_f32(provenance.salience),
        f.KEY_SILENCE_THRESHOLD: encode_f32(provenance.silence),
        f.KEY_CALIBRATION: encode_text(provenance.calibration),
        f.KEY_SOURCE: encode_text(provenance.source),
        f.KEY_SOURCE_SHA256: encode_text(provenance.source_sha256),
        f.KEY_COMMAND: encode_text(provenance.command),
        **_encoder(provenance, list(statistics)),
        f.KEY_STATISTICS_TENSORS: encode_texts(statistics),
        f.KEY_STATISTICS_SALIENT_WEIGHT_SHARE: encode_f32s(
            [s.salient_weight_share for s in statistics.values()]
        ),
        f.KEY_STATISTICS_SALIENT_INPUT_SHARE: encode_f32s(
            [s.salient_input_share for s in statistics.values()]
        ),
        f.KEY_STATISTICS_RELATIVE_ERROR: encode_f32s([s.relative_error for s in statistics.values()]),
        **_importance(provenance.importance),
    }
    metadata |= provenance.overrides
    return {**metadata, **{key.encode(): value for key, value in ours.items()}}


def _encoder(provenance: Provenance, names: Sequence[str]) -> dict[str, bytes]:
    """Settings of the layers that do not use the format's defaults, 0 standing for a default.

    The runtime reads these arrays and nothing else; so a setting of the whole model is listed for each layer.
    """
    listed = {}
    for name in names:
        own = provenance.encoder.get(name, EncoderSettings())
        salience = provenance.salience if own.salience is None else own.salience
        silence = provenance.silence if own.silence is None else own.silence
        # below half a step everything is rounded to silence anyway: 0 and the default mean the same
        pair = (
            0.0 if salience == f.DEFAULT_SALIENCE else salience,
            0.0 if silence == f.DEFAULT_SILENCE else silence,
        )
        if any(pair):
            listed[name] = pair
    if not listed:
        return {}
    return {
        f.KEY_ENCODER_TENSORS: encode_texts(listed),
        f.KEY_ENCODER_SALIENCE: encode_f32s([salience for salience, _ in listed.values()]),
        f.KEY_ENCODER_SILENCE: encode_f32s([silence for _, silence in listed.values()]),
    }


def _importance(importance: Importance | None) -> dict[str, bytes]:
    if importance is None:
        return {}
    facts = {"quantize.imatrix.file": encode_text(importance.path.name)}
    if importance.datasets:
        facts["quantize.imatrix.dataset"] = encode_text(
            PurePath(importance.datasets[0].replace("\\", "/")).name
        )
    facts["quantize.imatrix.entries_count"] = encode_u32(len(importance))
    if importance.chunks:
        facts["quantize.imatrix.chunks_count"] = encode_u32(importance.chunks)
    return facts
