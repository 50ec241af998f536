"""Energies of single operations, from files that name their source."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["DEFAULT_CONSTANTS", "OPERATIONS", "Constants", "constant_sets", "load_constants"]

DEFAULT_CONSTANTS = "horowitz-45nm"
FOLDER = Path(__file__).with_name("constants")
OPERATIONS = (
    "int4_mul",
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
_LARGEST_DEPTH = 8  # of sets that build on one another


@dataclass(frozen=True)
class Constants:
    """A named set: picojoules per operation, and per bit read from or written to DRAM."""

    name: str
    process: str
    citation: str
    pj: dict[str, float]

    def to_json(self) -> dict:
        return asdict(self)

    def with_dram_bit(self, picojoules: float) -> Constants:
        """The set with another memory. Raises InputError."""
        if not 0 <= picojoules < math.inf:
            raise InputError(f"{picojoules} is no energy of a bit", "give picojoules, for example 20.3")
        name = f"{self.name}, DRAM {picojoules:g} pJ/bit as given"
        return replace(self, name=name, pj=self.pj | {"dram_bit": float(picojoules)})

    def scaled(self, operation: str, factor: float) -> Constants:
        """The set with one energy multiplied."""
        return replace(self, pj=self.pj | {operation: self.pj[operation] * factor})


def constant_sets() -> list[str]:
    """Names of the sets that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_constants(name_or_file: str) -> Constants:
    """A set by name, or one in a TOML file of the same form. Raises InputError.

    A file with ``base = "name or file"`` takes from there whatever it does not say itself.
    """
    return _load(name_or_file, _LARGEST_DEPTH)


def _load(name_or_file: str, depth: int) -> Constants:
    known = name_or_file in constant_sets()
    path = FOLDER / f"{name_or_file}.toml" if known else Path(name_or_file)
    remedy = f"name one of {', '.join(constant_sets())}, or a TOML file of that form"
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{name_or_file}: no readable set of energy constants: {error}", remedy) from None
    texts: dict[str, object] = {}
    pj: dict[str, object] = {}
    base = document.get("base")
    if base is not None:
        if not isinstance(base, str) or depth == 0:
            raise InputError(f"{path}: base must name another set, and not itself", remedy)
        found = _load(base if base in constant_sets() else str(path.parent / base), depth - 1)
        texts = {"name": found.name, "process": found.process, "citation": found.citation}
        pj = dict(found.pj)
    texts |= {key: document[key] for key in ("name", "process", "citation") if key in document}
    own = document.get("pj", {})
    if not isinstance(own, dict) or not set(own) <= set(OPERATIONS):
        unknown = ", ".join(sorted(set(own) - set(OPERATIONS))) if isinstance(own, dict) else "no table"
        raise InputError(f"{path}: [pj] holds {unknown}", f"it takes {', '.join(OPERATIONS)}")
    pj |= own
    for key in OPERATIONS:
        value = pj.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise InputError(f"{path}: [pj] has no valid '{key}'", "give a number of picojoules")
    if not all(isinstance(texts.get(key), str) for key in ("name", "process", "citation")):
        raise InputError(f"{path}: name, process and citation must be texts", "say where they come from")
    energies = {key: float(pj[key]) for key in OPERATIONS}  # type: ignore[arg-type]
    return Constants(str(texts["name"]), str(texts["process"]), str(texts["citation"]), energies)
