"""Writes text with a model: the `run` command."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import runtime
from .errors import InputError
from .evaluation import Model
from .ggml_patch.progress import Progress, SilentProgress

__all__ = ["GenerateResult", "Sampling", "generate"]

_BATCH = 512
_TEMPLATE_TOKENS = 512  # what a chat template may add


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; llama.cpp's defaults.

    Attributes:
        temperature: 0 always takes the most likely token.
        top_k: keep so many most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens of this total probability; 1 keeps all.
        min_p: keep tokens of at least this share of the most likely one's probability; 0 keeps all.
        seed: of the random numbers; the same seed and model give the same text.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class GenerateResult:
    """A generated text.

    Attributes:
        model: path.
        prompt: as given.
        text: what the model wrote.
        tokens: their ids.
        stopped: True if the model ended the text, False if the limit did.
        chat: whether the prompt went through the model's chat template.
        sampling: how tokens were chosen, with the seed.
        prompt_tokens: number of tokens of the prompt.
        prompt_seconds, decode_seconds: times of its computation and of the rest.
        threads: that computed.
    """

    model: str
    prompt: str
    text: str
    tokens: tuple[int, ...]
    stopped: bool
    chat: bool
    sampling: Sampling
    prompt_tokens: int
    prompt_seconds: float
    decode_seconds: float
    threads: int

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_seconds

    @property
    def decode_tps(self) -> float | None:
        """Generated tokens per second after the first, which the prompt pays for; None for fewer than two."""
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 else None

    def to_json(self) -> dict:
        """The result as plain JSON types."""
        return asdict(self) | {
            "tokens": list(self.tokens),
            "prompt_tps": self.prompt_tps,
            "decode_tps": self.decode_tps,
        }


def generate(
    model: str | Path,
    prompt: str,
    *,
    n_predict: int = 128,
    chat: bool | None = None,
    system: str | None = None,
    sampling: Sampling | None = None,
    ctx: int | None = None,
    threads: int | None = None,
    stream: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> GenerateResult:
    """Continue a prompt, or answer it if the model has a chat template.

    Args:
        n_predict: tokens to write, at most.
        chat: use the chat template; if None, where the model has one.
        system: system message; for chat only.
        ctx: context size; as large as needed if None.
        stream: gets the text as it appears.

    Raises:
        InputError: the prompt is empty or does not fit the context, or there is no chat template; else as
            `Model`.
    """
    if not prompt:
        raise InputError("the prompt is empty", 'give one with -p "..."')
    if n_predict < 1:
        raise InputError("the number of tokens to write must be positive", "correct -n")
    progress = progress or SilentProgress()
    progress.step("load", Path(model).name)
    sampling = sampling or Sampling()
    if ctx is None:  # before the vocabulary is known; a token has at least one byte, as a rule
        ctx = len(prompt.encode()) + len((system or "").encode()) + n_predict + _TEMPLATE_TOKENS
    with Model(model, ctx_size=ctx, threads=threads) as loaded:
        template = _chat_template(loaded)
        if chat and template is None:
            raise InputError(f"{model} has no chat template", "leave out --chat")
        use_chat = template is not None if chat is None else chat
        if system is not None and not use_chat:
            raise InputError("a system message needs a chat template", "leave out --system")
        if use_chat:
            text = _render(loaded, template or "", prompt, system)
            tokens = loaded.tokenize(text.encode(), add_special=False, parse_special=True)
        else:
            tokens = loaded.tokenize(prompt.encode())
        if len(tokens) + n_predict > loaded.ctx_size:
            raise InputError(
                f"the prompt has {len(tokens)} tokens, which with {n_predict} new ones do not fit a context "
                f"of {loaded.ctx_size}",
                "give a larger --ctx-size or a smaller -n",
            )
        if not len(tokens):
            raise InputError("the prompt has no tokens", 'give one with -p "..."')
        progress.step("write")
        written = _Writer(loaded, stream)
        sampler = _make_sampler(loaded.api, sampling)
        try:
            prompt_seconds, decode_seconds = written.run(tokens.tolist(), n_predict, sampler)
        finally:
            loaded.api.llama_sampler_free(sampler)
    return GenerateResult(
        model=str(model),
        prompt=prompt,
        text=written.text,
        tokens=tuple(written.tokens),
        stopped=written.stopped,
        chat=use_chat,
        sampling=sampling,
        prompt_tokens=len(tokens),
        prompt_seconds=prompt_seconds,
        decode_seconds=decode_seconds,
        threads=loaded.threads,
    )


class _Writer:
    """Decodes token after token and turns them into text, which may split characters between tokens."""

    def __init__(self, model: Model, stream: Callable[[str], None] | None) -> None:
        self.model = model
        self.stream = stream
        self.text = ""
        self.tokens: list[int] = []
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def run(self, prompt: Sequence[int], n_predict: int, sampler: Any) -> tuple[float, float]:
        """Seconds for the prompt and for the tokens after the first."""
        api, model = self.model.api, self.model
        started = time.perf_counter()
        for start in range(0, len(prompt), _BATCH):
            part = prompt[start : start + _BATCH]
            model.decode(part, start, outputs=int(start + len(part) == len(prompt)))
        token = api.llama_sampler_sample(sampler, model.context, -1)
        first = time.perf_counter()
        position = len(prompt)
        while True:
            if api.llama_vocab_is_eog(model.vocab, token):
                self.stopped = True
                break
            self.tokens.append(token)
            self._emit(self._decoder.decode(model.piece(token)))
            if len(self.tokens) == n_predict:
                break
            model.decode([token], position, outputs=1)
            position += 1
            token = api.llama_sampler_sample(sampler, model.context, -1)
        self._emit(self._decoder.decode(b"", final=True))
        return first - started, time.perf_counter() - first

    def _emit(self, text: str) -> None:
        self.text += text
        if text and self.stream is not None:
            self.stream(text)


def _make_sampler(api: Any, sampling: Sampling) -> Any:
    chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
    if sampling.temperature <= 0:
        parts = [api.llama_sampler_init_greedy()]
    else:
        parts = [
            api.llama_sampler_init_top_k(sampling.top_k),
            api.llama_sampler_init_top_p(sampling.top_p, 1),
            api.llama_sampler_init_min_p(sampling.min_p, 1),
            api.llama_sampler_init_temp(sampling.temperature),
            api.llama_sampler_init_dist(sampling.seed),
        ]
    for part in parts:
        api.llama_sampler_chain_add(chain, part)
    return chain


def _chat_template(model: Model) -> str | None:
    found = model.api.llama_model_chat_template(model.handle, None)
    return found.decode("utf-8", "replace") if found else None


def _render(model: Model, template: str, prompt: str, system: str | None) -> str:
    """The prompt in the model's own chat format, with the opening of an answer at its end."""
    chat_format = runtime.import_llama_cpp().llama_chat_format
    api = model.api
    special = {
        name: model.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""
        for name, token in (
            ("bos", api.llama_vocab_bos(model.vocab)),
            ("eos", api.llama_vocab_eos(model.vocab)),
        )
    }
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    try:
        formatter = chat_format.Jinja2ChatFormatter(
            template=template, eos_token=special["eos"], bos_token=special["bos"]
        )
        return formatter(messages=messages).prompt
    except Exception as error:  # a template is a program of the model's author and may fail in any way
        raise InputError(
            f"{model.path}: the model's chat template fails: {error}", "run without it: --no-chat"
        ) from error
