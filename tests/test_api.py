"""The functions for Python programs: typed results, one progress callback, no state, no heavy imports."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest

import spikequant_gguf
from spikequant_gguf import api
from spikequant_gguf.converter.calibrated import CalibrationOptions
from spikequant_gguf.errors import InputError
from spikequant_gguf.texts import read_text

pytestmark = pytest.mark.usefixtures("runtime")


def test_every_function(tiny_model_f32: Path, tiny_text: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []

    def progress(step: str, done: int, total: int) -> None:
        calls.append((step, done, total))

    def steps() -> list[str]:
        names = list(dict.fromkeys(step for step, _, _ in calls))
        assert all(isinstance(step, str) and 0 <= done <= max(done, total) for step, done, total in calls)
        calls.clear()
        return names

    settings = CalibrationOptions(text=read_text(tiny_text), ctx=64, chunks=4, threads=2)
    report = api.convert(str(tiny_model_f32), tmp_path / "spk4.gguf", calibration=settings, progress=progress)
    assert report.calibration.startswith("tiny.txt") and "calibrate" in steps()
    result = api.perplexity(report.path, tiny_text, ctx=64, chunks=2, threads=1, progress=progress)
    assert result.ppl > 1 and steps()
    back = api.dequantize(report.path, tmp_path / "f16.gguf", progress=progress)
    assert back.type == "f16" and "write" in steps()
    options = {"ctx": 64, "chunks": 2, "rounds": 0, "threads": 1}
    comparison = api.compare([back.path, str(report.path)], str(tiny_text), progress=progress, **options)
    assert [row.type for row in comparison.rows] == ["f16", "spk4"] and steps()
    energy = api.energy(report.path, tiny_text, tokens=32, threads=1, progress=progress)
    assert "count" in steps()
    for each in (report, result, back, comparison, energy):
        assert is_dataclass(each) and type(each).__dataclass_params__.frozen
        json.dumps(each.to_json(), allow_nan=False)


def test_conversion_without_calibration(tiny_model_f32: Path, tmp_path: Path) -> None:
    report = api.convert(tiny_model_f32, tmp_path / "spk4.gguf", calibration=False)
    assert report.calibration == "none" and report.uncalibrated == ()


def test_errors_are_those_of_the_commands(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        api.perplexity(tmp_path / "missing.gguf")


def test_import_is_light() -> None:
    code = (
        "import sys, spikequant_gguf.api; from spikequant_gguf import compare, convert, energy, perplexity;"
        "heavy = {'torch', 'llama_cpp', 'transformers', 'matplotlib', 'lm_eval'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_functions_of_the_package_are_those_of_the_api() -> None:
    """Also after the modules of the same names were imported, in either order."""
    for name in api.__all__:
        if name != "Progress":
            importlib.import_module(f"spikequant_gguf.{'converter' if name == 'convert' else name}")
            assert getattr(spikequant_gguf, name) is getattr(api, name)
            assert name in dir(spikequant_gguf) and name in spikequant_gguf.__all__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        spikequant_gguf.nothing  # noqa: B018
