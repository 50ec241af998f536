"""Whole conversions: GGUF and checkpoints in, spike models out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from converter_models import METADATA, NumpyBackend, llama_tensors, normal, tensors_of, write_gguf
from gguf import GGMLQuantizationType as T
from gguf import quants
from test_converter_source import safetensors_bytes, split_model, write_imatrix

from spikequant_gguf import (
    InputError,
    OutputError,
    RuntimeMissingError,
    SpikeQuantError,
    UnsupportedError,
    runtime,
)
from spikequant_gguf import format as f
from spikequant_gguf.codec import decode_weights, encode_weights, pack_weights
from spikequant_gguf.converter import (
    ConvertOptions,
    EncoderSettings,
    Recipe,
    Scaling,
    TensorStatistics,
    checkpoint,
    convert,
    pipeline,
    plan,
)
from spikequant_gguf.converter.metadata import read_raw_metadata
from spikequant_gguf.converter.quantize import measure
from spikequant_gguf.format import blocks_from_bytes, blocks_to_bytes
from spikequant_gguf.gguf_header import read_header
from spikequant_gguf.verify import verify_file

SPK4 = 90
NUMPY = NumpyBackend()
Q = "blk.0.attn_q.weight"
DOWN = "blk.0.ffn_down.weight"


def converted(source, out, options=None, **arguments):
    """Converts without the runtime; checks what must hold for every result."""
    report = convert(source, out, options, backend=NUMPY, **arguments)
    checked = verify_file(report.path)
    checked.raise_if_faulty()
    assert not checked.warnings and report.file_bytes == report.path.stat().st_size
    assert not list(report.path.parent.glob("*.partial")) and not list(
        report.path.parent.glob(".spikequant-*")
    )
    planned = [(tensor.name, int(tensor.target_type), tensor.shape) for tensor in report.plan.tensors]
    assert [(name, kind, shape) for name, (kind, shape, _) in tensors_of(report.path).items()] == planned
    return report


@pytest.fixture
def model(tmp_path):
    return write_gguf(tmp_path / "tiny-F16.gguf", llama_tensors(), T.F16)


# ---- GGUF to SPK4


@pytest.mark.parametrize("kind", [T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_1])
def test_every_tensor_is_what_it_should_be(tmp_path, kind):
    tensors = llama_tensors(tied=False)
    source = write_gguf(tmp_path / "in.gguf", tensors, kind)
    report = converted(source, tmp_path / "out.gguf")
    for name, (target, _, data) in tensors_of(report.path).items():
        values = tensors[name]
        if values.ndim == 1:
            assert target == T.F32 and data == values.tobytes()
            continue
        stored = quants.dequantize(quants.quantize(values, kind), kind)
        if name == "output.weight" and kind in (T.Q8_0, T.Q4_1):  # not larger than what it would become
            assert target == kind and data == quants.quantize(values, kind).tobytes()
        elif name in ("token_embd.weight", "output.weight"):
            wanted = T.Q4_0 if name == "token_embd.weight" else T.Q8_0
            assert target == wanted and data == quants.quantize(stored, wanted).tobytes()
        else:
            assert target == SPK4 and data == blocks_to_bytes(encode_weights(stored)).tobytes()
    assert len(report.statistics) == 7 and bool(report.warnings) == (kind == T.Q4_1)


def test_statistics_are_those_of_the_data(model, tmp_path):
    report = converted(model, tmp_path / "out.gguf")
    values = llama_tensors()[Q].astype(np.float16).astype(np.float32)
    blocks = encode_weights(values)
    error = np.linalg.norm(decode_weights(blocks) - values) / np.linalg.norm(values)
    assert report.statistics[Q].relative_error == pytest.approx(error, rel=1e-6)
    salient = np.count_nonzero(f.salient_slots(blocks))
    assert report.statistics[Q].salient_weight_share == salient / values.size
    metadata = read_header(report.path).metadata
    at = metadata[f.KEY_STATISTICS_TENSORS].index(Q)
    assert metadata[f.KEY_STATISTICS_RELATIVE_ERROR][at] == np.float32(report.statistics[Q].relative_error)
    share = metadata[f.KEY_STATISTICS_SALIENT_WEIGHT_SHARE][at]
    assert share == np.float32(report.statistics[Q].salient_weight_share)
    json.dumps(report.to_json())


def test_metadata(model, tmp_path):
    report = converted(model, tmp_path / "out.gguf")
    before = read_raw_metadata(model, len(read_header(model).metadata))
    header = read_header(report.path)
    after = read_raw_metadata(report.path, len(header.metadata))
    changed = {b"general.file_type"}
    assert {key: value for key, value in before.items() if key not in changed}.items() <= after.items()
    new = {key.decode() for key in set(after) - set(before)}
    assert new == {
        "general.quantization_version",
        *(
            f.KEY_VERSION,
            f.KEY_TYPE_NAME,
            f.KEY_SALIENCE_THRESHOLD,
            f.KEY_SILENCE_THRESHOLD,
            f.KEY_CALIBRATION,
        ),
        *(f.KEY_SOURCE, f.KEY_SOURCE_SHA256, f.KEY_COMMAND, f.KEY_STATISTICS_TENSORS),
        *(f.KEY_STATISTICS_SALIENT_WEIGHT_SHARE, f.KEY_STATISTICS_SALIENT_INPUT_SHARE),
        f.KEY_STATISTICS_RELATIVE_ERROR,
    }
    metadata = header.metadata
    assert metadata["general.file_type"] == f.FTYPE_SPK4 and metadata["general.quantization_version"] == 2
    assert metadata[f.KEY_VERSION] == 2 and metadata[f.KEY_TYPE_NAME] == "spk4"
    assert metadata[f.KEY_CALIBRATION] == "none" and metadata[f.KEY_SOURCE] == "tiny-F16.gguf"
    digest = subprocess.run(["sha256sum", model], capture_output=True, text=True, check=True).stdout.split()[
        0
    ]
    assert metadata[f.KEY_SOURCE_SHA256] == report.source_sha256 == digest
    assert metadata[f.KEY_COMMAND].startswith("spikequant convert tiny-F16.gguf #")
    assert str(tmp_path).encode() not in report.path.read_bytes()


def test_result_depends_on_source_and_options_only(model, tmp_path):
    options = {"salience": 2.0, "tensor_types": ("ffn_up=q8_0",)}
    first = converted(model, tmp_path / "a.gguf", ConvertOptions(**options, threads=1)).path.read_bytes()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = shutil.copy(model, elsewhere)
    for threads in (2, 3, 7, None):
        out = elsewhere / f"other-{threads}.gguf"
        assert converted(copy, out, ConvertOptions(**options, threads=threads)).path.read_bytes() == first
    assert converted(model, tmp_path / "b.gguf").path.read_bytes() != first


def test_pieces_do_not_change_the_result(model, tmp_path, monkeypatch):
    whole = converted(model, tmp_path / "a.gguf").path.read_bytes()
    from spikequant_gguf.converter import job, quantize

    monkeypatch.setattr(job, "_PIECE_WEIGHTS", 300)
    monkeypatch.setattr(quantize, "_SLICE_WEIGHTS", 100)
    pieces = converted(model, tmp_path / "b.gguf")
    assert {n: d for n, (_, _, d) in tensors_of(pieces.path).items()} == {
        n: d for n, (_, _, d) in tensors_of(tmp_path / "a.gguf").items()
    }
    assert len(whole) == pieces.file_bytes


def test_experts(tmp_path):
    experts = normal(3, 8, 64)
    source = write_gguf(
        tmp_path / "in.gguf", {**llama_tensors(), "blk.0.ffn_gate_exps.weight": experts}, T.F32
    )
    report = converted(source, tmp_path / "out.gguf")
    kind, shape, data = tensors_of(report.path)["blk.0.ffn_gate_exps.weight"]
    assert (kind, shape) == (SPK4, (64, 8, 3))
    assert data == blocks_to_bytes(encode_weights(experts)).tobytes()


def test_model_in_parts(tmp_path):
    parts, tensors = split_model(tmp_path)
    report = converted(parts[1], tmp_path / "out.gguf")
    assert report.source == "tiny.gguf" and set(tensors_of(report.path)) == set(tensors)
    assert not any(key.startswith("split.") for key in read_header(report.path).metadata)
    whole = converted(write_gguf(tmp_path / "whole.gguf", tensors), tmp_path / "whole-out.gguf")
    assert tensors_of(report.path) == {name: tensors_of(whole.path)[name] for name in tensors_of(report.path)}
    assert report.source_sha256 != whole.source_sha256


def test_alignment_of_the_source_is_kept(tmp_path):
    source = write_gguf(tmp_path / "in.gguf", llama_tensors(), T.F16, alignment=256)
    header = read_header(converted(source, tmp_path / "out.gguf").path)
    assert header.alignment == 256 and all(tensor.offset % 256 == 0 for tensor in header.tensors)


def test_names_of_the_output(model, tmp_path, monkeypatch):
    assert converted(model, tmp_path / "m-{ftype}.gguf").path == tmp_path / "m-spk4.gguf"
    monkeypatch.chdir(tmp_path)
    assert converted(model, None).path == Path("Tiny-Test-SPK4.gguf")
    with pytest.raises(OutputError, match="exists already"):
        converted(model, None)


def test_progress(model, tmp_path):
    calls = []
    converted(model, tmp_path / "out.gguf", progress=lambda *call: calls.append(call))
    stages = list(dict.fromkeys(stage for stage, *_ in calls))
    assert stages == ["hash", "quantize", "verify"]
    for stage in stages:
        done = [(done, total) for name, _, done, total in calls if name == stage]
        assert (
            done == sorted(done) and done[-1][0] == done[-1][1] > 0 and len({total for _, total in done}) == 1
        )
    assert {item for stage, item, *_ in calls if stage == "quantize"} == set(llama_tensors())


def test_dry_run_writes_nothing(model, tmp_path):
    before = sorted(tmp_path.iterdir())
    planned = plan(model)
    assert sorted(tmp_path.iterdir()) == before
    assert planned == converted(model, tmp_path / "out.gguf").plan
    sizes = {name: len(data) for name, (_, _, data) in tensors_of(tmp_path / "out.gguf").items()}
    assert {tensor.name: tensor.target_bytes for tensor in planned.tensors} == sizes


# ---- options


def test_encoder_settings_reach_every_layer(model, tmp_path):
    own = {Q: EncoderSettings(salience=3.0), DOWN: EncoderSettings(silence=0.9)}
    options = ConvertOptions(silence=0.7)
    report = converted(model, tmp_path / "out.gguf", options, calibrate=lambda *_: Recipe(encoder=own))
    metadata = read_header(report.path).metadata
    assert metadata[f.KEY_SILENCE_THRESHOLD] == np.float32(0.7)
    names = metadata[f.KEY_ENCODER_TENSORS]
    assert names == [tensor.name for tensor in report.plan.spiking]
    salience = dict(zip(names, metadata[f.KEY_ENCODER_SALIENCE], strict=True))
    silence = dict(zip(names, metadata[f.KEY_ENCODER_SILENCE], strict=True))
    assert salience == {name: 3.0 if name == Q else 0.0 for name in names}
    assert silence == {name: np.float32(0.9 if name == DOWN else 0.7) for name in names}
    assert "--silence 0.7" in metadata[f.KEY_COMMAND]
    # the defaults of the format need no listing
    report = converted(model, tmp_path / "default.gguf", calibrate=lambda *_: Recipe(encoder={Q: own[Q]}))
    assert read_header(report.path).metadata[f.KEY_ENCODER_TENSORS] == [Q]


def test_importance(tmp_path):
    experts = normal(2, 8, 64)
    tensors = {**llama_tensors(), "blk.0.ffn_up_exps.weight": experts}
    source = write_gguf(tmp_path / "in.gguf", tensors, T.F32)
    uneven = np.repeat([1, 30], 64)  # of blocks: within one, rotation makes all inputs equally important
    sums = {
        DOWN: np.square(normal(1, 128, seed=5)) * uneven,
        "blk.0.ffn_up_exps.weight": np.square(normal(2, 64, seed=6)),
    }
    entries = {name: (values, np.full(len(values), 4)) for name, values in sums.items()}
    options = ConvertOptions(importance=write_imatrix(tmp_path / "imatrix.gguf", entries))
    report = converted(source, tmp_path / "out.gguf", options)
    found = tensors_of(report.path)
    of_down = sums[DOWN][0].astype(np.float32) / np.float32(4)
    assert found[DOWN][2] == blocks_to_bytes(encode_weights(tensors[DOWN], of_down)).tobytes()
    assert found[DOWN][2] != blocks_to_bytes(encode_weights(tensors[DOWN])).tobytes()
    expected = [
        encode_weights(w, s / np.float32(4))
        for w, s in zip(experts, sums["blk.0.ffn_up_exps.weight"], strict=True)
    ]
    assert found["blk.0.ffn_up_exps.weight"][2] == b"".join(
        blocks_to_bytes(blocks).tobytes() for blocks in expected
    )
    assert any("does not know 6 of 8" in warning for warning in report.warnings)
    metadata = read_header(report.path).metadata
    imatrix = {key.removeprefix("quantize.imatrix."): metadata[key] for key in metadata if "imatrix." in key}
    assert imatrix == {"file": "imatrix.gguf", "dataset": "wiki.txt", "entries_count": 2, "chunks_count": 5}
    wrong = write_imatrix(tmp_path / "wrong.gguf", {Q: (np.ones((1, 32)), np.ones(1))})
    with pytest.raises(InputError, match="32 values, not 64"):
        converted(source, tmp_path / "no.gguf", ConvertOptions(importance=wrong))


@pytest.mark.parametrize(
    "options", [{"salience": 7.5}, {"silence": -1}, {"threads": 0}, {"tensor_types": ("x",)}]
)
def test_bad_options(model, tmp_path, options):
    with pytest.raises(InputError):
        converted(model, tmp_path / "out.gguf", ConvertOptions(**options))
    assert not (tmp_path / "out.gguf").exists()


# ---- calibrations


def test_transforms(tmp_path):
    tensors = llama_tensors()
    source = write_gguf(tmp_path / "in.gguf", tensors, T.F32)
    t = np.linspace(0.5, 2, 64, dtype=np.float32)
    seen = {}

    def calibrate(opened, planned, progress):
        seen.update(name=opened.architecture, q=opened.read_rows(Q), plan=planned)
        smooth = {Q: Scaling(inputs=1 / t), "blk.0.attn_norm.weight": Scaling(inputs=t)}
        rows = {"blk.0.attn_v.weight": Scaling(outputs=t), "token_embd.weight": Scaling(inputs=t)}
        return Recipe("my text", transforms={**smooth, **rows}, options=("--calibration", "my text"))

    report = converted(source, tmp_path / "out.gguf", calibrate=calibrate)
    np.testing.assert_array_equal(seen["q"], tensors[Q])
    assert seen["plan"] == report.plan
    found = {name: data for name, (_, _, data) in tensors_of(report.path).items()}
    assert found[Q] == blocks_to_bytes(encode_weights(tensors[Q] * (1 / t))).tobytes()
    assert found["blk.0.attn_norm.weight"] == (tensors["blk.0.attn_norm.weight"] * t).tobytes()
    expected = encode_weights(tensors["blk.0.attn_v.weight"] * t[:, None])
    assert found["blk.0.attn_v.weight"] == blocks_to_bytes(expected).tobytes()
    assert found["token_embd.weight"] == quants.quantize(tensors["token_embd.weight"] * t, T.Q8_0).tobytes()
    assert found["blk.0.ffn_norm.weight"] == tensors["blk.0.ffn_norm.weight"].tobytes()
    metadata = read_header(report.path).metadata
    assert metadata[f.KEY_CALIBRATION] == report.calibration == "my text"
    assert "--calibration 'my text'" in metadata[f.KEY_COMMAND]


def test_scaling_of_rows_counts_over_pieces(tmp_path, monkeypatch):
    from spikequant_gguf.converter import job

    monkeypatch.setattr(job, "_PIECE_WEIGHTS", 64 * 5)
    experts = normal(2, 8, 64)
    source = write_gguf(tmp_path / "in.gguf", {**llama_tensors(), "blk.0.ffn_up_exps.weight": experts}, T.F32)
    factor = np.arange(1, 17, dtype=np.float32)
    transforms = {"blk.0.ffn_up_exps.weight": Scaling(outputs=factor)}
    report = converted(source, tmp_path / "out.gguf", calibrate=lambda *_: Recipe(transforms=transforms))
    expected = encode_weights(experts * factor.reshape(2, 8, 1))
    assert tensors_of(report.path)["blk.0.ffn_up_exps.weight"][2] == blocks_to_bytes(expected).tobytes()


@pytest.mark.parametrize("whole", [True, False])
def test_quantizer_of_a_calibration(tmp_path, monkeypatch, whole):
    from spikequant_gguf.converter import job

    monkeypatch.setattr(job, "_PIECE_WEIGHTS", 64 * 3)
    calls = []

    class Nearest:
        """Rounds to a fixed threshold."""

        whole_matrices = whole

        def quantize(self, name, weights, matrix=0):
            calls.append((name, len(weights), matrix))
            values = np.clip(np.rint(weights / np.float32(0.03125)), -8, 7).astype(np.int8)
            blocks = pack_weights(values, np.float32(0.03125), 8, rotated=False)
            return blocks, measure(weights, blocks, NUMPY)

    experts = normal(2, 8, 64)
    source = write_gguf(tmp_path / "in.gguf", {**llama_tensors(), "blk.0.ffn_up_exps.weight": experts}, T.F32)
    report = converted(source, tmp_path / "out.gguf", calibrate=lambda *_: Recipe(quantizer=Nearest()))
    of_experts = [(rows, matrix) for name, rows, matrix in calls if "exps" in name]
    assert of_experts == ([(8, 0), (8, 1)] if whole else [(3, 0), (3, 0), (2, 0), (3, 1), (3, 1), (2, 1)])
    data = np.frombuffer(tensors_of(report.path)[Q][2], np.uint8).reshape(64, -1)
    stored = decode_weights(blocks_from_bytes(data))
    assert np.abs(stored - llama_tensors()[Q]).max() <= 0.03125 / 2
    assert 0 < report.statistics[Q].relative_error < 0.5 and report.statistics[Q].salient_weights == 0


def test_recipe_for_another_model(model, tmp_path):
    for recipe in (
        Recipe(transforms={"x": Scaling()}),
        Recipe(encoder={"output_norm.weight": EncoderSettings()}),
    ):
        with pytest.raises(ValueError, match="not in the plan"):
            convert(model, tmp_path / "out.gguf", calibrate=lambda *_, recipe=recipe: recipe, backend=NUMPY)
    assert sorted(path.name for path in tmp_path.iterdir()) == [model.name]


def test_statistics_add_up():
    a, b = TensorStatistics(10, 1, 0.5, 2.0), TensorStatistics(30, 3, 0.5, 2.0)
    assert a + b == TensorStatistics(40, 4, 1.0, 4.0)
    assert (a + b).relative_error == 0.5 and (a + b).salient_weight_share == 0.1
    assert TensorStatistics().relative_error == 0.0 and TensorStatistics().salient_weight_share == 0.0


# ---- bad input: a sentence, a remedy, and nothing written


def refused(kind, message, source, tmp_path, **arguments):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(kind, match=message) as error:
        convert(source, tmp_path / "out.gguf", backend=NUMPY, **arguments)
    assert error.value.remedy and "\n" not in error.value.message
    assert sorted(tmp_path.iterdir()) == before
    return error.value


@pytest.mark.parametrize("bad, text", [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
@pytest.mark.parametrize("kind", [T.F32, T.F16, T.BF16])
def test_weights_that_are_not_finite(tmp_path, bad, text, kind):
    for name, row, index in ((Q, 5, 33), ("token_embd.weight", 2, 0), ("output_norm.weight", 0, 9)):
        tensors = llama_tensors()
        np.atleast_2d(tensors[name])[row, index] = bad
        source = write_gguf(tmp_path / "in.gguf", tensors, kind)
        message = f"tensor '{name}', row {row}, weight {index} is not finite, but {text}$"
        refused(InputError, message, source, tmp_path)


def test_weights_too_large_to_be_rotated(tmp_path):
    tensors = llama_tensors()
    tensors[Q][7] = 3e38
    source = write_gguf(tmp_path / "in.gguf", tensors)
    refused(InputError, f"tensor '{Q}': .*row", source, tmp_path)


def test_damaged_data_of_a_kept_tensor(tmp_path):
    class Doubtful(NumpyBackend):
        def validate(self, type_id, data):
            return type_id != T.Q8_0

    source = write_gguf(tmp_path / "in.gguf", llama_tensors(), T.Q8_0)
    with pytest.raises(InputError, match="tensor 'token_embd.weight': rows 0 to 31 hold invalid Q8_0 data"):
        convert(source, tmp_path / "out.gguf", backend=Doubtful())
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def test_refusals(model, tmp_path):
    spikes = converted(model, tmp_path / "spikes.gguf").path
    refused(InputError, "already SPK4", spikes, tmp_path)
    refused(InputError, "No such file", tmp_path / "nothing.gguf", tmp_path)
    small = write_gguf(tmp_path / "small.gguf", llama_tensors(n_embd=32, n_ff=32))
    refused(UnsupportedError, "no tensor of this model can become SPK4", small, tmp_path)
    with pytest.raises(OutputError, match="is the source itself"):
        convert(model, model, ConvertOptions(force=True), backend=NUMPY)
    with pytest.raises(OutputError, match="exists already"):
        convert(model, spikes, backend=NUMPY)
    assert converted(model, spikes, ConvertOptions(force=True)).path == spikes


def test_source_that_changes_meanwhile(model, tmp_path):
    def calibrate(source, *_):
        with model.open("ab") as file:
            file.write(b"x")
        return Recipe()

    refused(InputError, "changed while it was read", model, tmp_path, calibrate=calibrate)


@pytest.mark.parametrize(
    "stage, resume, resumed",
    [("hash", True, 0), ("quantize", True, 10), ("verify", True, 11), ("quantize", False, 0)],
)
def test_interruption(model, tmp_path, stage, resume, resumed):
    def interrupt(now, item, done, total):
        if now == stage and done == total:
            raise KeyboardInterrupt

    options = ConvertOptions(resume=resume)
    out = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        convert(model, out, options, progress=interrupt, backend=NUMPY)
    left = {f"{out.name}.partial", f"{out.name}.partial.journal"} if resumed else set()
    assert {path.name for path in tmp_path.iterdir()} == {model.name} | left
    stages = []
    report = converted(model, out, options, progress=lambda stage, *_: stages.append(stage))
    assert report.resumed == resumed and ("resume" in stages) == (resumed > 0)
    assert out.read_bytes() == converted(model, tmp_path / "whole.gguf").path.read_bytes()
    assert report.statistics == converted(model, tmp_path / "again.gguf").statistics
    assert {path.name for path in tmp_path.iterdir()} == {model.name, out.name, "whole.gguf", "again.gguf"}


def stop(source, out, options=None):
    """Interrupts a conversion when half of it is written."""

    def interrupt(stage, item, done, total):
        if stage == "quantize" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, options, progress=interrupt, backend=NUMPY)


def test_another_conversion_does_not_go_on(model, tmp_path, monkeypatch):
    """Options and calibration: see test_faults.py."""
    out = tmp_path / "out.gguf"
    stop(model, out)

    def refused_as(what, source=model, options=None, backend=NUMPY):
        with pytest.raises(OutputError) as error:
            convert(source, out, options, backend=backend, calibrate=pytest.fail)
        assert error.value.message == f"{out}.partial was begun with {what}"
        assert "--no-resume" in error.value.remedy

    other = write_gguf(tmp_path / "other.gguf", llama_tensors(n_ff=192), T.F16)
    refused_as("another source", other)
    with monkeypatch.context() as patch:
        patch.setattr("spikequant_gguf.__version__", "9.9.9")
        refused_as("another version of spikequant-gguf")

    class AnotherBuild(NumpyBackend):
        patch_id = "another"

    refused_as("another build of the runtime", backend=AnotherBuild())
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", {Q: (np.ones((1, 64)), np.ones(1))})
    refused_as("another importance matrix", options=ConvertOptions(importance=imatrix))
    assert converted(model, out).resumed > 0


def test_two_conversions_to_one_file(model, tmp_path):
    """The second one is refused at once, not when it has calibrated."""
    out = tmp_path / "out.gguf"

    def calibrate(*_):
        with pytest.raises(OutputError, match="another process is writing") as error:
            convert(model, out, backend=NUMPY, calibrate=pytest.fail)
        assert error.value.remedy
        return Recipe()

    converted(model, out, calibrate=calibrate)


def test_unknown_architecture_is_a_warning(tmp_path):
    source = write_gguf(tmp_path / "in.gguf", llama_tensors(), architecture="newest")
    (warning,) = converted(source, tmp_path / "out.gguf").warnings
    assert "newest" in warning


# ---- with the runtime


@pytest.fixture(scope="module")
def native():
    return runtime.native()


def test_runtime_gives_the_same_bytes_as_numpy(native, tmp_path):
    source = write_gguf(tmp_path / "in.gguf", llama_tensors(n_embd=192, n_ff=320, n_layers=2), T.F16)
    assert (
        convert(source, tmp_path / "a.gguf").path.read_bytes()
        == converted(source, tmp_path / "b.gguf").path.read_bytes()
    )


LLAMA = {
    "llama.context_length": 128,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 320,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 32,
}
MIXED = {
    "tied": llama_tensors(256, 320),
    "with an output of its own": llama_tensors(256, 320, tied=False),
    "rows of 96": {**llama_tensors(256, 96), "rope_freqs.weight": normal(32)},
    "rows of 80": llama_tensors(256, 80),
    "experts": {
        **llama_tensors(256, 320),
        "blk.0.ffn_gate_inp.weight": normal(4, 256),
        "blk.0.ffn_up_exps.weight": normal(4, 320, 256),
    },
}


@pytest.mark.parametrize("name", MIXED)
def test_llama_quantize_gives_the_same_tensors(native, tmp_path, name):
    source = write_gguf(tmp_path / "in.gguf", MIXED[name], T.F16, {**METADATA, **LLAMA})
    names = [tensor.name for tensor in plan(source).spiking]
    shapes = {tensor.name: tensor.shape for tensor in plan(source).spiking}
    sums = {
        name: np.square(normal(shapes[name][-1] if len(shapes[name]) > 2 else 1, shapes[name][0]))
        for name in names
    }
    entries = {name: (values, np.full(len(values), 3)) for name, values in sums.items()}
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", entries)
    for options, ours in (
        ([], ConvertOptions()),
        (["--imatrix", imatrix], ConvertOptions(importance=imatrix)),
    ):
        theirs = tmp_path / f"theirs-{len(options)}.gguf"
        subprocess.run(
            [runtime.tool("llama-quantize"), *options, source, theirs, "SPK4"],
            check=True,
            capture_output=True,
        )
        report = convert(source, tmp_path / f"ours-{len(options)}.gguf", ours)
        expected, found = tensors_of(theirs), tensors_of(report.path)
        assert {name: expected[name][:2] for name in expected} == {name: found[name][:2] for name in expected}
        assert expected == {name: found[name] for name in expected} and len(expected) == len(found)


def test_memory_does_not_grow_with_the_model(native, tmp_path):
    big = np.zeros((40_000, 512), np.float16)  # 39 MiB each, kept as they are
    big[:, 0] = 1
    tensors = {f"blk.{n}.big_norm.weight": big for n in range(8)}
    tensors[Q] = normal(16_384, 1024).astype(np.float16)  # 32 MiB, 64 MiB as float32
    source = write_gguf(tmp_path / "in.gguf", tensors)
    tiny = write_gguf(tmp_path / "tiny.gguf", llama_tensors())
    script = f"""
        import resource
        from spikequant_gguf.converter import ConvertOptions, convert
        peaks = []
        for source in ({str(tiny)!r}, {str(source)!r}):
            convert(source, {str(tmp_path / "out.gguf")!r}, ConvertOptions(force=True))
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        print(*peaks)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    before, after = map(int, done.stdout.split())
    assert source.stat().st_size > 340 * 2**20
    assert after - before < 160, f"{before} MiB, then {after} MiB"


