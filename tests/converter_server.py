"""Runs llama.cpp's converter in children of one process that has imported it, which takes seconds otherwise.

The converter knows pre-tokenizers by a hash of what they make of a certain text. Tokenizers of our own are
unknown to it; here they are taken for GPT-2's or BERT's, which they are made like.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

__all__ = ["ConverterServer"]


class ConverterServer:
    """A context manager. `popen` stands for subprocess.Popen where checkpoint.py calls the converter."""

    def __init__(self, script: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(script.parent / "gguf-py"), "HF_HUB_OFFLINE": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> ConverterServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait()

    def popen(self, command: list[str], *, stderr: IO[bytes], env: dict[str, str], **_: Any) -> _Run:
        request = {"arguments": command[1:], "log": stderr.name, "environment": env}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return _Run(self._server.stdout)


class _Run:
    """What checkpoint.py needs of a Popen."""

    def __init__(self, replies: IO[str]) -> None:
        self._replies = replies
        self._status: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self._status is None:
            self._status = int(self._replies.readline())
        return self._status

    def poll(self) -> int | None:
        return self._status

    def kill(self) -> None:
        self.wait()


def _serve(script: Path) -> None:
    sys.path.insert(0, str(script.parent))
    import torch  # noqa: F401
    import transformers
    from conversion import base

    transformers.AutoTokenizer  # noqa: B018, loads it
    known = base.TextModel.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            return "bert-bge" if hasattr(tokenizer, "mask_token_id") and tokenizer.mask_token_id else "gpt-2"

    base.TextModel.get_vocab_base_pre = get_vocab_base_pre
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _convert(request)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _convert(request: dict[str, Any]) -> None:
    """Runs the script and ends this process."""
    status = 1
    try:
        os.environ.clear()
        os.environ.update(request["environment"])
        os.dup2(os.open(request["log"], os.O_WRONLY | os.O_APPEND), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = request["arguments"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
