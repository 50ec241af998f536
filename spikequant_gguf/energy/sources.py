"""Counters that measure energy: RAPL through powercap, `perf stat`, and macOS' powermetrics.

A source measures one stretch of time: ``with source.measure() as reading: ...``, then ``reading.joules``.
Whatever it cannot measure raises MeasurementError; a constant never stands in.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import SpikeQuantError
from .rapl import POWERCAP, CounterError, Rapl, find_rapl

__all__ = [
    "EnergySource",
    "MeasurementError",
    "PerfSource",
    "PowermetricsSource",
    "RaplSource",
    "Reading",
    "find_source",
    "parse_perf",
    "parse_powermetrics",
]

_RAPL_SECONDS = 0.1  # between samples; a counter wraps after minutes
_POWERMETRICS_SECONDS = 0.2
_PERF_EVENTS = ("power/energy-pkg/",)
_PATIENCE = 20.0  # seconds to wait for a program to start or end


class MeasurementError(SpikeQuantError):
    """A counter gave nothing usable."""


@dataclass
class Reading:
    """One stretch of time; both are set when it ends."""

    joules: float = 0.0
    seconds: float = 0.0


class EnergySource(Protocol):
    """A way to measure.

    Attributes:
        method: ``rapl``, ``perf`` or ``powermetrics``.
        description: which counters, in words.
        sampling_seconds: between looks at the counter; None if it counts by itself.
    """

    method: str
    description: str
    sampling_seconds: float | None

    def measure(self) -> AbstractContextManager[Reading]:
        """Measures while the block runs. Raises MeasurementError at its end."""
        ...


class RaplSource:
    """Packages of a powercap tree, read by a thread so that no wrap-around is missed."""

    method = "rapl"
    sampling_seconds = _RAPL_SECONDS

    def __init__(self, rapl: Rapl) -> None:
        self._rapl = rapl
        self.description = ", ".join(str(package.folder) for package in rapl.packages)

    @contextmanager
    def measure(self) -> Iterator[Reading]:
        reading, faults, done = Reading(), [], threading.Event()
        last = self._read()
        begun = time.perf_counter()

        def advance() -> None:
            nonlocal last
            now = self._read()
            reading.joules += self._rapl.joules(last, now)
            last = now

        def sample() -> None:
            try:
                while not done.wait(_RAPL_SECONDS):
                    advance()
            except (CounterError, MeasurementError) as error:
                faults.append(error)

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield reading
        finally:
            done.set()
            thread.join()
            reading.seconds = time.perf_counter() - begun
        try:
            advance()
        except (CounterError, MeasurementError) as error:
            faults.append(error)
        if faults:
            raise MeasurementError(str(faults[0]), "repeat the measurement")

    def _read(self) -> tuple[int, ...]:
        try:
            return self._rapl.read()
        except (OSError, ValueError) as error:
            raise MeasurementError(f"the RAPL counter cannot be read: {error}", "repeat it") from error


class PerfSource:
    """Energy events of `perf stat`, for the whole machine."""

    method = "perf"
    sampling_seconds = None

    def __init__(self, perf: str = "perf", events: Sequence[str] = _PERF_EVENTS) -> None:
        self._perf = perf
        self._events = tuple(events)
        self.description = f"perf stat -a -e {','.join(events)}"

    def problem(self) -> str | None:
        """Why it does not work here, or None."""
        try:
            with self.measure():
                pass
        except MeasurementError as error:
            return error.message
        return None

    @contextmanager
    def measure(self) -> Iterator[Reading]:
        # perf counts while its child lives. The child says when it has begun, and ends with its input.
        with tempfile.TemporaryDirectory(prefix="spikequant-perf-") as folder:
            output = Path(folder) / "events"
            command = [self._perf, "stat", "-a", "-x", ";", "-o", str(output), "-e", ",".join(self._events)]
            child = ["--", "sh", "-c", "echo begun; cat >/dev/null"]
            pipe = subprocess.PIPE
            try:
                process = subprocess.Popen(command + child, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
            except OSError as error:
                raise MeasurementError(f"{self._perf} cannot run: {error.strerror or error}") from error
            reading = Reading()
            with process:
                if process.stdout is None or process.stdout.readline().strip() != "begun":
                    _, complaint = process.communicate(timeout=_PATIENCE)
                    raise MeasurementError(f"perf stat counts no energy: {_first_line(complaint)}")
                begun = time.perf_counter()
                try:
                    yield reading
                finally:
                    reading.seconds = time.perf_counter() - begun
                    _, complaint = process.communicate(timeout=_PATIENCE)
                text = output.read_text(encoding="utf-8", errors="replace") if output.is_file() else ""
            reading.joules = parse_perf(text or complaint, self._events)


class PowermetricsSource:
    """Package power of macOS' powermetrics, which needs root; sudo must not ask for a password."""

    method = "powermetrics"
    sampling_seconds = _POWERMETRICS_SECONDS

    def __init__(self, command: Sequence[str] = ("sudo", "-n", "powermetrics")) -> None:
        milliseconds = str(round(1000 * _POWERMETRICS_SECONDS))
        self._command = [*command, "--samplers", "cpu_power", "-i", milliseconds]
        self.description = " ".join(self._command)

    def problem(self) -> str | None:
        """Why it does not work here, or None."""
        try:
            with self.measure():
                time.sleep(3 * _POWERMETRICS_SECONDS)
        except MeasurementError as error:
            return error.message
        return None

    @contextmanager
    def measure(self) -> Iterator[Reading]:
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(self._command, stdout=pipe, stderr=pipe, text=True)
        except OSError as error:
            raise MeasurementError(f"powermetrics cannot run: {error.strerror or error}") from error
        lines: list[str] = []
        begun_sampling = threading.Event()

        def collect() -> None:
            for line in process.stdout or ():
                lines.append(line)
                if line.startswith("CPU Power"):
                    begun_sampling.set()
            begun_sampling.set()  # it ended, too early

        reader = threading.Thread(target=collect, daemon=True)
        reader.start()
        reading = Reading()
        try:
            begun_sampling.wait(_PATIENCE)
            before = len(lines)  # samples up to here are of the time before
            begun = time.perf_counter()
            yield reading
            reading.seconds = time.perf_counter() - begun
        finally:
            process.terminate()
            process.wait(_PATIENCE)
            reader.join()
            complaint = process.stderr.read() if process.stderr else ""
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        try:
            watts = parse_powermetrics("".join(lines[before:]))
        except MeasurementError:
            if not complaint.strip():
                raise
            raise MeasurementError(f"powermetrics: {_first_line(complaint)}") from None
        reading.joules = watts * reading.seconds


