"""Conversions that are killed, or refused by the system, at every call: nothing lost, nothing half-done.

faults.c is preloaded and meets a conversion at the call of a given number: each write, read, fsync, rename,
removal, opening and truncation in the folder of the output. `make fuzz` sets SPIKEQUANT_LONG_TESTS, and then
a call meets every fault instead of one of them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from converter_models import llama_tensors, write_gguf
from gguf import GGMLQuantizationType as T

from spikequant_gguf import OutputError
from spikequant_gguf.runtime import RuntimeInfo
from spikequant_gguf.verify import verify_file

COUNT, KILL_BEFORE, KILL_AFTER, KILL_IN_THE_MIDDLE, FAIL, SHORT = range(6)
KILLS = (KILL_BEFORE, KILL_AFTER, KILL_IN_THE_MIDDLE)
FOLDER = Path(__file__).parent
N_TENSORS = 20
LONG = bool(os.environ.get("SPIKEQUANT_LONG_TESTS"))
MEMORY = Path("/dev/shm")  # where it exists: synchronizing thousands of times is slow on disks


class Worker:
    """Converts one model again and again, in processes that may be killed."""

    def __init__(self, source: Path, library: Path) -> None:
        paths = [str(FOLDER), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, FOLDER / "fault_worker.py", source],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "LD_PRELOAD": str(library),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            },
        )

    def convert(self, out: Path, kind: int = COUNT, number: int = -1, error: int = 0, **options) -> dict:
        request = {"out": str(out), "kind": kind, "number": number, "error": error, "resume": True, **options}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be preloaded."""
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    compiler = os.environ.get("CC", "cc")
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-O1",
        "-Wall",
        "-Werror",
        "-o",
        library,
        FOLDER / "native/faults.c",
    ]
    subprocess.run([*command, "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def worker(library: Path) -> Iterator[Worker]:
    source = write_gguf(library.parent / "tiny-F16.gguf", llama_tensors(n_layers=2), T.F16)
    worker = Worker(source, library)
    yield worker
    worker.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        yield Path(name).resolve()


@pytest.fixture(scope="module")
def expected(worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """sha256 of a conversion that nothing disturbs, and its number of calls."""
    out = tmp_path_factory.mktemp("expected") / "out.gguf"
    done = worker.convert(out)
    assert done["status"] == 0 and done["calls"] >= 100, done
    verify_file(out).raise_if_faulty()
    assert [path.name for path in out.parent.iterdir()] == ["out.gguf"]
    return sha256(out), done["calls"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


PARTIAL = {"out.gguf.partial", "out.gguf.partial.journal"}


def finish(worker: Worker, out: Path, digest: str) -> int:
    """Converts undisturbed; the result must be the whole file and nothing else. Number of resumed tensors."""
    if out.exists():
        assert sha256(out) == digest  # killed after the renaming: what has the name is complete
        done = worker.convert(out)
        assert done["status"] == OutputError.exit_code and "exists already" in done["message"], done
        assert names(out.parent) == {out.name}
        return N_TENSORS
    done = worker.convert(out)
    assert done["status"] == 0, done
    assert sha256(out) == digest and names(out.parent) == {out.name}
    return done["resumed"]


# ---- SIGKILL


def test_killed_at_every_call(worker: Worker, expected: tuple[str, int], folder: Path) -> None:
    """Before it, after it, and in the middle of what it transfers. Then the same conversion goes on."""
    digest, n_calls = expected
    rng = random.Random(3)
    resumed = {kind: [] for kind in KILLS}
    for number in range(n_calls):
        for kind in KILLS if LONG else [rng.choice(KILLS)]:
            out = folder / f"{number}-{kind}" / "out.gguf"
            out.parent.mkdir()
            killed = worker.convert(out, kind, number)
            assert killed["signal"] == signal.SIGKILL, killed
            assert names(out.parent) <= PARTIAL | {out.name}
            resumed[kind].append(finish(worker, out, digest))
    assert sum(map(len, resumed.values())) == n_calls * (len(KILLS) if LONG else 1)
    # nothing lost: what was complete is not done again
    assert all(numbers == sorted(numbers) for numbers in resumed.values())
    assert set().union(*resumed.values()) == set(range(N_TENSORS + 1))


def test_killed_again_and_again(worker: Worker, expected: tuple[str, int], folder: Path) -> None:
    digest, n_calls = expected
    rng = random.Random(7)
    for number in range(200 if LONG else 10):
        out = folder / str(number) / "out.gguf"
        out.parent.mkdir()
        for _ in range(4):
            if out.exists():
                break
            worker.convert(out, rng.choice(KILLS), rng.randrange(n_calls))
        finish(worker, out, digest)


class Command:
    """`spikequant convert` with calibration, as a user starts it."""

    def __init__(self, source: Path, text: Path, library: Path) -> None:
        program = Path(sys.executable).with_name("spikequant")
        self._words = [str(program), "convert", str(source), "--threads", "1"]
        self._words += ["--calibration", str(text), "--calibration-chunks", "2"]
        self._library = library
        self._calls = library.with_name("calls")

    def convert(self, out: Path, kind: int = COUNT, number: int = -1) -> tuple[int, int]:
        """Exit status, negative for a signal, and the number of calls of a run that was not killed."""
        faults = {
            "LD_PRELOAD": str(self._library),
            "FAULTS_FOLDER": str(out.parent),
            "FAULTS_KIND": str(kind),
            "FAULTS_NUMBER": str(number),
            "FAULTS_CALLS": str(self._calls),
        }
        done = subprocess.run(
            [*self._words, "-o", str(out)], env=os.environ | faults, capture_output=True, text=True
        )
        return done.returncode, int(self._calls.read_text()) if done.returncode >= 0 else 0


def test_the_command_killed_while_it_calibrates_and_writes(
    library: Path, tiny_model_f32: Path, tiny_text: Path, runtime: RuntimeInfo, folder: Path
) -> None:
    """Finished layers and tensors are kept, and the file is the same in the end. All calls if LONG."""
    command = Command(tiny_model_f32, tiny_text, library)
    whole = folder / "whole" / "out.gguf"
    whole.parent.mkdir()
    status, n_calls = command.convert(whole)
    assert status == 0 and n_calls >= 100 and names(whole.parent) == {whole.name}
    digest = sha256(whole)
    points = range(n_calls) if LONG else range(n_calls // 6, n_calls, n_calls // 3)
    n_calls_after = []
    for number in points:
        out = folder / str(number) / "out.gguf"
        out.parent.mkdir()
        status, _ = command.convert(out, KILLS[number % len(KILLS)], number)
        assert status == -signal.SIGKILL
        assert names(out.parent) <= PARTIAL | {out.name, ".out.gguf.unfinished"}
        status, again = command.convert(out)
        if status == 0:
            n_calls_after.append(again)
        else:  # killed after the renaming
            assert status == OutputError.exit_code
        assert sha256(out) == digest and names(out.parent) == {out.name}
    assert len(points) >= (100 if LONG else 3)
    assert n_calls_after[-1] < n_calls_after[0]  # a late one found most of the work done


# ---- errors of the system


def test_error_at_every_call(worker: Worker, expected: tuple[str, int], folder: Path) -> None:
    """One sentence and no final file; then the same conversion goes on. Or the error does not matter."""
    digest, n_calls = expected
    outcomes = []
    errors = (errno.ENOSPC, errno.EIO)
    cases = [
        (number, error)
        for number in range(n_calls)
        for error in errors
        if LONG or error == errors[number % 2]
    ]
    for number, error in cases:
        out = folder / f"{number}-{error}" / "out.gguf"
        out.parent.mkdir()
        done = worker.convert(out, FAIL, number, error)
        assert done["signal"] == 0, done
        outcomes.append(done["status"])
        if done["status"] == 0:  # a folder that cannot be synchronized, a journal that cannot be removed
            assert sha256(out) == digest and names(out.parent) <= {out.name, *PARTIAL}
            out.unlink()
        else:
            assert done["status"] == OutputError.exit_code, done
            assert done["remedy"] and "\n" not in done["message"]
            assert not out.exists() and names(out.parent) <= PARTIAL
        finish(worker, out, digest)
    assert outcomes.count(OutputError.exit_code) >= 0.9 * len(cases)


def test_short_transfer_at_every_call(worker: Worker, expected: tuple[str, int], folder: Path) -> None:
    """A write or read of half the size is none of the user's business, except where reading again fails."""
    digest, n_calls = expected
    refused = 0
    for number in range(n_calls):
        out = folder / str(number) / "out.gguf"
        out.parent.mkdir()
        done = worker.convert(out, SHORT, number)
        assert done["signal"] == 0, done
        if done["status"] != 0:
            refused += 1
            assert done["status"] == OutputError.exit_code and "read back" in done["message"], done
        finish(worker, out, digest) if done["status"] else None
        assert sha256(out) == digest and names(out.parent) == {out.name}
    assert refused <= N_TENSORS + 1


# ---- whose partial file it is


@pytest.fixture
def stopped(worker: Worker, expected: tuple[str, int], folder: Path) -> Path:
    """A partial file of about half a model."""
    out = folder / "out.gguf"
    assert worker.convert(out, KILL_BEFORE, expected[1] // 2)["signal"] == signal.SIGKILL
    assert names(folder) == PARTIAL
    return out


@pytest.mark.parametrize(
    "change, what", [({"silence": 0.75}, "other options"), ({"calibration": "b"}, "another calibration")]
)
def test_another_conversion_is_refused(
    worker: Worker, expected: tuple[str, int], stopped: Path, change: dict, what: str
) -> None:
    before = {path.name: path.read_bytes() for path in stopped.parent.iterdir()}
    done = worker.convert(stopped, **change)
    assert done["status"] == OutputError.exit_code
    assert done["message"] == f"{stopped}.partial was begun with {what}"
    assert "--no-resume" in done["remedy"]
    assert {path.name: path.read_bytes() for path in stopped.parent.iterdir()} == before
    assert finish(worker, stopped, expected[0]) > 0  # nothing was lost by asking


def test_starting_over(worker: Worker, expected: tuple[str, int], stopped: Path) -> None:
    done = worker.convert(stopped, resume=False, calibration="b")
    assert done["status"] == 0 and done["resumed"] == 0 and names(stopped.parent) == {stopped.name}
    assert sha256(stopped) != expected[0]


@pytest.mark.parametrize("place", ["journal", "data"])
def test_damage_is_noticed_and_done_again(
    worker: Worker, expected: tuple[str, int], stopped: Path, place: str
) -> None:
    """Any flipped byte: the tensors before it are kept, the others made again."""
    partial, journal = (stopped.with_name(name) for name in sorted(PARTIAL))
    sound = {path: path.read_bytes() for path in (partial, journal)}
    damaged = journal if place == "journal" else partial
    rng = random.Random(1)
    resumed = set()
    for _ in range(400 if LONG else 20):
        for path, data in sound.items():
            path.write_bytes(data)
        changed = bytearray(sound[damaged])
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        damaged.write_bytes(changed)
        resumed.add(finish(worker, stopped, expected[0]))
        stopped.unlink()
    assert len(resumed) > 3


def test_a_partial_file_that_was_replaced(worker: Worker, expected: tuple[str, int], stopped: Path) -> None:
    partial = stopped.with_name("out.gguf.partial")
    for data in (b"", b"GGUF", bytes(100), os.urandom(100_000)):
        partial.write_bytes(data)
        assert finish(worker, stopped, expected[0]) == 0
        stopped.unlink()
