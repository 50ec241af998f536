"""Writes a Llama model of random weights with a small SentencePiece-like vocabulary, in no time."""

from __future__ import annotations

import string
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import LlamaFileType, PoolingType, TokenType

UNKNOWN, BOS, EOS = 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_WORDS = "the of and to in a is was for on as with he it by at from his that an were are which this".split()


def vocabulary() -> list[tuple[str, float, TokenType]]:
    """(piece, score, type) by token id: specials, bytes, characters, then pieces that merge step by step."""
    pieces = [
        ("<unk>", 0.0, TokenType.UNKNOWN),
        ("<s>", 0.0, TokenType.CONTROL),
        ("</s>", 0.0, TokenType.CONTROL),
    ]
    pieces += [(f"<0x{byte:02X}>", 0.0, TokenType.BYTE) for byte in range(256)]
    merged = {"▁": None}
    merged |= dict.fromkeys(string.ascii_letters + string.digits + string.punctuation)
    for word in _WORDS:
        merged |= dict.fromkeys(f"▁{word}"[: end + 1] for end in range(1, len(word) + 1))
    return pieces + [(piece, -float(rank), TokenType.NORMAL) for rank, piece in enumerate(merged)]


def write_tiny_model(
    path: Path,
    *,
    n_embd: int = 128,
    n_ff: int = 256,
    n_layer: int = 2,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_ctx: int = 2048,
    seed: int = 0,
    add_bos: bool = True,
    tied: bool = False,
    dtype: type[np.floating] = np.float32,
    chat_template: str | None = None,
    extra_pieces: int = 0,
    architecture: str = "llama",
    pooling: PoolingType | None = None,
) -> Path:
    """A GGUF of architecture llama or qwen2.

    dtype: of the matrices. extra_pieces: makes the vocabulary larger. pooling: of states to an embedding.
    """
    rng = np.random.default_rng(seed)
    pieces = vocabulary()
    pieces += [(f"extra{number}", -1e4, TokenType.NORMAL) for number in range(extra_pieces)]
    head = n_embd // n_head
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_file_type(LlamaFileType.ALL_F32 if dtype == np.float32 else LlamaFileType.MOSTLY_F16)
    writer.add_block_count(n_layer)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([int(kind) for _, _, kind in pieces])
    writer.add_unk_token_id(UNKNOWN)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(add_bos)
    writer.add_add_eos_token(False)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    if chat_template is not None:
        writer.add_chat_template(chat_template)

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        values = rng.standard_normal((rows, columns)) * (scale / np.sqrt(columns))
        # some large weights and channels, as trained models have
        values[:, rng.integers(0, columns, 2)] *= 4
        writer.add_tensor(f"{name}.weight", values.astype(dtype))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", (1 + 0.2 * rng.standard_normal(n_embd)).astype(np.float32))

    matrix("token_embd", len(pieces), n_embd, scale=np.sqrt(n_embd) / 4)
    for layer in range(n_layer):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        matrix(f"{block}.attn_q", n_embd, n_embd)
        matrix(f"{block}.attn_k", head * n_head_kv, n_embd)
        matrix(f"{block}.attn_v", head * n_head_kv, n_embd)
        if architecture == "qwen2":
            for part, size in (("q", n_embd), ("k", head * n_head_kv), ("v", head * n_head_kv)):
                bias = 0.3 * rng.standard_normal(size)
                writer.add_tensor(f"{block}.attn_{part}.bias", bias.astype(np.float32))
        matrix(f"{block}.attn_output", n_embd, n_embd)
        norm(f"{block}.ffn_norm")
        matrix(f"{block}.ffn_gate", n_ff, n_embd)
        matrix(f"{block}.ffn_up", n_ff, n_embd)
        matrix(f"{block}.ffn_down", n_embd, n_ff)
    norm("output_norm")
    if not tied:
        matrix("output", len(pieces), n_embd, scale=1.5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def some_text(n_words: int, seed: int = 0) -> str:
    """Words of the vocabulary, names and numbers in random order, in lines."""
    rng = np.random.default_rng(seed)
    words = [*_WORDS, "Zürich", "spike", "1024", "neuron,", "end."]
    picked = [words[index] for index in rng.integers(0, len(words), n_words)]
    return "\n".join(" ".join(picked[start : start + 12]) for start in range(0, n_words, 12)) + "\n"