def test_missing_runtime(model, tmp_path, monkeypatch):
    def missing():
        raise RuntimeMissingError("no runtime", "run `spikequant build`")

    monkeypatch.setattr(pipeline, "native", missing)
    with pytest.raises(RuntimeMissingError):
        convert(model, tmp_path / "out.gguf")
    plan(model)  # needs none


def test_import_needs_neither_torch_nor_llama_cpp():
    heavy = "{'torch', 'llama_cpp', 'transformers', 'huggingface_hub'}"
    code = f"import sys, spikequant_gguf.converter; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- checkpoints


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 with the precision of bfloat16 (cut off)."""
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


def checkpoint_weights() -> dict[str, np.ndarray]:
    weights = {"model.embed_tokens.weight": normal(64, 64), "lm_head.weight": normal(64, 64, seed=1)}
    for layer in range(2):
        shapes = {
            "self_attn.q_proj": (64, 64),
            "self_attn.k_proj": (32, 64),
            "self_attn.v_proj": (32, 64),
            "self_attn.o_proj": (64, 64),
            "mlp.gate_proj": (128, 64),
            "mlp.up_proj": (128, 64),
            "mlp.down_proj": (64, 128),
            "input_layernorm": (64,),
            "post_attention_layernorm": (64,),
        }
        for number, (name, shape) in enumerate(shapes.items()):
            weights[f"model.layers.{layer}.{name}.weight"] = normal(*shape, seed=10 * layer + number + 2)
    weights["model.norm.weight"] = normal(64, seed=40) + 1
    return {name: bfloat16(values) for name, values in weights.items()}


def write_checkpoint(folder: Path, config: dict = CONFIG) -> Path:
    """A Llama checkpoint in bfloat16: three shards with an index, and a SentencePiece tokenizer."""
    import sentencepiece

    folder.mkdir()
    weights = checkpoint_weights()
    names = list(weights)
    index = {}
    for number in range(3):
        part = names[number::3]
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        entries = {name: ("BF16", list(weights[name].shape), 2 * weights[name].size) for name in part}
        data = bytearray(safetensors_bytes(entries))
        payload = b"".join((weights[name].view(np.uint32) >> 16).astype("<u2").tobytes() for name in part)
        data[len(data) - len(payload) :] = payload
        (folder / file).write_bytes(data)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))
    text = folder / "text"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=30,
        model_type="char",
        minloglevel=2,
    )
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
    (folder / "modeling_evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("hf") / "Tiny-Llama")


def test_checkpoint_and_gguf_give_the_same_tensors(native, llama, tmp_path):
    copy = tmp_path / "from-llama-cpp.gguf"
    folders = []

    def calibrate(source, planned, progress):
        shutil.copy(source.paths[0], copy)
        folders.append(source.checkpoint)
        return Recipe()

    stages = []
    report = convert(
        llama, tmp_path / "a.gguf", calibrate=calibrate, progress=lambda stage, *_: stages.append(stage)
    )
    assert folders == [llama] and list(dict.fromkeys(stages)) == ["checkpoint", "hash", "quantize", "verify"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", copy.name]

    # the temporary file is what llama.cpp makes of the weights, without loss
    weights = checkpoint_weights()
    with_loss = [tensor for tensor in read_header(copy).tensors if tensor.type_id not in (T.F32, T.BF16)]
    assert not with_loss
    kind, _, data = tensors_of(copy)[DOWN]
    values = np.frombuffer(data, "<u2").astype(np.uint32) << 16
    np.testing.assert_array_equal(
        values.view(np.float32), weights["model.layers.0.mlp.down_proj.weight"].ravel()
    )

    again = convert(copy, tmp_path / "b.gguf")
    assert tensors_of(report.path) == tensors_of(again.path)
    assert len(report.statistics) == 14 and report.statistics == again.statistics
    expected = encode_weights(weights["model.layers.0.mlp.down_proj.weight"])
    assert tensors_of(report.path)[DOWN][2] == blocks_to_bytes(expected).tobytes()

    metadata = read_header(report.path).metadata
    assert metadata["general.architecture"] == "llama" and metadata["general.name"] == "Tiny Llama"
    assert len(metadata["tokenizer.ggml.tokens"]) == 64 and metadata[f.KEY_SOURCE] == "Tiny-Llama"
    assert metadata[f.KEY_SOURCE_SHA256] == report.source_sha256 != again.source_sha256
    assert str(tmp_path).encode() not in report.path.read_bytes()


def test_dry_run_of_a_checkpoint(llama, tmp_path):
    before = sorted(llama.iterdir())
    planned = plan(llama)
    assert sorted(llama.iterdir()) == before
    assert len(planned.tensors) == 21 and len(planned.spiking) == 14
    (down,) = (tensor for tensor in planned.tensors if tensor.name == DOWN)
    assert (down.shape, down.source_type) == ((128, 64), T.BF16)


def test_architecture_that_llama_cpp_does_not_know(tmp_path):
    config = {**CONFIG, "architectures": ["NovelForCausalLM"], "model_type": "novel"}
    folder = write_checkpoint(tmp_path / "novel", config)
    error = refused(UnsupportedError, "knows no architecture NovelForCausalLM", folder, tmp_path)
    assert error.exit_code == 7


@pytest.fixture
def script(tmp_path_factory, monkeypatch):
    """Replaces llama.cpp's converter by a few lines of Python, which get its arguments."""
    folder = tmp_path_factory.mktemp("script")

    def replace(code: str) -> Path:
        (folder / "convert_hf_to_gguf.py").write_text("import os, sys, time\n" + textwrap.dedent(code))
        return folder

    monkeypatch.setattr(checkpoint, "converter_script", lambda: folder / "convert_hf_to_gguf.py")
    return replace


