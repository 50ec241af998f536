"""Texts: what counts as one, which is taken, and that evaluation and calibration share nothing."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from spikequant_gguf import InputError
from spikequant_gguf.texts import (
    DATA_VARIABLE,
    default_calibration_text,
    default_evaluation_text,
    evaluation_text,
    read_text,
)


def paragraphs(data: bytes) -> list[str]:
    return [" ".join(part.split()) for part in data.decode().split("\n\n")]


def test_default_parts_never_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    evaluation, calibration = default_evaluation_text(), default_calibration_text()
    ours, theirs = paragraphs(evaluation.data), paragraphs(calibration.data)
    assert not set(ours) & set(theirs)
    assert len(set(ours)) == len(ours)
    assert len(evaluation.data) > 60_000  # 8 chunks of 512 tokens take some 20 kB
    assert len(calibration.data) > 100_000
    assert "evaluation" in evaluation.name and "calibration" in calibration.name
    assert evaluation.sha256 == hashlib.sha256(evaluation.data).hexdigest() != calibration.sha256
    assert evaluation.file is None
    assert default_evaluation_text() == evaluation, "the same text every time"


def test_evaluation_text_is_the_usual_one_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    with pytest.raises(InputError, match=r"no wiki\.test\.raw"):
        default_evaluation_text()
    (tmp_path / "wiki.test.raw").write_bytes(b"a text\n\n")
    found = evaluation_text()
    assert (found.name, found.data) == ("wiki.test.raw", b"a text\n")
    assert found.file == str(tmp_path / "wiki.test.raw")


def test_text_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("zwei\nZeilen ü\r\n".encode())
    text = read_text(path)
    assert text.data == "zwei\nZeilen ü\r".encode(), "one line feed less, as llama.cpp reads files"
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert text.to_json() == {"name": "t.txt", "file": str(path), "bytes": 15, "sha256": text.sha256}
    assert b"Zeilen" not in repr(text).encode()


@pytest.mark.parametrize(
    ("content", "problem"), [(b"", "is empty"), (b" \n\n", "is empty"), (b"GGUF\0\0", "not a text file")]
)
def test_what_is_no_text(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=problem):
        evaluation_text(path)


def test_unreadable_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the text .*nothing.txt"):
        read_text(tmp_path / "nothing.txt")
    with pytest.raises(InputError, match="cannot read the text"):
        read_text(tmp_path)


def test_python_without_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="without its documentation") as caught:
        default_evaluation_text()
    assert "-f" in (caught.value.remedy or "")
