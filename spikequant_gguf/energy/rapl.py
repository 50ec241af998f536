"""Linux's powercap tree (Intel and AMD RAPL): counters of microjoules, by processor package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["POWERCAP", "CounterError", "Package", "Rapl", "find_rapl"]

POWERCAP = Path("/sys/class/powercap")


class CounterError(Exception):
    """A counter ran backwards."""


@dataclass(frozen=True)
class Package:
    """One processor package; its counter runs from 0 to `limit` microjoules and starts again."""

    folder: Path
    limit: int

    def read(self) -> int:
        return _number(self.folder / "energy_uj")

    def spent(self, before: int, after: int) -> int:
        """Microjoules between two readings. Raises CounterError.

        A fall is a wrap-around only if it is by more than half of the range; a smaller one is a counter that
        was set back, which happens when a machine sleeps, and tells nothing.
        """
        if after >= before:
            return after - before
        wrapped = after - before + self.limit + 1
        if before > self.limit or wrapped > self.limit // 2:
            raise CounterError(f"the counter of {self.folder} went back from {before} to {after} µJ")
        return wrapped


@dataclass(frozen=True)
class Rapl:
    """All packages. Sample more often than a counter wraps, which takes minutes."""

    packages: tuple[Package, ...]

    def read(self) -> tuple[int, ...]:
        """Microjoules by package."""
        return tuple(package.read() for package in self.packages)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """Energy of all packages between two readings, with at most one wrap-around of each.

        Raises:
            CounterError: a counter ran backwards.
        """
        readings = zip(self.packages, before, after, strict=True)
        return sum(package.spent(first, last) for package, first, last in readings) / 1e6


def find_rapl(root: Path = POWERCAP) -> Rapl | str:
    """The packages' counters, or why they are unavailable. Parts of a package (core, dram) are left out."""
    zones = sorted(path for path in root.glob("*-rapl:*") if path.name.count(":") == 1)
    packages = []
    try:
        for zone in zones:
            if (zone / "name").read_text(encoding="ascii").startswith("package"):
                package = Package(zone, _number(zone / "max_energy_range_uj"))
                package.read()
                packages.append(package)
    except PermissionError:
        return f"{zone / 'energy_uj'} is readable by root only"
    except (OSError, ValueError) as error:
        return f"{zone} cannot be read: {error}"
    return Rapl(tuple(packages)) if packages else f"{root} has no RAPL package counter"


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