@pytest.mark.parametrize(
    "log, kind, message",
    [
        (
            "INFO:x\nERROR:hf-to-gguf:Model LlamaForCausalLM is not supported",
            UnsupportedError,
            "LlamaForCausalLM",
        ),
        (
            "NotImplementedError: BPE pre-tokenizer was not recognized - update x",
            UnsupportedError,
            "this tokenizer",
        ),
        ("ModuleNotFoundError: No module named 'tiktoken'", SpikeQuantError, "Python package tiktoken"),
        ("OSError: [Errno 28] No space left on device", OutputError, "no space for the temporary"),
        ("ValueError: set trust_remote_code=True to run it", UnsupportedError, "code from the checkpoint"),
        ("  File x\nValueError: Can not map tensor 'w'", InputError, "fails: Can not map tensor 'w'$"),
        ("torch.cuda.SomeError: what", InputError, "fails: .*what$"),
        ("", InputError, "fails: status 1$"),
    ],
)
def test_failures_of_the_converter(script, llama, tmp_path, log, kind, message):
    script(f"sys.stderr.write({log!r}); sys.exit(1)")
    refused(kind, message, llama, tmp_path)


def test_converter_that_is_killed_or_silent(script, llama, tmp_path):
    script("os.kill(os.getpid(), 9)")
    refused(InputError, "ended by signal 9", llama, tmp_path)
    script("pass")
    refused(InputError, "wrote no file", llama, tmp_path)
    script("open(sys.argv[3], 'wb').write(b'GGUF')")
    refused(InputError, "cut off", llama, tmp_path)


