"""Reading sources: types, models in parts, checkpoints, importance matrices, and every damage by its name."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from converter_models import METADATA, NumpyBackend, llama_tensors, normal, write_gguf
from gguf import GGMLQuantizationType as T
from gguf import quants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spikequant_gguf import InputError, SpikeQuantError, UnsupportedError
from spikequant_gguf.codec import encode_weights
from spikequant_gguf.converter.checkpoint import open_checkpoint
from spikequant_gguf.converter.importance import read_importance
from spikequant_gguf.converter.naming import default_name, fill_template
from spikequant_gguf.converter.shards import check_shards
from spikequant_gguf.converter.source import open_gguf
from spikequant_gguf.format import blocks_to_bytes
from spikequant_gguf.gguf_header import read_header

WEIGHTS = normal(6, 256)


def opened(path: Path):
    return open_gguf(path, NumpyBackend())


# ---- GGUF


@pytest.mark.parametrize("kind", [T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.TQ2_0])
def test_types_become_numbers(tmp_path, kind):
    path = write_gguf(tmp_path / "m.gguf", {"w": WEIGHTS, "norm": WEIGHTS[0]}, kind)
    expected = quants.dequantize(quants.quantize(WEIGHTS, kind), kind)
    with opened(path) as source:
        assert source.tensors["w"].type == kind and source.tensors["w"].shape == (256, 6)
        assert source.read_rows("w").dtype == np.float32
        np.testing.assert_array_equal(source.read_rows("w"), expected)
        np.testing.assert_array_equal(source.read_rows("w", 2, 3), expected[2:5])
        np.testing.assert_array_equal(source.read_rows("norm"), WEIGHTS[:1])


def test_more_types(tmp_path):
    wide = WEIGHTS.astype(np.float64)
    path = write_gguf(tmp_path / "m.gguf", {"f64": wide, "i32": np.arange(6, dtype=np.int32), "w": WEIGHTS})
    with opened(path) as source:
        np.testing.assert_array_equal(source.read_rows("f64"), WEIGHTS)
        assert source.read_raw("i32").tobytes() == np.arange(6, dtype=np.int32).tobytes()
        with pytest.raises(KeyError):
            source.read_raw("nothing")


def test_matrices_of_experts(tmp_path):
    experts = normal(3, 4, 64)
    with opened(write_gguf(tmp_path / "m.gguf", {"e": experts}, T.Q8_0)) as source:
        tensor = source.tensors["e"]
        assert (tensor.shape, tensor.n_rows, tensor.rows_per_matrix, tensor.n_in) == ((64, 4, 3), 12, 4, 64)
        assert tensor.row_bytes * 12 == tensor.n_bytes
        expected = quants.dequantize(quants.quantize(experts, T.Q8_0), T.Q8_0).reshape(12, 64)
        np.testing.assert_array_equal(source.read_rows("e", 5, 6), expected[5:11])


def split_model(folder: Path, n_parts: int = 3) -> tuple[list[Path], dict]:
    tensors = llama_tensors()
    names = list(tensors)
    paths = []
    for number in range(n_parts):
        path = folder / f"tiny-{number + 1:05d}-of-{n_parts:05d}.gguf"
        metadata = {**(METADATA if number == 0 else {})}
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in metadata.items():
            if isinstance(value, str):
                writer.add_string(key, value)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", n_parts)
        writer.add_int32("split.tensors.count", len(names))
        for name in names[number::n_parts]:
            writer.add_tensor(name, tensors[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths, tensors


@pytest.mark.parametrize("given_part", [0, 1, 2])
def test_model_in_parts(tmp_path, given_part):
    paths, tensors = split_model(tmp_path)
    with opened(paths[given_part]) as source:
        assert set(source.tensors) == set(tensors) and source.paths == tuple(paths)
        assert source.metadata["general.name"] == "Tiny Test"
        for name, values in tensors.items():
            np.testing.assert_array_equal(source.read_rows(name).reshape(values.shape), values)


def test_parts_that_do_not_belong_together(tmp_path):
    paths, _ = split_model(tmp_path)
    moved = paths[1].rename(tmp_path / "gone.gguf")
    with pytest.raises(InputError, match="tiny-00002-of-00003.gguf missing"):
        opened(paths[0])
    with pytest.raises(InputError, match="one of 3 parts") as error:
        opened(moved)
    assert "llama-gguf-split --merge" in error.value.remedy
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(InputError, match="split.no is 2"):
        opened(paths[0])
    single = write_gguf(tmp_path / "x-00001-of-00002.gguf", {"w": WEIGHTS})
    write_gguf(tmp_path / "x-00002-of-00002.gguf", {"w": WEIGHTS})
    with pytest.raises(InputError, match="split.no"):
        opened(single)


def test_change_while_reading(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {"w": WEIGHTS})
    with opened(path) as source:
        source.check_unchanged()
        with path.open("ab") as file:
            file.write(b"x")
        with pytest.raises(InputError, match="changed while it was read"):
            source.check_unchanged()
    with opened(path) as source:
        with path.open("r+b") as file:
            file.truncate(source.tensors["w"].offset + 100)
        with pytest.raises(InputError, match="became shorter"):
            source.read_rows("w")
    write_gguf(path, {"w": WEIGHTS})
    with opened(path) as source:
        path.unlink()
        with pytest.raises(InputError, match="changed"):
            source.check_unchanged()


# ---- bad GGUF files


def header(
    n_tensors: int = 0, n_values: int = 0, version: int = 3, magic: bytes = b"GGUF", rest: bytes = b""
) -> bytes:
    return magic + struct.pack("<IQQ", version, n_tensors, n_values) + rest


def entry(name: str = "w", shape=(64, 2), kind: int = 0, offset: int = 0) -> bytes:
    data = name.encode()
    dims = b"".join(struct.pack("<Q", size) for size in shape)
    return (
        struct.pack("<Q", len(data))
        + data
        + struct.pack("<I", len(shape))
        + dims
        + struct.pack("<IQ", kind, offset)
    )


ARCHITECTURE = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 5) + b"llama"


def model(*entries: bytes, data: int = 1024, metadata: bytes = ARCHITECTURE, n_values: int = 1) -> bytes:
    start = header(len(entries), n_values, rest=metadata + b"".join(entries))
    return start + bytes(-len(start) % 32 + data)


BAD_FILES = {
    "empty": (b"", InputError, "empty"),
    "no gguf": (b"hello world, this is text", InputError, "not a GGUF file"),
    "magic only": (b"GGUF", InputError, "cut off"),
    "version": (header(version=1), InputError, "version 1 is not supported"),
    "future": (header(version=4), InputError, "version 4 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), InputError, "big-endian"),
    "no end of values": (header(0, 2**63), InputError, "cut off or damaged"),
    "no end of tensors": (header(2**63, 0), InputError, "cut off or damaged"),
    "key of 2^63 bytes": (header(0, 1, rest=struct.pack("<Q", 2**63)), InputError, "cut off or damaged"),
    "no architecture": (model(entry(), metadata=b"", n_values=0), InputError, "general.architecture"),
    "no tensors": (model(), InputError, "no tensors"),
    "two of a name": (model(entry(), entry(offset=512)), InputError, "is there twice"),
    "no name": (model(entry("")), InputError, "no name"),
    "cut off": (model(entry(shape=(64, 9))), InputError, "tensor 'w' ends at byte"),
    "far away": (model(entry(offset=2**63)), InputError, "cut off"),
    "size overflow": (model(entry(shape=(2**62, 2**62, 2**62, 64))), InputError, "cut off"),
    "no elements": (model(entry(shape=(64, 0))), InputError, "no elements"),
    "five dimensions": (model(entry(shape=(2, 2, 2, 2, 2))), InputError, "5 dimensions"),
    "overlap": (model(entry(), entry("v", offset=32)), InputError, "overlaps"),
    "half a block": (model(entry(shape=(48, 2), kind=2)), InputError, "do not fit its type Q4_0"),
    "unknown type": (model(entry(kind=77)), UnsupportedError, "unknown type 77"),
    "removed type": (model(entry(kind=4)), UnsupportedError, "unknown type 4"),
    "SPK4": (model(entry(kind=90)), InputError, "already SPK4"),
    "SPKA": (model(entry(kind=91)), InputError, "already SPK4"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(tmp_path, name):
    content, kind, message = BAD_FILES[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(kind, match=message) as error:
        opened(path)
    assert str(path) in error.value.message and error.value.remedy
    assert "\n" not in error.value.message


def test_whole_file_is_accepted(tmp_path):
    (tmp_path / "good.gguf").write_bytes(model(entry()))
    with opened(tmp_path / "good.gguf") as source:
        assert list(source.tensors) == ["w"] and not source.read_rows("w").any()


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        opened(tmp_path / "nothing.gguf")
    with pytest.raises(InputError, match="No such file"):
        opened(tmp_path / "nothing-00001-of-00002.gguf")
    for suffix, remedy in (
        (".safetensors", "folder of the checkpoint"),
        (".bin", "pickles"),
        (".pth", "pickles"),
    ):
        (tmp_path / f"model{suffix}").write_bytes(b"x" * 100)
        with pytest.raises(InputError, match="not a GGUF file") as error:
            opened(tmp_path / f"model{suffix}")
        assert remedy in error.value.remedy


@pytest.mark.parametrize(
    "metadata, architecture, message",
    [
        ({"general.type": "adapter"}, "llama", "adapter"),
        ({"general.type": "imatrix"}, "llama", "imatrix"),
        ({}, "clip", "clip"),
    ],
)
def test_what_is_no_language_model(tmp_path, metadata, architecture, message):
    path = write_gguf(tmp_path / "m.gguf", {"w": WEIGHTS}, metadata=metadata, architecture=architecture)
    with pytest.raises(UnsupportedError, match=message):
        opened(path)


def test_spike_model_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", blocks_to_bytes(encode_weights(WEIGHTS)), raw_dtype=T(90))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="already SPK4") as error:
        opened(tmp_path / "m.gguf")
    assert "spikequant dequantize" in error.value.remedy


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    return write_gguf(
        tmp_path_factory.mktemp("fuzz") / "m.gguf", {"w": WEIGHTS, "norm": WEIGHTS[0]}, T.Q8_0
    ).read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_header_gives_one_kind_of_error(small_model, tmp_path, data):
    damaged = bytearray(small_model[: data.draw(st.integers(0, len(small_model)))])
    start = small_model.index(b"norm") + 64
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, min(start, len(damaged)) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    try:
        with opened(path) as source:
            assert source.raw_metadata
            for name in source.tensors:
                if source.tensors[name].type in (T.F32, T.Q8_0):
                    source.read_rows(name)
    except SpikeQuantError as error:
        assert error.remedy


# ---- checkpoints


def safetensors_bytes(tensors: dict[str, tuple[str, list[int], int]], cut: int = 0, extra: int = 0) -> bytes:
    entries, at = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(at) + bytes(extra)
    return data[: len(data) - cut]


A = {"a": ("BF16", [2, 3], 12)}
B = {"b": ("BF16", [4, 2], 16), "norm": ("F32", [2], 8)}
NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = {"a": NAMES[0], "b": NAMES[1], "norm": NAMES[1]}


def make_folder(folder: Path, first=A, second=B, index=INDEX) -> Path:
    for name, tensors in zip(NAMES, (first, second), strict=True):
        if tensors is not None:
            data = tensors if isinstance(tensors, bytes) else safetensors_bytes(tensors)
            (folder / name).write_bytes(data)
    if index is not None:
        text = index if isinstance(index, str) else json.dumps({"weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return folder


def test_sound_checkpoints(tmp_path):
    for number, index in enumerate((INDEX, None)):
        folder = tmp_path / str(number)
        folder.mkdir()
        shards = check_shards(make_folder(folder, index=index))
        assert [path.name for path in shards.paths] == list(NAMES)
        assert sorted(tensor.name for tensor in shards.tensors) == ["a", "b", "norm"]
        checkpoint = open_checkpoint(folder)
        assert (checkpoint.name, checkpoint.architecture) == (str(number), "LlamaForCausalLM")
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(A))
    (tmp_path / "consolidated.safetensors").write_bytes(b"not looked at")
    assert [path.name for path in check_shards(tmp_path).paths] == ["model.safetensors"]


@pytest.mark.parametrize(
    "dtypes, expected",
    [
        (["BF16"], "bf16"),
        (["F16"], "f16"),
        (["F32"], "f32"),
        (["F64"], "f32"),
        (["BF16", "F16"], "f32"),
        (["BF16", "F32"], "f32"),
        (["F8_E4M3", "BF16"], "bf16"),
        (["U8", "BF16"], "bf16"),
        (["I32"], "bf16"),
    ],
)
def test_type_that_holds_all_matrices(tmp_path, dtypes, expected):
    size = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "U8": 1, "I32": 4}
    tensors = {f"t{n}": (dtype, [2, 2], 4 * size[dtype]) for n, dtype in enumerate(dtypes)}
    tensors["norm"] = ("F32", [3], 12)  # vectors do not count
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    assert check_shards(tmp_path).float_type == expected


BAD_FOLDERS = {
    "missing shard": ({"second": None}, "model-00002-of-00002.safetensors missing"),
    "missing shard, no index": ({"second": None, "index": None}, "model-00002-of-00002.safetensors missing"),
    "cut off": ({"second": safetensors_bytes(B, cut=5)}, "5 bytes of weights are missing"),
    "cut off in the header": ({"second": safetensors_bytes(B)[:20]}, "cut off"),
    "eight bytes": ({"second": b"\xff" * 8}, "cut off"),
    "empty": ({"second": b""}, "cut off"),
    "too long": ({"second": safetensors_bytes(B, extra=3)}, "3 bytes too many"),
    "no JSON": ({"second": struct.pack("<Q", 4) + b"{{{{"}, "JSON in it is damaged"),
    "no object": ({"second": struct.pack("<Q", 2) + b"[]"}, "header is damaged"),
    "deep JSON": ({"second": struct.pack("<Q", 200_000) + b"[" * 200_000}, "JSON in it is damaged"),
    "wrong size": ({"first": {"a": ("BF16", [2, 3], 14)}}, "has 14 bytes of data"),
    "negative shape": ({"first": {"a": ("BF16", [-2, -3], 12)}}, "entry of tensor 'a' is damaged"),
    "size overflow": ({"first": {"a": ("BF16", [2**63, 2**63], 12)}}, "bytes of data"),
    "tensor missing": ({"second": {"b": B["b"]}}, "tensor 'norm' is said to be in"),
    "tensor elsewhere": (
        {"first": {**A, "norm": B["norm"]}, "second": {"b": B["b"]}},
        "but it is in model-00001",
    ),
    "tensor extra": ({"first": {**A, "c": A["a"]}}, "does not list tensor 'c'"),
    "tensor twice": ({"first": {**A, "b": B["b"]}}, "tensor 'b' is in model-00001"),
    "outside": (
        {"index": {**INDEX, "a": "../model-00001-of-00002.safetensors"}},
        "not a safetensors file of this",
    ),
    "absolute": ({"index": {**INDEX, "a": "/etc/passwd.safetensors"}}, "not a safetensors file of this"),
    "not weights": ({"index": {**INDEX, "a": "config.json"}}, "not a safetensors file of this"),
    "number": ({"index": {**INDEX, "a": 7}}, "not a safetensors file of this"),
    "broken index": ({"index": "{"}, "JSON in it is damaged"),
    "index without map": ({"index": "{}"}, "no weight_map"),
    "index twice": ({"index": '{"weight_map": {"a": "x", "a": "y"}}'}, "twice"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_checkpoint(tmp_path, name):
    changes, message = BAD_FOLDERS[name]
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(make_folder(tmp_path, **changes))
    assert error.value.remedy and "\n" not in error.value.message


def test_shard_of_another_model(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "model-00001-of-00003.safetensors").write_bytes(safetensors_bytes(A))
    with pytest.raises(InputError, match="the index does not know this file"):
        check_shards(tmp_path)


@pytest.mark.parametrize(
    "file, kind, message, remedy",
    [
        ("pytorch_model.bin", InputError, "pickled", "save_pretrained"),
        ("consolidated.00.pth", InputError, "pickled", "save_pretrained"),
        ("adapter_config.json", UnsupportedError, "adapter", "merge it"),
        ("tiny.gguf", InputError, "folder with GGUF files", "tiny.gguf"),
        ("notes.txt", InputError, "no model.safetensors", "Hugging Face checkpoint"),
    ],
)
def test_folders_without_safetensors(tmp_path, file, kind, message, remedy):
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(kind, match=message) as error:
        open_checkpoint(tmp_path)
    assert remedy in error.value.remedy


@pytest.mark.parametrize("config", [None, "{", "[]", "[1]", "\xff"])
def test_bad_configuration(tmp_path, config):
    make_folder(tmp_path)
    (tmp_path / "config.json").unlink()
    if config is not None:
        (tmp_path / "config.json").write_bytes(config.encode("latin-1"))
    with pytest.raises(InputError, match="config"):
        open_checkpoint(tmp_path)


# ---- importance matrices


def write_imatrix(path: Path, entries: dict[str, tuple[np.ndarray, np.ndarray]], **metadata) -> Path:
    writer = gguf.GGUFWriter(path, "")
    writer.add_string("general.type", metadata.get("kind", "imatrix"))
    writer.add_array("imatrix.datasets", ["/home/me/wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 5)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", sums.astype(metadata.get("dtype", np.float32)))
        if counts is not None:
            writer.add_tensor(f"{name}.counts", counts.astype(np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def legacy_imatrix(entries: dict[str, tuple[int, np.ndarray]], tail: bytes = b"") -> bytes:
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, values.size)
        data += values.astype("<f4").tobytes()
    return data + tail


SUMS = np.abs(normal(2, 64, scale=10.0))


def test_importance_from_gguf(tmp_path):
    path = write_imatrix(tmp_path / "i.gguf", {"e": (SUMS, np.array([4, 0])), "w": (SUMS[:1], np.array([8]))})
    found = read_importance(path)
    assert (len(found), found.datasets, found.chunks) == (2, ("/home/me/wiki.txt",), 5)
    np.testing.assert_array_equal(found.of("e", 0, 64), SUMS[0] / np.float32(4))
    np.testing.assert_array_equal(found.of("e", 1, 64), np.ones(64))  # an expert without tokens
    np.testing.assert_array_equal(found.of("w", 0, 64), SUMS[0] / np.float32(8))
    assert found.of("other", 0, 64) is None and "w" in found and "other" not in found
    found.check([("e", (64, 8, 2)), ("other", (32, 8))])
    with pytest.raises(InputError, match="128 values, not 256"):
        found.check([("e", (64, 8, 4))])
    with pytest.raises(InputError, match="knows none"):
        found.check([("other", (32, 8))])


@pytest.mark.parametrize("tail", [b"", struct.pack("<i", 9), struct.pack("<ii", 9, 4) + b"wiki"])
def test_importance_of_the_old_form(tmp_path, tail):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy_imatrix({"odd": (2, SUMS), "w": (0, SUMS[0])}, tail))
    found = read_importance(path)
    assert (found.chunks, found.datasets) == (9 if tail else 0, ("wiki",) if len(tail) > 4 else ())
    np.testing.assert_array_equal(found.of("odd", 1, 64), SUMS[1] / np.float32(2))
    np.testing.assert_array_equal(found.of("w", 0, 64), SUMS[0])


def test_bad_importance(tmp_path):
    good = legacy_imatrix({"w": (2, SUMS)}, struct.pack("<ii", 9, 4) + b"wiki")
    path = tmp_path / "imatrix.dat"
    # cutting it exactly after the entries or after the number of chunks leaves a valid file
    for length in set(range(len(good))) - {len(good) - 12, len(good) - 8}:
        path.write_bytes(good[:length])
        with pytest.raises(InputError):
            read_importance(path)
    path.write_bytes(struct.pack("<ii", 1, -5) + b"x" * 100)
    with pytest.raises(InputError):
        read_importance(path)
    with pytest.raises(InputError, match="No such file"):
        read_importance(tmp_path / "nothing")
    for name, entries, options in (
        ("no imatrix", {"w": (SUMS, np.array([1, 1]))}, {"kind": "model"}),
        ("no counts", {"w": (SUMS, None)}, {}),
        ("odd counts", {"w": (SUMS, np.array([1, 1, 1]))}, {}),
        ("F16", {"w": (SUMS, np.array([1, 1]))}, {"dtype": np.float16}),
        ("empty", {}, {}),
    ):
        with pytest.raises(InputError):
            print(name, read_importance(write_imatrix(tmp_path / "i.gguf", entries, **options)))
    whole = write_imatrix(tmp_path / "i.gguf", {"w": (SUMS, np.array([1, 1]))}).read_bytes()
    (tmp_path / "i.gguf").write_bytes(whole[: read_header(tmp_path / "i.gguf").tensors[0].offset + 8])
    with pytest.raises(InputError, match="cut off"):
        read_importance(tmp_path / "i.gguf")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_importance_must_be_finite(tmp_path, bad):
    sums = SUMS.copy()
    sums[1, 3] = bad
    found = read_importance(write_imatrix(tmp_path / "i.gguf", {"e": (sums, np.array([1, 1]))}))
    assert found.of("e", 0, 64) is not None
    with pytest.raises(InputError, match="tensor 'e'"):
        found.of("e", 1, 64)
    counted = read_importance(write_imatrix(tmp_path / "i.gguf", {"e": (SUMS, np.array([1, bad]))}))
    assert counted.of("e", 0, 64) is not None
    with pytest.raises(InputError, match="tensor 'e'"):
        counted.of("e", 1, 64)


# ---- names of the output


@pytest.mark.parametrize(
    "metadata, fallback, expected",
    [
        (
            {"basename": "smollm2", "size_label": "135M", "finetune": "Instruct"},
            "x.gguf",
            "smollm2-135M-Instruct-SPK4.gguf",
        ),
        (
            {"basename": "Mixtral", "size_label": "8x7B", "version": "v0.1"},
            "x.gguf",
            "Mixtral-8x7B-v0.1-SPK4.gguf",
        ),
        ({"name": "My Model 7B", "size_label": "7B"}, "x.gguf", "My-Model-7B-SPK4.gguf"),
        ({}, "SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct-SPK4.gguf"),
        ({}, "model-F16.gguf", "model-SPK4.gguf"),
        ({}, "model-bf16-00001-of-00003.gguf", "model-SPK4.gguf"),
        ({}, "owner/Tiny-1B", "owner-Tiny-1B-SPK4.gguf"),
        ({}, ".gguf", "model-SPK4.gguf"),
        ({"basename": "../../etc/passwd", "size_label": "1/2"}, "x.gguf", "etc-passwd-1-2-SPK4.gguf"),
        ({"basename": 7, "name": " "}, "x.gguf", "x-SPK4.gguf"),
    ],
)
def test_default_name(metadata, fallback, expected):
    assert default_name({f"general.{key}": value for key, value in metadata.items()}, fallback) == expected


def test_template():
    assert fill_template(Path("a/b-{ftype}.gguf")) == Path("a/b-spk4.gguf")
    assert fill_template(Path("b-{FTYPE}.{outtype}.gguf")) == Path("b-SPK4.spk4.gguf")
    assert fill_template(Path("{x}/{y}.gguf")) == Path("{x}/{y}.gguf")
