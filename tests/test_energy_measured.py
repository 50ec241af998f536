"""Measurement from end to end on counters of our own: a powercap tree, a `perf` and a `powermetrics`.

Processes of our own play the hardware: they advance the counter with time, and faster while the measuring
process computes. So what must come out is known.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spikequant_gguf.cli import app
from spikequant_gguf.energy import MeasureOptions, energy, find_rapl, measure
from spikequant_gguf.energy.rapl import CounterError
from spikequant_gguf.energy.sources import (
    MeasurementError,
    PerfSource,
    PowermetricsSource,
    RaplSource,
    find_source,
    parse_perf,
    parse_powermetrics,
)
from spikequant_gguf.errors import InputError

measure_module = importlib.import_module("spikequant_gguf.energy.measure")  # the name is the function's, too

IDLE_WATTS = 20.0  # of each package
BUSY_JOULES = 50.0  # per second that the measuring process computes, in the first package

# Microjoules by wall time and by processor time of the parent, wrapped as the hardware wraps them.
_HARDWARE = """
import os, sys, time
from pathlib import Path
folder, busy, idle, limit, parent = Path(sys.argv[1]), *map(float, sys.argv[2:5]), int(sys.argv[5])
def computed():
    fields = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
begun, first = time.monotonic(), computed()
while os.getppid() == parent:
    joules = idle * (time.monotonic() - begun) + busy * (computed() - first)
    partial = folder / "energy_uj.partial"
    partial.write_text(f"{int(joules * 1e6 + limit / 2) % int(limit + 1)}\\n")
    partial.rename(folder / "energy_uj")
    time.sleep(0.005)
