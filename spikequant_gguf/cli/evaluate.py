"""Commands that compute with models: run, perplexity, compare, bench, demo."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..console import Console
from .common import (
    Chunks,
    CtxSize,
    Model,
    Models,
    TextFile,
    Threads,
    command,
    examples,
)

__all__ = ["add_commands"]

Rounds = Annotated[
    int, typer.Option("--repetitions", "-r", min=1, help="Rounds of the speed test, each in turns with Q4_0.")
]
Imatrix = Annotated[
    Path | None, typer.Option("--imatrix", help="Importance matrix for the quantizers.", show_default=False)
]


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command(
        epilog=examples(
            'spikequant run model-SPK4.gguf -p "Why is the sky blue?"',
            'spikequant run model-SPK4.gguf -p "Once upon a time" --no-chat -n 200 --temp 0',
        )
    )(run)
    app.command(
        epilog=examples(
            "spikequant perplexity model-SPK4.gguf -f wiki.test.raw",
            "spikequant perplexity model-SPK4.gguf --reference model-F16.gguf --chunks 16",
        )
    )(perplexity)
    app.command(
        epilog=examples(
            "spikequant compare model-F16.gguf --types f16,q4_0,q4_k_m,iq4_xs,spk4 -f wiki.test.raw",
            "spikequant compare model-F16.gguf model-Q4_0.gguf model-SPK4.gguf --chunks 16 --json",
        )
    )(compare)
    app.command(
        epilog=examples(
            "spikequant bench model-SPK4.gguf model-Q4_0.gguf",
            "spikequant bench *.gguf -p 128 -n 32 -r 10 -o csv",
        )
    )(bench)
    app.command(epilog=examples("spikequant demo", "spikequant demo --model my-model-F16.gguf --chunks 16"))(
        demo
    )


@command
def run(
    console: Console,
    model: Model,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Text to answer or to continue.", show_default=False)
    ],
    n_predict: Annotated[
        int, typer.Option("--n-predict", "-n", min=1, help="Tokens to write, at most.")
    ] = 128,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the model's chat template.", show_default="if it has one"),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="System message of the chat.", show_default=False)
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temp", min=0.0, help="Temperature; 0 takes the most likely token.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Choose among so many tokens; 0: all.")] = 40,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.0, max=1.0, help="Of this total probability.")
    ] = 0.95,
    min_p: Annotated[
        float,
        typer.Option("--min-p", min=0.0, max=1.0, help="Of this share of the likeliest one's probability."),
    ] = 0.05,
    seed: Annotated[
        int | None,
        typer.Option("--seed", "-s", min=0, max=2**32 - 1, help="Random seed.", show_default="random"),
    ] = None,
    ctx_size: Annotated[
        int | None, typer.Option("--ctx-size", "-c", min=8, help="Context.", show_default="as needed")
    ] = None,
    threads: Threads = None,
) -> None:
    """Write text with a model."""
    from ..generate import Sampling, generate

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    sampling = Sampling(temperature, top_k, top_p, min_p, secrets.randbits(32) if seed is None else seed)
    result = generate(
        model,
        prompt,
        n_predict=n_predict,
        chat=chat,
        system=system,
        sampling=sampling,
        ctx=ctx_size,
        threads=threads,
        stream=None if console.json_output else show,
    )
    console.result(result.to_json, lambda out: out.print())
    rate = f"{result.decode_tps:.1f}" if result.decode_tps else "-"
    console.say(
        f"[prompt {result.prompt_tokens} tokens, {result.prompt_tps:.1f} t/s; "
        f"{len(result.tokens)} tokens written, {rate} t/s; "
        f"{result.threads} threads; seed {sampling.seed}]"
    )


@command
def perplexity(
    console: Console,
    model: Model,
    file: TextFile = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference", help="Model to measure the divergence from, F16 as a rule.", show_default=False
        ),
    ] = None,
    ctx_size: CtxSize = 512,
    chunks: Chunks = None,
    threads: Threads = None,
) -> None:
    """Perplexity of a model, as llama-perplexity defines it; with --reference its divergence, too."""
    from ..divergence import divergence
    from ..perplexity import perplexity as evaluate
    from .tables import show_divergence, show_perplexity

    with console.progress() as progress:
        if reference is None:
            result = evaluate(model, file, ctx=ctx_size, chunks=chunks, threads=threads, progress=progress)
        else:
            compared = divergence(
                reference, [model], file, ctx=ctx_size, chunks=chunks, threads=threads, progress=progress
            )
    if reference is None:
        console.result(result.to_json, lambda out: show_perplexity(out, result))
    else:
        console.result(compared.to_json, lambda out: show_divergence(out, compared))


@command
def compare(
    console: Console,
    models: Models,
    types: Annotated[
        str | None,
        typer.Option(
            "--types",
            help="Types to make of the one MODEL, in the cache, with commas between. "
            "Default with a single MODEL: f16,q4_0,q4_k_m,iq4_xs,spk4.",
            show_default=False,
        ),
    ] = None,
    file: TextFile = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference", help="Model whose predictions count as right.", show_default="the float model"
        ),
    ] = None,
    ctx_size: CtxSize = 512,
    chunks: Chunks = None,
    repetitions: Rounds = 5,
    with_speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure speeds, too.")] = True,
    imatrix: Imatrix = None,
    threads: Threads = None,
) -> None:
    """Compare size, accuracy and speed: of several models, or of one model in several types."""
    from ..compare import compare as compare_models
    from ..compare import compare_types
    from ..variants import DEFAULT_TYPES
    from .comparison import show_comparison

    one_source = types is not None or (len(models) == 1 and reference is None)
    if one_source and len(models) > 1:
        raise typer.BadParameter("--types makes versions of one model, but several are given")
    if one_source and reference is not None:
        raise typer.BadParameter("with --types the reference is the F16 version; leave --reference out")
    if not one_source and imatrix is not None:
        raise typer.BadParameter("--imatrix is for making types of one model; give --types, too")
    rounds = repetitions if with_speed else 0
    with console.progress() as progress:
        if one_source:
            result = compare_types(
                models[0],
                types.split(",") if types is not None else DEFAULT_TYPES,
                file,
                imatrix=imatrix,
                threads=threads,
                progress=progress,
                ctx=ctx_size,
                chunks=chunks,
                rounds=rounds,
            )
        else:
            result = compare_models(
                models,
                file,
                reference=reference,
                ctx=ctx_size,
                chunks=chunks,
                rounds=rounds,
                threads=threads,
                progress=progress,
            )
    console.result(result.to_json, lambda out: show_comparison(out, result))


@command
def bench(
    console: Console,
    models: Models,
    n_prompt: Annotated[
        int, typer.Option("--n-prompt", "-p", min=0, help="Tokens of the prompt test.")
    ] = 512,
    n_gen: Annotated[int, typer.Option("--n-gen", "-n", min=0, help="Tokens of the decode test.")] = 64,
    repetitions: Rounds = 5,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", help="Model that ratios refer to.", show_default="the Q4_0 one"),
    ] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="table, md, csv or json.")] = "table",
    threads: Threads = None,
) -> None:
    """Measure tokens per second, each model in turns with the baseline. (Random weights do.)"""
    from ..compare import BASELINE_TYPE
    from ..gguf_header import read_header
    from ..inspect_file import model_type
    from ..speed import speed
    from .tables import SPEED_FORMATS, show_speed

    console.json_output = console.json_output or output == "json"
    if output not in (*SPEED_FORMATS, "json"):
        raise typer.BadParameter(f"--output is {', '.join(SPEED_FORMATS)} or json, not {output}")
    if baseline is None:
        baseline = next((path for path in models if model_type(read_header(path)) == BASELINE_TYPE), None)
    with console.progress() as progress:
        result = speed(
            models,
            baseline,
            prompt=n_prompt,
            decode=n_gen,
            rounds=repetitions,
            threads=threads,
            progress=progress,
        )
    console.result(result.to_json, lambda out: show_speed(out, result, output))


@command
def demo(
    console: Console,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="GGUF model.", show_default="SmolLM2-135M-Instruct")
    ] = None,
    wheel: Annotated[
        Path | None,
        typer.Option(
            "--wheel", help="Package with the default model, got by hand.", show_default="downloaded"
        ),
    ] = None,
    file: TextFile = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What the model is asked.", show_default=False)
    ] = None,
    chunks: Annotated[int, typer.Option("--chunks", min=1, help="Chunks of 512 tokens to evaluate.")] = 8,
    repetitions: Rounds = 5,
    threads: Threads = None,
) -> None:
    """Fetch a small model, make it spike, let it write, and compare it with stock types.

    The model is SmolLM2-135M-Instruct (93 MB through pip). Everything made stays in the cache.
    """
    from ..demo import DEFAULT_PROMPT
    from ..demo import demo as run_demo
    from .comparison import show_comparison

    with console.progress() as progress:
        result = run_demo(
            model,
            wheel=wheel,
            text=file,
            prompt=prompt if prompt is not None else DEFAULT_PROMPT,
            chunks=chunks,
            rounds=repetitions,
            threads=threads,
            say=console.say,
            progress=progress,
        )
    console.result(result.to_json, lambda out: show_comparison(out, result.comparison))
    console.say(f'\nTry it: spikequant run {result.spike_model} -p "Hello!"')
