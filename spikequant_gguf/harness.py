"""A model for EleutherAI's lm-evaluation-harness, in this process: no server, no schema between the two.

    import lm_eval
    from spikequant_gguf.harness import HarnessModel

    with HarnessModel("model-SPK4.gguf") as model:
        print(lm_eval.simple_evaluate(model, tasks=["arc_easy"], bootstrap_iters=0)["results"])

Needs the extra `evaluate`. Works for every GGUF file that the runtime reads, so that types can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, SpikeQuantError, UnsupportedError
from .evaluation import Model

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise SpikeQuantError(
        f"lm-evaluation-harness is missing: {error}", "run pip install 'spikequant-gguf[evaluate]'"
    ) from error

__all__ = ["HarnessModel"]

_NEW_TOKENS = 256  # where a task names no number


class HarnessModel(TemplateLM):
    """A GGUF model as lm_eval.simple_evaluate() takes it. A context manager.

    Args:
        model: path of the file.
        ctx_size: tokens of a context; longer requests lose tokens at their start.
        threads: that compute; None for one per physical core.

    Raises:
        RuntimeMissingError, InputError: as `Model`.
    """

    def __init__(self, model: str | Path, *, ctx_size: int = 2048, threads: int | None = None) -> None:
        super().__init__()
        self._model = Model(model, ctx_size=ctx_size, threads=threads)
        api, vocab = self._model.api, self._model.vocab
        self._eos: int = api.llama_vocab_eos(vocab)
        self._bos: int = api.llama_vocab_bos(vocab)

    def __enter__(self) -> HarnessModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model's memory."""
        self._model.close()

    # ---- tokens, as TemplateLM wants them

    @property
    def eot_token_id(self) -> int:
        return self._eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self._bos if self._bos >= 0 else self._eos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        special = True if add_special_tokens is None else add_special_tokens
        return self._model.tokenize(string.encode(), add_special=special, parse_special=True).tolist()

    # ---- what tasks ask for

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would have written it."""
        scores = []
        for (context, continuation), before, after in tqdm(requests, disable=disable_tqdm):
            score = self._score(before, after)
            self.cache_hook.add_partial("loglikelihood", (context, continuation), score)
            scores.append(score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, cut into windows that overlap in one token."""
        totals = []
        for request in tqdm(requests, disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._model.ctx_size - 1,
                context_len=1,
            )
            total = sum(self._score(*make_disjoint_window(window))[0] for window in windows)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            totals.append(total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop word.

        Raises:
            UnsupportedError: a task wants random samples.
        """
        texts = []
        for request in tqdm(requests, disable=disable_tqdm):
            context, options = request.args
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise UnsupportedError("this task samples at random", "choose tasks that decode greedily")
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            text = self._continue(context, options.get("max_gen_toks", _NEW_TOKENS), stops)
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    # ---- the model

    def _score(self, before: Sequence[int], after: Sequence[int]) -> tuple[float, bool]:
        """Log-probability of the tokens `after`, and whether each was the most likely one."""
        if len(after) > self._model.ctx_size:
            raise InputError(
                f"a continuation of {len(after)} tokens does not fit a context of {self._model.ctx_size}",
                "use a larger ctx_size",
            )
        tokens = [*before, *after][-self._model.ctx_size - 1 :]
        first = len(tokens) - len(after) - 1
        total, greedy, done = 0.0, True, 0
        for logits in self._model.logits(tokens[:-1], first):
            wanted = np.asarray(after[done : done + len(logits)])
            rows = np.arange(len(logits))
            total += float((logits[rows, wanted] - _log_sum_exp(logits)).sum())
            greedy = greedy and bool((logits.argmax(axis=1) == wanted).all())
            done += len(logits)
        return total, greedy

    def _continue(self, context: str, n_new: int, stops: Sequence[str]) -> str:
        model = self._model
        n_new = min(n_new, model.ctx_size - 1)
        tokens = self.tok_encode(context)[-(model.ctx_size - n_new) :]
        for block in model.logits(tokens, len(tokens) - 1):
            token = int(block[-1].argmax())
        written = b""
        for position in range(len(tokens), len(tokens) + n_new):
            if model.api.llama_vocab_is_eog(model.vocab, token):
                break
            written += model.piece(token)
            text = written.decode("utf-8", "replace")
            ends = [text.index(stop) for stop in stops if stop in text]
            if ends:
                return text[: min(ends)]
            token = int(model.decode([token], position, outputs=1)[0].argmax())
        return written.decode("utf-8", "replace")


def _log_sum_exp(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of each row, in double precision."""
    values = logits.astype(np.float64)
    largest = values.max(axis=1)
    return largest + np.log(np.exp(values - largest[:, None]).sum(axis=1))