"""


def package(root: Path, index: int, energy_uj: int, limit: int) -> Path:
    zone = root / f"intel-rapl:{index}"
    zone.mkdir(parents=True)
    (zone / "name").write_text(f"package-{index}\n")
    (zone / "max_energy_range_uj").write_text(f"{limit}\n")
    (zone / "energy_uj").write_text(f"{energy_uj}\n")
    return zone


@contextmanager
def hardware(folder: Path, busy: float, limit: int) -> Iterator[None]:
    """Advances the counter of a package while the block runs."""
    numbers = [str(busy), str(IDLE_WATTS), str(limit), str(os.getpid())]
    with subprocess.Popen([sys.executable, "-c", _HARDWARE, str(folder), *numbers]) as process:
        try:
            time.sleep(0.3)
            assert process.poll() is None
            yield
        finally:
            process.terminate()


# ---- powercap


def test_powercap_packages_and_wrap_around(tmp_path: Path) -> None:
    zones = package(tmp_path, 0, 9_999_000, 9_999_999), package(tmp_path, 1, 500, 9_999_999)
    core = tmp_path / "intel-rapl:0:0"
    core.mkdir()
    (core / "name").write_text("core\n")
    rapl = find_rapl(tmp_path)
    assert not isinstance(rapl, str)
    before = rapl.read()
    (zones[0] / "energy_uj").write_text("1000\n")  # wrapped: 1000 + 1000 microjoules later
    (zones[1] / "energy_uj").write_text("2500\n")
    assert rapl.joules(before, rapl.read()) == pytest.approx(4000e-6)


def test_a_counter_that_runs_backwards_is_no_wrap_around(tmp_path: Path) -> None:
    zone = package(tmp_path, 0, 5_000_000, 9_999_999)
    rapl = find_rapl(tmp_path)
    assert not isinstance(rapl, str)
    before = rapl.read()
    (zone / "energy_uj").write_text("4999000\n")
    with pytest.raises(CounterError, match="went back from 5000000 to 4999000"):
        rapl.joules(before, rapl.read())
    with pytest.raises(MeasurementError, match="went back"), RaplSource(rapl).measure():
        (zone / "energy_uj").write_text("100\n")
        (zone / "energy_uj").write_text("4000000\n")


def test_powercap_missing_or_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no RAPL" in str(find_rapl(tmp_path / "none"))
    zone = package(tmp_path, 0, 1, 10)
    (zone / "max_energy_range_uj").write_text("unknown\n")
    assert "cannot be read" in str(find_rapl(tmp_path))

    def refuse(self: Path, *args: object, **options: object) -> str:
        raise PermissionError(self)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert "root only" in str(find_rapl(tmp_path))
    assert "root only" in str(find_source(tmp_path, perf="/no/such/perf", platform="linux"))


def test_a_counter_that_vanishes_ends_the_measurement(tmp_path: Path) -> None:
    zone = package(tmp_path, 0, 1, 10_000_000)
    source = find_source(tmp_path)
    assert isinstance(source, RaplSource)
    with pytest.raises(MeasurementError, match="cannot be read"), source.measure():
        (zone / "energy_uj").unlink()


def spin(*_: object) -> None:
    """Work of a known energy: a fifth of a second of processor time, however long that takes."""
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="process times are read from /proc")
@pytest.mark.parametrize("work", ["known", "real"])
def test_the_whole_loop_on_a_powercap_tree(
    tiny_models: dict[str, Path], tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    """Two packages, one of which wraps several times; idle power is subtracted, that of work remains."""
    limit = 30_000_000  # of the first: 30 J, less than a second and a half of its power
    zones = package(tmp_path, 0, 0, limit), package(tmp_path, 1, 0, 10**12)
    options = MeasureOptions(repeats=5, seconds=0.4, idle_seconds=0.3, settle_seconds=0.05)
    models = [tiny_models["spk4"], tiny_models["q4_0"]]
    if work == "known":
        monkeypatch.setattr(measure_module, "compute_text", spin)
    with hardware(zones[0], BUSY_JOULES, limit), hardware(zones[1], 0.0, 10**12):
        result = energy(
            models, tiny_text, tokens=256, phases=["prompt"], options=options, powercap=tmp_path, threads=1
        )
    assert [each.system for each in result.measured] == ["spk4", "q4_0"]
    for each in result.measured:
        assert (each.method, each.phase, each.repeats, each.threads) == ("rapl", "prompt", 5, 1)
        assert each.idle_watts == pytest.approx(2 * IDLE_WATTS, rel=0.25)
        assert each.stdev is not None and each.joules_per_token is not None
        assert 0 < each.joules_per_token < each.total_joules_per_token
        if work == "known":  # 50 J for each second of it, without the 40 W that the machine takes anyway
            assert each.joules_per_token == pytest.approx(0.2 * BUSY_JOULES / 256, rel=0.35)
    assert result.measured[1].ratio_to_q4_0 == 1
    low, high = result.measured[0].ratio_to_q4_0_range
    assert low <= result.measured[0].ratio_to_q4_0 <= high
    record = result.to_json()["measured"][0]
    assert record["batch"] == record["sequence_length"] == 256 and record["stabilisation_seconds"] == 0.05
    assert record["sampling_seconds"] == 0.1 and str(tmp_path) in record["source"]


def test_without_a_counter_nothing_is_called_measured(
    tiny_models: dict[str, Path], tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no perf
    models = [str(tiny_models["spk4"]), str(tiny_models["q4_0"])]
    arguments = ["energy", *models, "-f", str(tiny_text), "-n", "16", "--powercap", str(tmp_path)]
    found = CliRunner().invoke(app, [*arguments, "--json"])
    assert found.exit_code == 0, found.output
    measured = json.loads(found.stdout)["measured"]
    assert [(each["system"], each["phase"]) for each in measured] == [
        *(("spk4", "prompt"), ("q4_0", "prompt"), ("spk4", "decode"), ("q4_0", "decode"))
    ]
    for each in measured:
        assert each["method"] == "unavailable"
        assert "no RAPL package counter" in each["reason"] and "perf" in each["reason"]
        numbers = {key for key, value in each.items() if isinstance(value, float | int) and value}
        assert not numbers


def test_options_are_checked(tiny_models: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="spread"):
        energy(tiny_models["spk4"], options=MeasureOptions(repeats=4))
    with pytest.raises(InputError, match="both q4_0"):
        energy([tiny_models["spk4"], tiny_models["q4_0"], tiny_models["q4_0"]])
    for name in ("seconds", "idle_seconds", "settle_seconds"):
        for value in (-1.0, math.nan, math.inf):
            with pytest.raises(InputError, match="seconds"):
                energy(tiny_models["spk4"], options=MeasureOptions(**{name: value}))


def test_a_spoiled_sample_is_repeated(tiny_models: dict[str, Path], tiny_text: Path) -> None:
    """A source that fails once in a while, and one that never works."""

    class Flaky:
        method, description, sampling_seconds = "rapl", "flaky", None

        def __init__(self, every: int) -> None:
            self.calls, self.every = 0, every

        @contextmanager
        def measure(self) -> Iterator[object]:
            from spikequant_gguf.energy.sources import Reading

            self.calls += 1
            reading, begun = Reading(), time.perf_counter()
            yield reading
            reading.seconds = time.perf_counter() - begun
            reading.joules = 10 * reading.seconds
            if self.calls % self.every == 0:
                raise MeasurementError("the counter went back")

    options = MeasureOptions(5, 0.01, 0.01, 0.0)
    models = {"spk4": tiny_models["spk4"]}
    data = tiny_text.read_bytes()
    (found,) = measure(models, data, 16, ["prompt"], Flaky(4), options, threads=1)
    assert found.lost > 0 and found.repeats == 5
    with pytest.raises(MeasurementError, match="went back"):
        measure(models, data, 16, ["prompt"], Flaky(1), options, threads=1)


# ---- perf


def fake_perf(folder: Path, line: str, status: int = 0) -> str:
    """A program that runs its child as `perf stat` does and then writes what `perf stat -x ';'` would.

    line: with {joules} in it, which are 30 for each second of the child's life.
    """
    path = folder / "perf"
    path.write_text(
        f"#!{sys.executable}\n"
        "import subprocess, sys, time\n"
        f"if {status}: print('event syntax error: no such PMU', file=sys.stderr); sys.exit({status})\n"
        "begun = time.monotonic()\n"
        "subprocess.run(sys.argv[sys.argv.index('--') + 1:])\n"
        "joules = 30 * (time.monotonic() - begun)\n"
        f"line = {line!r}.format(joules=f'{{joules:.2f}}')\n"
        "open(sys.argv[sys.argv.index('-o') + 1], 'w').write('# started on Tue\\n\\n' + line + '\\n')\n"
    )
    path.chmod(0o755)
    return str(path)


def test_perf_measures_a_stretch_of_time(tmp_path: Path) -> None:
    perf = fake_perf(tmp_path, "{joules};Joules;power/energy-pkg/;1000;100.00;;")
    source = find_source(tmp_path / "none", perf=perf, platform="linux")
    assert isinstance(source, PerfSource)
    with source.measure() as reading:
        time.sleep(0.5)
    assert reading.seconds == pytest.approx(0.5, rel=0.2)
    assert reading.joules == pytest.approx(30 * reading.seconds, rel=0.3)


def test_perf_without_energy_events(tmp_path: Path) -> None:
    unsupported = fake_perf(tmp_path, "<not supported>;Joules;power/energy-pkg/;0;100.00;;")
    reason = find_source(tmp_path / "none", perf=unsupported, platform="linux")
    assert "perf stat says of power/energy-pkg/: <not supported>" in str(reason)
    refusing = fake_perf(tmp_path, "", status=129)
    assert "event syntax error" in str(find_source(tmp_path / "none", perf=refusing, platform="linux"))


def test_perf_output() -> None:
    sockets = "1.5;Joules;power/energy-pkg/;1;100.00;;\n2,25;Joules;power/energy-pkg/;1;100.00;;\n"
    assert parse_perf(sockets) == 3.75
    with pytest.raises(MeasurementError, match="no energy"):
        parse_perf("5;msec;power/energy-pkg/;1;100.00;;\n")
    with pytest.raises(MeasurementError, match="counts no energy"):
        parse_perf("1.5;Joules;power/energy-ram/;1;100.00;;\n")


# ---- powermetrics


def powermetrics_text(samples: list[tuple[float, dict[str, str]]]) -> str:
    """What powermetrics prints with the sampler cpu_power, of (milliseconds, power by name)."""
    parts = ["Machine model: Mac14,2\nOS version: 23A344\n"]
    for milliseconds, powers in samples:
        head = f"*** Sampled system activity (Tue Nov 24 20:00:00 2026 +0000) ({milliseconds}ms elapsed) ***"
        lines = [f"{name}: {value}" for name, value in powers.items()]
        parts.append("\n".join([head, "", "**** Processor usage ****", "CPU 0 frequency: 2000 MHz", *lines]))
    return "\n\n".join(parts) + "\n"


def test_powermetrics_text() -> None:
    text = powermetrics_text(
        [
            (200.0, {"CPU Power": "1000 mW", "Combined Power (CPU + GPU + ANE)": "1500 mW"}),
            (600.0, {"CPU Power": "2000 mW", "Combined Power (CPU + GPU + ANE)": "2500 mW"}),
        ]
    )
    assert parse_powermetrics(text) == pytest.approx((0.2 * 1.5 + 0.6 * 2.5) / 0.8)
    intel = powermetrics_text([(100.0, {"Intel energy model derived package power (CPUs+GT+SA)": "3.25W"})])
    assert parse_powermetrics(intel) == pytest.approx(3.25)
    for useless in ("", "powermetrics must be invoked as the superuser\n", powermetrics_text([(100.0, {})])):
        with pytest.raises(MeasurementError, match="no sample"):
            parse_powermetrics(useless)


def test_powermetrics_measures_a_stretch_of_time(tmp_path: Path) -> None:
    """A program that samples on and on, 4 W first and 6 W from the third sample on."""
    path = tmp_path / "powermetrics"
    path.write_text(
        f"#!{sys.executable}\nimport itertools, time\n"
        "for n in itertools.count():\n"
        "    time.sleep(0.1)\n"
        "    print('*** Sampled system activity (now) (100.0ms elapsed) ***')\n"
        "    print(f'CPU Power: {4000 if n < 2 else 6000} mW', flush=True)\n"
    )
    path.chmod(0o755)
    with PowermetricsSource([str(path)]).measure() as reading:
        time.sleep(1.0)
    assert 5.5 < reading.joules / reading.seconds <= 6.0
    assert PowermetricsSource([str(path)]).problem() is None
    assert "cannot run" in str(PowermetricsSource([str(tmp_path / "none")]).problem())
    refused = "sudo: a password is required"
    path.write_text(f"#!/bin/sh\necho '{refused}' >&2\nexit 1\n")
    assert refused in str(PowermetricsSource([str(path)]).problem())
