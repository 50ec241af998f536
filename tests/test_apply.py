"""Applying the patch: strict, atomic, idempotent, reversible to the byte; and rewriting the series."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikequant_gguf.errors import BuildError, InputError
from spikequant_gguf.ggml_patch import apply as apply_module
from spikequant_gguf.ggml_patch import canary, regenerate, unidiff
from spikequant_gguf.ggml_patch.apply import apply, remove
from spikequant_gguf.ggml_patch.cache import CACHE_VARIABLE, open_cache
from spikequant_gguf.ggml_patch.fetch import find_sdist
from spikequant_gguf.ggml_patch.progress import SilentProgress
from spikequant_gguf.ggml_patch.upstream import PatchSource, Upstream, load_releases, load_upstream, patch_id

SPIKE = "vendor/ggml/spike"
LINES = [f"line {number}\n" for number in range(40)]
HOOK = """From: somebody
Subject: a hook

Why it is needed.
---
diff --git a/vendor/ggml/ggml.c b/vendor/ggml/ggml.c
index 123..456 100644
--- a/vendor/ggml/ggml.c
+++ b/vendor/ggml/ggml.c
@@ -10,5 +10,6 @@ static void function(void)
 line 9
 line 10
-line 11
+line 11 with a hook
+one more line
 line 12
 line 13
--
2.39.5

"""
SECOND = """Subject: another hook
--- a/vendor/ggml/ggml.c
+++ b/vendor/ggml/ggml.c
@@ -31,3 +32,4 @@
 line 30
 line 31
+second hook
 line 32
--- /dev/null
+++ b/vendor/ggml/new.h
@@ -0,0 +1,2 @@
+#pragma once
+int hook(void);
"""


class Project:
    """A small source package, its pin and a patch for it."""

    def __init__(self, root: Path) -> None:
        self.tree = root / "tree"
        self.write("llama_cpp/__init__.py", '__version__ = "0.3.36"\n')
        self.write("vendor/ggml/ggml.c", "".join(LINES))
        self.write("vendor/ggml/untouched.c", "int x;\n")
        self.source = PatchSource(root / "patch")
        self.patch("0001-hook.patch", HOOK)
        self.patch("0002-more.patch", SECOND)
        self.spike("spike.c", "int spike;\n")
        self.spike("cpu/kernel.c", "int kernel;\n")
        self.upstream = Upstream(
            "llama-cpp-python",
            "0.3.36",
            "llama_cpp_python-0.3.36.tar.gz",
            "0" * 64,
            "abc",
            "0.25.3",
            SPIKE,
            {},
        )

    def write(self, name: str, text: str) -> Path:
        path = self.tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        return path

    def patch(self, name: str, text: str) -> None:
        path = self.source.root / "series" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())

    def spike(self, name: str, text: str) -> None:
        path = self.source.root / "spike" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())

    def apply(self) -> apply_module.ApplyReport:
        return apply(self.tree, self.upstream, self.source)

    def state(self) -> dict[str, bytes | None]:
        """Every file and folder of the tree."""
        return {
            path.relative_to(self.tree).as_posix(): path.read_bytes() if path.is_file() else None
            for path in self.tree.rglob("*")
        }


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_apply_gives_exactly_the_patched_files(project: Project) -> None:
    report = project.apply()
    expected = [
        *LINES[:11],
        "line 11 with a hook\n",
        "one more line\n",
        *LINES[12:32],
        "second hook\n",
        *LINES[32:],
    ]
    assert (project.tree / "vendor/ggml/ggml.c").read_text() == "".join(expected)
    assert (project.tree / "vendor/ggml/new.h").read_text() == "#pragma once\nint hook(void);\n"
    assert (project.tree / SPIKE / "cpu/kernel.c").read_text() == "int kernel;\n"
    assert set(report.written) == {
        "vendor/ggml/ggml.c",
        "vendor/ggml/new.h",
        f"{SPIKE}/spike.c",
        f"{SPIKE}/cpu/kernel.c",
    }
    assert report.patch_id == patch_id(project.upstream, project.source)


def test_second_application_is_a_no_op(project: Project) -> None:
    project.apply()
    before = project.state()
    times = {path: path.stat().st_mtime_ns for path in project.tree.rglob("*")}
    assert project.apply().already_done
    assert project.state() == before
    assert {path: path.stat().st_mtime_ns for path in project.tree.rglob("*")} == times


def test_remove_restores_the_tree_to_the_byte(project: Project) -> None:
    before = project.state()
    project.apply()
    assert project.state() != before
    remove(project.tree)
    assert project.state() == before
    assert remove(project.tree).already_done


def test_hunks_may_be_elsewhere_but_not_different(project: Project) -> None:
    project.write("vendor/ggml/ggml.c", "".join(["// new first line\n"] * 7 + LINES))
    project.apply()
    assert "second hook\n" in (project.tree / "vendor/ggml/ggml.c").read_text()
    remove(project.tree)
    project.write("vendor/ggml/ggml.c", "".join(LINES).replace("line 13\n", "line 13 \n"))
    before = project.state()
    with pytest.raises(
        BuildError, match=r"0001-hook\.patch does not apply to vendor/ggml/ggml\.c at line 10"
    ):
        project.apply()
    assert project.state() == before


def test_a_displaced_hunk_that_fits_twice_is_refused(project: Project) -> None:
    project.write("vendor/ggml/ggml.c", "".join(["// shift\n", *LINES, *LINES]))
    with pytest.raises(BuildError, match="does not apply"):
        project.apply()


FUNCTIONS = "int first(void)\n{\n  a\n  b\n}\n\nint second(void)\n{\n  a\n  b\n}\n"


@pytest.mark.parametrize("name, place", [("first", 2), ("second", 8), ("third", None), ("", None)])
def test_the_heading_decides_between_equal_places(name: str, place: int | None) -> None:
    """As in git's diffs, the function above the hunk is named behind its line numbers."""
    heading = f" int {name}(void)" if name else ""
    text = f"--- a/x\n+++ b/x\n@@ -40,2 +40,3 @@{heading}\n   a\n+  new\n   b\n"
    [change] = unidiff.parse(text.encode(), "x.patch")
    assert unidiff.place_hunks(unidiff.split_lines(FUNCTIONS.encode()), change) == [place]


