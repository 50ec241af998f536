"""readers.py SEED COUNT [SECONDS]: damaged files for every Python reader: success or SpikeQuantError, and no
warning.

The system limits memory to what the process needs before it begins, and 64 MB: a reader that wants more for a
file of a few kilobytes fails. The file that a reader fell over is kept in the current folder. PYTHONPATH is
the folder of the tests.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from mutations import (
    Mutator,
    gguf_bytes,
    imatrix_bytes,
    old_imatrix_bytes,
    safetensors_bytes,
    spike_gguf_bytes,
)

from spikequant_gguf import SpikeQuantError
from spikequant_gguf.converter import plan
from spikequant_gguf.converter.importance import read_importance
from spikequant_gguf.converter.shards import check_shards
from spikequant_gguf.converter.source import open_gguf
from spikequant_gguf.gguf_header import read_header
from spikequant_gguf.inspect_file import inspect_file
from spikequant_gguf.verify import verify_file

EXTRA_BYTES = 64 << 20


def _read_source(path: Path) -> None:
    """The header, the metadata as they are, and every tensor of floats."""
    with open_gguf(path) as source:
        _ = source.raw_metadata
        for name, tensor in source.tensors.items():
            source.read_raw(name) if tensor.type.name not in ("F16", "F32", "BF16") else source.read_rows(
                name
            )


def _read_importance(path: Path) -> None:
    importance = read_importance(path)
    for width in (8, 64):
        importance.of("q", 0, width)


def readers() -> dict[str, tuple[Callable[[Path], object], str]]:
    """The readers by name, each with the kind of file that it is given."""
    return {
        "verify": (verify_file, "spikes"),
        "header": (read_header, "spikes"),
        "source": (_read_source, "stock"),
        "plan": (plan, "stock"),
        "importance": (_read_importance, "imatrix"),
        "inspect": (inspect_file, "spikes"),
        "shards": (lambda path: check_shards(path.parent), "safetensors"),
    }


def run(seed: int, count: int, seconds: float) -> dict:
    """Reads `count` files, or as many as there is time for."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        folder = Path(name)
        originals = {
            "spikes": [spike_gguf_bytes(folder)],
            "stock": [gguf_bytes(folder)],
            "imatrix": [imatrix_bytes(folder), old_imatrix_bytes(folder)],
            "safetensors": [safetensors_bytes(folder)],
        }
        contents = {kind: Mutator(files, seed) for kind, files in originals.items()}
        names = {"safetensors": "model.safetensors"}
        paths = {kind: folder / names.get(kind, f"{kind}.gguf") for kind in originals}
        chosen = list(readers().items())
        for name, (read, kind) in chosen:  # whatever is imported late, before memory is limited
            _read(name, read, paths[kind], contents[kind].next())
        _limit_memory()
        outcomes: Counter[str] = Counter()
        end = time.monotonic() + seconds
        for number in range(count):
            name, (read, kind) = chosen[number % len(chosen)]
            outcomes[f"{name}: {_read(name, read, paths[kind], contents[kind].next())}"] += 1
            if number % 1000 == 0 and time.monotonic() > end:
                break
    return {"seed": seed, "files": sum(outcomes.values()), "outcomes": dict(sorted(outcomes.items()))}


def _read(name: str, read: Callable[[Path], object], path: Path, data: bytes) -> str:
    path.write_bytes(data)
    try:
        read(path)
        return "read"
    except SpikeQuantError as error:
        assert error.message and "\n" not in error.message, repr(error.message)
        return "refused"
    except BaseException:
        kept = Path(f"crash-{name}-{os.getpid()}{path.suffix}")
        kept.write_bytes(data)
        print(f"{name} fell over {kept}", file=sys.stderr)
        raise


def _limit_memory() -> None:
    """What is mapped now, a file of a few kilobytes, and 64 MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    seconds = float(sys.argv[3]) if len(sys.argv) > 3 else float("inf")
    warnings.simplefilter("error", RuntimeWarning)  # NumPy's, of numbers that nobody thought of
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]), seconds)))
