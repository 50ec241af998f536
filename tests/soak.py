"""soak.py [MODEL]: llama-cpp-python's server with a spike model, four clients, for SOAK_SECONDS (1200).

Some requests are cancelled while they stream, some prompts are longer than the context. Every whole answer
must be the one that a lone client was given, every over-long prompt must be refused, nothing else may fail,
and memory must not grow. Without MODEL the reference model is converted. The server listens on loopback only.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from spikequant_gguf.converter import convert
from spikequant_gguf.models import smollm2

CLIENTS = 4
CONTEXT = 512
TOKENS = 24
LARGEST_GROWTH = 32 << 20
PATIENCE_SECONDS = 300
# No two begin alike: the server keeps what it has computed for the beginning of the last prompt.
PROMPTS = [
    "The capital of France is",
    "A neuron is a cell that",
    "In the year 1969,",
    "Water boils at",
    "def add(a, b):",
    "Once upon a time there was",
    "Three primary colours are",
    "2 + 2 =",
]


@dataclass
class Soak:
    """What happened. growth: of the server's memory after the first fifth of the time, in bytes."""

    seconds: float = 0.0
    requests: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    @property
    def growth(self) -> int:
        settled = self.memory[len(self.memory) // 5 :]
        third = max(1, len(settled) // 3)
        return max(settled[-third:]) - max(settled[:third])


class Server:
    """The server's process."""

    def __init__(self, model: Path, port: int, log: Path) -> None:
        self.port = port
        self._log = log
        options = {
            "model": model,
            "host": "127.0.0.1",
            "port": port,
            "n_ctx": CONTEXT,
            "n_threads": 1,
            "n_threads_batch": 1,
            "interrupt_requests": "false",  # else a new request ends one that streams
        }
        command = [sys.executable, "-m", "llama_cpp.server"]
        command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def wait(self) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/v1/models")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                time.sleep(0.2)
        raise SystemExit(f"error: the server did not start: {self._log.read_text()[-2000:]}")

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def ask(self, prompt: str) -> tuple[int, str]:
        """Status and text of an answer."""
        response = self._post(prompt, stream=False)
        document = json.loads(response.read())
        text = document["choices"][0]["text"] if response.status == 200 else str(document)
        return response.status, text

    def cancel(self, prompt: str, after: int) -> int:
        """Reads so many bytes of a stream and hangs up. Status."""
        response = self._post(prompt, stream=True)
        response.read(after)
        response.close()
        return response.status

    def _post(self, prompt: str, stream: bool) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": stream}
        headers = {"Content-Type": "application/json", "Connection": "close"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        return connection.getresponse()


@contextmanager
def serve(model: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(model, port, Path(folder) / "log")
        try:
            server.wait()
            yield server
        finally:
            server.process.terminate()
            server.process.wait()


def soak(model: Path, seconds: float, seed: int = 1) -> Soak:
    """Runs server and clients."""
    result = Soak()
    with serve(model) as server:
        # A prompt that comes again right away finds itself computed but for its last token. Stock attention
        # sums in another order for one token than for many: a lone client, too, may get another answer then
        # (docs/serving.md, test_determinism.py).
        alone = {prompt: [server.ask(prompt) for _ in range(2)] for prompt in PROMPTS}
        if any(status != 200 for answers in alone.values() for status, _ in answers):
            raise SystemExit(f"error: the server fails a lone client: {alone}")
        started = time.monotonic()
        end = started + seconds
        clients = [
            threading.Thread(target=_client, args=(server, alone, end, seed + number, result))
            for number in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        while any(client.is_alive() for client in clients):
            result.memory.append(server.resident_bytes())
            time.sleep(min(1.0, seconds / 100))
        if server.process.poll() is not None:
            result.failures.append(f"the server ended with {server.process.returncode}")
        result.seconds = time.monotonic() - started
    return result


def _client(
    server: Server, alone: dict[str, list[tuple[int, str]]], end: float, seed: int, result: Soak
) -> None:
    rng = random.Random(seed)
    while time.monotonic() < end and not result.failures:
        prompt = rng.choice(PROMPTS)
        kind = rng.choices(("whole", "cancelled", "too long"), (6, 3, 1))[0]
        try:
            if kind == "whole":
                found = server.ask(prompt)
                if found not in alone[prompt]:
                    result.failures.append(f"{prompt!r}: {found} instead of {alone[prompt]}")
            elif kind == "cancelled":
                status = server.cancel(prompt, rng.randint(1, 2000))
                if status != 200:
                    result.failures.append(f"{prompt!r}, streamed: status {status}")
            else:
                status, text = server.ask(prompt * CONTEXT)
                if status != 400 or "context" not in text:
                    result.failures.append(f"an over-long prompt: {status} {text[:200]}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            result.failures.append(f"{kind}: {type(error).__name__}: {error}")
        result.requests[kind] += 1


def main() -> int:
    seconds = float(os.environ.get("SOAK_SECONDS", "1200"))
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1:
            model = Path(sys.argv[1])
        else:
            model = convert(smollm2(), Path(folder) / "soak-SPK4.gguf").path
        result = soak(model, seconds)
    counts = ", ".join(f"{number} {kind}" for kind, number in sorted(result.requests.items()))
    print(f"{result.seconds:.0f} s, {CLIENTS} clients, requests: {counts}")
    megabytes = [size / 1e6 for size in (result.memory[0], result.memory[-1], max(result.memory))]
    print(
        "memory of the server: {:.1f} MB at first, {:.1f} at last, {:.1f} at most".format(*megabytes),
        end="; ",
    )
    print(f"growth after the first fifth: {result.growth / 1e6:+.1f} MB")
    if result.growth > LARGEST_GROWTH:
        result.failures.append("memory grew")
    for failure in result.failures:
        print(f"error: {failure}", file=sys.stderr)
    return int(bool(result.failures))


if __name__ == "__main__":
    sys.exit(main())
