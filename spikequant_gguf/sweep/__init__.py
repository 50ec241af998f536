"""Studies of the arithmetic: bit widths, salience, ablations, and published methods in the same harness.

    from spikequant_gguf.sweep import sweep

    result = sweep("SmolLM2-135M-Instruct-F16.gguf", "wiki.test.raw", what="bits")

Importing this is cheap; sweep() needs torch and transformers.
"""

from .points import STUDIES, Method, Point, plan_points
from .run import SweepPoint, SweepResult, sweep

__all__ = ["STUDIES", "Method", "Point", "SweepPoint", "SweepResult", "plan_points", "sweep"]
