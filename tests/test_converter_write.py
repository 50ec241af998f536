"""The output file exists when it is complete, and not before: whatever fails."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from spikequant_gguf import OutputError
from spikequant_gguf.codec import encode_weights
from spikequant_gguf.converter import write
from spikequant_gguf.converter.metadata import (
    encode_f32,
    encode_f32s,
    encode_text,
    encode_texts,
    encode_u32,
    read_raw_metadata,
)
from spikequant_gguf.converter.workspace import workspace
from spikequant_gguf.converter.write import Layout, OutputFile, OutputTensor, check_output, check_space
from spikequant_gguf.format import blocks_to_bytes
from spikequant_gguf.gguf_header import read_header

METADATA = {
    b"general.architecture": encode_text("llama"),
    b"some.number": encode_u32(7),
    b"some.float": encode_f32(0.5),
    b"some.texts": encode_texts(["a", "ü", ""]),
    b"some.floats": encode_f32s([1, 2.5]),
}
TENSORS = [
    OutputTensor("blk.0.attn_q.weight", (64, 5), T(90)),
    OutputTensor("norm", (7,), T.F32),
    OutputTensor("experts", (32, 2, 3), T.Q8_0),
]
SPIKES = blocks_to_bytes(encode_weights(np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)))
DATA = [SPIKES.tobytes(), np.arange(7, dtype=np.float32).tobytes(), bytes(range(34)) * 6]


def write_file(
    path: Path,
    force: bool = False,
    data: list[bytes] = DATA,
    metadata: dict = METADATA,
    fingerprint: dict | None = None,
) -> Layout:
    layout = Layout(METADATA, TENSORS, 32)
    with OutputFile(path, force) as output:
        output.begin(layout, fingerprint)
        for part in data[output.n_resumed :]:
            output.write_tensor([part[:50], part[50:]])
        output.commit(metadata)
    return layout


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what is written


def test_file_is_read_back_by_others(tmp_path):
    path = tmp_path / "out.gguf"
    layout = write_file(path)
    assert files(tmp_path) == ["out.gguf"] and path.stat().st_size == layout.file_bytes
    reader, header = gguf.GGUFReader(path), read_header(path)
    assert header.version == 3
    for tensor, planned, data in zip(reader.tensors, TENSORS, DATA, strict=True):
        assert (tensor.name, tuple(tensor.shape), tensor.tensor_type) == (
            planned.name,
            planned.shape,
            planned.type,
        )
        assert tensor.data.tobytes() == data and tensor.data_offset % 32 == 0
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert values == {
        "general.architecture": "llama",
        "some.number": 7,
        "some.float": 0.5,
        "some.texts": ["a", "ü", ""],
        "some.floats": [1.0, 2.5],
    }


def test_metadata_are_carried_over_as_they_are(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "llama")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(kind, 3)
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("bool", True)
    writer.add_string("text", "ü\0x")
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5])
    writer.add_array("bools", [True, False])
    writer.add_array("texts", ["", "abc"])
    writer.add_tensor("norm", np.ones(7, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "all.gguf")
    raw = read_raw_metadata(tmp_path / "all.gguf", len(header.metadata))
    layout = Layout(raw, TENSORS[1:2], header.alignment)
    with OutputFile(tmp_path / "copy.gguf") as output:
        output.begin(layout)
        output.write_tensor([np.ones(7, np.float32).tobytes()])
        output.commit(raw)
    assert (tmp_path / "copy.gguf").read_bytes() == (tmp_path / "all.gguf").read_bytes()


@pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
def test_alignment(tmp_path, alignment):
    metadata = {**METADATA, b"general.alignment": encode_u32(alignment)}
    layout = Layout(metadata, TENSORS, alignment)
    with OutputFile(tmp_path / "a.gguf") as output:
        output.begin(layout)
        for part in DATA:
            output.write_tensor([part])
        output.commit(metadata)
    for tensor, data in zip(gguf.GGUFReader(tmp_path / "a.gguf").tensors, DATA, strict=True):
        assert tensor.data_offset % alignment == 0 and tensor.data.tobytes() == data


def test_only_the_partial_file_exists_meanwhile(tmp_path):
    with OutputFile(tmp_path / "out.gguf") as output:
        output.begin(Layout(METADATA, TENSORS, 32))
        for part in DATA:
            output.write_tensor([part])
            assert files(tmp_path) == ["out.gguf.partial"]
        # without its header it is no GGUF file
        assert (tmp_path / "out.gguf.partial").read_bytes()[:4] == bytes(4)
        output.commit(METADATA)
    assert files(tmp_path) == ["out.gguf"]


def test_records_hold_what_a_journal_needs(tmp_path):
    layout = Layout(METADATA, TENSORS, 32)
    with OutputFile(tmp_path / "out.gguf") as output:
        output.begin(layout)
        record = output.write_tensor([DATA[0]])
    assert record == output.records[0] and record.offset == layout.offsets[0]
    assert (record.n_bytes, record.sha256) == (len(DATA[0]), hashlib.sha256(DATA[0]).hexdigest())


# ---- refusals


def test_existing_file_needs_force(tmp_path):
    path = tmp_path / "out.gguf"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists already") as error:
        write_file(path)
    assert "--force" in error.value.remedy and path.read_bytes() == b"precious"
    write_file(path, force=True)
    assert path.read_bytes()[:4] == b"GGUF" and files(tmp_path) == ["out.gguf"]


def test_file_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "out.gguf"
    with pytest.raises(OutputError, match="exists already"):
        with OutputFile(path) as output:
            output.begin(Layout(METADATA, TENSORS, 32))
            for part in DATA:
                output.write_tensor([part])
            path.write_bytes(b"precious")
            output.commit(METADATA)
    assert path.read_bytes() == b"precious" and files(tmp_path) == ["out.gguf"]


def test_old_file_survives_a_failure(tmp_path, monkeypatch):
    path = tmp_path / "out.gguf"
    write_file(path)
    before = path.read_bytes()
    monkeypatch.setattr(write.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OutputError, match="broken"):
        write_file(path, force=True)
    assert path.read_bytes() == before and files(tmp_path) == ["out.gguf"]


def test_output_over_its_source(tmp_path):
    source = tmp_path / "model.gguf"
    source.write_bytes(b"x")
    (tmp_path / "link.gguf").symlink_to(source)
    os.link(source, tmp_path / "hard.gguf")
    for name in ("model.gguf", "link.gguf", "hard.gguf", "../" + tmp_path.name + "/model.gguf"):
        with pytest.raises(OutputError, match="is the source itself"):
            check_output(tmp_path / name, True, [source])
    # the partial file would be the source, too
    (tmp_path / "other.gguf.partial").write_bytes(b"y")
    with pytest.raises(OutputError, match="is the source itself"):
        check_output(tmp_path / "other.gguf", True, [tmp_path / "other.gguf.partial"])
    check_output(tmp_path / "new.gguf", False, [source])


def test_folders(tmp_path):
    with pytest.raises(OutputError, match="is a folder"):
        check_output(tmp_path, True)
    with pytest.raises(OutputError, match="there is no folder"):
        check_output(tmp_path / "nowhere" / "out.gguf", True)
    with pytest.raises(OutputError, match="File name too long"):
        check_output(tmp_path / ("x" * 300), True)
    assert files(tmp_path) == []


def test_space_is_checked_first(tmp_path, monkeypatch):
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    check_space(tmp_path, 100)
    with pytest.raises(OutputError, match="not enough space") as error:
        write_file(tmp_path / "out.gguf")
    assert error.value.remedy and files(tmp_path) == []


def test_two_writers(tmp_path):
    path = tmp_path / "out.gguf"
    with OutputFile(path) as output:
        output.begin(Layout(METADATA, TENSORS, 32))
        with pytest.raises(OutputError, match="another process is writing"):
            write_file(path)
        for part in DATA:
            output.write_tensor([part])
        output.commit(METADATA)
    assert files(tmp_path) == ["out.gguf"]


def test_stale_partial_file_is_replaced(tmp_path):
    (tmp_path / "out.gguf.partial").write_bytes(b"z" * 100_000)
    layout = write_file(tmp_path / "out.gguf")
    assert files(tmp_path) == ["out.gguf"] and (tmp_path / "out.gguf").stat().st_size == layout.file_bytes


# ---- misuse is an error, not a broken file


@pytest.mark.parametrize("data", [DATA[:2], [DATA[0][:-1], *DATA[1:]], [DATA[0] + b"x", *DATA[1:]]])
def test_wrong_data_size(tmp_path, data):
    with pytest.raises(ValueError):
        write_file(tmp_path / "out.gguf", data=data)
    assert files(tmp_path) == []


def test_metadata_of_another_size(tmp_path):
    with pytest.raises(ValueError, match="reserved"):
        write_file(tmp_path / "out.gguf", metadata={**METADATA, b"more": encode_text("x" * 100)})
    assert files(tmp_path) == []


# ---- faults of the system


class FailingWrites:
    """Stands for os.write: the call with this number fails or writes less than it was given."""

    def __init__(self, number: int, error: int | None):
        self.number, self.error, self.calls, self.write = number, error, 0, os.write

    def __call__(self, file, data):
        self.calls += 1
        if self.calls - 1 == self.number:
            if self.error is not None:
                raise OSError(self.error, os.strerror(self.error))
            return self.write(file, bytes(data)[: max(1, len(data) // 2)])
        return self.write(file, data)


def count_writes(tmp_path, monkeypatch) -> int:
    counter = FailingWrites(-1, None)
    with monkeypatch.context() as patch:
        patch.setattr(write.os, "write", counter)
        write_file(tmp_path / "count.gguf")
    (tmp_path / "count.gguf").unlink()
    return counter.calls


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_error_at_every_write(tmp_path, monkeypatch, fault):
    n_writes = count_writes(tmp_path, monkeypatch)
    assert n_writes >= 8
    for number in range(n_writes):
        with monkeypatch.context() as patch:
            patch.setattr(write.os, "write", FailingWrites(number, fault))
            with pytest.raises(OutputError) as error:
                write_file(tmp_path / "out.gguf")
        assert ("the disk is full" in error.value.message) == (fault != errno.EIO)
        assert error.value.remedy and files(tmp_path) == []


def test_short_write_at_every_write(tmp_path, monkeypatch):
    write_file(tmp_path / "expected.gguf")
    for number in range(count_writes(tmp_path, monkeypatch)):
        with monkeypatch.context() as patch:
            patch.setattr(write.os, "write", FailingWrites(number, None))
            write_file(tmp_path / "out.gguf", force=True)
        assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()


@pytest.mark.parametrize("function", ["fsync", "replace", "ftruncate", "open", "lseek"])
def test_error_of_other_calls(tmp_path, monkeypatch, function):
    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(write.os, function, fail)
        with pytest.raises(OutputError, match="cannot write"):
            write_file(tmp_path / "out.gguf")
    assert files(tmp_path) == []


def test_every_damage_on_disk_is_noticed(tmp_path, monkeypatch):
    path = tmp_path / "out.gguf"
    layout = write_file(path)
    path.unlink()
    places = [
        0,
        30,
        layout.header_bytes - 40,
        *layout.offsets,
        layout.offsets[1] + 6,
        layout.offsets[2] + 200,
    ]
    for place in places:

        def damaged(file, size, offset, place=place, read=os.pread):
            data = bytearray(read(file, size, offset))
            if offset <= place < offset + len(data):
                data[place - offset] ^= 1
            return bytes(data)

        with monkeypatch.context() as patch:
            patch.setattr(write.os, "pread", damaged)
            with pytest.raises(OutputError, match="read back is not what was written"):
                write_file(path)
        assert files(tmp_path) == []


def test_invalid_spikes_never_get_the_final_name(tmp_path):
    invalid = np.frombuffer(DATA[0], np.uint8).reshape(5, -1).copy()
    invalid[3, :2] = (0xF0, 0x7F)
    with pytest.raises(OutputError, match="read back"):
        write_file(tmp_path / "out.gguf", data=[invalid.tobytes(), *DATA[1:]])
    assert files(tmp_path) == []


SCRIPT = """
import sys
from pathlib import Path
from test_converter_write import *
from spikequant_gguf import SpikeQuantError
{setup}
try:
    write_file(Path({out!r}))
