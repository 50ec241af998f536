"""`spikequant build`: from the pinned source package to a patched llama-cpp-python in this environment.

Builds are cached by pin, patch and settings, so the same thing is never compiled twice; interrupted ones
resume.

    python -m spikequant_gguf.ggml_patch.build [--release VERSION] [--unpatched] [--portable] [--wheel FOLDER]
                                               [--sdist PATH] [--jobs N] [--force]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from spikequant_gguf.errors import BuildError, InputError, OutputError, SpikeQuantError
from spikequant_gguf.files import atomic_path

from . import package
from .apply import apply
from .cache import CACHE_VARIABLE, MANIFEST, Cache, make_folder, open_cache, remove_folder, short_hash
from .compile import Variant, compile_tree
from .fetch import find_sdist, unpack
from .progress import Progress, SilentProgress, StepTimer, TerminalProgress, print_error
from .toolchain import default_jobs, find_toolchain, host_fingerprint
from .upstream import PatchSource, Upstream, load_upstream, patch_id, source_hash

KEEP_TREE_VARIABLE = "SPIKEQUANT_KEEP_TREE"
_KEPT_BUILDS = 3
_FLAG_VARIABLES = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CMAKE_ARGS")


@dataclass(frozen=True)
class BuildReport:
    """What `build` made or found.

    ``folder`` holds ``python/`` (for PYTHONPATH), the wheel and, if patched, ``bin/`` with the tools and
    ``converter/``. ``cached``: nothing was compiled. ``installed``: the wheel was installed by this call.
    ``seconds`` per step. ``self_test``: what the self-test measured.
    """

    key: str
    pin: str
    patch_id: str | None
    portable: bool
    cached: bool
    installed: bool
    folder: Path
    wheel: Path
    compiler: str
    settings: dict[str, str]
    tools: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    self_test: dict = field(default_factory=dict)

    @property
    def unpatched(self) -> bool:
        return self.patch_id is None

    @property
    def handed_on(self) -> bool:
        """Whether the wheel is a copy to hand on, outside the cache."""
        return self.wheel.parent != self.folder

    @property
    def python_path(self) -> Path:
        """Folder to put on PYTHONPATH to use this build's llama_cpp without installing it."""
        return self.folder / "python"

    def to_json(self) -> dict:
        """The report as plain JSON types."""
        return json.loads(json.dumps(asdict(self) | {"python_path": self.python_path}, default=str))


