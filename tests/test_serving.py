"""llama-cpp-python's own server with a spike model, asked by the OpenAI client."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from gguf.constants import PoolingType
from tiny_model import CHAT_TEMPLATE

from spikequant_gguf.converter import convert

_PATIENCE_SECONDS = 60
_MESSAGES = [{"role": "user", "content": "it was the end"}]


@pytest.fixture(scope="module")
def spike_model(runtime, tiny_model_factory, tmp_path_factory) -> Path:
    source = tiny_model_factory(chat_template=CHAT_TEMPLATE, pooling=PoolingType.MEAN)
    return convert(source, tmp_path_factory.mktemp("serving") / "served-SPK4.gguf").path


def serve(*options: str) -> Iterator[openai.OpenAI]:
    """A client of `python -m llama_cpp.server` with these options, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--n_ctx", "256", "--n_threads", "1", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            _wait(server, port)
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
                yield client
        finally:
            server.terminate()


def _wait(server: subprocess.Popen, port: int) -> None:
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    server.terminate()
    pytest.fail(f"the server did not start: {server.communicate()[0][-2000:]}")


@pytest.fixture(scope="module")
def client(spike_model: Path) -> Iterator[openai.OpenAI]:
    yield from serve("--model", str(spike_model), "--model_alias", "spikes")


@pytest.fixture(scope="module")
def embedder(spike_model: Path) -> Iterator[openai.OpenAI]:
    yield from serve("--model", str(spike_model), "--model_alias", "spikes", "--embedding", "true")


def test_chat(client: openai.OpenAI, spike_model: Path) -> None:
    """The chat template of the file is used, and the answer is that of the library."""
    from llama_cpp import Llama

    answer = client.chat.completions.create(
        model="spikes", messages=_MESSAGES, max_tokens=8, temperature=0, seed=1
    )
    assert [model.id for model in client.models.list()] == ["spikes"]
    llama = Llama(str(spike_model), n_ctx=256, n_threads=1, verbose=False)
    expected = llama.create_chat_completion(_MESSAGES, max_tokens=8, temperature=0, seed=1)
    assert answer.choices[0].message.content == expected["choices"][0]["message"]["content"]
    prompt = llama.tokenize(b"<user>it was the end<assistant>", add_bos=False)
    assert answer.usage.prompt_tokens == len(prompt)


def test_streamed_chat_is_the_same_text(client: openai.OpenAI) -> None:
    options = {"model": "spikes", "messages": _MESSAGES, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0].message.content
    parts = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**options, stream=True)
    ]
    # llama-cpp-python leaves a last character out whose bytes are several tokens
    cut = whole if whole[-1:].isascii() else whole[:-1]
    assert "".join(parts) in (whole, cut) and len(parts) > 2


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="spikes", prompt="it was", max_tokens=4, temperature=0)
    assert answer.usage.completion_tokens == 4


def test_embeddings(embedder: openai.OpenAI) -> None:
    texts = ["it was the end", "neuron, 1024", "it was the end"]
    found = np.array(
        [entry.embedding for entry in embedder.embeddings.create(model="spikes", input=texts).data]
    )
    assert found.shape == (3, 128) and np.isfinite(found).all()
    np.testing.assert_allclose(found[0], found[2], rtol=1e-5)
    assert np.linalg.norm(found[0] - found[1]) > 0.1 * np.linalg.norm(found[0])
