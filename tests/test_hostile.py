"""Hostile files: one sentence each, no code run, no path followed, memory within file size + 64 MB."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hostile
import pytest

from spikequant_gguf import InputError
from spikequant_gguf.converter import convert
from spikequant_gguf.converter.checkpoint import hub_id
from spikequant_gguf.runtime import RuntimeInfo

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a reader is given, by the name of the case."""
    found = {}
    for number, (name, case) in enumerate(hostile.CASES.items()):
        folder = tmp_path_factory.mktemp(f"case{number}-")
        found[name] = hostile.write(case, folder)
    return found


@pytest.fixture(scope="module")
def said(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What the readers said, in a process whose memory is limited for each file."""
    requests = {name: (hostile.CASES[name].reader, str(path)) for name, path in folders.items()}
    place = tmp_path_factory.mktemp("place")
    done = subprocess.run(
        [sys.executable, FOLDER / "hostile_worker.py"],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        cwd=place,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not list(place.iterdir())  # no pickle was loaded
    return json.loads(done.stdout)


def test_there_are_enough() -> None:
    assert len(hostile.CASES) >= 60


@pytest.mark.parametrize("name", hostile.CASES)
def test_one_sentence(said: dict[str, str | None], name: str) -> None:
    expected = hostile.CASES[name].sentence
    if expected is None:
        assert said[name] is None
    else:
        assert said[name] is not None and re.search(expected, said[name]), said[name]
        assert len(said[name]) < 1500


_LOAD = """
import os, sys
import llama_cpp
for path in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            llama_cpp.Llama(path, n_ctx=32, n_threads=1, verbose=False)
        except ValueError:
            os._exit(3)
        os._exit(0)
    print(os.waitpid(child, 0)[1], path, flush=True)
"""


def test_runtime_refuses_them_without_a_crash(runtime: RuntimeInfo, folders: dict[str, Path]) -> None:
    """None of them is a whole model: llama.cpp must refuse each, with an exception and not with a signal."""
    paths = [path for name, path in folders.items() if hostile.CASES[name].reader == "verify"]
    done = subprocess.run([sys.executable, "-c", _LOAD, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert len(lines) == len(paths)
    assert [path for status, path in lines if os.waitstatus_to_exitcode(int(status)) != 3] == []


@pytest.mark.parametrize(
    "text",
    [
        "../secret",
        "owner/..",
        "../../etc/passwd",
        "owner/../../secret",
        "/etc/passwd/x",
        "owner/name/more",
        "owner\\name",
        "owner/na\0me",
        "owner/name\n",
        "http://example.com/x",
        "owner/name?x=1",
        "-owner/name",
        ".owner/name",
        "owner/" + "x" * 200,
    ],
)
def test_ids_that_are_paths(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing like them is asked for on the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("spikequant_gguf.converter.pipeline.download", pytest.fail)
    assert not hub_id(text)
    with pytest.raises(InputError) as error:
        convert(text, tmp_path / "out.gguf")
    assert error.value.remedy and error.value.message.isprintable()
    assert not list(tmp_path.iterdir())


def test_an_id_that_is_one() -> None:
    assert hub_id("HuggingFaceTB/SmolLM2-135M-Instruct") and hub_id("a/b.c_d-e")
