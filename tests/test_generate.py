"""Writing text: greedy choice against logits computed by hand, templates, limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_model import CHAT_TEMPLATE

from spikequant_gguf import InputError, evaluation
from spikequant_gguf import generate as module
from spikequant_gguf.evaluation import Model
from spikequant_gguf.generate import Sampling, generate
from spikequant_gguf.runtime import RuntimeInfo

GREEDY = Sampling(temperature=0.0)


@pytest.mark.parametrize("kind", ["f16", "spk4"])
def test_greedy_text_takes_the_largest_logit(tiny_models: dict[str, Path], kind: str) -> None:
    parts: list[str] = []
    result = generate(
        tiny_models[kind], "the of and", n_predict=12, sampling=GREEDY, threads=1, stream=parts.append
    )
    with Model(tiny_models[kind], ctx_size=64, threads=1) as model:
        tokens = model.tokenize(b"the of and").tolist()
        prompt = len(tokens)
        expected: list[int] = []
        logits = model.decode(tokens, 0, outputs=1)
        for position in range(prompt, prompt + 12):
            expected.append(int(np.argmax(logits[0])))
            logits = model.decode([expected[-1]], position, outputs=1)
        text = b"".join(model.piece(token) for token in expected).decode("utf-8", "replace")
    assert list(result.tokens) == expected[: len(result.tokens)]
    assert len(result.tokens) == 12 or result.stopped
    assert result.text == "".join(parts)
    if not result.stopped:
        assert result.text == text
    assert (result.prompt_tokens, result.chat, result.threads) == (prompt, False, 1)


def test_seed_decides(tiny_models: dict[str, Path]) -> None:
    texts = [
        generate(tiny_models["f16"], "the", n_predict=20, sampling=Sampling(1.5, seed=seed), threads=1).tokens
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_characters_split_between_tokens_stay_whole(
    tiny_model_f32: Path, runtime: RuntimeInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Model, "piece", lambda self, token, special=False: b"\xc3" if next(turns) else b"\xa4"
    )
    turns = iter([True, False] * 10)
    parts: list[str] = []
    result = generate(tiny_model_f32, "the", n_predict=4, sampling=GREEDY, stream=parts.append)
    if not result.stopped:
        assert (parts, result.text) == (["ä", "ä"], "ää")


def test_chat_template_is_the_models_own(
    runtime: RuntimeInfo, tiny_model_factory: Callable[..., Path]
) -> None:
    model = tiny_model_factory(chat_template=CHAT_TEMPLATE)
    with Model(model) as opened:
        expected = opened.tokenize(b"<system>of<user>the<assistant>", add_special=False, parse_special=True)
    chat = generate(model, "the", system="of", n_predict=2, sampling=GREEDY)
    assert (chat.chat, chat.prompt_tokens) == (True, len(expected))
    plain = generate(model, "the", chat=False, n_predict=2, sampling=GREEDY)
    assert not plain.chat
    assert plain.prompt_tokens < chat.prompt_tokens

    broken = tiny_model_factory(chat_template="{{ raise_exception('no such role') }}")
    with pytest.raises(InputError, match="chat template fails: no such role"):
        generate(broken, "the")


def test_long_prompts_are_computed_in_parts(tiny_models: dict[str, Path]) -> None:
    result = generate(tiny_models["f16"], "the of and to " * 300, n_predict=3, sampling=GREEDY)
    assert result.prompt_tokens > 2 * module._BATCH
    assert module._BATCH <= evaluation._BATCH


def test_bad_requests(runtime: RuntimeInfo, tiny_model_f32: Path) -> None:
    for problem, options in (
        ("prompt is empty", {"prompt": ""}),
        ("must be positive", {"n_predict": 0}),
        ("has no chat template", {"chat": True}),
        ("needs a chat template", {"system": "be brief"}),
        ("do not fit a context of 8", {"ctx": 8}),
    ):
        with pytest.raises(InputError, match=problem):
            generate(tiny_model_f32, **({"prompt": "the of"} | options))
