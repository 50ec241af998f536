"""Open files: locks, reads at a place, and the order of closing and renaming that Windows wants."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from spikequant_gguf.converter import convert, system, workspace, write
from spikequant_gguf.converter.system import BINARY, read_at, try_lock


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """A file of 100,000 different values of 32 bits."""
    path = tmp_path / "numbers"
    np.arange(100_000, dtype="<u4").tofile(path)
    return path


@pytest.mark.parametrize("read", [read_at, system._seek_and_read])
def test_threads_read_where_they_want(numbers: Path, read) -> None:
    file = os.open(numbers, os.O_RDONLY | BINARY)
    os.lseek(file, 12, os.SEEK_SET)
    wrong = []

    def look(seed: int) -> None:
        for first in np.random.default_rng(seed).integers(0, 99_000, 300):
            found = np.frombuffer(read(file, 4000, int(first) * 4), "<u4")
            if not np.array_equal(found, np.arange(first, first + 1000)):
                wrong.append(first)

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and os.lseek(file, 0, os.SEEK_CUR) == 12
    assert read(file, 100, 400_000) == b""
    os.close(file)


def test_a_lock_keeps_other_processes_out_until_its_holder_is_gone(numbers: Path) -> None:
    code = (
        "import os, sys; from spikequant_gguf.converter.system import try_lock;"
        "print(try_lock(os.open(sys.argv[1], os.O_RDWR)), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, numbers]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "True\n"
        file = os.open(numbers, os.O_RDWR)
        assert not try_lock(file)
        holder.kill()
    assert try_lock(file)
    os.close(file)


def test_without_renaming_of_open_files(
    runtime, tiny_model_f32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows: everything is closed before it gets its name or is removed."""
    for module in (write, workspace):
        monkeypatch.setattr(module, "RENAMES_OPEN_FILES", False)

    def is_open(path: Path) -> bool:
        links = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        return str(path.resolve()) in links

    def closed_only(function):
        def checked(path, *rest, **options):
            assert options or not is_open(Path(path)), path  # options: of shutil.rmtree
            return function(path, *rest, **options)

        return checked

    monkeypatch.setattr(os, "replace", closed_only(os.replace))
    monkeypatch.setattr(os, "unlink", closed_only(os.unlink))
    out = tmp_path / "spk4.gguf"
    convert(tiny_model_f32, out)
    expected = out.read_bytes()
    with pytest.raises(RuntimeError, match="stop"), write.OutputFile(out, force=True) as file:
        raise RuntimeError(f"stop {file.path}")
    with workspace.workspace(tmp_path) as folder:
        (folder / "some").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["spk4.gguf"] and out.read_bytes() == expected