def test_interrupted_converter_is_ended(script, llama, tmp_path):
    marker = tmp_path / "pid"
    script(f"open({str(marker)!r}, 'w').write(str(os.getpid())); time.sleep(60)")

    def interrupt(stage, *_):
        if stage == "checkpoint" and marker.exists() and marker.read_text():
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        convert(llama, tmp_path / "out.gguf", progress=interrupt, backend=NUMPY)
    assert time.monotonic() - started < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["pid"]


def test_converter_sees_no_code_and_no_network(script, llama, tmp_path):
    seen = tmp_path / "seen"
    names = "sorted(os.listdir(sys.argv[1]))"
    values = "os.environ['HF_HUB_OFFLINE'], os.environ['TRANSFORMERS_OFFLINE'], os.environ['HF_HOME']"
    script(f"open({str(seen)!r}, 'w').write(repr(({names}, sys.argv[1:], {values}))); sys.exit(1)")
    with pytest.raises(InputError):
        convert(llama, tmp_path / "out.gguf", backend=NUMPY)
    files, arguments, *offline, home = eval(seen.read_text())
    assert files == sorted(path.name for path in llama.iterdir() if path.suffix != ".py")
    assert arguments[3:] == ["--outtype", "bf16"] and Path(arguments[0]).name == "Tiny-Llama"
    assert offline == ["1", "1"] and Path(home).parent == Path(arguments[0]).parent.parent


