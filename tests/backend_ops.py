"""Runs ggml's own test-backend-ops, of the pinned source package, for SPK4 on the CPU backend.

    python tests/backend_ops.py [--work FOLDER] [--threads N]

It takes the program's shapes: batches, broadcasting, permuted and strided tensors, experts. Compiling it
takes a minute or two, so it is no part of the tests; tests/test_exactness.py has shapes of its own. Needs a
built runtime. Exit status 1 if a case fails, or fewer are run than there were.

As it stands the program shows nothing about spikes: it compares two CPU backends that compute every product
in the same way, and it makes weights block by block, while a row of SPK4 has one threshold. So it is edited:
its lists of types have SPK4 only, weights are made by whole rows, and in one backend they lie in CPU_SPIKE
buffers, for the event kernels, in the other as stored, for the dot product. No difference is allowed, where
the program allows 5e-4. Tensors that are permuted or viewed stay as stored in both.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from spikequant_gguf.ggml_patch.apply import apply
from spikequant_gguf.ggml_patch.cache import open_cache
from spikequant_gguf.ggml_patch.fetch import find_sdist, unpack
from spikequant_gguf.ggml_patch.progress import SilentProgress
from spikequant_gguf.ggml_patch.toolchain import find_compiler
from spikequant_gguf.ggml_patch.upstream import load_upstream
from spikequant_gguf.runtime import require_runtime

LIBRARIES = ("ggml", "ggml-cpu", "ggml-base")
OPERATIONS = {"MUL_MAT": 47, "MUL_MAT_ID": 75, "GET_ROWS": 8, "CPY": 17}
"""With the least number of cases that must have been compared."""

WEIGHTS = Path(__file__).parent / "native" / "backend_ops.inc"

# What is replaced, and how often it must be found.
_EDITS = [
    (r"(static const ggml_type (?:all|base|other)_types\[\] = )\{[^}]*\};", r"\1{ GGML_TYPE_SPK4 };", 3),
    (
        r"size_t blck_size = ggml_blck_size\(tensor->type\);",
        "size_t blck_size = tensor->type == GGML_TYPE_SPK4 ? tensor->ne[0] : ggml_blck_size(tensor->type);",
        1,
    ),
    (r"if \(err > ud->tc->max_err\(ud->backend1\)\)", "if (err > 0.0)", 1),
    (
        r"\n        // allocate\n(?= +ggml_backend_buffer_ptr buf\(\w+\(ctx.get\(\), backend1\)\))",
        f'\n#include "{WEIGHTS}"\n',
        1,
    ),
]


def edited(source: str) -> str:
    """The program for SPK4. Raises SystemExit if it is not the one that the edits were made for."""
    for pattern, replacement, times in _EDITS:
        source, found = re.subn(pattern, replacement, source)
        if found != times:
            raise SystemExit(f"error: found {found} times instead of {times} in test-backend-ops: {pattern}")
    return source


def build(work: Path) -> Path:
    upstream = load_upstream()
    tree = work / "tree"
    if not tree.is_dir():
        unpack(find_sdist(open_cache(), upstream, None, SilentProgress()), tree, upstream, SilentProgress())
    apply(tree)
    llama = tree / "vendor" / "llama.cpp"
    source, program = work / "backend-ops.cpp", work / "backend-ops"
    text = (llama / "tests" / "test-backend-ops.cpp").read_text(encoding="utf-8")
    source.write_text(edited(text), encoding="utf-8")
    libraries = require_runtime().library_dir
    folders = ("ggml/include", "ggml/src", "tests", "common", "include")
    includes = [f"-I{llama / folder}" for folder in folders]
    command = [find_compiler()[1], "-std=c++17", "-O1", "-w", *includes, source, f"-L{libraries}"]
    command += [f"-l{name}" for name in LIBRARIES] + [f"-Wl,-rpath,{libraries}", "-pthread", "-o", program]
    subprocess.run(command, check=True)
    return program


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder to keep tree and program in")
    parser.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS of the program")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="spikequant-") as folder:
        work = (options.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        program = build(work)
        wrong = False
        for operation, least in OPERATIONS.items():
            done = subprocess.run(
                [program, "test", "-b", "CPU", "-o", operation, "-p", "spk4"],
                env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
                capture_output=True,
                text=True,
            )
            plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
            cases = [line for line in plain.splitlines() if f"{operation}(" in line]
            sound = [line for line in cases if line.endswith("OK")]
            repacked = [line for line in sound if "CPU_SPIKE" in line]
            refused = [line for line in cases if "not supported" in line]
            failed = [line for line in cases if line not in sound and line not in refused]
            print(
                f"{operation}: {len(sound)} without a difference, {len(repacked)} of them by event kernels; "
                f"{len(refused)} not supported; {len(failed)} failed"
            )
            print("\n".join(failed[:20]), end="\n" if failed else "")
            wrong |= done.returncode != 0 or bool(failed) or len(sound) < least
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
