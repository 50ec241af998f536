"""A spike model whose layers are spread over two RPC servers gives the logits of one process."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from spikequant_gguf.errors import InputError
from spikequant_gguf.rpc import add_servers
from spikequant_gguf.runtime import tool

_PATIENCE_SECONDS = 30
# In a process of its own: the servers stay known to llama.cpp until its end.
_CHILD = """
import hashlib, json, sys
import numpy as np
from llama_cpp import Llama
from spikequant_gguf.rpc import add_servers
path, *servers = sys.argv[1:]
options = {}
if servers:
    add_servers(servers)
    options = {"n_gpu_layers": -1, "tensor_split": [1.0] * len(servers)}
model = Llama(path, n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=True, **options)
tokens = [1 + i * 7 % 300 for i in range(40)]
model.eval(tokens[:32])
for token in tokens[32:]:
    model.eval([token])
scores = np.asarray(model.scores[: len(tokens)])
json.dump(hashlib.sha256(scores.tobytes()).hexdigest(), sys.stdout)
"""


@contextmanager
def rpc_server() -> Iterator[str]:
    """Runs a server on a free port of the loopback; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(tool("ggml-rpc-server")), "-H", "127.0.0.1", "-p", str(port), "-t", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            end = time.monotonic() + _PATIENCE_SECONDS
            while time.monotonic() < end and server.poll() is None:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()


def run(model: Path, servers: list[str]) -> tuple[str, str]:
    """Digest of the logits, and llama.cpp's log."""
    command = [sys.executable, "-c", _CHILD, str(model), *servers]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout), child.stderr


def test_two_servers_give_the_same_logits(runtime, tiny_models: dict[str, Path]) -> None:
    alone, _ = run(tiny_models["spk4"], [])
    with ExitStack() as stack:
        servers = [stack.enter_context(rpc_server()) for _ in range(2)]
        spread, log = run(tiny_models["spk4"], servers)
    for server in servers:
        assert f"[{server}] model buffer size" in log, log
    assert spread == alone


def test_addresses_that_are_none(runtime) -> None:
    with pytest.raises(InputError, match="no address of a server"):
        add_servers(["localhost"])
