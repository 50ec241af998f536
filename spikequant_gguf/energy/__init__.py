"""Energy of linear layers: counted by the runtime, modelled with cited constants, measured where possible."""

from .analysis import EnergyResult, energy
from .constants import Constants, constant_sets, load_constants
from .counts import Counts, counting, read_counts
from .rapl import find_rapl

__all__ = [
    "Constants",
    "Counts",
    "EnergyResult",
    "constant_sets",
    "counting",
    "energy",
    "find_rapl",
    "load_constants",
    "read_counts",
]