def test_nothing_is_written_if_a_later_patch_fails(project: Project) -> None:
    project.patch("0002-more.patch", SECOND.replace("line 31", "line thirty-one"))
    before = project.state()
    with pytest.raises(BuildError, match=r"0002-more\.patch"):
        project.apply()
    assert project.state() == before


@pytest.mark.parametrize("version", ["0.3.35", "0.4.0"])
def test_another_version_is_refused_by_name(project: Project, version: str) -> None:
    project.write("llama_cpp/__init__.py", f'__version__ = "{version}"\n')
    with pytest.raises(InputError, match=rf"{version}, but the patch is made for 0\.3\.36"):
        project.apply()


def test_a_folder_that_is_no_source_package_is_refused(project: Project, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not an unpacked llama-cpp-python"):
        apply(tmp_path / "nowhere", project.upstream, project.source)


def test_recorded_hash_of_an_unpatched_file_is_checked(project: Project) -> None:
    content = (project.tree / "vendor/ggml/ggml.c").read_bytes()
    project.upstream.files["vendor/ggml/ggml.c"] = hashlib.sha256(content).hexdigest()
    project.apply()
    remove(project.tree)
    project.write("vendor/ggml/ggml.c", "".join(LINES) + "// a change far from every hunk\n")
    with pytest.raises(InputError, match=r"vendor/ggml/ggml\.c differs from llama-cpp-python==0\.3\.36"):
        project.apply()


@pytest.mark.parametrize("path", ["vendor/ggml/ggml.c", f"{SPIKE}/spike.c"])
def test_files_changed_by_hand_are_never_overwritten(project: Project, path: str) -> None:
    project.apply()
    project.write(path, "my own work\n")
    before = project.state()
    for action in (project.apply, lambda: remove(project.tree)):
        with pytest.raises(InputError, match=f"{path} was changed by hand"):
            action()
    assert project.state() == before


def test_a_damaged_stamp_is_an_error(project: Project) -> None:
    project.apply()
    project.write(apply_module.STAMP, '{"version": 1, "files"')
    with pytest.raises(InputError, match="is damaged"):
        project.apply()


@pytest.mark.parametrize("writes", range(1, 9))
@pytest.mark.parametrize("then", ["apply", "remove"])
def test_an_interrupted_run_can_be_finished_or_undone(
    project: Project, monkeypatch: pytest.MonkeyPatch, writes: int, then: str
) -> None:
    pristine = project.state()
    reference = Project(project.tree.parent / "reference")
    reference.apply()
    with monkeypatch.context() as patched:
        _die_after(patched, writes)
        try:
            project.apply()
        except KeyboardInterrupt:
            pass
    if then == "apply":
        project.apply()
        assert project.state() == reference.state()
    else:
        remove(project.tree)
        left = {
            name: content for name, content in project.state().items() if not name.startswith(".spikequant")
        }
        assert left == pristine


def _die_after(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    write = apply_module._write
    count = 0

    def interrupted(root: Path, name: str, content: bytes | None) -> bool:
        nonlocal count
        if count == writes:
            raise KeyboardInterrupt
        count += 1
        return write(root, name, content)

    monkeypatch.setattr(apply_module, "_write", interrupted)


def test_a_new_revision_writes_only_what_differs(project: Project) -> None:
    before = project.state()
    project.apply()
    project.spike("spike.c", "int spike = 2;\n")
    (project.source.root / "spike/cpu/kernel.c").unlink()
    (project.source.root / "series/0002-more.patch").unlink()
    report = project.apply()
    assert set(report.written) == {
        "vendor/ggml/ggml.c",
        "vendor/ggml/new.h",
        f"{SPIKE}/spike.c",
        f"{SPIKE}/cpu/kernel.c",
    }
    assert not (project.tree / "vendor/ggml/new.h").exists()
    assert "second hook" not in (project.tree / "vendor/ggml/ggml.c").read_text()
    project.spike("spike.c", "int spike = 3;\n")
    assert project.apply().written == (f"{SPIKE}/spike.c",)
    remove(project.tree)
    assert project.state() == before


@pytest.mark.parametrize(
    "text, message",
    [
        (HOOK.replace("\n", "\r\n"), "CRLF"),
        ("Subject: nothing\n", "changes nothing"),
        (HOOK.replace("@@ -10,5", "@@ -10,x"), "header is malformed"),
        (HOOK.replace("@@ -10,5", "@@ -10,9"), "cut short"),
        (HOOK.replace("+++ b/vendor", "+++ b/../vendor"), "is not a path below"),
        (
            HOOK.replace("+++ b/vendor/ggml/ggml.c", "+++ b/vendor/ggml/other.c"),
            "only changed and new text files",
        ),
        (HOOK.replace("+++ b/vendor/ggml/ggml.c", "+++ /dev/null"), "only changed and new text files"),
        (HOOK.replace("index 123..456 100644", "rename from x"), "only changed and new text files"),
        (HOOK.replace("ggml/ggml.c", "ggml/absent.c"), "changes vendor/ggml/absent.c, which does not exist"),
        (
            SECOND.replace("ggml/new.h", "ggml/untouched.c"),
            "creates vendor/ggml/untouched.c, which already exists",
        ),
        (SECOND.replace("ggml/new.h", "ggml/spike/spike.c"), "both in spike/ and in the tree or the series"),
    ],
)
def test_bad_patches_are_named(project: Project, text: str, message: str) -> None:
    (project.source.root / "series/0002-more.patch").unlink()
    project.patch("0001-hook.patch", text)
    before = project.state()
    with pytest.raises(BuildError, match=message):
        project.apply()
    assert project.state() == before


@pytest.mark.parametrize(
    "name, message", [("0001-again.patch", "same number"), ("later.patch", "four-digit number")]
)
def test_the_series_has_one_order(project: Project, name: str, message: str) -> None:
    project.patch(name, HOOK)
    with pytest.raises(BuildError, match=message):
        project.apply()


# ---- other releases


def run_canary(project: Project) -> tuple[canary.CanaryReport, dict[str, bytes]]:
    def read(name: str) -> bytes | None:
        path = project.tree / name
        return path.read_bytes() if path.is_file() else None

    return canary.check_series(read, project.upstream, project.source)


def test_the_canary_finds_hunks_that_have_moved_in_another_release(project: Project) -> None:
    project.write("llama_cpp/__init__.py", '__version__ = "0.4.0"\n')
    project.write("vendor/ggml/ggml.c", "".join(["new\n", *LINES]))
    report, contents = run_canary(project)
    assert report.ok and report.version == "0.4.0"
    assert [hunk.moved for hunk in report.hunks] == [1, 2, 0]  # the first patch adds a line, too
    assert b"line 11 with a hook\none more line\n" in contents["vendor/ggml/ggml.c"]
    assert contents[f"{SPIKE}/spike.c"] == b"int spike;\n"


def test_the_canary_names_the_hunk_that_fails_and_goes_on(project: Project) -> None:
    project.write("vendor/ggml/ggml.c", "".join(LINES).replace("line 12\n", "changed\n"))
    report, contents = run_canary(project)
    assert [hunk.fits for hunk in report.hunks] == [False, True, True] and not report.ok
    assert report.hunks[0].line_of_text() == (
        "FAILS  0001-hook.patch: vendor/ggml/ggml.c, line 10: its lines are not there, or not once: "
        "line 11 with a hook"
    )
    assert (
        b"second hook" in contents["vendor/ggml/ggml.c"]
        and b"with a hook" not in contents["vendor/ggml/ggml.c"]
    )
    (project.tree / "vendor/ggml/ggml.c").unlink()
    report, _ = run_canary(project)
    assert [hunk.reason for hunk in report.hunks] == ["there is no such file"] * 2 + [""]


def test_the_canary_on_the_pin_and_on_what_is_no_package(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pinned = open_cache().sdists / load_upstream().sdist
    assert canary.main([str(pinned)]) == 0
    words = capsys.readouterr().out.split()
    assert words[:2] == ["llama-cpp-python", f"{load_upstream().version}:"] and words[2] == words[4]
    assert canary.main([str(tmp_path)]) != 0
    assert "no source package" in capsys.readouterr().err


def test_patch_id_depends_on_content_and_names_only(project: Project, tmp_path: Path) -> None:
    original = patch_id(project.upstream, project.source)
    copy = PatchSource(tmp_path / "elsewhere")
    shutil.copytree(project.source.root, copy.root)
    assert patch_id(project.upstream, copy) == original
    (copy.root / "spike/.hidden").write_text("editor file")
    assert patch_id(project.upstream, copy) == original
    (copy.root / "spike/spike.c").rename(copy.root / "spike/other.c")
    assert patch_id(project.upstream, copy) != original


text_lines = st.lists(
    st.sampled_from(["a\n", "b\n", "c\n", "-x\n", "+y\n", "@@ -1 +1 @@\n", "\n", " \n", "\r\n"]), max_size=30
)


@settings(max_examples=300, deadline=None)
@given(
    old=text_lines, new=text_lines, ends=st.tuples(st.sampled_from(["", "end"]), st.sampled_from(["", "end"]))
)
def test_what_regenerate_writes_apply_reads(old: list[str], new: list[str], ends: tuple[str, str]) -> None:
    before, after = (
        "".join([*lines, end]).encode().replace(b"\r", b"?")
        for lines, end in zip((old, new), ends, strict=True)
    )
    if before == after or not after:
        return
    patch = regenerate._Patch(Path("x"), "Subject: x\n", {"file": (before or None, after)})
    [change] = unidiff.parse(regenerate._format(patch, []), "x")
    assert change.creates == (not before)
    assert unidiff.apply_hunks(before, change, "x") == after


class Regeneration(Project):
    """A project whose source package exists as a file, with a pin in a file of its own."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.sdist = root / "sdist.tar.gz"
        with tarfile.open(self.sdist, "w:gz") as archive:
            for path in sorted(self.tree.rglob("*")):
                if path.is_file():
                    entry = tarfile.TarInfo(
                        "llama_cpp_python-0.3.36/" + path.relative_to(self.tree).as_posix()
                    )
                    content = path.read_bytes()
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
        pin = self.upstream
        self.toml = root / "UPSTREAM.toml"
        self.toml.write_text(
            f'[pin]\nproject = "{pin.project}"\nversion = "{pin.version}"\nsdist = "{pin.sdist}"\n'
            f'sha256 = "{hashlib.sha256(self.sdist.read_bytes()).hexdigest()}"\nllama_cpp_commit = "abc"\n'
            f'ggml_version = "0.25.3"\nspike_folder = "{SPIKE}"\n\n[files]\n'
        )

    def regenerate(self, into: str | None = None) -> set[str]:
        written = regenerate.regenerate(self.tree, self.sdist, into, self.source, self.toml)
        return {path.name for path in written}


@pytest.fixture
def regeneration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Regeneration:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))  # a given package is kept in the cache
    return Regeneration(tmp_path)


def test_regenerated_series_gives_the_edited_tree(regeneration: Regeneration, tmp_path: Path) -> None:
    regeneration.apply()
    regeneration.write(
        "vendor/ggml/ggml.c", (regeneration.tree / "vendor/ggml/ggml.c").read_text() + "edited"
    )
    regeneration.write("vendor/ggml/untouched.c", "int x = 1;\n")
    regeneration.write(f"{SPIKE}/spike.c", "int edited;\n")
    regeneration.write(f"{SPIKE}/added.c", "int added;\n")
    (regeneration.tree / SPIKE / "cpu/kernel.c").unlink()
    with pytest.raises(InputError, match=r"no patch touches vendor/ggml/untouched\.c yet"):
        regeneration.regenerate()
    written = regeneration.regenerate(into="0001-hook.patch")
    assert written >= {
        "0001-hook.patch",
        "0002-more.patch",
        "spike.c",
        "added.c",
        "kernel.c",
        "UPSTREAM.toml",
    }
    first = (regeneration.source.root / "series/0001-hook.patch").read_text()
    assert first.startswith("From: somebody\nSubject: a hook\n\nWhy it is needed.\n---\ndiff --git")

    fresh = Project(tmp_path / "fresh")
    apply(fresh.tree, load_upstream(regeneration.toml), regeneration.source)
    for path in ("vendor/ggml/ggml.c", "vendor/ggml/untouched.c", "vendor/ggml/new.h", f"{SPIKE}/spike.c"):
        assert (fresh.tree / path).read_bytes() == (regeneration.tree / path).read_bytes()
    assert (fresh.tree / SPIKE / "added.c").exists() and not (fresh.tree / SPIKE / "cpu/kernel.c").exists()


def test_regenerating_an_unchanged_tree_changes_nothing_twice(regeneration: Regeneration) -> None:
    regeneration.apply()
    regeneration.regenerate()
    assert regeneration.regenerate() == set()
    assert "vendor/ggml/ggml.c" in load_upstream(regeneration.toml).files


def test_a_deleted_file_cannot_be_expressed(regeneration: Regeneration) -> None:
    regeneration.apply()
    (regeneration.tree / "vendor/ggml/untouched.c").unlink()
    with pytest.raises(InputError, match="is missing"):
        regeneration.regenerate()


def formatted(before: bytes, edited: bytes, other: bytes) -> tuple[str, bytes]:
    """The patch of a file, which gives the edited one, and another release's file with it applied."""
    patch = regenerate._Patch(Path("x"), "", {"file": (before, edited)})
    neighbour = Upstream("llama-cpp-python", "0.3.35", "x", "", "", "", SPIKE, {})
    releases = [regenerate._Neighbour(neighbour, {"file": other})]
    made = regenerate._format(patch, releases).decode()
    [change] = unidiff.parse(made.encode(), "x")
    assert unidiff.apply_hunks(before, change, "x") == edited
    return made, releases[0].files["file"]


def test_hunks_get_the_context_that_neighbours_share() -> None:
    """Lines that another release lacks are no context; a hunk without a place there is refused by name."""
    before = "".join(LINES).encode()
    edited = before.replace(b"line 20\n", b"line 20\nnew hook\n")

    def text(other: bytes) -> str:
        made, patched = formatted(before, edited, other)
        assert b"new hook" in patched
        return made

    assert "@@ -19,6 +19,7 @@ line 17\n line 18\n line 19\n line 20\n+new hook\n line 21\n" in text(before)
    other = before.replace(b"line 19\n", b"another\n")
    assert "@@ -21,4 +21,5 @@ line 19\n line 20\n+new hook\n line 21\n line 22\n line 23\n" in text(other)
    with pytest.raises(BuildError, match=r"hunk of file at line 19 fits 0\.3\.35, too"):
        text(before.replace(b"line 20\n", b"").replace(b"line 21\n", b""))


def test_an_insertion_that_could_stand_higher_or_lower_stands_where_it_fits() -> None:
    """Its first lines are those behind it, so that difflib takes their place for that of the change."""
    check = "if (!ok) {\n    break;\n}\n"
    before = f"old\n{check}\nthen\n".encode()
    edited = f"old\n{check}\nif (!ok) {{\n    report;\n    break;\n}}\n\nthen\n".encode()
    _, patched = formatted(before, edited, before.replace(b"old\n", b"older\n"))
    assert patched == edited.replace(b"old\n", b"older\n")


def touched_files(upstream: Upstream) -> dict[str, bytes]:
    """Those files of a source package that the series touches, and its version; downloaded once."""
    sdist = find_sdist(open_cache(), upstream, None, SilentProgress())
    wanted = {"llama_cpp/__init__.py"} | {
        change.path
        for patch in PatchSource().patches()
        for change in unidiff.parse(patch.read_bytes(), patch.name)
    }
    top = upstream.sdist.removesuffix(".tar.gz") + "/"
    with tarfile.open(sdist) as archive:
        members = [member for member in archive if member.name.removeprefix(top) in wanted]
        return {member.name.removeprefix(top): archive.extractfile(member).read() for member in members}


def touched_files_or_skip(upstream: Upstream) -> dict[str, bytes]:
    """The same; without a neighbour the test is skipped, without the pin it fails."""
    try:
        return touched_files(upstream)
    except BuildError as error:
        assert upstream != load_upstream(), f"{error.message}: run `spikequant build`"
        pytest.skip(f"{upstream.sdist} is neither cached nor to be had: {error.message}")


@pytest.fixture(scope="module", params=load_releases(), ids=lambda upstream: upstream.version)
def release(request: pytest.FixtureRequest) -> tuple[Upstream, dict[str, bytes]]:
    """The pin and each of its neighbours, with the files that the series touches."""
    return request.param, touched_files_or_skip(request.param)


def test_the_real_series_is_what_its_tree_gives() -> None:
    """So that whoever edits a patched tree gets patches of that alone."""
    upstream, *others = load_releases()
    files = touched_files_or_skip(upstream)
    neighbours = [regenerate._Neighbour(each, touched_files_or_skip(each)) for each in others]
    hooks: dict[str, bytes] = {}
    for patch in PatchSource().patches():
        for change in unidiff.parse(patch.read_bytes(), patch.name):
            before = hooks.get(change.path, files.get(change.path, b""))
            hooks[change.path] = unidiff.apply_hunks(before, change, patch.name)
    for patch in regenerate._assign(PatchSource(), files, hooks, None):
        assert regenerate._format(patch, neighbours) == patch.file.read_bytes()


def test_the_real_series_applies_to_every_release_and_comes_off(
    release: tuple[Upstream, dict[str, bytes]], tmp_path: Path
) -> None:
    upstream, files = release
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    report = apply(tmp_path)
    assert report.patch_id == patch_id(upstream)
    assert len(report.written) >= len(files) - 1
    assert apply(tmp_path).already_done
    added = [
        line[1:]
        for patch in PatchSource().patches()
        for line in patch.read_text().splitlines()
        if re.match(r"\+(?!\+\+ )", line)
    ]
    written = [(tmp_path / name).read_text().splitlines() for name in report.written]
    assert len(added) > 60 and set(added) <= {line for lines in written for line in lines}
    remove(tmp_path)
    left = {
        path.relative_to(tmp_path).as_posix(): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    assert left == files


def test_hooks_stand_in_the_same_functions_of_every_release(
    release: tuple[Upstream, dict[str, bytes]],
) -> None:
    """Not only where their lines happen to be: llama.h and CMake's files have no functions."""
    _, files = release
    for patch in PatchSource().patches():
        for change in unidiff.parse(patch.read_bytes(), patch.name):
            lines = unidiff.split_lines(files[change.path])
            places = unidiff.place_hunks(lines, change)
            found = [unidiff.heading(lines, place) for place in places if place is not None]
            expected = [hunk.heading for hunk in change.hunks]
            for at, (here, there) in enumerate(zip(found, expected, strict=True)):
                # the loader's function behind which a new one stands has another name in older releases
                behind = change.hunks[at].old[:1] == [b"}\n"]
                assert here == there or behind, (change.path, here, there)


def test_the_pin_records_the_hash_of_every_file_that_the_series_changes(
    release: tuple[Upstream, dict[str, bytes]],
) -> None:
    upstream, files = release
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    del hashes["llama_cpp/__init__.py"]
    assert upstream.files == hashes, "run `python -m spikequant_gguf.ggml_patch.regenerate`"