def parse_perf(text: str, events: Sequence[str] = _PERF_EVENTS) -> float:
    """Joules of all energy events in the output of ``perf stat -x ';'``. Raises MeasurementError."""
    joules = 0.0
    seen = 0
    for line in text.splitlines():
        fields = line.split(";")
        if len(fields) < 3 or fields[2].strip() not in events:
            continue
        try:
            value = float(fields[0].replace(",", "."))  # some locales write a comma
        except ValueError:
            raise MeasurementError(f"perf stat says of {fields[2]}: {fields[0]}") from None
        if fields[1].strip() != "Joules" or value < 0:
            raise MeasurementError(f"perf stat gives {fields[0]} {fields[1]} for {fields[2]}, no energy")
        joules += value
        seen += 1
    if not seen:
        raise MeasurementError(f"perf stat counts no energy: {_first_line(text)}")
    return joules


_SAMPLE = re.compile(r"^\*\*\* Sampled system activity .*\((?P<ms>[\d.]+)ms elapsed\)", re.M)
_POWER = re.compile(
    r"^(?P<what>Combined Power|Package Power|Intel energy model derived package power|CPU Power)"
    r"[^:\n]*:\s*(?P<value>[\d.]+)\s*(?P<unit>mW|W)\b",
    re.M,
)
_ORDER = ("Combined Power", "Package Power", "Intel energy model derived package power", "CPU Power")


def parse_powermetrics(text: str) -> float:
    """Mean package power in watts over the samples in powermetrics' text, each weighted by its duration.

    Raises MeasurementError if there is no whole sample.
    """
    heads = list(_SAMPLE.finditer(text))
    joules = seconds = 0.0
    for place, head in enumerate(heads):
        end = heads[place + 1].start() if place + 1 < len(heads) else len(text)
        powers = {}
        for power in _POWER.finditer(text, head.end(), end):
            scale = 1e-3 if power["unit"] == "mW" else 1.0
            powers[power["what"]] = float(power["value"]) * scale
        best = next((powers[name] for name in _ORDER if name in powers), None)
        if best is not None:
            elapsed = float(head["ms"]) / 1e3
            joules += best * elapsed
            seconds += elapsed
    if not seconds:
        raise MeasurementError("powermetrics gave no sample of the package's power")
    return joules / seconds


def find_source(
    powercap: Path = POWERCAP, *, perf: str = "perf", platform: str = sys.platform
) -> EnergySource | str:
    """The best counter of this machine, or why there is none."""
    if platform == "darwin":
        metrics = PowermetricsSource()
        problem = metrics.problem()
        return metrics if problem is None else problem
    rapl = find_rapl(powercap)
    if not isinstance(rapl, str):
        return RaplSource(rapl)
    source = PerfSource(perf)
    problem = source.problem()
    return source if problem is None else f"{rapl}; {problem}"


def _first_line(text: str) -> str:
    """The first line that says something."""
    lines = (line.strip() for line in text.splitlines())
    return next((line for line in lines if line and not line.startswith("#")), "it says nothing")