def build(
    *,
    release: str | None = None,
    portable: bool = False,
    unpatched: bool = False,
    sdist: Path | str | None = None,
    jobs: int | None = None,
    force: bool = False,
    install: bool = True,
    wheel: Path | str | None = None,
    keep_tree: bool | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Build and install the patched llama-cpp-python, or make the unpatched one for comparisons.

    release: another llama-cpp-python that the patch is made for; the pin if None. portable: do not use the
    CPU's newest instructions (on x86: up to AVX2, FMA and F16C). unpatched: only the
    llama library of the same pin, never installed. sdist: a source package got by hand. force: build again
    from a fresh tree. wheel: a folder for a wheel to hand on, which is a portable build that is not installed
    here and has none of llama.cpp's programs. keep_tree: leave the unpacked tree for short rebuilds (default:
    if ``$SPIKEQUANT_KEEP_TREE`` is set). progress: shows the steps; silent if None. Raises BuildError,
    InputError or OutputError with a remedy.
    """
    if wheel is not None:
        if unpatched:
            raise InputError("there is no wheel of the unpatched library", "leave out one of the two options")
        portable, install = True, False
    job = _job(portable, unpatched, release, library_only=wheel is not None)
    keep = bool(os.environ.get(KEEP_TREE_VARIABLE)) if keep_tree is None else keep_tree
    timer = StepTimer(progress or SilentProgress())
    installing = install and not unpatched
    try:
        with job.cache.lock(lambda: timer.note("Another build is running; waiting for it.")):
            if force:
                remove_folder(job.folder)
                remove_folder(job.work)
            cached = job.cache.finished(job.key) is not None
            if not cached:
                _make(job, Path(sdist) if sdist else None, jobs or default_jobs(), timer)
                _clean_up(job, keep)
            manifest = job.cache.finished(job.key) or {}
            made = job.folder / manifest["wheel"]
            installed = installing and not _is_installed(job.key)
            if installed:
                timer.step("install", made.name)
                package.install_wheel(made)
            if wheel is not None:
                with atomic_path(make_folder(Path(wheel)) / made.name) as partial:
                    shutil.copyfile(made, partial)
                made = Path(wheel) / made.name
            outcome = manifest["self_test"]
            if installing:
                timer.step("self-test", "installed runtime")
                outcome = _self_test(None, unpatched)
    except OSError as error:
        raise OutputError(
            f"cannot build in {job.cache.root}: {error}",
            f"free space, or set {CACHE_VARIABLE} to another folder",
        ) from error
    return BuildReport(
        key=job.key,
        pin=job.upstream.version,
        patch_id=job.variant.patch_id,
        portable=portable,
        cached=cached,
        installed=installed,
        folder=job.folder,
        wheel=made,
        compiler=manifest["compiler"],
        settings=manifest["settings"],
        tools={tool: job.folder / "bin" / package.program_file(tool) for tool in job.variant.tools},
        seconds=timer.finish(),
        self_test=outcome,
    )


def find_unpatched(portable: bool = False) -> Path | None:
    """Folder for PYTHONPATH with the unpatched build of the same pin, or None if it was never made."""
    job = _job(portable, unpatched=True)
    return job.folder / "python" if job.cache.finished(job.key) else None


@dataclass(frozen=True)
class _Job:
    """What to build from what. ``source`` is None for the unpatched build."""

    cache: Cache
    upstream: Upstream
    source: PatchSource | None
    variant: Variant

    @cached_property
    def _recipe(self) -> list[str]:
        settings = [f"{name}={value}" for name, value in sorted(self.variant.settings(self.upstream).items())]
        return settings + [f"{name}={os.environ.get(name, '')}" for name in _FLAG_VARIABLES]

    @cached_property
    def key(self) -> str:
        """The same key: the same thing would be compiled, for the same kind of machine."""
        host = host_fingerprint(native=not self.variant.portable)
        source = source_hash(self.upstream, self.source)
        identity = short_hash(source, *self.variant.targets, *self._recipe, host)
        return f"{self.upstream.version}-{self.variant.name}-{self.variant.patch_id or 'stock'}-{identity}"

    @property
    def folder(self) -> Path:
        return self.cache.build(self.key)

    @property
    def work(self) -> Path:
        """One work folder serves all revisions of the patch, so that only what differs is compiled again."""
        return self.cache.work(f"{self.variant.name}-{short_hash(self.upstream.sha256, *self._recipe)[:8]}")


def _job(portable: bool, unpatched: bool, release: str | None = None, library_only: bool = False) -> _Job:
    upstream = load_upstream(version=release)
    source = None if unpatched else PatchSource()
    variant = Variant(source and patch_id(upstream, source), portable, library_only)
    return _Job(open_cache(), upstream, source, variant)


def _make(job: _Job, sdist: Path | None, jobs: int, timer: StepTimer) -> None:
    """Compile and test a build; its folder appears in the cache when all of that went well."""
    upstream, source, variant = job.upstream, job.source, job.variant
    toolchain = find_toolchain()
    for leftover in job.folder.parent.glob("*.partial"):  # of a build that died
        remove_folder(leftover)
    make_folder(job.work)
    tree = job.work / "tree"
    if not tree.is_dir():
        unpack(find_sdist(job.cache, upstream, sdist, timer), tree, upstream, timer)
    if source is not None:
        timer.step("patch", f"{len(source.patches())} patches, {len(source.spike_files())} new files")
        apply(tree, upstream, source)
    binaries = compile_tree(tree, job.work / "cmake", variant, upstream, toolchain, jobs, timer)
    if source is not None and patch_id(upstream, source) != variant.patch_id:
        raise BuildError("the patch was changed while it was compiled", "run `spikequant build` again")

    timer.step("package")
    partial = make_folder(job.folder.with_name(job.folder.name + ".partial"))
    package.stage(tree, binaries, partial, variant.tools, upstream)
    facts = {
        "key": job.key,
        "pin": upstream.version,
        "patch_id": variant.patch_id,
        "portable": variant.portable,
        "compiler": toolchain.compiler,
        "settings": variant.settings(upstream),
    }
    # A portable build may be handed on, and elsewhere the place of this cache means nothing.
    place = {} if variant.portable else {"build": str(job.folder)}
    package.write_runtime_manifest(partial / "python", facts | place)
    wheel = package.write_wheel(partial / "python", partial, upstream)
    timer.step("self-test", "new build")
    outcome = _self_test(partial / "python", unpatched=source is None)
    manifest = facts | {"wheel": wheel.name, "self_test": outcome}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    remove_folder(job.folder)
    os.replace(partial, job.folder)


def _clean_up(job: _Job, keep: bool) -> None:
    """Remove the work folder; or keep it, and then only the newest builds: every change makes one."""
    if not keep:
        remove_folder(job.work)
    elif job.source is not None:
        same = [found for found in job.cache.builds() if found["pin"] == job.upstream.version]
        patched = [manifest["key"] for manifest in same if manifest["patch_id"] is not None]
        for old in [key for key in patched if key != job.key][_KEPT_BUILDS - 1 :]:
            remove_folder(job.cache.build(old))


def _is_installed(key: str) -> bool:
    """True if the environment's llama_cpp is exactly this build, its libraries whole."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return False
    folder = Path(spec.origin).parent / "lib"
    try:
        manifest = json.loads((folder / package.RUNTIME_MANIFEST).read_text(encoding="utf-8"))
        whole = all(
            package.file_digest(folder / name) == digest for name, digest in manifest["libraries"].items()
        )
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return whole and manifest.get("key") == key


