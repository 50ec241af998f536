"""models.py SEED COUNT [SECONDS]: damaged spike models for the installed runtime, each in its own process.

Damaged are the data of SPK4 tensors, their entries in the tensor list and our metadata; now and then the file
is cut off. Each is loaded and, if that works, asked for the next token. Refusal or success, no crash: a file
that ends a process by a signal is kept in the current folder. PYTHONPATH names the folder of the tests.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import llama_cpp
from tiny_model import write_tiny_model

from spikequant_gguf.format import TYPE_SPK4
from spikequant_gguf.gguf_header import read_header
from spikequant_gguf.runtime import require_runtime, tool

_NUMBERS = [0, 1, 2, 63, 64, 65, 90, 91, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 64, 2**64 - 1]
_REFUSED = 3
_LONGEST_SECONDS = 60


class DamagedModels:
    """Damaged versions of one model."""

    def __init__(self, model: Path, seed: int) -> None:
        self._original = model.read_bytes()
        self._random = random.Random(seed)
        spiking = [tensor for tensor in read_header(model).tensors if tensor.type_id == TYPE_SPK4]
        self._data = [range(tensor.offset, tensor.offset + tensor.n_bytes) for tensor in spiking]
        entries = [self._original.index(tensor.name.encode()) + len(tensor.name) for tensor in spiking]
        self._header = [range(at, at + 32) for at in entries]
        at = self._original.find(b"spikequant.")
        while at >= 0:
            self._header.append(range(at, at + 100))
            at = self._original.find(b"spikequant.", at + 1)

    def next(self) -> bytes:
        rng = self._random
        data = bytearray(self._original)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.choice(rng.choice(rng.choice((self._data, self._header))))
            size = rng.choice((1, 2, 4, 8))
            value = rng.choice((rng.choice(_NUMBERS), rng.getrandbits(64))) % 2 ** (8 * size)
            data[at : at + size] = value.to_bytes(size, "little")
        if rng.random() < 0.05:
            del data[rng.randrange(len(data)) :]
        return bytes(data)


def run(seed: int, count: int, seconds: float) -> dict:
    require_runtime()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        source, model, damaged = (Path(name) / file for file in ("f32.gguf", "spk4.gguf", "damaged.gguf"))
        write_tiny_model(source)
        command = [tool("llama-quantize"), "--allow-requantize", source, model, "SPK4", "1"]
        subprocess.run(command, check=True, capture_output=True)
        models = DamagedModels(model, seed)
        outcomes: Counter[str] = Counter()
        end = time.monotonic() + seconds
        for _ in range(count):
            if time.monotonic() > end:
                break
            damaged.write_bytes(models.next())
            outcome = _load(damaged)
            outcomes[outcome] += 1
            if outcome not in ("loaded", "refused"):
                kept = Path(f"crash-model-{seed}-{sum(outcomes.values())}.gguf")
                kept.write_bytes(damaged.read_bytes())
                raise SystemExit(f"{outcome}: {kept}")
    return {"seed": seed, "files": sum(outcomes.values()), "outcomes": dict(outcomes)}


def _load(path: Path) -> str:
    child = os.fork()
    if child == 0:
        signal.alarm(_LONGEST_SECONDS)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        try:
            model = llama_cpp.Llama(
                str(path), n_ctx=32, n_batch=8, n_threads=1, n_threads_batch=1, verbose=False
            )
            model.eval([1, 40, 41])
            os._exit(0)
        except Exception:
            os._exit(_REFUSED)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return {0: "loaded", _REFUSED: "refused"}[os.WEXITSTATUS(status)]


if __name__ == "__main__":
    seconds = float(sys.argv[3]) if len(sys.argv) > 3 else float("inf")
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]), seconds)))