except SpikeQuantError as error:
    print(error.message)
    sys.exit(error.exit_code)
"""


def run_script(out: Path, setup: str) -> subprocess.CompletedProcess:
    script = SCRIPT.format(out=str(out), setup=textwrap.dedent(setup))
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment
    )


def test_real_limit_on_file_size(tmp_path):
    done = run_script(
        tmp_path / "out.gguf",
        """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        """,
    )
    assert done.returncode == OutputError.exit_code and "cannot write" in done.stdout, done
    assert files(tmp_path) == []


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("number", [0, 3, 9])
def test_ended_by_a_signal(tmp_path, sign, number):
    done = run_script(
        tmp_path / "out.gguf",
        f"""
        class EndsAt(FailingWrites):
            def __call__(self, file, data):
                written = super().__call__(file, data)
                if self.calls == self.number + 1:
                    os.kill(os.getpid(), {int(sign)})
                return written
        write.os.write = EndsAt({number}, None)
        """,
    )
    assert done.returncode not in (0, OutputError.exit_code), done
    # Ctrl-C cleans up; nothing can after SIGKILL, but the final name does not exist
    assert files(tmp_path) == ([] if sign == signal.SIGINT else ["out.gguf.partial"])
    write_file(tmp_path / "out.gguf")
    assert files(tmp_path) == ["out.gguf"]


# ---- temporary folders


def test_workspace_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with workspace(tmp_path) as folder:
            (folder / "model.gguf").write_bytes(b"x")
            assert folder.parent == tmp_path
            raise KeyboardInterrupt
    assert files(tmp_path) == []


def test_workspace_of_a_killed_run_is_removed(tmp_path):
    with workspace(tmp_path) as alive:
        killed = tmp_path / ".spikequant-killed"
        killed.mkdir()
        (killed / "lock").write_bytes(b"")
        (killed / "model.gguf").write_bytes(b"x")
        (tmp_path / ".spikequant-foreign").mkdir()
        with workspace(tmp_path) as second:
            assert files(tmp_path) == sorted([alive.name, second.name, ".spikequant-foreign"])
    assert files(tmp_path) == [".spikequant-foreign"]
    with pytest.raises(OutputError, match="no temporary folder"):
        with workspace(tmp_path / "nowhere"):
            pass
