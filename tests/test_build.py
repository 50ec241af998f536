"""Building: what is fetched and checked, what is cached, what a wheel holds. Nothing is compiled here."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import threading
import venv
import zipfile
from pathlib import Path

import pytest

from spikequant_gguf.errors import BuildError, InputError, OutputError
from spikequant_gguf.ggml_patch import build as build_module
from spikequant_gguf.ggml_patch import compile as compile_module
from spikequant_gguf.ggml_patch import fetch, package, toolchain
from spikequant_gguf.ggml_patch.build import _Job, build, find_unpatched
from spikequant_gguf.ggml_patch.cache import CACHE_VARIABLE, Cache, open_cache
from spikequant_gguf.ggml_patch.compile import Variant, compile_tree
from spikequant_gguf.ggml_patch.progress import SilentProgress
from spikequant_gguf.ggml_patch.toolchain import Toolchain
from spikequant_gguf.ggml_patch.upstream import PatchSource, Upstream, patch_id

REPOSITORY = Path(__file__).resolve().parents[1]
SILENT = SilentProgress()
VERSION = "0.3.36"


def make_sdist(path: Path, version: str = VERSION) -> str:
    """A source package with the few files that packaging reads; returns its sha256."""
    top = f"llama_cpp_python-{version}"
    files = {
        "llama_cpp/__init__.py": f'__version__ = "{version}"\n',
        "llama_cpp/llama.py": "class Llama: ...\n",
        "PKG-INFO": f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n",
        "LICENSE.md": "MIT\n",
        ".git/HEAD": "ref: refs/heads/main\n",
        "vendor/llama.cpp/LICENSE": "MIT\n",
        "vendor/llama.cpp/convert_hf_to_gguf.py": "print('convert')\n",
        "vendor/llama.cpp/conversion/base.py": "",
        "vendor/llama.cpp/gguf-py/gguf/__init__.py": "",
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"{top}/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return open_cache()


@pytest.fixture
def sdist(tmp_path: Path) -> Path:
    return tmp_path / "llama_cpp_python-0.3.36.tar.gz"


@pytest.fixture
def upstream(sdist: Path) -> Upstream:
    digest = make_sdist(sdist)
    return Upstream("llama-cpp-python", VERSION, sdist.name, digest, "abc", "0.25.3", "vendor/spike", {})


# ---- the source package


def test_a_given_file_with_another_hash_stops_the_build(
    cache: Cache, upstream: Upstream, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.tar.gz"
    wrong.write_bytes(b"something else")
    with pytest.raises(
        BuildError, match=f"has sha256 {hashlib.sha256(b'something else').hexdigest()}, expected"
    ):
        fetch.find_sdist(cache, upstream, wrong, SILENT)
    assert wrong.exists(), "a file of the user is never deleted"
    with pytest.raises(InputError, match="no source package at"):
        fetch.find_sdist(cache, upstream, tmp_path / "absent.tar.gz", SILENT)


class FakePip:
    """Stands in for the pip process: leaves ``content`` where the download goes."""

    def __init__(self, content: bytes | None, output: str = "") -> None:
        self.content, self.output, self.calls = content, output, 0

    def __call__(self, command: list[str], progress: object) -> str:
        self.calls += 1
        folder = Path(command[command.index("--dest") + 1])
        requirement = (folder / "requirement.txt").read_text()
        assert "llama-cpp-python==0.3.36 --hash=sha256:" in requirement
        if self.content is not None:
            (folder / "llama_cpp_python-0.3.36.tar.gz").write_bytes(self.content)
        return self.output


def test_download_happens_once_and_then_works_offline(
    cache: Cache, upstream: Upstream, sdist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = FakePip(sdist.read_bytes())
    monkeypatch.setattr(fetch, "_run_pip", pip)
    first = fetch.find_sdist(cache, upstream, None, SILENT)
    assert first.read_bytes() == sdist.read_bytes() and first.parent == cache.sdists
    assert fetch.find_sdist(cache, upstream, None, SILENT) == first
    assert pip.calls == 1
    first.write_bytes(first.read_bytes()[:100])
    fetch.find_sdist(cache, upstream, None, SILENT)
    assert pip.calls == 2 and first.read_bytes() == sdist.read_bytes(), "a damaged cache was not mended"


@pytest.mark.parametrize(
    "content, output, message",
    [
        (b"tampered", "", "expected"),
        (None, "ERROR: Could not find a version", "cannot download .*Could not find a version"),
        (None, "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE FILE", "is not the pinned one"),
        (None, "", "pip said nothing"),
    ],
)
def test_a_failed_download_leaves_nothing(
    cache: Cache,
    upstream: Upstream,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes | None,
    output: str,
    message: str,
) -> None:
    monkeypatch.setattr(fetch, "_run_pip", FakePip(content, output))
    with pytest.raises(BuildError, match=message):
        fetch.find_sdist(cache, upstream, None, SILENT)
    assert list(cache.sdists.iterdir()) == []


def test_unpack_is_all_or_nothing(upstream: Upstream, sdist: Path, tmp_path: Path) -> None:
    tree = tmp_path / "work" / "tree"
    fetch.unpack(sdist, tree, upstream, SILENT)
    assert (tree / "llama_cpp/__init__.py").exists() and not (tree / ".git").exists()
    shutil.rmtree(tree)
    sdist.write_bytes(sdist.read_bytes()[:200])
    with pytest.raises((tarfile.TarError, EOFError, OSError)):
        fetch.unpack(sdist, tree, upstream, SILENT)
    assert not tree.exists()


# ---- compiler and compilation


def test_a_missing_compiler_is_one_sentence_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="no C compiler found") as caught:
        toolchain.find_compiler()
    assert caught.value.remedy
    monkeypatch.setenv("CC", "no-such-cc")
    with pytest.raises(BuildError, match="CC names the C compiler no-such-cc, which does not exist"):
        toolchain.find_compiler()


def test_build_programs_come_from_the_environment_before_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for folder in ("scripts", "path"):
        program = tmp_path / folder / "cmake"
        program.parent.mkdir()
        program.write_text("#!/bin/sh\necho cmake version 3.5.0\n")
        program.chmod(0o755)
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path / "scripts"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"), prepend=os.pathsep)
    assert toolchain.find_build_program("cmake") == tmp_path / "scripts/cmake"
    with pytest.raises(BuildError, match="too old: cmake version 3.5.0"):
        toolchain.find_toolchain()
    (tmp_path / "scripts/cmake").unlink()
    assert toolchain.find_build_program("cmake") == tmp_path / "path/cmake"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="ninja is missing"):
        toolchain.find_build_program("ninja")


def fake_program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_progress_and_errors_of_the_compiler_are_reported(upstream: Upstream, tmp_path: Path) -> None:
    cmake = fake_program(tmp_path / "cmake", "echo configured")
    ninja = fake_program(tmp_path / "ninja", 'echo "${NINJA_STATUS}"; echo "[1/3] a.c"; echo "[3/3] b.c"')
    tools = Toolchain(Path("cc"), Path("c++"), cmake, ninja, "cc 12")
    seen = []
    progress = SilentProgress()
    progress.advance = lambda done, total: seen.append((done, total))  # type: ignore[method-assign]
    variant = Variant("0123456789ab", portable=False)
    binaries = compile_tree(tmp_path, tmp_path / "cmake.d", variant, upstream, tools, 1, progress)
    assert binaries == tmp_path / "cmake.d/bin" and seen == [(1, 3), (3, 3)]
    assert "configured" in (tmp_path / "cmake.d.log").read_text()

    fake_program(ninja, 'echo "[1/3] a.c"; echo "FAILED: a.o"; echo "a.c:7:1: error: unknown type"; exit 1')
    with pytest.raises(BuildError, match=r"ninja failed: a\.c:7:1: error: unknown type") as caught:
        compile_tree(tmp_path, tmp_path / "cmake.d", variant, upstream, tools, 1, SILENT)
    assert "cmake.d.log" in str(caught.value.remedy)


@pytest.mark.parametrize("moved", [False, True])
def test_a_cache_that_has_moved_is_configured_anew(upstream: Upstream, tmp_path: Path, moved: bool) -> None:
    cmake, ninja = (fake_program(tmp_path / name, "exit 0") for name in ("cmake", "ninja"))
    folder, tree = tmp_path / "cmake.d", tmp_path / "tree"
    folder.mkdir()
    place = tmp_path / "elsewhere" / "tree" if moved else tree
    (folder / "CMakeCache.txt").write_text(f"# comment\nCMAKE_HOME_DIRECTORY:INTERNAL={place}\n")
    (folder / "object.o").touch()
    tools = Toolchain(Path("cc"), Path("c++"), cmake, ninja, "cc 12")
    compile_tree(tree, folder, Variant("0123456789ab", portable=False), upstream, tools, 1, SILENT)
    assert (folder / "object.o").exists() != moved


def test_cmake_errors_are_told_with_their_second_line() -> None:
    lines = [
        "-- Looking",
        "CMake Error at CMakeLists.txt:3 (project):",
        "",
        "  No CMAKE_CXX_COMPILER could be found.",
    ]
    assert compile_module._first_error(lines).endswith("(project): No CMAKE_CXX_COMPILER could be found.")
    assert compile_module._first_error(["Killed", ""]) == "Killed"


def test_settings_say_what_a_variant_is(upstream: Upstream) -> None:
    patched, portable = Variant("abc", False), Variant("abc", True)
    stock = Variant(None, False)
    assert (
        patched.settings(upstream)["GGML_NATIVE"] == "ON"
        and portable.settings(upstream)["GGML_NATIVE"] == "OFF"
    )
    assert stock.targets == ("llama",) and set(patched.targets) > {"llama", "mtmd", "llama-quantize"}
    alone = Variant("abc", True, library_only=True)
    assert alone.targets == ("llama", "mtmd") and alone.tools == ()
    assert alone.settings(upstream) == portable.settings(upstream), "both go on in one folder"
    command = compile_module._configure_command(
        Path("tree"),
        Path("out"),
        patched,
        upstream,
        Toolchain(*map(Path, ("cc", "c++", "cmake", "ninja")), "cc 12"),
    )
    assert "-DSPIKEQUANT_PATCH_ID=abc" in command and f"-DSPIKEQUANT_PIN={VERSION}" in command


@pytest.mark.parametrize(
    "system, compiler, flag",
    [
        ("win32", "gcc.exe (x86_64-posix-seh-rev0, Built by MinGW-Builds project) 13.1.0", "-static"),
        ("win32", "cc (GCC) 14.2.0", "-static"),
        ("win32", "clang version 18.1.8", None),
        ("darwin", "Apple clang version 15.0.0", "-Wl,-rpath,@loader_path"),
        ("linux", "gcc (Debian 12.2.0-14) 12.2.0", None),
    ],
)
def test_linkers_get_what_their_system_wants(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch, system: str, compiler: str, flag: str | None
) -> None:
    monkeypatch.setattr(compile_module.sys, "platform", system)
    monkeypatch.setenv("LDFLAGS", "-Wl,--as-needed")
    tools = Toolchain(*map(Path, ("cc", "c++", "cmake", "ninja")), compiler)
    command = compile_module._configure_command(Path("t"), Path("o"), Variant("a", True), upstream, tools)
    for kind in ("SHARED", "EXE"):
        found = [each for each in command if each.startswith(f"-DCMAKE_{kind}_LINKER_FLAGS=")]
        assert found == ([f"-DCMAKE_{kind}_LINKER_FLAGS={flag} -Wl,--as-needed"] if flag else [])


# ---- keys


def test_the_key_follows_patch_and_settings_only(
    cache: Cache, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = PatchSource(tmp_path / "patch")
    (source.root / "series").mkdir(parents=True)
    (source.root / "spike").mkdir()
    (source.root / "spike/a.c").write_text("int a;")

    def key(portable: bool = False, unpatched: bool = False) -> str:
        identity = None if unpatched else patch_id(upstream, source)
        return _Job(cache, upstream, None if unpatched else source, Variant(identity, portable)).key

    keys = [key(), key(portable=True), key(unpatched=True)]
    monkeypatch.setenv("CFLAGS", "-O1")
    keys.append(key())
    monkeypatch.delenv("CFLAGS")
    monkeypatch.setattr(toolchain, "cpu_features", lambda: ["avx9"])
    keys.append(key())
    assert key(portable=True) == keys[1], "a portable build does not depend on this CPU"
    (source.root / "spike/a.c").write_text("int b;")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "moved"))
    assert key() == keys[-1]


# ---- the whole sequence, with stand-ins for compiler and self-test


class Workshop:
    """Replaces what is slow; counts what happens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, upstream: Upstream) -> None:
        self.compiled, self.installed, self.tested = 0, 0, 0
        self.fail: BaseException | None = None
        monkeypatch.setattr(build_module, "load_upstream", lambda version=None: upstream)
        monkeypatch.setattr(build_module, "compile_tree", self.compile)
        monkeypatch.setattr(build_module, "apply", lambda *arguments: None)
        monkeypatch.setattr(build_module, "_self_test", self.test)
        monkeypatch.setattr(package, "install_wheel", self.install)

    def compile(self, tree: Path, folder: Path, variant: Variant, *rest: object) -> Path:
        self.compiled += 1
        assert (tree / "llama_cpp").is_dir()
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        if self.fail:
            raise self.fail
        for name in ("llama", "mtmd", "ggml", "ggml-base", "ggml-cpu", "llama-common"):
            (folder / "bin" / package.library_file(name)).write_bytes(name.encode() * 10)
        for tool in variant.tools:
            (folder / "bin" / package.program_file(tool)).write_bytes(b"program")
        return folder / "bin"

    def install(self, wheel: Path) -> None:
        assert wheel.is_file()
        self.installed += 1

    def test(self, python_path: Path | None, unpatched: bool) -> dict:
        self.tested += 1
        return {"ok": True}


