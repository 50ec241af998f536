"""Energies of single operations, from files that name their source."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["OPERATIONS", "Constants", "constant_sets", "load_constants"]

FOLDER = Path(__file__).with_name("constants")
OPERATIONS = (
    "int8_add",
    "int32_add",
    "int8_mul",
    "int32_mul",
    "fp16_add",
    "fp16_mul",
    "fp32_add",
    "fp32_mul",
    "dram_bit",
)


@dataclass(frozen=True)
class Constants:
    """A named set: picojoules per operation, and per bit read from DRAM."""

    name: str
    process: str
    citation: str
    pj: dict[str, float]

    def to_json(self) -> dict:
        return asdict(self)


def constant_sets() -> list[str]:
    """Names of the sets that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_constants(name_or_file: str) -> Constants:
    """A set by name, or one in a TOML file of the same form. Raises InputError."""
    known = name_or_file in constant_sets()
    path = FOLDER / f"{name_or_file}.toml" if known else Path(name_or_file)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(
            f"{name_or_file}: no readable set of energy constants: {error}",
            f"name one of {', '.join(constant_sets())}, or a TOML file of that form",
        ) from None
    pj = document.get("pj")
    for key in OPERATIONS:
        value = pj.get(key) if isinstance(pj, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise InputError(f"{path}: [pj] has no valid '{key}'", "give a number of picojoules")
    if not all(isinstance(document.get(key), str) for key in ("name", "process", "citation")):
        raise InputError(f"{path}: name, process and citation must be texts", "say where they come from")
    energies = {key: float(pj[key]) for key in OPERATIONS}
    return Constants(document["name"], document["process"], document["citation"], energies)