def test_checkpoint_that_changes_meanwhile(script, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "copy")
    good = write_gguf(tmp_path / "good.gguf", llama_tensors())
    code = f"""
        import shutil
        shutil.copy({str(good)!r}, sys.argv[3])
        open({str(folder / "config.json")!r}, "a").write(" ")
    """
    script(code)
    refused(InputError, "a file changed while it was read", folder, tmp_path)
    script(
        f"import shutil; shutil.copy({str(good)!r}, sys.argv[3]); os.remove({str(folder / 'config.json')!r})"
    )
    refused(InputError, "config.json: No such file", folder, tmp_path)


def test_missing_packages(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None if name == "torch" else 1)
    error = refused(SpikeQuantError, "need the Python package torch$", llama, tmp_path)
    assert "spikequant-gguf[convert]" in error.remedy


# ---- Hugging Face ids


def test_download(script, llama, tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def fetch(model_id, **arguments):
        asked.update(arguments, id=model_id)
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    good = write_gguf(tmp_path / "good.gguf", llama_tensors())
    script(f"import shutil; shutil.copy({str(good)!r}, sys.argv[3])")
    report = converted("owner/Tiny-1B", "out.gguf")
    assert asked["id"] == report.source == "owner/Tiny-1B" and "*.safetensors" in asked["allow_patterns"]
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked["allow_patterns"])
    assert read_header(report.path).metadata[f.KEY_SOURCE] == "owner/Tiny-1B"


@pytest.mark.parametrize(
    "name, message",
    [
        ("GatedRepoError", "asks for an account"),
        ("RepositoryNotFoundError", "nor a public model"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("OfflineModeIsEnabled", "cannot be reached"),
    ],
)
def test_download_that_fails(tmp_path, monkeypatch, name, message):
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, name)

    def fail(*_, **__):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    error = refused(InputError, message, "owner/model", tmp_path)
    assert "'owner/model'" in error.message


def test_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    code = """
        from spikequant_gguf import InputError
        from spikequant_gguf.converter import plan
        try:
            plan("owner/model-that-is-not-in-the-cache")
        except InputError as error:
            print(error.message)
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert "Hugging Face cannot be reached" in done.stdout, done.stderr


def test_path_that_does_not_exist_is_no_id(tmp_path):
    for source in ("missing.gguf", "./owner/model", "/owner/model", "a/b/c"):
        with pytest.raises(InputError, match="No such file"):
            plan(source)


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    for source, message in (
        ("", "is no file"),
        (tmp_path / "pipe.gguf", "is no file"),
        ("x" * 5000, "File name too long"),
    ):
        with pytest.raises(InputError, match=message) as error:
            plan(source)
        assert error.value.remedy
