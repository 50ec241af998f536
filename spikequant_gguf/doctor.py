"""`spikequant doctor`: is everything there, does it fit together, and what to do if not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from . import __version__
from .energy.rapl import POWERCAP
from .energy.sources import find_source
from .errors import BuildError, RuntimeMissingError
from .ggml_patch.cache import CACHE_VARIABLE, open_cache
from .ggml_patch.compile import TOOLS
from .ggml_patch.toolchain import cpu_features, find_build_program, find_compiler, version_line
from .ggml_patch.upstream import load_releases, load_upstream, patch_id
from .runtime import ABI, RuntimeInfo, converter_script, find_runtime, tool

__all__ = ["Check", "DoctorReport", "doctor"]

_CONVERTER_PACKAGES = ("torch", "transformers", "accelerate", "sentencepiece", "safetensors")
_BUILD = "run `spikequant build`"


@dataclass(frozen=True)
class Check:
    """One line of the report. ``ok`` is None for a fact that is neither good nor bad."""

    name: str
    value: str
    ok: bool | None = True
    remedy: str | None = None

    @property
    def status(self) -> str:
        """``ok``, ``problem`` or ``info``."""
        return "info" if self.ok is None else "ok" if self.ok else "problem"


@dataclass(frozen=True)
class DoctorReport:
    """All checks in order."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True if no check found a problem."""
        return all(check.ok is not False for check in self.checks)

    def to_json(self) -> dict:
        """The report as plain JSON types."""
        return {"ok": self.ok, "checks": [asdict(check) | {"status": check.status} for check in self.checks]}


def doctor() -> DoctorReport:
    """Look at package, runtime, build tools, CPU, energy source and converter; changes nothing."""
    info = find_runtime()
    return DoctorReport(
        (
            *_package(info),
            *_runtime(info),
            *_tools(info),
            *_toolchain(needed=info.problem is not None),
            _cache(),
            _energy(),
            *_converter(),
        )
    )


def _package(info: RuntimeInfo) -> list[Check]:
    releases = {release.version: release for release in load_releases()}
    upstream = releases.get(info.llama_cpp_version or "", load_upstream())
    return [
        Check("package", f"spikequant-gguf {__version__}, Python {platform.python_version()}", None),
        Check(
            "pin",
            f"{upstream.requirement}, llama.cpp {upstream.llama_cpp_commit}, ggml {upstream.ggml_version}",
            None,
        ),
        Check("patch", f"{patch_id(upstream)}, ABI {ABI}", None),
    ]


def _runtime(info: RuntimeInfo) -> list[Check]:
    if info.problem:
        checks = [Check("runtime", info.problem, False, info.remedy)]
    else:
        checks = [
            Check(
                "runtime", f"llama-cpp-python {info.llama_cpp_version}, patch {info.patch_id}, ABI {info.abi}"
            ),
            Check("kernel", info.kernel or "unknown"),
        ]
    if info.library_dir is not None:
        checks.append(Check("libraries", str(info.library_dir), None))
    return [
        *checks,
        Check("CPU", f"{platform.machine()}: {' '.join(cpu_features()) or 'features unknown'}", None),
    ]


def _tools(info: RuntimeInfo) -> list[Check]:
    if info.problem:
        return [Check("tools", "not available without the runtime", False, info.remedy)]
    try:
        folders = {tool(name).parent for name in TOOLS}
        script = converter_script()
    except RuntimeMissingError as error:
        return [Check("tools", error.message, False, error.remedy)]
    return [
        Check("tools", f"{', '.join(TOOLS)} in {folders.pop()}"),
        Check("llama.cpp converter", str(script)),
    ]


def _toolchain(needed: bool) -> list[Check]:
    """Build programs: missing ones are a problem only while there is no good runtime."""
    checks = []
    for name, find in (
        ("compiler", lambda: find_compiler()[1]),
        ("cmake", lambda: find_build_program("cmake")),
        ("ninja", lambda: find_build_program("ninja")),
    ):
        try:
            checks.append(Check(name, f"{version_line(find())}"))
        except BuildError as error:
            checks.append(Check(name, error.message, False if needed else None, error.remedy))
    return checks


def _cache() -> Check:
    cache = open_cache()
    if not cache.root.is_dir():
        return Check("build cache", f"{cache.root}, empty", None)
    if not os.access(cache.root, os.W_OK):
        return Check(
            "build cache", f"{cache.root} cannot be written", False, f"set {CACHE_VARIABLE} to another folder"
        )
    return Check(
        "build cache", f"{cache.root}, {cache.size() / 1e6:.0f} MB, {len(cache.builds())} builds", None
    )


def _energy() -> Check:
    """Whether joules can be measured without further hardware; most systems keep the counters to root."""
    name = "energy source"
    source = find_source(POWERCAP)
    if not isinstance(source, str):
        return Check(name, f"{source.method}: {source.description}")
    if "root only" in source or "cannot be read" in source:
        return Check(
            name,
            f"RAPL counters exist but cannot be read: {source}",
            False,
            "let your user read them (they belong to root), or measure with an external meter",
        )
    return Check(name, f"none: energies are modelled, never measured, here ({source})", None)


def _converter() -> list[Check]:
    versions, missing = [], []
    for name in _CONVERTER_PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return [
            Check(
                "converter",
                f"missing: {', '.join(missing)} (needed for Hugging Face models only)",
                None,
                f"run `{Path(sys.executable).name} -m pip install spikequant-gguf[convert]`",
            )
        ]
    return [Check("converter", ", ".join(versions))]
