"""Weights on their way into memory: checked while they are packed, faults named, nothing kept twice."""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hostile import STRING, U32, text, value

from spikequant_gguf import evaluation
from spikequant_gguf.errors import InputError
from spikequant_gguf.evaluation import Model
from spikequant_gguf.format import (
    BLOCK_SPK4,
    KEY_VERSION,
    TYPE_SPK4,
    blocks_from_bytes,
    blocks_to_bytes,
    salient_slots,
)
from spikequant_gguf.ggml_api import MatMul
from spikequant_gguf.gguf_header import TensorInfo, read_header
from spikequant_gguf.llama_log import collect_errors
from spikequant_gguf.native import load
from spikequant_gguf.runtime import RuntimeInfo
from spikequant_gguf.validation import first_weight_fault


def draw_blocks(rows: int, n_in: int) -> np.ndarray:
    values = np.random.default_rng(rows).standard_normal((rows, n_in), np.float32)
    return blocks_from_bytes(load().quantize(TYPE_SPK4, values)).copy()


def no_extension(slots: np.ndarray) -> None:
    slots[0] = 0xC0


def not_zero(slots: np.ndarray) -> None:
    slots[-1] = 0x05


def gap(slots: np.ndarray) -> None:
    slots[:] = 0
    slots[-1] = 0x42


def same_place_twice(slots: np.ndarray) -> None:
    slots[-2:] = (0x41, 0x81)
    slots[:-2] = 0x40


FAULTS = {
    no_extension: "salient weight has no valid extension",
    not_zero: "unused salient slot is not zero",
    gap: "unused salient slot before a used one",
    same_place_twice: "salient positions are not ascending",
}
HEADERS = {0x7C08: "threshold is not finite", 0x0008: "threshold is zero"}


def slots_of(blocks: np.ndarray, row: int, block: int) -> np.ndarray:
    return blocks["salient"][row, block, 2 if block == 0 else 0 :]


@pytest.fixture
def log(runtime: RuntimeInfo) -> None:
    evaluation._llama()  # sends llama.cpp's log to Python


def assert_found(blocks: np.ndarray, row: int, block: int, reason: str) -> None:
    assert first_weight_fault(blocks) == (row, block, reason)
    with (
        collect_errors() as errors,
        MatMul(TYPE_SPK4, blocks_to_bytes(blocks), 64 * blocks.shape[1], 1, buffer="CPU_SPIKE") as product,
    ):
        assert np.array_equal(product.weight_bytes(), blocks_to_bytes(blocks))
    assert len(errors) == 1 and errors[0].endswith(f"row {row}, block {block}: {reason}"), errors


ROWS = [128 + 70, 128 + 40]  # the last tile is a whole one, and half of one


@pytest.mark.parametrize("n_rows", ROWS)
@pytest.mark.parametrize("damage", FAULTS)
def test_packing_finds_a_fault_wherever_it_is(
    log: None, n_rows: int, damage: Callable[[np.ndarray], None]
) -> None:
    sound = draw_blocks(n_rows, 192)
    for row in (0, 15, 64, 127, 128, 128 + 33, n_rows - 1):
        for block in range(3):
            blocks = sound.copy()
            damage(slots_of(blocks, row, block))
            assert_found(blocks, row, block, FAULTS[damage])


@pytest.mark.parametrize("n_rows", ROWS)
@pytest.mark.parametrize("header", HEADERS)
def test_packing_finds_a_faulty_header(log: None, n_rows: int, header: int) -> None:
    for row in (0, 127, 128, n_rows - 1):
        blocks = draw_blocks(n_rows, 192)
        blocks["header"][row, 0] = header
        assert_found(blocks, row, 0, HEADERS[header])


def test_packing_finds_a_row_of_another_rotation(log: None) -> None:
    blocks = draw_blocks(300, 128)
    blocks["header"][200, 0] ^= 0x8000
    with collect_errors() as errors, MatMul(TYPE_SPK4, blocks_to_bytes(blocks), 128, 1, buffer="CPU_SPIKE"):
        pass
    assert len(errors) == 1 and errors[0].endswith("row 200, block 0: rotation differs from the first row")


@pytest.mark.parametrize("rows, n_in", [(5000, 1024), (2048 + 65, 2048), (30, 33792)])
def test_weights_that_several_threads_pack(log: None, rows: int, n_in: int) -> None:
    blocks = draw_blocks(rows, n_in)
    x = np.random.default_rng(1).standard_normal((3, n_in), np.float32)
    with (
        collect_errors() as errors,
        MatMul(TYPE_SPK4, blocks_to_bytes(blocks), n_in, 3, buffer="CPU_SPIKE") as product,
    ):
        assert np.array_equal(product.weight_bytes(), blocks_to_bytes(blocks))
        product.set_input(x)
        product.compute()
        assert np.array_equal(product.output(), load().vec_dot(blocks, load().encode_activations(x)))
    assert errors == []


