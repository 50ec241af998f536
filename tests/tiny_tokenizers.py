"""Small tokenizers, trained in a moment on a text of our own: SentencePiece, byte-level BPE, WordPiece."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["HARD_TEXT", "VOCABULARY", "bpe", "sentencepiece", "wordpiece"]

VOCABULARY = 512
"""Entries that the embeddings of the tiny models have; a tokenizer may use fewer."""

HARD_TEXT = (
    "Hello, World!  Two spaces\tand a tab;\n\n\nthree lines.   \n"
    "naïve café, Zürich: ½ + ¼ = ¾ … 3.14159 1000000 v2.0.1 0x1F\n"
    "don't I'LL we've SHE'D 'quoted' “curly” «guillemets» — dash–dash\n"
    "日本語の文章。한국어 텍스트, العربية والعبرية עברית, ไทย, हिन्दी\n"
    "👩‍👩‍👧‍👦 🇨🇭 🏳️‍🌈 e\u0301 \u200b\ufeff zero\u00a0width\n"
    "def f(x):\n    return {'a': [x**2, -1e-9]}  # code\n\r\n\x07end"
)
"""What tokenizers stumble over: spaces, contractions, digits, scripts, joined emoji, control characters."""

_TEXT = (
    "The quick brown fox jumps over the lazy dog, and 12 neurons fire 345 spikes in 6789 steps.\n"
    "A neuron adds the weights of what fires; when its potential passes the threshold, it fires, too.\n"
    "Don't we'll it's I'm they've she'd: it isn't what it was. Is it? Yes! def f(x): return x + 1\n"
    "Ein Neuron addiert die Gewichte, naïve cafés in Zürich; été, où, ça.\n"
)
_SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]
_TOKENIZER_CONFIG = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "model_max_length": 256,
}


def sentencepiece(folder: Path) -> None:
    """Writes tokenizer.model, with byte fallback, as Llama's is."""
    import sentencepiece

    text = folder / "text"
    text.write_text(_TEXT * 8, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=3,
        minloglevel=2,
    )
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
    _write_config(folder, "LlamaTokenizer", add_bos_token=True, add_eos_token=False)


def bpe(folder: Path) -> None:
    """Writes tokenizer.json of a byte-level BPE, as GPT-2's is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8,
        special_tokens=_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(keepends=True) * 8, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_config(folder, "PreTrainedTokenizerFast")


def wordpiece(folder: Path) -> None:
    """Writes tokenizer.json and vocab.txt of a lower-case WordPiece, as BERT's is."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY - 8, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT.splitlines() * 8, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in by_id), encoding="utf-8")
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        **{f"{name[1:-1].lower()}_token": name for name in specials},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _write_config(folder: Path, tokenizer_class: str, **more: object) -> None:
    config = {**_TOKENIZER_CONFIG, "tokenizer_class": tokenizer_class, **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
