"""From spike models back to stock types, and what `inspect` reads out of a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from spikequant_gguf import FormatError, InputError, OutputError, UnsupportedError
from spikequant_gguf.codec import decode_weights
from spikequant_gguf.console import to_json_text
from spikequant_gguf.dequantize import OUTPUT_TYPES, _target, dequantize
from spikequant_gguf.format import TYPE_SPK4, TYPE_SPKA, blocks_from_bytes
from spikequant_gguf.gguf_header import read_header
from spikequant_gguf.inspect_file import inspect_file, model_type, type_name
from spikequant_gguf.perplexity import perplexity


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", OUTPUT_TYPES)
def test_values_are_those_of_the_codec(tiny_models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    source, out = tiny_models["spk4"], tmp_path / "out.gguf"
    report = dequantize(source, out, kind.upper())
    assert model_type(read_header(out)) == report.type == kind
    before, after = tensors(source), tensors(out)
    assert list(before) == list(after)
    target = gguf.GGMLQuantizationType[kind.upper()]
    spiking = 0
    for name, tensor in before.items():
        found = after[name]
        assert list(found.shape) == list(tensor.shape)
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            np.testing.assert_array_equal(found.data, tensor.data)
            continue
        assert found.tensor_type == target
        if tensor.tensor_type == TYPE_SPK4:
            spiking += 1
            values = decode_weights(blocks_from_bytes(np.asarray(tensor.data)))
        else:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(
            np.asarray(found.data).view(np.uint8).ravel(),
            gguf.quants.quantize(values, target).view(np.uint8).ravel(),
        )
    assert spiking == 14
    assert report.file_bytes == out.stat().st_size


def test_metadata_are_those_of_a_stock_model(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    dequantize(tiny_models["spk4"], out)
    before, after = read_header(tiny_models["spk4"]).metadata, read_header(out).metadata
    assert after["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    assert after["spikequant.source"] == tiny_models["spk4"].name
    assert [key for key in after if key.startswith("spikequant.")] == [
        "spikequant.source",
        "spikequant.source_sha256",
    ]
    stock = [key for key in before if not key.startswith("spikequant.") and key != "general.file_type"]
    for key in stock:
        np.testing.assert_array_equal(after[key], before[key])


def test_dequantized_model_works(tiny_models: dict[str, Path], tiny_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    dequantize(tiny_models["spk4"], out)
    spiking = perplexity(tiny_models["spk4"], tiny_text, ctx=128, chunks=2).ppl
    stock = perplexity(out, tiny_text, ctx=128, chunks=2).ppl
    assert stock == pytest.approx(spiking, rel=0.2)  # the same weights; activations are not quantized now


def test_rows_that_do_not_fit_q8_0_become_f16(
    tiny_model_factory: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = read_header(tiny_model_factory())
    tensor = next(tensor for tensor in header.tensors if len(tensor.shape) == 2)
    odd = type(tensor)(
        tensor.name, (48, 2), 2, 0, 54
    )  # Q4_0 needs a multiple of 32, too; only the rule counts
    assert _target(odd, gguf.GGMLQuantizationType.Q8_0) == gguf.GGMLQuantizationType.F16
    assert _target(odd, gguf.GGMLQuantizationType.BF16) == gguf.GGMLQuantizationType.BF16


def test_what_cannot_be_dequantized(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    source, out = tiny_models["spk4"], tmp_path / "out.gguf"
    with pytest.raises(InputError, match="no output type 'q4_0'"):
        dequantize(source, out, "q4_0")
    with pytest.raises(InputError, match="missing.gguf"):
        dequantize(tmp_path / "missing.gguf", out)
    with pytest.raises(OutputError, match="is the source itself"):
        dequantize(source, source, force=True)
    out.write_text("something")
    with pytest.raises(OutputError, match="exists already"):
        dequantize(source, out)
    assert out.read_text() == "something"
    dequantize(source, out, force=True)
    assert model_type(read_header(out)) == "f16"

    damaged = bytearray(source.read_bytes())
    tensor = next(t for t in read_header(source).tensors if t.type_id == TYPE_SPK4)
    damaged[tensor.offset : tensor.offset + 2] = b"\0\0"
    (tmp_path / "damaged.gguf").write_bytes(damaged)
    with pytest.raises(FormatError, match=tensor.name):
        dequantize(tmp_path / "damaged.gguf", tmp_path / "new.gguf")
    assert not list(tmp_path.glob("new*"))


def test_values_too_large_for_f16(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values = np.zeros((2, 32), np.float32)
    values[1, 3] = 1e6
    writer.add_tensor(
        "big.weight",
        gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    out = tmp_path / "out.gguf"
    with pytest.raises(UnsupportedError, match=r"big.weight.*too large for F16") as caught:
        dequantize(path, out)
    assert "bf16" in (caught.value.remedy or "")
    assert not list(tmp_path.glob("out*"))
    dequantize(path, out, "bf16")


# ---- inspect


def test_inspect_shows_tensors_and_metadata(tiny_models: dict[str, Path]) -> None:
    report = inspect_file(tiny_models["spk4"])
    document = json.loads(to_json_text(report.to_json()))
    assert document["type"] == "spk4"
    assert document["metadata"]["general.architecture"] == "llama"
    assert document["metadata"]["tokenizer.ggml.tokens"]["items"] > 300
    by_name = {tensor["name"]: tensor for tensor in document["tensors"]}
    query = by_name["blk.0.attn_q.weight"]
    assert (query["type"], query["shape"], query["rotated"]) == ("SPK4", [128, 128], True)
    assert query["bits_per_weight"] == 4.5
    assert by_name["blk.0.attn_norm.weight"]["rotated"] is None
    assert sum(report.types.values()) == document["tensor_bytes"]
    assert document["bits_per_weight"] == pytest.approx(8 * document["tensor_bytes"] / document["parameters"])


def test_type_without_file_type_is_that_of_most_weights(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("small", np.zeros(8, np.float32))
    writer.add_tensor("large", np.zeros((4, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert model_type(read_header(path)) == "f16"
    assert (type_name(TYPE_SPKA), type_name(1234)) == ("SPKA", "type 1234")
