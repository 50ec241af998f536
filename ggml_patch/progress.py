"""How a build tells what it does: a small interface, a silent version and one for terminals."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from spikequant_gguf.errors import SpikeQuantError


def print_error(error: SpikeQuantError) -> int:
    """Message and remedy on standard error; returns the exit status."""
    print(f"error: {error.message}", file=sys.stderr)
    if error.remedy:
        print(f"  -> {error.remedy}", file=sys.stderr)
    return error.exit_code


class Progress(Protocol):
    """Receives the steps of a build in order. Implement it to show them elsewhere."""

    def step(self, name: str, detail: str = "") -> None:
        """A step begins; the one before it is done."""

    def advance(self, done: int, total: int) -> None:
        """``done`` of ``total`` units of the current step (bytes, files, compiled objects) are finished."""

    def note(self, text: str) -> None:
        """One sentence for the user, beside the steps."""


class SilentProgress:
    """Shows nothing."""

    def step(self, name: str, detail: str = "") -> None:
        pass

    def advance(self, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class StepTimer:
    """Passes everything on and keeps ``seconds`` per step name."""

    def __init__(self, inner: Progress) -> None:
        self.inner = inner
        self.seconds: dict[str, float] = {}
        self._current: tuple[str, float] | None = None

    def step(self, name: str, detail: str = "") -> None:
        self.finish()
        self._current = (name, time.monotonic())
        self.inner.step(name, detail)

    def advance(self, done: int, total: int) -> None:
        self.inner.advance(done, total)

    def note(self, text: str) -> None:
        self.inner.note(text)

    def finish(self) -> dict[str, float]:
        """Close the current step; returns the seconds of all steps so far."""
        if self._current:
            name, begun = self._current
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - begun, 2)
            self._current = None
        return self.seconds


class TerminalProgress:
    """A bar per step on standard error, without a terminal one plain line per step. A context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr)
        self._bars = Bars(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = None
        self._begun = 0.0

    def __enter__(self) -> TerminalProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        self._bars.stop()

    def step(self, name: str, detail: str = "") -> None:
        self._finish()
        text = f"{name:<10} {detail}"
        if self._console.is_terminal:
            self._task = self._bars.add_task(text, total=None, count="")
        else:
            self._console.print(text.rstrip(), highlight=False, soft_wrap=True)

    def advance(self, done: int, total: int) -> None:
        if self._task is not None:
            # Byte counts read better as a bar alone.
            count = f"{done}/{total}" if total < 100_000 else ""
            self._bars.update(self._task, completed=done, total=total, count=count)

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def _finish(self) -> None:
        if self._task is not None:
            task = self._bars.tasks[self._bars.task_ids.index(self._task)]
            total = task.total or 1
            self._bars.update(self._task, completed=total, total=total)
            self._task = None
