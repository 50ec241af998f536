"""llama.cpp's log as records of the Python logger ``spikequant_gguf.llama_cpp``; silent without a handler."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

__all__ = ["LLAMA_LOGGER", "collect_errors", "redirect_log"]

LLAMA_LOGGER = "spikequant_gguf.llama_cpp"

logging.getLogger("spikequant_gguf").addHandler(logging.NullHandler())

# ggml_log_level: none, debug, info, warning, error
_LEVELS = (logging.DEBUG, logging.DEBUG, logging.DEBUG, logging.INFO, logging.ERROR)
_CONTINUE = 5


@cache
def redirect_log(llama_cpp: ModuleType) -> Any:
    """Sends llama.cpp's log to the Python logger, for the rest of the process. Returns the C callback."""
    logger = logging.getLogger(LLAMA_LOGGER)
    line: list[str] = []
    level = logging.DEBUG

    @llama_cpp.llama_log_callback
    def callback(ggml_level: int, text: bytes, user_data: object) -> None:
        nonlocal level
        if ggml_level != _CONTINUE:
            level = _LEVELS[ggml_level] if ggml_level < len(_LEVELS) else logging.DEBUG
        line.append(text.decode("utf-8", "replace"))
        if line[-1].endswith("\n"):
            message = "".join(line).rstrip()
            line.clear()
            if message:
                logger.log(level, "%s", message)

    llama_cpp.llama_log_set(callback, None)
    return callback


class _ErrorLines(logging.Handler):
    """Keeps error lines, without the names of C functions that llama.cpp puts before them."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        function, separator, rest = message.partition(": ")
        self.lines.append(rest if separator and " " not in function else message)


@contextmanager
def collect_errors() -> Iterator[list[str]]:
    """The error lines that llama.cpp logs during the block, in order."""
    logger = logging.getLogger(LLAMA_LOGGER)
    handler = _ErrorLines()
    logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