def test_salient_slots_of_any_view() -> None:
    blocks = draw_blocks(6, 512)
    assert blocks.dtype == BLOCK_SPK4 and blocks["salient"].any()
    for view in (blocks, blocks[::2], blocks[:, 1::3], blocks[3], blocks.T):
        expected = view["salient"].copy()
        expected[..., 0, :2] = 0
        assert np.array_equal(salient_slots(view), expected)


# ---- a whole model


def last_spikes(path: Path) -> TensorInfo:
    return max((t for t in read_header(path).tensors if t.type_id == TYPE_SPK4), key=lambda t: t.offset)


@pytest.mark.parametrize("use_mmap", [True, False])
@pytest.mark.parametrize("damage", FAULTS)
def test_the_loader_names_the_fault(
    tiny_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[np.ndarray], None],
    use_mmap: bool,
) -> None:
    original = evaluation._model_params

    def params(api: object) -> object:
        made = original(api)
        made.use_mmap = use_mmap
        return made

    monkeypatch.setattr(evaluation, "_model_params", params)
    monkeypatch.setattr(evaluation, "check_model_file", lambda path: None)  # which would find it first
    data = bytearray(tiny_models["spk4"].read_bytes())
    tensor = last_spikes(tiny_models["spk4"])
    n_blocks = tensor.shape[0] // 64
    blocks = np.frombuffer(data, BLOCK_SPK4, tensor.n_rows * n_blocks, tensor.offset).reshape(-1, n_blocks)
    damage(slots_of(blocks, 77, 1))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(data)
    place = f"tensor '{tensor.name}', row 77, block 1: {FAULTS[damage]}"
    with pytest.raises(InputError, match=re.escape(place)) as caught:
        Model(damaged)
    assert caught.value.message.count(place) == 1
    assert f"tensor '{tensor.name}' holds damaged spike data" in caught.value.message


def with_version(path: Path, kind: int, version: bytes) -> bytes:
    """The file with a version of the spike format in its metadata, which has none."""
    data = path.read_bytes()
    added = value(KEY_VERSION, kind, version)
    added += value("padding", STRING, text("." * (-len(added + value("padding", STRING, text(""))) % 32)))
    (n_values,) = struct.unpack_from("<Q", data, 16)
    return data[:16] + struct.pack("<Q", n_values + 2) + added + data[24:]  # data stays aligned to 32 bytes


@pytest.mark.parametrize(
    ("kind", "version", "known"),
    [
        (U32, b"\2\0\0\0", True),
        (U32, b"\1\0\0\0", False),
        (U32, b"\3\0\0\0", False),
        (STRING, text("2"), False),
    ],
)
def test_other_versions_of_the_format_are_refused(
    tiny_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: int,
    version: bytes,
    known: bool,
) -> None:
    monkeypatch.setattr(evaluation, "check_model_file", lambda path: None)  # which would find it first
    path = tmp_path / "m.gguf"
    path.write_bytes(with_version(tiny_models["spk4"], kind, version))
    if not known:
        with pytest.raises(
            InputError, match="another version of the spike format than 2, .* convert the model"
        ):
            Model(path)
        return
    with Model(path) as model, Model(tiny_models["spk4"]) as original:  # which is of this version, too
        same = [each.decode([1, 5, 9], 0, outputs=1).copy() for each in (model, original)]
    assert np.array_equal(*same)


def mapped_bytes(path: Path) -> int:
    """Bytes of a file that are in this process's memory because it is mapped."""
    resident, ours = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            resident += 1024 * int(line.split()[1])
    return resident


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_repacked_weights_are_in_memory_once(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    of_kind = {}
    for kind in ("q4_0", "spk4"):
        path = tmp_path / f"{kind}.gguf"
        path.write_bytes(tiny_models[kind].read_bytes())
        with Model(path) as model:
            of_kind[kind] = mapped_bytes(path)
            assert np.isfinite(model.decode([1, 5, 9], 0, outputs=1)).all()
    header = read_header(tmp_path / "spk4.gguf")
    spikes = [t.n_bytes for t in header.tensors if t.type_id == TYPE_SPK4]
    assert of_kind["q4_0"] > 0.9 * header.file_bytes, "what would have been kept"
    assert of_kind["spk4"] < header.file_bytes - sum(spikes) + 2 * 4096 * (len(spikes) + 1)
