"""Whole files: valid ones pass, and every damage is reported by name."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spikequant_gguf import FormatError, InputError, SpikeQuantError
from spikequant_gguf import format as f
from spikequant_gguf.codec import encode_activations, encode_weights
from spikequant_gguf.format import blocks_to_bytes, salient_slots
from spikequant_gguf.gguf_header import read_header
from spikequant_gguf.verify import verify_file

Q = "blk.0.attn_q.weight"
DOWN = "blk.0.ffn_down.weight"
ENCODER = {
    f.KEY_ENCODER_TENSORS: [Q, DOWN],
    f.KEY_ENCODER_SALIENCE: [2.5, 0.0],
    f.KEY_ENCODER_SILENCE: [0.0, 0.75],
}
STATISTICS = {
    f.KEY_STATISTICS_TENSORS: [Q],
    f.KEY_STATISTICS_SALIENT_WEIGHT_SHARE: [0.02],
    f.KEY_STATISTICS_RELATIVE_ERROR: [0.1],
}


def rows(n_rows: int, n_in: int, seed: int = 0) -> np.ndarray:
    weights = np.random.default_rng(seed).standard_normal((n_rows, n_in)).astype(np.float32)
    return encode_weights(weights)


def write_model(
    path: Path, metadata: dict | None = None, tensors: dict | None = None, stock: dict | None = None
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (metadata if metadata is not None else {f.KEY_VERSION: 2, **ENCODER}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    tensors = (
        tensors
        if tensors is not None
        else {Q: rows(40, 128), DOWN: rows(3, 192, 1), "norm": np.ones(64, "f4")}
    )
    for name, data in tensors.items():
        kind = {f.BLOCK_SPK4: GGMLQuantizationType.SPK4, f.BLOCK_SPKA: GGMLQuantizationType.SPKA}.get(
            data.dtype
        )
        writer.add_tensor(name, data if kind is None else blocks_to_bytes(data), raw_dtype=kind)
    for name, (data, kind) in (stock or {}).items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model.gguf")


def tensor_at(path: Path, name: str):
    (tensor,) = (tensor for tensor in read_header(path).tensors if tensor.name == name)
    return tensor


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def only_fault(path: Path):
    report = verify_file(path)
    assert not report.ok and len(report.faults) == 1, report.faults
    with pytest.raises(FormatError, match="."):
        report.raise_if_faulty()
    return report.faults[0]


# ---- what is valid


def test_valid_file(model):
    report = verify_file(model)
    report.raise_if_faulty()
    assert report.ok and report.version == 2 and report.warnings == () and report.other_tensors == 1
    assert report.file_bytes == model.stat().st_size and report.path == str(model)
    q, down = report.tensors
    assert (q.name, q.rows, q.inputs, q.bytes, q.rotated) == (Q, 40, 128, 40 * 72, True)
    assert (down.name, down.rows, down.inputs) == (DOWN, 3, 192)
    assert q.salient_weights == np.count_nonzero(salient_slots(rows(40, 128)))
    json.dumps(dataclasses.asdict(report))


def test_header_agrees_with_gguf_reader(model):
    header, reader = read_header(model), gguf.GGUFReader(model)
    assert header.data_offset == reader.data_offset and header.alignment == reader.alignment
    for ours, theirs in zip(header.tensors, reader.tensors, strict=True):
        assert (ours.name, list(ours.shape), ours.offset) == (
            theirs.name,
            theirs.shape.tolist(),
            theirs.data_offset,
        )
        assert (ours.type_id, ours.n_bytes) == (theirs.tensor_type, theirs.n_bytes)
    for key, value in header.metadata.items():
        expected = reader.get_field(key).contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected


def test_not_rotated_and_experts(tmp_path):
    weights = np.random.default_rng(0).standard_normal((4, 3, 64)).astype(np.float32)
    blocks = encode_weights(weights, rotated=False)
    (tensor,) = verify_file(write_model(tmp_path / "m.gguf", {f.KEY_VERSION: 2}, {"experts": blocks})).tensors
    assert (tensor.rows, tensor.inputs, tensor.rotated) == (12, 64, False)


def test_warnings(tmp_path):
    report = verify_file(write_model(tmp_path / "a.gguf", {}))
    assert report.ok and report.version is None and f.KEY_VERSION in report.warnings[0]
    report = verify_file(write_model(tmp_path / "b.gguf", {}, {"norm": np.ones(64, "f4")}))
    assert report.ok and report.warnings == ("the file holds no SPK4 tensor",)


def test_all_metadata_together(tmp_path):
    metadata = {
        f.KEY_VERSION: 2,
        f.KEY_TYPE_NAME: "spk4",
        f.KEY_SALIENCE_THRESHOLD: 2.3,
        f.KEY_SILENCE_THRESHOLD: 0.5,
        f.KEY_SOURCE: "a model",
        **ENCODER,
        **STATISTICS,
    }
    assert verify_file(write_model(tmp_path / "m.gguf", metadata)).ok


# ---- damaged data


@pytest.mark.parametrize("row", [0, 17, 39])
@pytest.mark.parametrize(
    "block, field, data, rule",
    [
        (0, 2, b"\xc0", "no valid extension"),
        (0, 0, b"\x00\x00", "threshold is zero"),
        (0, 0, b"\xff\xff", "not finite"),
        (1, 0, b"\xc0", "no valid extension"),
        (1, 3, b"\xff", "no valid extension"),
        (1, 0, b"\x3f", "unused salient slot is not zero"),
        (1, 1, b"\x00\x00\xbf", "before a used one"),
        (1, 2, b"\x50\x50", "not ascending"),
    ],
)
def test_damaged_block(model, row, block, field, data, rule):
    patch(model, tensor_at(model, Q).offset + row * 72 + block * 36 + field, data)
    fault = only_fault(model)
    assert (fault.tensor, fault.row, fault.block) == (Q, row, block) and rule in fault.reason
    assert str(fault).startswith(f"tensor '{Q}', row {row}, block {block}: ")


def test_rotation_differs_in_a_later_piece(tmp_path):
    blocks = np.repeat(rows(1, 64), 70_000, axis=0)  # 2.4 MiB: several pieces
    blocks["header"][2**21 // 36 :, 0] |= 0x8000  # from a piece's first row to the end
    path = write_model(tmp_path / "m.gguf", {f.KEY_VERSION: 2}, {"w": blocks})
    fault = only_fault(path)
    assert (fault.row, fault.block) == (2**21 // 36, 0) and "rotation" in fault.reason


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
)
def test_scales_of_stock_types(tmp_path, kind):
    """The places of the scales: those bytes alone that make a block's values infinite, whatever they hold."""
    kind = GGMLQuantizationType[kind]
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 32, (3, 2 * block_bytes), np.uint8)
    places = []
    for place in range(0, block_bytes, 2):
        damaged = data.copy()
        damaged[1, block_bytes + place : block_bytes + place + 2] = (0x00, 0xFC)  # minus infinity
        with np.errstate(all="ignore"):
            if not np.isfinite(gguf.quants.dequantize(damaged, kind)).all():
                places.append(place)
        path = write_model(tmp_path / "m.gguf", {f.KEY_VERSION: 2}, {Q: rows(2, 64)}, {"s": (damaged, kind)})
        faults = verify_file(path).faults
        if places[-1:] == [place]:
            (fault,) = faults
            assert (fault.tensor, fault.row, fault.block) == ("s", 1, 1) and "scale" in fault.reason
        else:
            assert not faults
    assert 1 <= len(places) <= 2


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_floats_must_be_finite(tmp_path, dtype, bad):
    values = np.ones((3, 70), dtype)
    values[2, 69] = bad
    fault = only_fault(
        write_model(tmp_path / "m.gguf", None, {Q: rows(40, 128), DOWN: rows(3, 192), "n": values})
    )
    assert (fault.tensor, fault.row, fault.reason) == ("n", 2, "value 69 is not finite")


