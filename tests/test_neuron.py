"""Layers' real inputs and outputs, a neuron's trace against the reference, its pictures, the command."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from spikequant_gguf import neuron as neuron_module
from spikequant_gguf.activations import activation_values, encode_activations
from spikequant_gguf.cli import app
from spikequant_gguf.converter import ConvertOptions, convert
from spikequant_gguf.errors import InputError, OutputError, SpikeQuantError
from spikequant_gguf.format import BLOCK_SPK4
from spikequant_gguf.gguf_header import read_header
from spikequant_gguf.neuron import layer_spikes, trace_neuron
from spikequant_gguf.neuron_file import check_picture_path, write_neuron
from spikequant_gguf.potentials import matmul, potentials_by_spikes
from spikequant_gguf.probe import ProbedModel

TEXT = "the spike was on this neuron, which is at it."
TENSOR = "blk.1.ffn_down.weight"


def weights_of(model: Path, name: str) -> np.ndarray:
    """BLOCK_SPK4[rows, n_blocks] of a tensor, read by other means than the trace does."""
    info = next(each for each in read_header(model).tensors if each.name == name)
    raw = model.read_bytes()[info.offset : info.offset + (info.n_bytes or 0)]
    return np.frombuffer(raw, BLOCK_SPK4).reshape(info.n_rows, -1)


def test_every_layer_computes_what_the_reference_computes(tiny_models: dict[str, Path]) -> None:
    """Bit for bit: real inputs through NumPy against the runtime's own outputs."""
    model = tiny_models["spk4"]
    names = [
        each.name
        for each in read_header(model).tensors
        if each.name.startswith("blk.") and each.type_id == 90
    ]
    with ProbedModel(model, names, ctx_size=64, threads=2) as loaded:
        ids = loaded.tokenize(TEXT.encode())
        loaded.decode(ids, 0, len(ids))
        products = list(loaded.products)
    assert [each.name for each in products] and {each.name for each in products} == set(names)
    for product in products:
        assert product.x.shape[0] == product.y.shape[0] == len(ids)
        expected = matmul(weights_of(model, product.name), encode_activations(product.x))
        assert np.array_equal(expected.view(np.uint32), product.y.view(np.uint32)), product.name


@pytest.mark.parametrize("row", [0, 77, 127])
@pytest.mark.parametrize("position", [0, 3, -1])
def test_trace_is_that_of_the_reference(tiny_models: dict[str, Path], row: int, position: int) -> None:
    model = tiny_models["spk4"]
    trace = trace_neuron(model, f"{TENSOR}:{row}", TEXT, position=position, threads=1)
    layer = layer_spikes(model, TENSOR, TEXT, threads=1)
    blocks = layer.blocks[[trace.position]]
    fine, coarse = potentials_by_spikes(weights_of(model, TENSOR)[[row]], blocks)
    assert (trace.potential_fine[-1], trace.potential_coarse[-1]) == (fine[0, 0], coarse[0, 0])
    codes, coarse_codes, _, shift = activation_values(blocks)
    assert trace.potential[-1] == int(trace.weights @ (codes[0] + (coarse_codes[0] << shift[0])))
    assert np.array_equal(
        np.where(trace.time > 0, 17 - trace.time, 0), np.abs(codes[0]) + np.abs(coarse_codes[0])
    )
    assert np.array_equal(trace.polarity, np.sign(codes[0] + coarse_codes[0]))
    assert trace.output.view(np.uint32) == layer.outputs[trace.position, row].view(np.uint32)
    assert trace.output == pytest.approx(trace.unit * trace.potential[-1], rel=1e-5)
    assert trace.firing_threshold * trace.unit == pytest.approx(1)
    assert sum(each["contribution"] for each in trace.strongest(10**6)) == trace.potential[-1]


def test_a_neuron_of_smollm2(smollm2: Path, tmp_path: Path) -> None:
    model = tmp_path / "smollm2-SPK4.gguf"
    convert(smollm2, model, ConvertOptions(threads=2))
    for neuron in ("blk.0.attn_q:5", "blk.29.ffn_down.weight:575"):
        trace = trace_neuron(model, neuron, "The capital of France is Paris", threads=2)
        assert trace.piece == " Paris"
        assert trace.runtime_output.view(np.uint32) == trace.output.view(np.uint32)
        assert {0, 1} <= set(trace.kind.tolist())  # salient inputs among the standard ones


def test_another_output_is_an_error(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bit of one output is turned."""
    original = neuron_module.layer_spikes

    def disturbed(*arguments: object, **options: object) -> object:
        layer = original(*arguments, **options)  # type: ignore[arg-type]
        outputs = layer.outputs.copy()
        outputs.view(np.uint32)[-1, 3] ^= 1
        return replace(layer, outputs=outputs)

    monkeypatch.setattr(neuron_module, "layer_spikes", disturbed)
    trace_neuron(tiny_models["spk4"], f"{TENSOR}:2", TEXT)
    with pytest.raises(SpikeQuantError, match="the runtime computed"):
        trace_neuron(tiny_models["spk4"], f"{TENSOR}:3", TEXT)


@pytest.mark.parametrize(
    ("neuron", "position", "message"),
    [
        ("blk.1.ffn_down", None, "names no neuron"),
        ("blk.9.ffn_down:1", None, "no tensor 'blk.9.ffn_down'"),
        ("blk.1.ffn_down:128", None, "has 128 neurons"),
        ("output_norm:1", None, "not spike-coded"),
        ("blk.1.ffn_down:1", 1000, "tokens"),
    ],
)
def test_wrong_neurons(tiny_models: dict[str, Path], neuron: str, position: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        trace_neuron(tiny_models["spk4"], neuron, TEXT, position=position)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
def test_pictures(tiny_models: dict[str, Path], tmp_path: Path, suffix: str) -> None:
    trace = trace_neuron(tiny_models["spk4"], f"{TENSOR}:5", TEXT)
    path = tmp_path / f"neuron{suffix}"
    check_picture_path(path, force=False)
    write_neuron(trace, path)
    data = path.read_bytes()
    if suffix == ".png":
        assert data.startswith(b"\x89PNG") and len(data) < 400_000
    else:
        text = data.decode()
        assert "http" not in text.replace("http://www.w3.org/", "")  # but for names of namespaces
        if suffix == ".svg":
            xml.etree.ElementTree.fromstring(text)
        else:
            assert trace.output_bits in text and TEXT in text
    with pytest.raises(OutputError, match="exists already"):
        check_picture_path(path, force=False)
    with pytest.raises(InputError, match="kind of picture"):
        check_picture_path(tmp_path / "neuron.pdf", force=False)


def test_command(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model = str(tiny_models["spk4"])
    arguments = ["inspect", model, "--neuron", f"{TENSOR}:7", "-p", TEXT, "--position", "2"]
    found = CliRunner().invoke(app, [*arguments, "--json", "-o", str(tmp_path / "n.svg")])
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert document["time"] == list(range(1, 17)) and len(document["inputs"]) == 256
    assert document["equal_to_the_runtime"] and document["output_bits"].startswith("0x")
    assert (
        document["potential"]["total"][-1]
        == trace_neuron(model, f"{TENSOR}:7", TEXT, position=2).potential[-1]
    )
    assert (tmp_path / "n.svg").is_file()
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "neuron 7: 256 inputs" in shown.stdout and document["output_bits"] in shown.stdout
    assert "potential V" in shown.stdout and "to the bit" in shown.stdout
    for wrong in (["inspect", model, "-p", TEXT], ["inspect", model, "-o", "x.png"]):
        assert CliRunner().invoke(app, wrong).exit_code == 2