@pytest.fixture
def workshop(cache: Cache, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    monkeypatch.delenv(build_module.KEEP_TREE_VARIABLE, raising=False)
    return Workshop(monkeypatch, upstream)


def test_the_same_build_is_never_compiled_twice(workshop: Workshop, cache: Cache, sdist: Path) -> None:
    first = build(sdist=sdist)
    assert not first.cached and first.installed and workshop.compiled == 1
    assert first.wheel.is_file() and all(path.is_file() for path in first.tools.values())
    assert not first.handed_on
    assert (first.folder / "converter/convert_hf_to_gguf.py").is_file()
    second = build()
    assert second.cached and workshop.compiled == 1 and second.key == first.key
    assert workshop.tested == 3, "self-test: the new build, and each installed state"
    assert json.loads(json.dumps(second.to_json()))["folder"] == str(first.folder)
    assert list((cache.root / "work").iterdir()) == []


def test_force_builds_again(workshop: Workshop, sdist: Path) -> None:
    build(sdist=sdist)
    assert not build(sdist=sdist, force=True).cached
    assert workshop.compiled == 2


def test_an_interrupted_build_leaves_no_finished_one_and_resumes_in_its_tree(
    workshop: Workshop, cache: Cache, sdist: Path
) -> None:
    workshop.fail = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        build(sdist=sdist)
    assert cache.builds() == []
    [tree] = (cache.root / "work").glob("*/tree")
    (tree / "marker").touch()
    workshop.fail = None
    build(keep_tree=True)
    assert (tree / "marker").exists(), "the tree was unpacked again"
    assert len(cache.builds()) == 1


def test_a_build_that_fails_its_self_test_is_not_kept(
    workshop: Workshop, cache: Cache, sdist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(python_path: Path | None, unpatched: bool) -> dict:
        raise BuildError("the self-test failed: wrong result")

    monkeypatch.setattr(build_module, "_self_test", fail)
    with pytest.raises(BuildError, match="wrong result"):
        build(sdist=sdist)
    assert cache.builds() == [] and workshop.installed == 0


def test_a_patch_that_changes_during_compilation_is_noticed(
    workshop: Workshop, cache: Cache, sdist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities = iter(["111111111111", "222222222222"])
    monkeypatch.setattr(build_module, "patch_id", lambda *arguments: next(identities))
    with pytest.raises(BuildError, match="changed while it was compiled"):
        build(sdist=sdist)
    assert cache.builds() == []


def test_the_unpatched_build_is_separate_and_never_installed(workshop: Workshop, sdist: Path) -> None:
    assert find_unpatched() is None
    report = build(unpatched=True, sdist=sdist)
    assert report.unpatched and not report.installed and workshop.installed == 0 and report.tools == {}
    assert find_unpatched() == report.python_path
    assert (report.python_path / "llama_cpp/lib" / package.library_file("llama")).is_file()
    assert build(sdist=sdist).key != report.key


def test_a_full_disk_is_an_output_error(
    workshop: Workshop, sdist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.fail = OSError(28, "No space left on device")
    with pytest.raises(OutputError, match="No space left on device"):
        build(sdist=sdist)


def test_two_builds_at_once_wait_for_each_other(cache: Cache) -> None:
    entered, leave, order = threading.Event(), threading.Event(), []

    def first() -> None:
        with cache.lock(lambda: order.append("unexpected")):
            entered.set()
            leave.wait(10)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(10)
    with cache.lock(leave.set):  # told to wait: only then the first one goes on
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_a_cache_that_cannot_be_made_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(OutputError, match="cannot create"):
        build()


# ---- the runtime's wheel


def test_the_wheel_is_reproducible_complete_and_installable(
    workshop: Workshop, sdist: Path, tmp_path: Path
) -> None:
    report = build(sdist=sdist)
    again = tmp_path / "again"
    again.mkdir()
    copy = package.write_wheel(report.python_path, again, build_module.load_upstream())
    assert copy.read_bytes() == report.wheel.read_bytes()
    with zipfile.ZipFile(report.wheel) as archive:
        names = archive.namelist()
        [record] = [name for name in names if name.endswith("RECORD")]
        rows = {row[0]: row[1] for row in csv.reader(archive.read(record).decode().splitlines())}
        for name in names:
            if name != record:
                digest = (
                    base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest())
                    .rstrip(b"=")
                    .decode()
                )
                assert rows[name] == f"sha256={digest}"
    assert set(rows) == set(names)
    libraries = {name for name in names if name.startswith("llama_cpp/lib/")}
    expected = {
        "spikequant.json",
        *map(package.library_file, ("llama", "mtmd", "ggml", "ggml-base", "ggml-cpu")),
    }
    assert libraries == {f"llama_cpp/lib/{name}" for name in expected}, "the tools' own libraries stay out"

    target = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        target,
    ]
    subprocess.run([*command, report.wheel], check=True, capture_output=True)
    assert (target / "llama_cpp/llama.py").exists()
    assert (target / "llama_cpp_python-0.3.36.dist-info/licenses/LICENSE-llama.cpp").exists()


def test_wheels_of_macs_are_for_their_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the interpreter is for both kinds and for older systems, as python.org's is."""
    monkeypatch.setattr(package.sys, "platform", "darwin")
    monkeypatch.setattr(package.sysconfig, "get_platform", lambda: "macosx-10.13-universal2")
    monkeypatch.setattr(package.platform, "mac_ver", lambda: ("14.5", ("", "", ""), "arm64"))
    monkeypatch.setattr(package.platform, "machine", lambda: "arm64")
    assert package._wheel_tag() == "py3-none-macosx_14_0_arm64"


def test_a_wheel_to_hand_on_is_portable_and_names_no_place(
    workshop: Workshop, sdist: Path, tmp_path: Path
) -> None:
    report = build(sdist=sdist, wheel=tmp_path / "dist")
    assert report.portable and report.handed_on and not report.installed and workshop.installed == 0
    assert (
        report.wheel == tmp_path / "dist" / report.wheel.name
        and len(list(report.wheel.parent.iterdir())) == 1
    )
    assert report.tools == {} and not (report.folder / "bin").exists(), "nobody gets them with a wheel"
    with zipfile.ZipFile(report.wheel) as archive:
        manifest = archive.read("llama_cpp/lib/spikequant.json")
    assert str(tmp_path).encode() not in manifest and json.loads(manifest)["key"] == report.key
    with pytest.raises(InputError, match="no wheel of the unpatched"):
        build(sdist=sdist, wheel=tmp_path, unpatched=True)


def test_an_installed_build_is_recognized_by_key_and_content(
    workshop: Workshop, sdist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = build(sdist=sdist)
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    monkeypatch.syspath_prepend(str(report.python_path))
    assert build_module._is_installed(report.key)
    assert not build_module._is_installed("another key")
    library = report.python_path / "llama_cpp/lib" / package.library_file("ggml")
    library.unlink()
    library.write_bytes(b"replaced by another package")
    assert not build_module._is_installed(report.key)


# ---- our own wheel


def test_our_wheel_holds_every_module_and_data_file(tmp_path: Path) -> None:
    """Built without network; every file of the three packages is in it."""
    source = tmp_path / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    for folder in ("spikequant_gguf", "converter", "ggml_patch"):
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(REPOSITORY / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    ]
    result = subprocess.run(
        [*command, "--wheel-dir", tmp_path, source], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    [wheel] = tmp_path.glob("spikequant_gguf-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = set()
    for folder, place in (
        ("spikequant_gguf", ""),
        ("converter", "converter/"),
        ("ggml_patch", "ggml_patch/"),
    ):
        for path in (source / folder).rglob("*"):
            if path.is_file():
                expected.add(f"spikequant_gguf/{place}{path.relative_to(source / folder).as_posix()}")
    assert expected <= names, sorted(expected - names)
    assert any(name.endswith("entry_points.txt") for name in names)
    assert wheel.name.endswith("-py3-none-any.whl")

    # installed elsewhere, its command runs from there; numpy and the like are those of this environment
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    command = [*pip, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(command, check=True, capture_output=True)
    code = (
        "import sys; sys.path.append(sys.argv[1]);"
        "import spikequant_gguf.converter as converter; print(converter.__file__);"
        "import spikequant_gguf.ggml_patch; from spikequant_gguf.cli import main;"
        "sys.argv = ['spikequant', '--version']; main()"
    )
    packages = sysconfig.get_path("purelib")
    command = [python, "-c", code, packages]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    place, version = result.stdout.splitlines()
    assert place.startswith(str(tmp_path / "venv")) and version.startswith("spikequant ")
    assert not any(name.startswith(("converter/", "ggml_patch/", "tests/")) for name in names)