def test_file_that_becomes_shorter(model, monkeypatch):
    header = read_header(model)
    with model.open("r+b") as file:
        file.truncate(tensor_at(model, DOWN).offset + 10)
    monkeypatch.setattr("spikequant_gguf.verify.read_header", lambda _: header)
    with pytest.raises(InputError, match="became shorter"):
        verify_file(model)


def test_header_that_would_fill_the_memory(tmp_path):
    """Millions of tiny strings, keys and tensors: refused before they are all there."""
    n = 3_000_000
    names = b"".join(string(f"{number:02x}") for number in range(256)) * (n // 256)
    texts = string("k") + struct.pack("<IIQ", 9, 8, n // 256 * 256) + names
    path = tmp_path / "m.gguf"
    for raw in (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + texts,
        header_bytes([(f"{number:x}", (1,), 0, 0) for number in range(150_000)]),
        header_bytes(
            [], b"".join(string(f"{n:x}") + struct.pack("<IB", 0, 0) for n in range(500_000)), 500_000
        ),
    ):
        path.write_bytes(raw)
        with pytest.raises(InputError, match="would fill the memory"):
            verify_file(path)


def test_every_faulty_tensor_is_reported(model):
    for name in (Q, DOWN):
        patch(model, tensor_at(model, name).offset + 3, b"\x01")
    report = verify_file(model)
    assert [fault.tensor for fault in report.faults] == [Q, DOWN] and report.tensors == ()


def test_cut_off_data(model):
    tensor = tensor_at(model, DOWN)
    with model.open("r+b") as file:
        file.truncate(tensor.offset + tensor.n_bytes - 1)
    report = verify_file(model)
    assert [(fault.tensor, "cut off" in fault.reason) for fault in report.faults] == [
        (DOWN, True),
        ("norm", True),
    ]
    assert [tensor.name for tensor in report.tensors] == [Q]


@settings(deadline=None, derandomize=True, max_examples=80, suppress_health_check=list(HealthCheck))
@given(share=st.floats(0, 1, exclude_max=True))
def test_cut_off_anywhere(model, share):
    whole = model.read_bytes()
    end = max(tensor.offset + tensor.n_bytes for tensor in read_header(model).tensors)
    short = model.with_name("short.gguf")
    short.write_bytes(whole[: int(share * end)])
    with pytest.raises(SpikeQuantError) as caught:
        verify_file(short).raise_if_faulty()
    assert isinstance(caught.value, InputError) and caught.value.remedy


@settings(deadline=None, derandomize=True, max_examples=150, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_flipped_bytes_never_crash(model, data):
    damaged = bytearray(model.read_bytes())
    header_bytes = read_header(model).data_offset
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, header_bytes - 1))] = data.draw(st.integers(0, 255))
    path = model.with_name("damaged.gguf")
    path.write_bytes(damaged)
    try:
        verify_file(path)
    except InputError as error:
        assert str(error).startswith(str(path))


