"""The short part of what `make fuzz` does: damaged files for readers, any bytes for native code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import Mutator
from native_build import build, host_architecture, target_of

from spikequant_gguf.runtime import RuntimeInfo

FOLDER = Path(__file__).parent / "fuzz"
KEPT = FOLDER / "kept"
INPUTS = {"fuzz_blocks": 100_000, "fuzz_encode": 20_000, "fuzz_kernels": 10_000, "fuzz_prompts": 10_000}


def run_script(name: str, seed: int, count: int, folder: Path) -> dict:
    """In a process of its own, whose memory it limits. What crashes is left in the folder."""
    done = subprocess.run(
        [sys.executable, FOLDER / name, str(seed), str(count)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(FOLDER.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_mutations_repeat_and_differ() -> None:
    original = bytes(range(256)) * 8
    first, again, other = (Mutator([original], seed) for seed in (1, 1, 2))
    files = [first.next() for _ in range(300)]
    assert files == [again.next() for _ in range(300)] != [other.next() for _ in range(300)]
    assert len(set(files)) > 280


def test_readers_survive_damaged_files(tmp_path: Path) -> None:
    """Success or SpikeQuantError, within 64 MB."""
    result = run_script("readers.py", 2026, 20_000, tmp_path)
    assert result["files"] == 20_000
    outcomes = result["outcomes"]
    for reader in ("verify", "header", "source", "plan", "importance", "inspect", "shards"):
        assert outcomes[f"{reader}: read"] > 50 and outcomes[f"{reader}: refused"] > 500


def test_runtime_survives_damaged_models(runtime: RuntimeInfo, tmp_path: Path) -> None:
    result = run_script("models.py", 2026, 150, tmp_path)
    assert result["files"] == 150 and min(result["outcomes"].values()) > 20


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fuzz targets with sanitizers, without libFuzzer."""
    folder = tmp_path_factory.mktemp("targets")
    return build(target_of(host_architecture()), folder, "address,undefined", source=FOLDER)


@pytest.mark.parametrize("name", INPUTS)
def test_any_bytes(targets: Path, name: str) -> None:
    """No access out of bounds, no undefined behaviour, no broken promise: each would end the program."""
    done = subprocess.run([targets / name, "2026", str(INPUTS[name])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"inputs {INPUTS[name]} seed 2026\n"


@pytest.mark.parametrize("name", INPUTS)
def test_kept_inputs(targets: Path, name: str) -> None:
    """What fell over once, and what reached new code: tests/fuzz/kept.py."""
    file = KEPT / f"{name}.txt"
    number = len(file.read_text(encoding="utf-8").splitlines())
    done = subprocess.run([targets / name, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert number > 0 and done.stdout == f"inputs {number}\n"


def test_inputs_are_kept_once(tmp_path: Path) -> None:
    crash, other = tmp_path / "crash-1", tmp_path / "crash-2"
    crash.write_bytes(bytes(range(40)))
    other.write_bytes(b"")
    command = [sys.executable, FOLDER / "kept.py", "fuzz_x", "why", crash, other, crash]
    folder = tmp_path / "kept"
    for expected in ("2 of 3 added", "0 of 3 added"):
        done = subprocess.run([*command, "--folder", folder], capture_output=True, text=True)
        assert done.returncode == 0 and expected in done.stdout, done.stderr
    assert (folder / "fuzz_x.txt").read_text() == f"{bytes(range(40)).hex()} # why\n # why\n"