def _self_test(python_path: Path | None, unpatched: bool) -> dict:
    """Run selftest.py in a fresh process, on the installed runtime or on the one in ``python_path``."""
    environment = {name: value for name, value in os.environ.items() if name != "LLAMA_CPP_LIB_PATH"}
    if python_path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(python_path), os.environ.get("PYTHONPATH")))
        )
    command = [
        sys.executable,
        "-m",
        "spikequant_gguf.ggml_patch.selftest",
        *(["--unpatched"] if unpatched else []),
    ]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"the process ended with status {result.returncode}"
        raise BuildError(
            f"the self-test failed: {reason}",
            "run `spikequant build --force`; if it fails again, report it with `spikequant doctor --json`",
        )
    return json.loads(result.stdout)


def main(arguments: list[str] | None = None) -> int:
    """Command line of this module, used by the Makefile for the unpatched build."""
    parser = argparse.ArgumentParser(
        prog="python -m spikequant_gguf.ggml_patch.build", description=build.__doc__
    )
    parser.add_argument("--release", metavar="VERSION", help="another release that the patch is made for")
    parser.add_argument("--portable", action="store_true", help="a library for other CPUs of this kind, too")
    parser.add_argument(
        "--unpatched", action="store_true", help="the unpatched library, for comparisons; not installed"
    )
    parser.add_argument(
        "--wheel", type=Path, help="folder for a portable wheel to hand on; not installed here"
    )
    parser.add_argument("--sdist", type=Path, help="source package got by hand")
    parser.add_argument("--jobs", type=int, help="compile jobs at once")
    parser.add_argument("--force", action="store_true", help="build again from a fresh tree")
    options = parser.parse_args(arguments)
    try:
        with TerminalProgress() as progress:
            report = build(**vars(options), progress=progress)
    except SpikeQuantError as error:
        return print_error(error)
    print(json.dumps(report.to_json(), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
