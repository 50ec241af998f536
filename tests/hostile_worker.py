"""Reads hostile files with little memory: readers and paths as JSON on stdin, what they said on stdout."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from spikequant_gguf import SpikeQuantError
from spikequant_gguf.converter.checkpoint import open_checkpoint
from spikequant_gguf.converter.source import open_gguf
from spikequant_gguf.verify import verify_file

EXTRA_BYTES = 64 << 20


def read(reader: str, path: Path) -> str | None:
    """The sentence of the refusal."""
    try:
        if reader == "verify":
            verify_file(path).raise_if_faulty()
        elif reader == "source":
            open_gguf(path).close()
        else:
            open_checkpoint(path)
    except SpikeQuantError as error:
        assert error.remedy and error.message.isprintable(), error.message
        return error.message
    return None


def file_bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def main() -> None:
    said = {}
    for name, (reader, text) in json.load(sys.stdin).items():
        path = Path(text)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + file_bytes(path) + EXTRA_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        said[name] = read(reader, path)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
