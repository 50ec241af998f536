"""Block layouts, FORMAT.md's worked example, and what the gguf package makes of our types."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from enum import IntEnum
from importlib import resources

import gguf
import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.scripts import gguf_dump

from spikequant_gguf import FormatError, SpikeQuantError, UnsupportedError, errors, format, register_with_gguf
from spikequant_gguf.codec import (
    activation_values,
    decode_activations,
    decode_weights,
    encode_weights,
    matmul,
    pack_weights,
    potentials,
    spike_train,
    validate_activations,
    validate_weights,
    weight_values,
)
from spikequant_gguf.format import BLOCK_SPK4, BLOCK_SPKA, blocks_from_bytes, blocks_to_bytes
from spikequant_gguf.gguf_types import add_enum_member

SPEC = (resources.files("spikequant_gguf") / "FORMAT.md").read_text(encoding="utf-8")

# ---- layout


def test_block_layouts():
    assert BLOCK_SPK4.itemsize == 36 and BLOCK_SPKA.itemsize == 64
    offsets = {name: field[1] for name, field in BLOCK_SPKA.fields.items()}
    assert offsets == {
        "threshold": 0,
        "zero_point": 4,
        "salient_shift": 5,
        "flags": 6,
        "reserved": 7,
        "salient_mask": 8,
        "codes": 16,
        "fifth_bits": 48,
        "coarse_mask": 56,
    }
    assert {name: field[1] for name, field in BLOCK_SPK4.fields.items()} == {
        "header": 0,
        "salient": 0,
        "codes": 4,
    }
    assert {name: field[0].shape for name, field in BLOCK_SPK4.fields.items()} == {
        "header": (),
        "salient": (4,),
        "codes": (32,),
    }


def test_blocks_and_bytes():
    raw = np.arange(3 * 72, dtype=np.uint8).reshape(3, 72)
    blocks = blocks_from_bytes(raw)
    assert blocks.shape == (3, 2) and np.shares_memory(blocks, raw)
    assert blocks["header"][1, 0] == 72 | 73 << 8
    assert np.array_equal(blocks_to_bytes(blocks), raw)
    assert np.array_equal(blocks_from_bytes(raw.tobytes()[:72]), blocks[0])
    assert np.array_equal(blocks_to_bytes(blocks[:, :1]), raw[:, :36])
    joined = np.concatenate([blocks, blocks])  # which NumPy gives fields that do not overlap
    assert joined.dtype.itemsize == 38 and np.array_equal(blocks_to_bytes(joined), np.tile(raw, (2, 1)))
    assert np.concatenate([blocks, blocks], dtype=BLOCK_SPK4).tobytes() == 2 * raw.tobytes()
    with pytest.raises(FormatError, match="71 bytes"):
        blocks_from_bytes(raw[:, :71])
    with pytest.raises(FormatError, match="int8"):
        blocks_from_bytes(raw.astype(np.int8))


# ---- the worked example


def example(kind: str) -> str:
    (text,) = re.findall(rf"^```{kind}\n(.*?)^```$", SPEC, re.MULTILINE | re.DOTALL)
    return text


def example_blocks() -> tuple[np.ndarray, np.ndarray]:
    weights = blocks_from_bytes(bytes.fromhex(example("hex spk4")), BLOCK_SPK4)[None]
    activations = blocks_from_bytes(bytes.fromhex(example("hex spka")), BLOCK_SPKA)[None]
    return weights, activations


def test_worked_example_of_the_specification():
    weights, activations = example_blocks()
    validate_weights(weights)
    validate_activations(activations)
    positions = [0, 1, 3, 33, 40]
    values, theta = weight_values(weights)
    assert theta[0] == 0.25 and values[0, positions].tolist() == [7, -8, 20, 2, -19]
    assert np.count_nonzero(values) == 5
    fine, coarse, step, shift = activation_values(activations)
    assert (step[0], shift[0]) == (0.5, 2)
    assert fine[0, positions].tolist() == [3, -2, 11, -8, 0] and coarse[0, positions].tolist() == [
        0,
        0,
        0,
        0,
        9,
    ]
    assert np.count_nonzero(fine) == 4 and np.count_nonzero(coarse) == 1
    assert decode_activations(activations)[0, positions].tolist() == [1.5, -1, 5.5, -4, 18]
    assert decode_weights(weights)[0, positions].tolist() == [1.75, -2, 5, 0.5, -4.75]
    assert spike_train(activations).time[0, positions].tolist() == [13, 14, 5, 8, 7]

    stated = dict(line.split(" = ") for line in example("values").splitlines())
    n, s = potentials(weights, activations)
    assert n[0, 0] == int(stated["N"]) and s[0, 0] == int(stated["S"])
    assert matmul(weights, activations)[0, 0] == float(stated["y"])


def test_a_second_block_has_four_slots():
    blocks = blocks_from_bytes(bytes.fromhex(example("hex spk4, two blocks")), BLOCK_SPK4)[None]
    assert blocks.shape == (1, 2) and blocks["header"][0, 0] == 0xB408
    validate_weights(blocks)
    values, theta = weight_values(blocks)
    expected = np.zeros((1, 128), int)
    expected[0, [3, 64 + 1, 64 + 2, 64 + 63]], expected[0, 64 + 40] = 16, -16
    assert theta[0] == 0.25 and np.array_equal(values, expected)
    assert np.array_equal(pack_weights(expected, 0.25, 8, rotated=False), blocks)


def test_prose_of_the_example_agrees():
    n, s, y = (re.search(rf"^    {name} = .* = (\S+)$", SPEC, re.MULTILINE)[1] for name in "NSy")
    stated = dict(line.split(" = ") for line in example("values").splitlines())
    assert [n, s.replace("−", "-"), y.replace("−", "-")] == [stated["N"], stated["S"], stated["y"]]


def test_specification_names_every_metadata_key_and_limit():
    text = SPEC.replace("`.source`", "`spikequant.source`").replace(
        "`.source_sha256`", "`spikequant.source_sha256`"
    )
    text = text.replace("`.command`", "`spikequant.command`")
    keys = [getattr(format, name) for name in format.__all__ if name.startswith("KEY_")]
    assert len(keys) == 15
    assert [key for key in keys if f"`{key}`" not in text] == []
    assert f"{format.MAX_INPUTS:,}" in SPEC


# ---- errors


def test_errors_carry_place_remedy_and_exit_code():
    error = FormatError("is odd", tensor="a.weight", row=3, block=0)
    assert str(error) == "tensor 'a.weight', row 3, block 0: is odd" and error.reason == "is odd"
    assert str(FormatError("is odd", tensor="a", row=1, row_word="token")) == "tensor 'a', token 1: is odd"
    assert str(FormatError("is odd")) == "is odd"
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.row, again.remedy) == (str(error), 3, error.remedy)
    codes = {name: getattr(errors, name).exit_code for name in errors.__all__}
    assert codes == {
        "SpikeQuantError": 1,
        "InputError": 3,
        "FormatError": 3,
        "RuntimeMissingError": 4,
        "BuildError": 5,
        "OutputError": 6,
        "UnsupportedError": 7,
    }
    assert all(issubclass(getattr(errors, name), SpikeQuantError) for name in errors.__all__)


# ---- registration


def test_registration_with_gguf():
    register_with_gguf()
    register_with_gguf()
    assert GGMLQuantizationType(90).name == "SPK4" and GGMLQuantizationType["SPKA"].value == 91
    assert GGMLQuantizationType(90) is GGMLQuantizationType.SPK4
    assert LlamaFileType(90).name == "MOSTLY_SPK4"
    assert [t.name for t in GGMLQuantizationType][-2:] == ["SPK4", "SPKA"]
    assert GGML_QUANT_SIZES[GGMLQuantizationType.SPK4] == (64, 36)
    assert GGML_QUANT_SIZES[GGMLQuantizationType.SPKA] == (64, 64)
    assert GGMLQuantizationType(2) is GGMLQuantizationType.Q4_0
    with pytest.raises(ValueError):
        GGMLQuantizationType(89)


class Color(IntEnum):
    RED = 1
    GREEN = 2


def test_added_members_behave_like_others():
    blue = add_enum_member(Color, "BLUE", 7)
    assert add_enum_member(Color, "BLUE", 7) is blue
    assert isinstance(blue, Color) and blue == 7 and hash(blue) == hash(7)
    assert Color(7) is Color["BLUE"] is Color.BLUE is blue and blue in Color
    assert (blue.name, blue.value) == ("BLUE", 7) and repr(blue) == "<Color.BLUE: 7>"
    assert list(Color) == [Color.RED, Color.GREEN, blue] and len(Color) == 3
    assert "BLUE" in Color.__members__
    assert copy.deepcopy(blue) is blue and pickle.loads(pickle.dumps(blue)) is blue
    for name, value in (("BLUE", 8), ("CYAN", 7), ("RED", 9), ("CYAN", 1)):
        with pytest.raises(UnsupportedError, match="collides"):
            add_enum_member(Color, name, value)


@pytest.fixture
def weights() -> np.ndarray:
    return (np.random.default_rng(0).standard_normal((5, 128)) * 0.02).astype(np.float32)


@pytest.fixture
def model(tmp_path, weights):
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(LlamaFileType.MOSTLY_SPK4)
    writer.add_uint32(format.KEY_VERSION, 2)
    raw = blocks_to_bytes(encode_weights(weights))
    writer.add_tensor("blk.0.attn_q.weight", raw, raw_dtype=GGMLQuantizationType.SPK4)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(128, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_reader_reads_spk4(model, weights):
    tensor = gguf.GGUFReader(model).tensors[0]
    assert tensor.tensor_type is GGMLQuantizationType.SPK4
    assert tensor.shape.tolist() == [128, 5] and tensor.data.shape == (5, 72) and tensor.n_bytes == 5 * 72
    blocks = blocks_from_bytes(tensor.data)
    assert np.array_equal(blocks, encode_weights(weights))
    assert np.array_equal(quants.dequantize(tensor.data, tensor.tensor_type), decode_weights(blocks))


def test_gguf_quantizes_spk4_by_whole_rows(weights):
    many = np.concatenate([weights, 3 * weights] * 20)  # gguf works in groups of about 16 rows
    raw = quants.quantize(many, GGMLQuantizationType.SPK4)
    assert np.array_equal(raw, blocks_to_bytes(encode_weights(many)))
    decoded = quants.dequantize(raw, GGMLQuantizationType.SPK4)
    assert decoded.shape == many.shape and np.array_equal(decoded, decode_weights(encode_weights(many)))
    experts = quants.quantize(many.reshape(4, 50, 128), GGMLQuantizationType.SPK4)
    assert np.array_equal(experts.reshape(200, 72), raw)
    with pytest.raises(quants.QuantError):
        quants.quantize(np.zeros((2, 100), np.float32), GGMLQuantizationType.SPK4)


def test_gguf_dump_shows_spk4(model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gguf-dump", str(model)])
    gguf_dump.main()
    output = capsys.readouterr().out
    assert re.search(r"640 \|\s+128,\s+5,\s+1,\s+1 \| SPK4\s+\| blk.0.attn_q.weight", output)
    assert "spikequant.version = 2" in output


def test_import_needs_neither_torch_nor_llama_cpp():
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['llama_cpp'] = None\n"
        "import spikequant_gguf, spikequant_gguf.codec, spikequant_gguf.verify, gguf\n"
        "print(gguf.GGMLQuantizationType(90).name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "SPK4"
