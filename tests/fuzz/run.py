"""run.py: fuzzes everything for FUZZ_SECONDS (600) from FUZZ_SEED (1), and says how many inputs that were.

Half of the time is for the native code, with libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer:
blocks, encoder and quantizer, kernels, whole files in ggml. A quarter is for the Python readers, the rest for
models that the runtime loads, and for NEON kernels in an emulator where there is one.

FUZZ_INPUTS and FUZZ_FILES are numbers instead of times, which do not depend on what else the machine does: so
many inputs for the native code, so many damaged files for readers and runtime; what is not given is left out.

Inputs that lead to new code stay in build/fuzz, so that the next run goes on from them; what crashes lies
beside them, and kept.py makes a test of it. PYTHONPATH names the folder of the tests.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from kept import kept_inputs
from mutations import spike_gguf_bytes
from native_build import build, target_of

from spikequant_gguf import SpikeQuantError
from spikequant_gguf.ggml_patch.apply import apply
from spikequant_gguf.ggml_patch.cache import open_cache
from spikequant_gguf.ggml_patch.fetch import find_sdist, unpack
from spikequant_gguf.ggml_patch.progress import SilentProgress
from spikequant_gguf.ggml_patch.upstream import load_upstream

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "fuzz"
NATIVE = {
    "fuzz_blocks": (0.2, 0.55),
    "fuzz_encode": (0.2, 0.15),
    "fuzz_kernels": (0.2, 0.06),
    "fuzz_prompts": (0.2, 0.05),
    "fuzz_file": (0.2, 0.19),
}
"""Targets with their shares of a time, and of a number: about as many as that time allows."""
MODELS_SHARE = 0.05
"""Of the damaged files those that the runtime loads; the readers are a hundred times as fast."""
UNLIMITED = 10**9
LONGEST_INPUT = 4096


@dataclass(frozen=True)
class Budget:
    """How long, or how many. ``inputs`` and ``files`` are None if time decides."""

    seed: int
    seconds: float
    inputs: int | None
    files: int | None

    @staticmethod
    def of_environment() -> Budget:
        numbers = [os.environ.get(name) for name in ("FUZZ_INPUTS", "FUZZ_FILES")]
        if any(numbers):
            inputs, files = (int(number or 0) for number in numbers)
        else:
            inputs = files = None
        seed, seconds = os.environ.get("FUZZ_SEED", "1"), os.environ.get("FUZZ_SECONDS", "600")
        return Budget(int(seed), float(seconds), inputs, files)


def main() -> int:
    budget = Budget.of_environment()
    compilers = _clang()
    if compilers is None:
        print(
            "error: fuzzing needs clang with libFuzzer; on Debian or Ubuntu: sudo apt install clang",
            file=sys.stderr,
        )
        return 1
    (FOLDER / "crashes").mkdir(parents=True, exist_ok=True)
    sound = True
    if budget.inputs != 0:
        print("Compiling the targets and ggml with sanitizers (minutes, the first time)")
        folder = _build(compilers)
        for target, (of_time, of_number) in NATIVE.items():
            limit = (
                {"max_total_time": max(1, round(0.5 * of_time * budget.seconds))}
                if budget.inputs is None
                else {"runs": round(of_number * budget.inputs)}
            )
            sound &= _libfuzzer(folder / target, budget.seed, limit)
    if budget.files is None:
        sound &= _python("readers.py", budget.seed, UNLIMITED, 0.25 * budget.seconds)
        sound &= _python("models.py", budget.seed, UNLIMITED, 0.15 * budget.seconds)
        sound &= _neon(budget.seed, 0.1 * budget.seconds)
    elif budget.files > 0:
        n_models = round(MODELS_SHARE * budget.files)
        sound &= _python("readers.py", budget.seed, budget.files - n_models)
        sound &= _python("models.py", budget.seed, n_models)
    return int(not sound)


def _clang() -> tuple[str, str] | None:
    """clang and clang++ that can link libFuzzer."""
    for suffix in ("", *(f"-{version}" for version in range(22, 13, -1))):
        c, cxx = shutil.which(f"clang{suffix}"), shutil.which(f"clang++{suffix}")
        if c and cxx:
            command = [c, "-x", "c", "-fsanitize=fuzzer,address", "-o", os.devnull, "-"]
            source = (
                "int LLVMFuzzerTestOneInput(const char * d, unsigned long n) { return d == 0 && n == 1; }"
            )
            if subprocess.run(command, input=source, text=True, capture_output=True).returncode == 0:
                return c, cxx
    return None


def _build(compilers: tuple[str, str]) -> Path:
    """Compiles what differs from the last time."""
    upstream = load_upstream()
    tree = FOLDER / f"tree-{upstream.version}"
    if not tree.is_dir():
        for old in FOLDER.glob("tree-*"):
            shutil.rmtree(old)
        sdist = find_sdist(open_cache(), upstream, None, SilentProgress())
        unpack(sdist, tree, upstream, SilentProgress())
    apply(tree)
    c, cxx = compilers
    options = ("-DLIBFUZZER=ON", f"-DTREE={tree}", f"-DCMAKE_C_COMPILER={c}", f"-DCMAKE_CXX_COMPILER={cxx}")
    return build(target_of("host"), FOLDER / "native", source=ROOT / "tests" / "fuzz", options=options)


def _libfuzzer(target: Path, seed: int, limit: dict[str, int]) -> bool:
    corpus = FOLDER / "corpus" / target.name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(kept_inputs(target.name)):
        (corpus / f"kept-{number}").write_bytes(data)
    if target.name == "fuzz_file":
        (corpus / "spikes").write_bytes(spike_gguf_bytes(FOLDER))
    options = limit | {
        "seed": seed,
        "max_len": LONGEST_INPUT,
        "print_final_stats": 1,
        "artifact_prefix": f"{FOLDER / 'crashes'}/{target.name}-",
    }
    command = [target, *(f"-{name}={value}" for name, value in options.items()), corpus]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    inputs = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    _report(target.name, seed, int(inputs.group(1)) if inputs else 0, started, done.returncode == 0)
    if done.returncode != 0:
        print("\n".join(done.stderr.splitlines()[-60:]), file=sys.stderr)
    return done.returncode == 0


def _python(script: str, seed: int, count: int, seconds: float = math.inf) -> bool:
    command = [sys.executable, ROOT / "tests" / "fuzz" / script, str(seed), str(count), str(seconds)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}  # the current folder is another one there
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=FOLDER / "crashes", env=environment)
    files = json.loads(done.stdout)["files"] if done.returncode == 0 else 0
    _report(script, seed, files, started, done.returncode == 0)
    return done.returncode == 0


def _neon(seed: int, seconds: float) -> bool:
    target = target_of("aarch64")
    if target.missing:
        print(f"NEON kernels are not fuzzed, for want of {', '.join(target.missing)}")
        return True
    folder = build(target, FOLDER / "aarch64", source=ROOT / "tests" / "fuzz")
    started, inputs, sound = time.monotonic(), 0, True
    while sound and time.monotonic() < started + seconds:
        command = [*target.run, folder / "fuzz_kernels", str(seed + inputs), "1000"]
        sound = subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
        inputs += 1000
    _report("fuzz_kernels (aarch64)", seed, inputs, started, sound)
    return sound


def _report(what: str, seed: int, inputs: int, started: float, sound: bool) -> None:
    seconds, verdict = time.monotonic() - started, "sound" if sound else "BROKEN"
    print(f"{what:24} seed {seed:<6} {inputs:>12,} inputs {seconds:>8.0f} s  {verdict}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SpikeQuantError as error:
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)
