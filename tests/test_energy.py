"""Counters against NumPy, the operation model, powercap trees, the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from spikequant_gguf.activations import activation_values, spike_train
from spikequant_gguf.cli import app
from spikequant_gguf.energy import counting, energy, find_rapl, load_constants, read_counts
from spikequant_gguf.energy.counts import Counts
from spikequant_gguf.energy.model import model_energy
from spikequant_gguf.errors import InputError
from spikequant_gguf.format import TYPE_SPK4
from spikequant_gguf.ggml_api import mul_mat
from spikequant_gguf.native import load


def reference(blocks: np.ndarray, n_rows: int) -> dict[str, int]:
    """What spike-counters.h promises, from BLOCK_SPKA[tokens, n_blocks]."""
    tokens, n_blocks = blocks.shape
    train = spike_train(blocks)
    fine, coarse, _, shift = activation_values(blocks)
    salient = blocks["salient_mask"][..., None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)
    fires, salient = train.time >= 0, salient.astype(bool).reshape(tokens, -1)
    steps = np.abs(fine).max(axis=1).sum() + np.abs(coarse).max(axis=1).sum()
    read = n_rows * (2 + 2 * n_blocks) + tokens * (64 * n_blocks + 4 * n_rows)
    codes = train.spikes * n_rows // 2 if tokens == 1 else 64 * n_blocks * n_rows // 2
    return {
        "products": 1,
        "tokens": tokens,
        "spikes": train.spikes,
        "silent": fires.size - train.spikes,
        "salient": int(salient.sum()),
        "rate_spikes": int(np.abs(fine).sum() + (np.abs(coarse) << shift[:, None]).sum()),
        "adds": n_rows * int((fires & ~salient).sum() + steps),
        "shift_adds": n_rows * int((fires & salient).sum()),
        "readouts": n_rows * tokens,
        "bytes": read + codes,
    }


@pytest.mark.parametrize("tokens", [1, 2, 37])
@pytest.mark.parametrize("buffer", ["CPU", "CPU_SPIKE"])
def test_counters_equal_numpy(runtime: object, tokens: int, buffer: str) -> None:
    rng = np.random.default_rng(tokens)
    library = load()
    weights = library.quantize(TYPE_SPK4, rng.standard_normal((96, 192)))
    x = rng.standard_t(3, (tokens, 192)).astype(np.float32)
    with counting():
        mul_mat(TYPE_SPK4, weights, x, buffer=buffer, threads=2)
    mul_mat(TYPE_SPK4, weights, x, buffer=buffer)  # not counted
    (counts,) = read_counts()
    found = counts.to_json()
    expected = reference(library.encode_activations(x), 96)
    assert {key: found[key] for key in expected} == expected
    assert (counts.n_inputs, counts.n_rows) == (192, 96)


def test_real_text(tiny_models: dict[str, Path], tiny_text: Path) -> None:
    prompt = energy(tiny_models["spk4"], tiny_text, tokens=64, threads=2)
    decode = energy(tiny_models["spk4"], tiny_text, tokens=64, decode=True, threads=1)
    for count in prompt.counts:
        assert count.tokens == 64 or count.name.startswith("output")
        assert count.spikes + count.silent == count.tokens * count.n_inputs
    assert {count.products for count in decode.counts} == {64}
    assert prompt.spike_ratio >= 3
    assert prompt.ratio("fp16_mac") >= 4.6
    assert prompt.ratio("q4_0") >= 2


def test_no_spikes(tiny_models: dict[str, Path], tiny_text: Path) -> None:
    with pytest.raises(InputError, match="no spike-coded tensors"):
        energy(tiny_models["q4_0"], tiny_text, tokens=16)


def test_model_by_hand() -> None:
    count = Counts("w", 64, 32, 1, 1, 50, 14, 4, 200, 32 * 60, 32 * 4, 32, 1000)
    rows = {row.system: row for row in model_energy([count], 1, load_constants("horowitz-45nm"))}
    assert rows["fp16_mac"].arithmetic == pytest.approx(64 * 32 * 1.5)
    assert rows["q4_0"].dequantization == pytest.approx(64 * 32 * 0.03 + 64 * (2 * 3.7 + 0.9))
    readouts = 32 * (3 * 3.7 + 0.9 + 3.1)
    assert rows["spk4"].arithmetic == pytest.approx(
        (32 * 60 + 2 * 32 * 4) * 0.1 + readouts + 64 * (3.7 + 7 * 0.9)
    )
    assert rows["spk4"].dequantization == 0
    assert rows["spk4"].memory == pytest.approx(8000 * 20.3125)


def test_constants_from_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "a"\nprocess = "b"\ncitation = "c"\n[pj]\nint8_add = -1\n', encoding="utf-8")
    with pytest.raises(InputError, match="int8_add"):
        load_constants(str(path))
    assert load_constants("jouppi-7nm").pj["int8_mul"] == 0.07


def package(root: Path, index: int, energy_uj: int, limit: int) -> Path:
    zone = root / f"intel-rapl:{index}"
    zone.mkdir(parents=True)
    (zone / "name").write_text(f"package-{index}\n")
    (zone / "max_energy_range_uj").write_text(f"{limit}\n")
    (zone / "energy_uj").write_text(f"{energy_uj}\n")
    return zone


def test_powercap_packages_and_wrap_around(tmp_path: Path) -> None:
    zones = package(tmp_path, 0, 9_999_000, 9_999_999), package(tmp_path, 1, 500, 9_999_999)
    core = tmp_path / "intel-rapl:0:0"
    core.mkdir()
    (core / "name").write_text("core\n")
    rapl = find_rapl(tmp_path)
    assert not isinstance(rapl, str)
    before = rapl.read()
    (zones[0] / "energy_uj").write_text("1000\n")  # wrapped: 1000 + 1000 microjoules later
    (zones[1] / "energy_uj").write_text("2500\n")
    assert rapl.joules(before, rapl.read()) == pytest.approx(4000e-6)


def test_powercap_missing_or_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no RAPL" in str(find_rapl(tmp_path / "none"))
    package(tmp_path, 0, 1, 10)

    def refuse(self: Path, *args: object, **options: object) -> str:
        raise PermissionError(self)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert "root only" in str(find_rapl(tmp_path))


def test_command(tiny_models: dict[str, Path], tiny_text: Path) -> None:
    arguments = ["energy", str(tiny_models["spk4"]), "-f", str(tiny_text), "--tokens", "32", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["rows"][0]["system"] == "spk4"
    assert document["measured"][0]["joules_per_token"] is None
    assert document["measured"][0]["reason"]
