"""Hugging Face checkpoints and GGUF models to spike GGUF. Importing this needs neither torch nor llama_cpp.

from spikequant_gguf.converter import ConvertOptions, convert

report = convert("SmolLM2-135M-F16.gguf", "SmolLM2-135M-SPK4.gguf", ConvertOptions(silence=0.7))
print(report.bits_per_weight)
"""

from .pipeline import ConvertOptions, ConvertReport, convert, plan
from .plan import ConversionPlan, TensorPlan
from .progress import Progress
from .recipe import Calibrate, EncoderSettings, Recipe, Scaling, TensorQuantizer, TensorStatistics, Transform
from .source import Source, SourceTensor

__all__ = [
    "Calibrate",
    "ConversionPlan",
    "ConvertOptions",
    "ConvertReport",
    "EncoderSettings",
    "Progress",
    "Recipe",
    "Scaling",
    "Source",
    "SourceTensor",
    "TensorPlan",
    "TensorQuantizer",
    "TensorStatistics",
    "Transform",
    "convert",
    "plan",
]
