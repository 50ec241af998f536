"""run.py: fuzzes everything for FUZZ_SECONDS (600) from FUZZ_SEED (1), and says how many inputs that were.

Half of the time is for the native code, with libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer:
blocks, encoder and quantizer, kernels, whole files in ggml. A quarter is for the Python readers, the rest for
models that the runtime loads, and for NEON kernels in an emulator where there is one. Inputs that lead to new
code are kept in build/fuzz, so that the next run goes on from them; what crashes is kept beside them.
PYTHONPATH names the folder of the tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from mutations import spike_gguf_bytes
from native_build import build, target_of

from spikequant_gguf import SpikeQuantError
from spikequant_gguf.ggml_patch.apply import apply
from spikequant_gguf.ggml_patch.cache import open_cache
from spikequant_gguf.ggml_patch.fetch import find_sdist, unpack
from spikequant_gguf.ggml_patch.progress import SilentProgress
from spikequant_gguf.ggml_patch.upstream import load_upstream, patch_id

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "fuzz"
NATIVE = {"fuzz_blocks": 0.2, "fuzz_encode": 0.2, "fuzz_kernels": 0.2, "fuzz_prompts": 0.2, "fuzz_file": 0.2}
"""Targets and their shares of the time for native code."""
LONGEST_INPUT = 4096


def main() -> int:
    seconds = float(os.environ.get("FUZZ_SECONDS", "600"))
    seed = int(os.environ.get("FUZZ_SEED", "1"))
    compilers = _clang()
    if compilers is None:
        print(
            "error: fuzzing needs clang with libFuzzer; on Debian or Ubuntu: sudo apt install clang",
            file=sys.stderr,
        )
        return 1
    (FOLDER / "crashes").mkdir(parents=True, exist_ok=True)
    print("Compiling the targets and ggml with sanitizers (minutes, once for each state of the patch)")
    folder = _build(compilers)
    failed = False
    for target, share in NATIVE.items():
        failed |= not _libfuzzer(folder / target, seed, 0.5 * share * seconds)
    failed |= not _python("readers.py", seed, 0.25 * seconds)
    failed |= not _python("models.py", seed, 0.15 * seconds)
    failed |= not _neon(seed, 0.1 * seconds)
    return int(failed)


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
    """Compiles into a folder that belongs to this state of the patch."""
    upstream = load_upstream()
    tree = FOLDER / f"tree-{patch_id(upstream)}"
    if not tree.is_dir():
        for old in FOLDER.glob("tree-*"):
            shutil.rmtree(old)
        sdist = find_sdist(open_cache(), upstream, None, SilentProgress())
        unpack(sdist, tree, upstream, SilentProgress())
        apply(tree)
    c, cxx = compilers
    options = ("-DLIBFUZZER=ON", f"-DTREE={tree}", f"-DCMAKE_C_COMPILER={c}", f"-DCMAKE_CXX_COMPILER={cxx}")
    return build(target_of("host"), FOLDER / "native", source=ROOT / "tests" / "fuzz", options=options)


def _libfuzzer(target: Path, seed: int, seconds: float) -> bool:
    corpus = FOLDER / "corpus" / target.name
    corpus.mkdir(parents=True, exist_ok=True)
    if target.name == "fuzz_file":
        (corpus / "spikes").write_bytes(spike_gguf_bytes(FOLDER))
    options = {
        "seed": seed,
        "max_total_time": max(1, round(seconds)),
        "max_len": LONGEST_INPUT,
        "print_final_stats": 1,
        "artifact_prefix": f"{FOLDER / 'crashes'}/{target.name}-",
    }
    command = [target, *(f"-{name}={value}" for name, value in options.items()), corpus]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    inputs = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    _report(target.name, seed, int(inputs.group(1)) if inputs else 0, done.returncode == 0)
    if done.returncode != 0:
        print("\n".join(done.stderr.splitlines()[-60:]), file=sys.stderr)
    return done.returncode == 0


def _python(script: str, seed: int, seconds: float) -> bool:
    command = [sys.executable, ROOT / "tests" / "fuzz" / script, str(seed), str(10**9), str(seconds)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}  # the current folder is another one there
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=FOLDER / "crashes", env=environment)
    files = json.loads(done.stdout)["files"] if done.returncode == 0 else 0
    _report(script, seed, files, done.returncode == 0)
    return done.returncode == 0


def _neon(seed: int, seconds: float) -> bool:
    target = target_of("aarch64")
    if target.missing:
        print(f"NEON kernels are not fuzzed, for want of {', '.join(target.missing)}")
        return True
    folder = build(target, FOLDER / "aarch64", source=ROOT / "tests" / "fuzz")
    end, inputs = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        command = [*target.run, folder / "fuzz_kernels", str(seed), "1000"]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode != 0:
            _report("fuzz_kernels (aarch64)", seed, inputs, False)
            return False
        inputs, seed = inputs + 1000, seed + 1
    _report("fuzz_kernels (aarch64)", seed, inputs, True)
    return True


def _report(what: str, seed: int, inputs: int, sound: bool) -> None:
    print(f"{what:24} seed {seed:<6} {inputs:>12,} inputs  {'sound' if sound else 'BROKEN'}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SpikeQuantError as error:
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)
