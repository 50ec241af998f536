"""What the command line shows: progress and messages on stderr, results (text or JSON) on stdout."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import rich.console
from rich.logging import RichHandler

from .errors import SpikeQuantError
from .ggml_patch.progress import Progress, SilentProgress, TerminalProgress

__all__ = ["EXIT_INTERRUPTED", "Console", "remember_command", "to_json_text"]

EXIT_INTERRUPTED = 130
_EXIT_PIPE_CLOSED = 141
_EXIT_INTERNAL = 1
_LOGGER = "spikequant_gguf"
_PIPE_WIDTH = 200  # no terminal to wrap lines for
_command_line: str | None = None


class Console:
    """Output of one command.

    Args:
        json_output: print results as JSON instead of text.
        quiet: show no progress and no messages but errors.
        verbose: show llama.cpp's log and tracebacks.
    """

    def __init__(self, *, json_output: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.json_output = json_output
        self.quiet = quiet
        self.verbose = verbose
        self._messages = _rich_console(stderr=True)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Shows the steps of a long task while the block runs."""
        if self.quiet:
            yield SilentProgress()
            return
        with TerminalProgress(self._messages) as progress:
            yield progress

    def say(self, text: str = "") -> None:
        """A message beside the result; not in quiet mode."""
        if not self.quiet:
            self._messages.print(text, highlight=False, markup=False, soft_wrap=True)

    def result(self, document: Callable[[], dict], render: Callable[[rich.console.Console], None]) -> None:
        """The result of the command on stdout: `document` as JSON, or what `render` prints.

        A document says by which command it was made, and when.
        """
        if self.json_output:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            made = {} if _command_line is None else {"command": _command_line, "created": now}
            print(to_json_text(made | document()))
        else:
            render(_rich_console(stderr=False))

    def error(self, error: SpikeQuantError) -> None:
        """One line about what is wrong and one about what to do, in quiet mode, too."""
        print(f"error: {_one_line(error.message)}", file=sys.stderr)
        if error.remedy:
            print(f"  -> {_one_line(error.remedy)}", file=sys.stderr)

    @contextmanager
    def exit_codes(
        self, leave: Callable[[int], BaseException], passing: tuple[type[BaseException], ...] = ()
    ) -> Iterator[None]:
        """Turns errors of the block into messages and exit codes.

        leave: makes the exception that ends the program with a code. passing: exceptions that are left alone.
        """
        logger = logging.getLogger(_LOGGER)
        level = logger.level
        handler = RichHandler(
            console=self._messages, show_time=False, show_path=False, markup=False, highlighter=None
        )
        if self.verbose:
            logger.addHandler(handler)
            logger.setLevel(logging.DEBUG)
        try:
            yield
            sys.stdout.flush()
        except passing:
            raise
        except SpikeQuantError as error:
            if self.verbose:
                traceback.print_exc()
            self.error(error)
            raise leave(error.exit_code) from error
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            raise leave(EXIT_INTERRUPTED) from error
        except BrokenPipeError as error:
            # Whoever read our output has enough of it; Python must not try to flush the rest at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise leave(_EXIT_PIPE_CLOSED) from error
        except MemoryError as error:
            self.error(
                SpikeQuantError("out of memory", "close other programs, or use a smaller model or context")
            )
            raise leave(SpikeQuantError.exit_code) from error
        except Exception as error:  # a mistake of ours: still one line, and never a success
            if self.verbose:
                traceback.print_exc()
            problem = f"internal error: {type(error).__name__}: {error}"
            self.error(SpikeQuantError(problem, "run it again with --verbose and report what it prints"))
            raise leave(_EXIT_INTERNAL) from error
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)


def remember_command(program: str, arguments: Sequence[str]) -> None:
    """The command line of this process, for documents; of paths only the last part."""
    global _command_line

    def shown(argument: str) -> str:
        folder, name = os.path.split(argument.rstrip(os.sep))
        return name if folder and os.path.isdir(folder) else argument

    _command_line = shlex.join([program, *map(shown, arguments)])


class _Screen(rich.console.Console):
    """A Rich console that leaves a closed pipe to its caller."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def to_json_text(document: object) -> str:
    """Strict JSON: numbers that JSON does not know (NaN, infinity) become null."""
    return json.dumps(_strict(document), indent=2, ensure_ascii=False, allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _rich_console(stderr: bool) -> rich.console.Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else _PIPE_WIDTH
    return _Screen(stderr=stderr, width=width)
