"""Energy of linear layers: counted by the runtime, modelled with cited constants, measured where possible."""

from .analysis import PHASES, EnergyResult, PhaseEnergy, count_text, energy
from .constants import Constants, constant_sets, load_constants
from .counts import Counts, counting, read_counts, read_token_counts
from .measure import Measured, MeasureOptions, measure
from .rapl import find_rapl
from .sources import find_source

__all__ = [
    "PHASES",
    "Constants",
    "Counts",
    "EnergyResult",
    "MeasureOptions",
    "Measured",
    "PhaseEnergy",
    "constant_sets",
    "count_text",
    "counting",
    "energy",
    "find_rapl",
    "find_source",
    "load_constants",
    "measure",
    "read_counts",
    "read_token_counts",
]
