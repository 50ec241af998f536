"""The command line: one JSON document on stdout, one sentence per error, exit codes, help, interruption."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main
from tiny_model import CHAT_TEMPLATE
from typer.testing import CliRunner, Result

from spikequant_gguf import FormatError, RuntimeMissingError, SpikeQuantError, __version__
from spikequant_gguf import demo as demo_module
from spikequant_gguf import doctor as doctor_module
from spikequant_gguf import variants as variants_module
from spikequant_gguf.cli import app
from spikequant_gguf.console import Console, to_json_text
from spikequant_gguf.format import TYPE_SPK4
from spikequant_gguf.gguf_header import read_header
from spikequant_gguf.runtime import RuntimeInfo

COMMANDS = sorted(typer.main.get_command(app).commands)
QUICK = ["--ctx-size", "64", "--chunks", "2", "--threads", "1"]


def call(*arguments: object, code: int = 0) -> Result:
    """Runs a command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exit_code != code and result.exception is not None:
        raise AssertionError(f"exit status {result.exit_code}: {result.stderr}") from result.exception
    assert result.exit_code == code, result.stderr
    return result


def document(*arguments: object) -> dict:
    """What a command prints with --json."""
    return json.loads(call(*arguments, "--json").stdout)


def failure(code: int, *arguments: object) -> str:
    """The error line of a command that must fail, checked for form."""
    result = call(*arguments, code=code)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith(("error: ", "  -> "))]
    assert [line[:5] for line in lines] == ["error", "  -> "], result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants_module, "models_folder", lambda: tmp_path)


# ---- help


def test_every_command_has_help_with_examples() -> None:
    assert set(COMMANDS) >= {
        *("build", "doctor", "convert", "run", "perplexity", "compare", "demo", "inspect", "verify"),
        *("dequantize", "bench"),
    }
    overview = call("--help").stdout
    for name in COMMANDS:
        assert re.search(rf"\b{name}\b", overview)
        text = call(name, "--help").stdout
        assert "Examples" in text
        assert f"spikequant {name}" in text
        for option in ("--json", "--quiet", "--verbose"):
            assert option in text


def test_version() -> None:
    assert call("--version").stdout == f"spikequant {__version__}\n"


def test_help_is_quick_and_needs_no_runtime() -> None:
    heavy = "import sys, spikequant_gguf.cli; print(sorted({'torch', 'llama_cpp'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


# ---- results


def test_json_of_commands_about_files(
    tiny_models: dict[str, Path], tiny_model_f32: Path, tmp_path: Path
) -> None:
    spk4 = tiny_models["spk4"]
    assert document("inspect", spk4)["type"] == "spk4"
    assert document("verify", spk4)["faults"] == []
    assert document("dequantize", spk4, "-o", tmp_path / "d.gguf")["type"] == "f16"
    planned = document("convert", tiny_model_f32, "--dry-run", "-o", tmp_path / "s.gguf")
    assert not (tmp_path / "s.gguf").exists()
    made = document("convert", tiny_model_f32, "-o", tmp_path / "s.gguf", "-t", 1)
    assert made["plan"] == planned
    assert document("verify", made["path"])["faults"] == []


