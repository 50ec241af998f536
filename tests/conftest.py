"""What several test modules use: the runtime, small models of random weights, the reference model, data."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_model import some_text, write_tiny_model

from spikequant_gguf import models
from spikequant_gguf.converter import ConvertOptions, convert
from spikequant_gguf.runtime import RuntimeInfo, find_runtime, tool
from spikequant_gguf.texts import DATA_VARIABLE


@pytest.fixture(scope="session")
def runtime() -> RuntimeInfo:
    """The patched runtime; without it the tests that need it fail."""
    found = find_runtime()
    if found.problem is not None:
        pytest.fail(f"{found.problem}: {found.remedy}", pytrace=False)
    return found


@pytest.fixture(scope="session")
def tiny_model_factory(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a tiny model with the options of write_tiny_model; the same options give the same file."""
    folder = tmp_path_factory.mktemp("tiny")
    made: dict[str, Path] = {}

    def make(**options: object) -> Path:
        key = repr(sorted(options.items(), key=lambda item: item[0]))
        if key not in made:
            made[key] = write_tiny_model(folder / f"tiny-{len(made)}-F32.gguf", **options)  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_model_f32(tiny_model_factory: Callable[..., Path]) -> Path:
    """A Llama model of float32: 2 layers, 128 channels, 256 in the MLP, a vocabulary of some 400 tokens."""
    return tiny_model_factory()


@pytest.fixture(scope="session")
def quantized(runtime: RuntimeInfo, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Path]:
    """Makes a version of a model in another type with llama-quantize, SPK4 included."""
    folder = tmp_path_factory.mktemp("quantized")
    made: dict[tuple[Path, str], Path] = {}

    def make(source: Path, kind: str) -> Path:
        if (source, kind) not in made:
            out = folder / f"{source.stem}-{len(made)}-{kind}.gguf"
            command = [tool("llama-quantize"), "--allow-requantize", source, out, kind, "2"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
            made[source, kind] = out
        return made[source, kind]

    return make


@pytest.fixture(scope="session")
def tiny_models(tiny_model_f32: Path, quantized: Callable[[Path, str], Path]) -> dict[str, Path]:
    """The tiny model by type."""
    return {kind: quantized(tiny_model_f32, kind.upper()) for kind in ("f16", "q8_0", "q4_0", "spk4")}


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some 7,000 tokens of the tiny models."""
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text(some_text(3000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct.Q4_1.gguf, fetched into the cache by the first test that wants it."""
    return models.smollm2()


@pytest.fixture(scope="session")
def real_models(
    runtime: RuntimeInfo,
    smollm2: Path,
    quantized: Callable[[Path, str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """F16, Q8_0 and Q4_0 by llama-quantize, SPK4 by our converter, all of the F16 file."""
    f16 = quantized(smollm2, "F16")
    spk4 = tmp_path_factory.mktemp("real") / "spk4.gguf"
    convert(f16, spk4, ConvertOptions(threads=2))
    return {
        "f16": f16,
        "q8_0": quantized(f16, "Q8_0"),
        "q4_0": quantized(f16, "Q4_0"),
        "spk4": spk4,
    }


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of evaluation texts, which are not part of this project."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        pytest.skip(
            f"{DATA_VARIABLE} names no folder with wiki.test.raw, to which the expected figure belongs"
        )
    return Path(folder)