# ---- damaged headers


@pytest.mark.parametrize(
    "offset, data, message",
    [
        (0, b"GGML", "not a GGUF file"),
        (4, struct.pack("<I", 1), "version 1 is not supported"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 2**60), "cut off or damaged|0 dimensions"),
        (16, struct.pack("<Q", 2**60), "cut off or damaged"),
        (24, struct.pack("<Q", 2**63), "cut off or damaged"),
    ],
)
def test_damaged_header(model, offset, data, message):
    patch(model, offset, data)
    with pytest.raises(InputError, match=message):
        verify_file(model)


def header_bytes(
    entries: list[tuple[str, tuple[int, ...], int, int]], values: bytes = b"", n_values: int = 0
) -> bytes:
    """A GGUF header written by hand, for what gguf.GGUFWriter refuses to write."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(entries), n_values), values]
    for name, shape, type_id, offset in entries:
        parts += [struct.pack("<Q", len(name)), name.encode(), struct.pack("<I", len(shape))]
        parts += [struct.pack(f"<{len(shape)}Q", *shape), struct.pack("<IQ", type_id, offset)]
    raw = b"".join(parts)
    return raw + bytes(-len(raw) % 32)


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.mark.parametrize(
    "entries, rule",
    [
        ([("w", (100, 2), 90, 0)], "100 inputs"),
        ([("w", (64 * 529, 1), 90, 0)], "more than the 33792"),
        ([("w", (64, 0), 90, 0)], "without elements"),
        ([("w", (64, 1), 90, 16)], "not aligned"),
        ([("w", (64, 2**40), 90, 0)], "cut off"),
        ([("w", (64, 2**63, 2**63), 90, 0)], "cut off"),
        ([("w", (64, 1), 90, 2**62)], "cut off"),
        ([("w", (64, 1), 91, 0)], "SPKA"),
        ([("w", (64, 1), 90, 0), ("v", (64, 1), 90, 0)], "overlaps tensor 'w'"),
        ([("a", (64,), 0, 0), ("w", (64, 1), 90, 32)], "overlaps tensor 'a'"),
    ],
)
def test_bad_tensor_entry(tmp_path, entries, rule):
    path = tmp_path / "m.gguf"
    path.write_bytes(header_bytes(entries) + blocks_to_bytes(rows(1, 64)).tobytes() + bytes(1000))
    fault = only_fault(path)
    assert fault.tensor == entries[-1][0] and rule in fault.reason


@pytest.mark.parametrize(
    "raw, message",
    [
        (header_bytes([("w", (64, 1), 90, 0), ("w", (64, 1), 90, 64)]), "tensor 'w' is there twice"),
        (header_bytes([("w", (1,) * 5, 0, 0)]), "5 dimensions"),
        (header_bytes([("w", (), 0, 0)]), "0 dimensions"),
        (header_bytes([], (string("k") + struct.pack("<II", 4, 1)) * 2, 2), "metadata 'k' is there twice"),
        (header_bytes([], string("k") + struct.pack("<I", 13), 1), "unknown value type 13"),
        (header_bytes([], string("k") + struct.pack("<IIQ", 9, 9, 1), 1), "unknown value type 9"),
        (header_bytes([], string("k") + struct.pack("<IIQ", 9, 8, 2**62), 1), "claims"),
        (header_bytes([], string("k") + struct.pack("<IIQ", 9, 4, 2**62), 1), "does not fit"),
        (header_bytes([], string("general.alignment") + struct.pack("<II", 4, 24), 1), "power of two"),
        (b"", "empty"),
    ],
)
def test_malformed_header(tmp_path, raw, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=message):
        verify_file(path)


def test_unknown_type_is_a_warning(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(header_bytes([("w", (64, 1), 4321, 0)]) + bytes(64))
    report = verify_file(path)
    assert report.ok and "unknown type 4321" in report.warnings[0]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        verify_file(tmp_path / "absent.gguf")
    with pytest.raises(InputError, match="directory"):
        verify_file(tmp_path)


# ---- metadata


@pytest.mark.parametrize(
    "metadata, tensor, rule",
    [
        ({f.KEY_VERSION: 1}, None, "spikequant.version is 1, and this program knows version 2: convert the"),
        ({f.KEY_VERSION: 3}, None, "spikequant.version is 3"),
        ({f.KEY_VERSION: "2"}, None, "spikequant.version is 2"),
        ({f.KEY_TYPE_NAME: "spk5"}, None, "spikequant.type_name"),
        ({f.KEY_TYPE_NAME: [1, 2], "split.count": [1, 2]}, None, "spikequant.type_name"),
        ({f.KEY_SALIENCE_THRESHOLD: 7.5}, None, "spikequant.salience_threshold is 7.5"),
        ({f.KEY_SALIENCE_THRESHOLD: 0.0}, None, "spikequant.salience_threshold is 0"),
        ({f.KEY_SALIENCE_THRESHOLD: 2}, None, "spikequant.salience_threshold is 2"),
        ({f.KEY_SILENCE_THRESHOLD: 4.5}, None, "spikequant.silence_threshold"),
        ({f.KEY_SILENCE_THRESHOLD: float("nan")}, None, "spikequant.silence_threshold is nan"),
        ({**ENCODER, f.KEY_ENCODER_TENSORS: [Q, "x"]}, "x", "no such SPK4 tensor"),
        ({**ENCODER, f.KEY_ENCODER_TENSORS: [Q, "norm"]}, "norm", "no such SPK4 tensor"),
        ({**ENCODER, f.KEY_ENCODER_TENSORS: [Q, Q]}, Q, "twice"),
        ({**ENCODER, f.KEY_ENCODER_TENSORS: [1, 2]}, None, "not an array of strings"),
        ({**ENCODER, f.KEY_ENCODER_SALIENCE: [2.5]}, None, "1 values for 2 names"),
        ({**ENCODER, f.KEY_ENCODER_SILENCE: [1, 2]}, None, "not an array of float32"),
        ({**ENCODER, f.KEY_ENCODER_SALIENCE: [2.5, -1.0]}, DOWN, "spikequant.encoder.salience is -1"),
        ({**ENCODER, f.KEY_ENCODER_SILENCE: [4.5, 0.0]}, Q, "spikequant.encoder.silence is 4.5"),
        ({key: ENCODER[key] for key in list(ENCODER)[:2]}, None, "spikequant.encoder.silence is missing"),
        ({f.KEY_ENCODER_SILENCE: [0.5]}, None, "without spikequant.encoder.tensors"),
        ({**STATISTICS, f.KEY_STATISTICS_SALIENT_WEIGHT_SHARE: [1.5]}, Q, "salient_weight_share is 1.5"),
        ({**STATISTICS, f.KEY_STATISTICS_RELATIVE_ERROR: [float("inf")]}, Q, "relative_error is inf"),
    ],
)
def test_inconsistent_metadata(tmp_path, metadata, tensor, rule):
    fault = only_fault(write_model(tmp_path / "m.gguf", metadata))
    assert fault.tensor == tensor and rule in fault.reason


def test_data_of_another_version_are_not_judged(tmp_path):
    blocks = rows(4, 128)
    blocks["header"][:, 1] = blocks["header"][:, 0]  # as version 1 had it
    assert "salient" in only_fault(write_model(tmp_path / "b.gguf", {f.KEY_VERSION: 2}, {Q: blocks})).reason
    fault = only_fault(write_model(tmp_path / "a.gguf", {f.KEY_VERSION: 1}, {Q: blocks}))
    assert fault.tensor is None and fault.reason.endswith("convert the model again with this program")


def test_a_part_of_a_model_may_list_tensors_of_other_parts(tmp_path):
    metadata = {f.KEY_VERSION: 2, "split.count": 2, **ENCODER}
    assert verify_file(write_model(tmp_path / "m.gguf", metadata, {Q: rows(2, 64)})).ok


def test_activations_cannot_be_stored(tmp_path):
    blocks = encode_activations(np.ones((2, 64)))
    fault = only_fault(write_model(tmp_path / "m.gguf", {f.KEY_VERSION: 2}, {Q: rows(2, 64), "x": blocks}))
    assert fault.tensor == "x" and "SPKA" in fault.reason