def test_the_loss_of_the_default_calibration_text_is_told(
    tiny_model_f32: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """In the help, and after a conversion that was given no text."""
    note = "note: calibrated on Python's documentation"
    command = ("convert", tiny_model_f32, "-o", tmp_path / "s.gguf", "--force", "-t", 1)
    assert note in call(*command, "--calibration-chunks", 1).stderr
    for given in (
        ("--calibration", tiny_text, "--calibration-chunks", 1),
        ("--no-calibration",),
        ("--dry-run",),
    ):
        assert note not in call(*command, *given).stderr
    told = " ".join(call("convert", "--help").stdout.replace("│", " ").split())
    assert "KL divergence than web text" in told


def test_json_of_commands_that_compute(tiny_models: dict[str, Path], tiny_text: Path) -> None:
    spk4, f16, q4 = (tiny_models[kind] for kind in ("spk4", "f16", "q4_0"))
    alone = document("perplexity", spk4, "-f", tiny_text, *QUICK)
    assert alone["text"]["chunks"] == 2
    against = document("perplexity", spk4, "--reference", f16, "-f", tiny_text, *QUICK)
    assert against["models"][0]["ppl"] == pytest.approx(alone["ppl"], rel=1e-9)
    assert against["models"][0]["kld"] > 0
    table = document("compare", f16, q4, spk4, "-f", tiny_text, *QUICK, "-r", 1)
    assert [row["type"] for row in table["rows"]] == ["f16", "q4_0", "spk4"]
    speeds = document("bench", q4, spk4, "-p", 16, "-n", 4, "-r", 1)
    assert speeds["baseline"] == str(q4)
    assert [speed["model"] for speed in speeds["models"]] == [str(q4), str(spk4)]
    written = document("run", spk4, "-p", "the of", "-n", 4, "--temp", 0)
    assert len(written["tokens"]) <= 4


def test_types_of_one_model(cache: None, tiny_model_f32: Path, tiny_text: Path, runtime: RuntimeInfo) -> None:
    arguments = ("compare", tiny_model_f32, "-f", tiny_text, *QUICK, "--no-speed")
    assert [row["name"] for row in document(*arguments, "--types", "q8_0")["rows"]] == ["F16", "Q8_0"]
    shown = call(*arguments, "--types", "f16,q8_0,spk4")
    for part in (
        "F16",
        "Q8_0",
        "SPK4",
        "tiny.txt",
        "2 chunks of 64 tokens",
        "1 threads",
        runtime.kernel or "",
    ):
        assert part in shown.stdout
    assert "quantize" in shown.stderr or "convert" in shown.stderr


def test_narrow_terminals_get_two_whole_tables(tiny_models: dict[str, Path], tiny_text: Path) -> None:
    arguments = ["compare", tiny_models["f16"], tiny_models["q4_0"], "-f", tiny_text, *QUICK, "-r", 1, "-q"]
    arguments = [str(argument) for argument in arguments]
    name = tiny_models["q4_0"].stem
    wide, narrow = (
        CliRunner(env={"COLUMNS": columns}).invoke(app, arguments).stdout for columns in ("200", "100")
    )
    assert wide.split("PPL and KLD:")[0].count(name) == 1
    assert narrow.split("PPL and KLD:")[0].count(name) == 2
    assert "…" not in narrow.split("PPL and KLD:")[0]
    for title in ("bits/w", "same top", "prompt t/s", "decode t/s"):
        assert title in wide and title in narrow


def test_text_of_results(tiny_models: dict[str, Path], tiny_text: Path, tmp_path: Path) -> None:
    spk4, f16 = tiny_models["spk4"], tiny_models["f16"]
    assert re.search(r"PPL = \d+\.\d+ ± ", call("perplexity", spk4, "-f", tiny_text, *QUICK).stdout)
    shown = call("perplexity", spk4, "--reference", f16, "-f", tiny_text, *QUICK).stdout
    assert "KLD" in shown and "same top" in shown
    shown = call("inspect", spk4).stdout
    assert "blk.1.ffn_down.weight" in shown and "general.architecture = 'llama'" in shown
    assert "blk" not in call("inspect", spk4, "--no-tensors").stdout
    assert "14 SPK4 tensors" in call("verify", spk4).stdout
    assert "16 tensors as BF16" in call("dequantize", spk4, "-o", tmp_path / "d", "--outtype", "bf16").stdout
    csv = call("bench", f16, "-p", 0, "-n", 2, "-r", 1, "-o", "csv").stdout.splitlines()
    assert csv[0].startswith("model,") and csv[1].startswith(f"{f16.name},,,,")
    assert call("bench", f16, "-p", 8, "-n", 0, "-r", 1, "-o", "md").stdout.startswith("| model |")
    assert json.loads(call("bench", f16, "-p", 8, "-n", 0, "-r", 1, "-o", "json").stdout)["rounds"] == 1


def test_run_streams_the_text(
    runtime: RuntimeInfo, tiny_model_factory: Callable[..., Path], tiny_models: dict[str, Path]
) -> None:
    result = call("run", tiny_models["f16"], "-p", "the of", "-n", 6, "--seed", 1)
    expected = document("run", tiny_models["f16"], "-p", "the of", "-n", 6, "--seed", 1)
    assert result.stdout == expected["text"] + "\n"
    assert "seed 1" in result.stderr
    quiet = call("run", tiny_models["f16"], "-p", "the of", "-n", 2, "--quiet")
    assert quiet.stderr == ""
    chat = tiny_model_factory(chat_template=CHAT_TEMPLATE)
    assert document("run", chat, "-p", "the", "-n", 1)["chat"]
    assert not document("run", chat, "-p", "the", "-n", 1, "--no-chat")["chat"]


def test_dequantize_names_its_file_after_the_type(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "Tiny-SPK4.gguf"
    model.write_bytes(tiny_models["spk4"].read_bytes())
    assert document("dequantize", model, "--outtype", "q8_0")["path"] == str(tmp_path / "Tiny-Q8_0.gguf")


def test_demo(
    cache: None,
    runtime: RuntimeInfo,
    tiny_model_f32: Path,
    tiny_text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo_module, "smollm2", lambda wheel, progress: tiny_model_f32)
    arguments = ("demo", "-f", tiny_text, "--chunks", 2, "-r", 1, "-t", 1)
    found = document(*arguments)
    assert {row["name"] for row in found["rows"]} == {"F16", "Q4_0", "Q4_K_M", "IQ4_XS", "SPK4"}
    assert found["sentence"]["tokens"]
    shown = call(*arguments)
    assert "SPK4" in shown.stdout
    for step in ("1. ", "2. ", "3. ", "4. ", "Try it: spikequant run"):
        assert step in shown.stderr


# ---- errors


def test_exit_codes_and_sentences(
    tiny_models: dict[str, Path], tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spk4 = tiny_models["spk4"]
    assert "missing.gguf" in failure(3, "perplexity", tmp_path / "missing.gguf", "-f", tiny_text)
    assert "not a GGUF file" in failure(3, "run", tiny_text, "-p", "x")
    assert "cannot read the text" in failure(3, "perplexity", spk4, "-f", tmp_path / "missing.txt")
    assert "has only" in failure(3, "perplexity", spk4, "-f", tiny_text, "-c", 100_000)
    assert "no type 'q9'" in failure(3, "compare", tiny_models["f16"], "--types", "q9", "-f", tiny_text)
    assert "exists already" in failure(6, "dequantize", spk4, "-o", tiny_text)
    assert "is a spike model" in failure(7, "compare", spk4, "--types", "q4_0", "-f", tiny_text)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(spk4.read_bytes()[:-1000])
    assert "cut off" in failure(3, "perplexity", broken, "-f", tiny_text)
    broken.write_bytes(tiny_models["f16"].read_bytes().replace(b"blk.1.attn_q", b"blk.1.attn_z"))
    assert "blk.1.attn_q" in failure(3, "perplexity", broken, "-f", tiny_text), "llama.cpp's reason is told"
    monkeypatch.setenv("SPIKEQUANT_DATA", str(tmp_path))
    assert "wiki.test.raw" in failure(3, "perplexity", spk4)


def test_faulty_file_fails_verification_and_lists_the_faults(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    tensor = next(t for t in read_header(tiny_models["spk4"]).tensors if t.type_id == TYPE_SPK4)
    damaged = bytearray(tiny_models["spk4"].read_bytes())
    damaged[tensor.offset + 1] = 0x7F
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    result = call("verify", path, code=FormatError.exit_code)
    assert tensor.name in result.stdout
    assert "Traceback" not in result.stderr
    listed = json.loads(call("verify", path, "--json", code=FormatError.exit_code).stdout)
    assert listed["faults"][0]["tensor"] == tensor.name


def test_usage_errors(tiny_models: dict[str, Path]) -> None:
    f16 = tiny_models["f16"]
    for arguments in (
        ("unknown",),
        ("perplexity",),
        ("perplexity", f16, "--chunks", 0),
        ("perplexity", f16, "--ctx-size", "many"),
        ("compare", f16, f16, "--types", "q4_0"),
        ("compare", f16, "--types", "q4_0", "--reference", f16),
        ("compare", f16, f16, "--imatrix", f16),
        ("bench", f16, "-o", "xml"),
    ):
        assert call(*arguments, code=2).stdout == ""


def test_missing_runtime(tiny_model_f32: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def require() -> RuntimeInfo:
        raise RuntimeMissingError("llama-cpp-python is not installed", "run `spikequant build`")

    monkeypatch.setattr("spikequant_gguf.evaluation._llama", require)
    assert "not installed" in failure(4, "perplexity", tiny_model_f32, "-f", tiny_text)


def test_doctor_exit_status_tells_health(monkeypatch: pytest.MonkeyPatch) -> None:
    for ok in (True, False):
        report = doctor_module.DoctorReport(
            (doctor_module.Check("runtime", "x", ok, None if ok else "build"),)
        )
        monkeypatch.setattr(doctor_module, "doctor", lambda report=report: report)
        result = call("doctor", "--json", code=0 if ok else 1)
        assert json.loads(result.stdout)["ok"] is ok


def test_traceback_only_with_verbose(tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" in call("inspect", tiny_text, "--verbose", code=3).stderr

    def fail(path: Path) -> None:
        raise ZeroDivisionError("a mistake\nof ours")

    monkeypatch.setattr("spikequant_gguf.inspect_file.inspect_file", fail)
    assert failure(1, "inspect", tiny_text) == "error: internal error: ZeroDivisionError: a mistake of ours"
    assert "Traceback" in call("inspect", tiny_text, "--verbose", code=1).stderr


def test_verbose_shows_the_log_of_llama_cpp(tiny_models: dict[str, Path]) -> None:
    arguments = ("run", tiny_models["f16"], "-p", "the", "-n", 1)
    assert "llama_model_loader" in call(*arguments, "--verbose").stderr
    assert "llama_model_loader" not in call(*arguments).stderr


def test_console_keeps_errors_in_one_line(capsys: pytest.CaptureFixture) -> None:
    Console().error(SpikeQuantError("a\nb", None))
    assert capsys.readouterr().err == "error: a b\n"


def test_json_is_strict() -> None:
    values = {"a": float("nan"), "b": [float("inf"), 1.5], 3: Path("x"), "t": (True, None)}
    assert json.loads(to_json_text(values)) == {"a": None, "b": [None, 1.5], "3": "x", "t": [True, None]}


# ---- as a process


def process(*arguments: object, **options: object) -> subprocess.Popen:
    program = [sys.executable, "-c", "from spikequant_gguf.cli import main; main()"]
    return subprocess.Popen(
        [*program, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_interruption_is_clean(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("the of and " * 300_000)
    running = process("perplexity", tiny_models["spk4"], "-f", text, "-t", 1)
    for line in running.stderr:
        if line.startswith("evaluate"):
            break
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert out == ""
    assert err.strip().splitlines()[-1] == "interrupted"
    assert "Traceback" not in err


def test_closed_pipe_is_no_crash(tiny_models: dict[str, Path]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    program = [sys.executable, "-c", "from spikequant_gguf.cli import main; main()"]
    try:
        result = subprocess.run(
            [*program, "inspect", tiny_models["spk4"]], stdout=writing, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(writing)
    assert result.returncode == 141
    assert result.stderr == ""


@pytest.mark.parametrize(
    "line, word, expected",
    [("spikequant comp", 1, {"compare"}), ("spikequant build --re", 2, {"--release"})],
)
def test_shells_complete_commands_and_options(line: str, word: int, expected: set[str]) -> None:
    """As the script of `--install-completion bash` asks for it."""
    program = Path(sysconfig.get_path("scripts")) / "spikequant"
    asked = {"_SPIKEQUANT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(word)}
    done = subprocess.run([program], env=os.environ | asked, capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == expected, done.stderr
