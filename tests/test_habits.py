"""Habits of those who convert models: names, authorship, parts, importance matrices, tokenizers, cards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import tiny_tokenizers
from architectures import ARCHITECTURES, write_checkpoint
from converter_models import tensors_of
from converter_server import ConverterServer
from gguf.constants import TokenType
from tiny_tokenizers import HARD_TEXT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from spikequant_gguf.cli.app import app
from spikequant_gguf.converter import ConvertOptions, checkpoint, convert
from spikequant_gguf.errors import InputError, OutputError
from spikequant_gguf.evaluation import Model
from spikequant_gguf.gguf_header import read_header
from spikequant_gguf.runtime import converter_script, tool

pytestmark = pytest.mark.usefixtures("runtime")

AUTHORSHIP = {
    "general.author": "Ada Lovelace",
    "general.license": "apache-2.0",
    "general.tags": ["spiking", "chat"],
    "general.basename": "Babbage",
}


def options(**chosen: object) -> ConvertOptions:
    return ConvertOptions(threads=1, **chosen)  # type: ignore[arg-type]


# ---- metadata


def test_authorship_name_and_single_keys(tiny_model_f32: Path, tmp_path: Path) -> None:
    file = tmp_path / "authorship.json"
    file.write_text(json.dumps(AUTHORSHIP), encoding="utf-8")
    report = convert(
        tiny_model_f32,
        tmp_path,
        options(
            metadata=file,
            model_name="Difference Engine",
            override_kv=("tokenizer.ggml.add_bos_token=bool:false", "llama.rope.freq_base=float:5000"),
        ),
    )
    assert report.path == tmp_path / "Babbage-SPK4.gguf"
    found = read_header(report.path).metadata
    assert {key: found[key] for key in AUTHORSHIP} == AUTHORSHIP
    assert found["general.name"] == "Difference Engine"
    assert found["llama.rope.freq_base"] == 5000.0
    assert "--model-name 'Difference Engine'" in found["spikequant.command"]
    with Model(report.path, ctx_size=64) as model:
        assert model.bos is None


@pytest.mark.parametrize(
    "chosen, message",
    [
        ({"override_kv": ("general.architecture=str:bert",)}, "cannot be set"),
        ({"override_kv": ("spikequant.version=int:2",)}, "cannot be set"),
        ({"override_kv": ("a.b=int:1.5",)}, "not of the form"),
        ({"override_kv": ("a.b=int:99999999999",)}, "not of the form"),
        ({"override_kv": ("a.b=float:nan",)}, "not of the form"),
        ({"override_kv": ("a.b=bool:yes",)}, "not of the form"),
        ({"override_kv": ("a b=int:1",)}, "no key of metadata"),
        ({"override_kv": ("a.b",)}, "not of the form"),
        ({"split_max_size": "4 GB"}, "no size of a file"),
        ({"split_max_size": "0M"}, "no size of a file"),
    ],
)
def test_what_cannot_be_set(tiny_model_f32: Path, tmp_path: Path, chosen: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        convert(tiny_model_f32, tmp_path / "out.gguf", options(**chosen))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "damaged"),
        ("[]", "no JSON object"),
        ('{"author": "Ada"}', "no key of authorship"),
        ('{"general.tags": [1]}', "neither a text nor a list"),
        ('{"general.architecture": "bert"}', "cannot be set"),
    ],
)
def test_bad_files_of_authorship(tiny_model_f32: Path, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "authorship.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        convert(tiny_model_f32, tmp_path / "out.gguf", options(metadata=file))


# ---- models in parts


def logits(path: Path) -> np.ndarray:
    with Model(path, ctx_size=64, threads=1) as model:
        return next(model.logits(np.arange(5, 37, dtype=np.int32))).copy()


def test_parts_in_and_out(tiny_model_factory: Callable[..., Path], tmp_path: Path) -> None:
    """A model in parts gives the same tensors as the whole one, and parts run as the whole one does."""
    source = tiny_model_factory(n_embd=512, n_ff=1024, n_layer=3)
    whole = convert(source, tmp_path / "whole.gguf", options())
    split = [tool("llama-gguf-split"), "--split", "--split-max-size", "10M", source, tmp_path / "source"]
    subprocess.run(split, check=True, capture_output=True)
    first = sorted(tmp_path.glob("source-00001-of-*.gguf"))[0]
    assert not first.name.endswith("of-00001.gguf")

    report = convert(first, tmp_path / "out.gguf", options(split_max_size="1M"))
    assert len(report.files) > 2 and report.path == report.files[0]
    assert [file.name for file in report.files] == [
        f"out-{number:05d}-of-{len(report.files):05d}.gguf" for number in range(1, len(report.files) + 1)
    ]
    assert not (tmp_path / "out.gguf").exists() and not list(tmp_path.glob(".spikequant-*"))
    assert report.file_bytes == sum(file.stat().st_size for file in report.files)
    parts = {name: tensor for file in report.files for name, tensor in tensors_of(file).items()}
    assert parts == tensors_of(whole.path)
    np.testing.assert_array_equal(logits(report.path), logits(whole.path))

    with pytest.raises(OutputError, match="exists already"):
        convert(first, tmp_path / "out.gguf", options(split_max_size="1M"))
    again = convert(first, tmp_path / "out.gguf", options(split_max_size="2M", force=True))
    assert sorted(tmp_path.glob("out-*.gguf")) == list(again.files)


def test_a_small_model_stays_one_file(tiny_model_f32: Path, tmp_path: Path) -> None:
    report = convert(tiny_model_f32, tmp_path / "out.gguf", options(split_max_size="1G"))
    assert report.files == (tmp_path / "out.gguf",) == (report.path,)


# ---- importance matrices by llama-imatrix itself


def test_importance_matrices_of_both_forms(tiny_model_f32: Path, tiny_text: Path, tmp_path: Path) -> None:
    results = []
    for form in ("gguf", "dat"):
        matrix = tmp_path / f"imatrix.{form}"
        command = [tool("llama-imatrix"), "-m", tiny_model_f32, "-f", tiny_text, "-o", matrix]
        command += ["--output-format", form, "-c", "64", "--chunks", "4", "-t", "1"]
        subprocess.run(command, check=True, capture_output=True)
        report = convert(tiny_model_f32, tmp_path / f"{form}.gguf", options(importance=matrix))
        metadata = read_header(report.path).metadata
        assert metadata["quantize.imatrix.file"] == matrix.name
        assert metadata["quantize.imatrix.chunks_count"] == 4
        results.append(tensors_of(report.path))
    plain = convert(tiny_model_f32, tmp_path / "plain.gguf", options())
    assert tensors_of(plain.path) != results[0]
    # the old form keeps means instead of sums, which may round a weight the other way
    equal = [results[0][name] == results[1][name] for name in results[0]]
    assert sum(equal) >= len(equal) - 2


# ---- tokenizers, templates and cards


@pytest.fixture(scope="module")
def converter(runtime) -> Iterator[None]:
    with ConverterServer(converter_script()) as server, pytest.MonkeyPatch.context() as patch:
        names = SimpleNamespace(**vars(checkpoint.subprocess) | {"Popen": server.popen})
        patch.setattr(checkpoint, "subprocess", names)
        yield


def tokens(model: Path, text: str) -> list[int]:
    with Model(model, ctx_size=64, threads=1) as loaded:
        return loaded.tokenize(text.encode(), add_special=False).tolist()


def small_llama(tokenizer: Callable[[Path], None], folder: Path, vocab_size: int) -> Path:
    llama = ARCHITECTURES["Llama"]
    sized = type(llama)(llama.config, llama.model, llama.name, tokenizer, llama.spiking)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    write_checkpoint(sized, folder, vocab_size=vocab_size, tie_word_embeddings=True, **sizes)
    return folder


def test_sentencepiece_tokens_are_those_of_the_library(converter, data_dir: Path, tmp_path: Path) -> None:
    """Llama 2's tokenizer of 32,000 pieces on a text of all that is difficult."""
    source = data_dir / "llama2-tokenizer.model"

    def copy(folder: Path) -> None:
        shutil.copy(source, folder / "tokenizer.model")

    report = convert(small_llama(copy, tmp_path / "llama2", 32000), tmp_path / "out.gguf", options())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(source))
    assert tokens(report.path, HARD_TEXT) == processor.encode(HARD_TEXT)


def test_bpe_tokens_are_those_of_transformers(converter, smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2's tokenizer and its chat template."""
    import transformers

    source = read_header(smollm2).metadata
    words, template = source["tokenizer.ggml.tokens"], source["tokenizer.chat_template"]

    def save(folder: Path) -> None:
        """The tokenizer as it is published; llama.cpp knows it by what it makes of a certain text."""
        merges = [tuple(merge.split(" ")) for merge in source["tokenizer.ggml.merges"]]
        tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        kinds = source["tokenizer.ggml.token_type"]
        tokenizer.add_special_tokens(
            [word for word, kind in zip(words, kinds, strict=True) if kind == TokenType.CONTROL]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
        config |= {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")

    folder = small_llama(save, tmp_path / "smol", len(words))
    found = convert(folder, tmp_path / "out.gguf", options()).path
    original = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokens(found, HARD_TEXT) == original.encode(HARD_TEXT, add_special_tokens=False)
    metadata = read_header(found).metadata
    assert metadata["tokenizer.chat_template"] == template
    assert metadata["tokenizer.ggml.pre"] == "smollm" and metadata["tokenizer.ggml.tokens"] == words


def test_small_tokenizers_of_all_kinds(converter, tmp_path: Path) -> None:
    """Those that the architectures are tested with; they know few letters and so fall back to bytes often."""
    import transformers

    for kind in (tiny_tokenizers.sentencepiece, tiny_tokenizers.bpe):
        folder = small_llama(kind, tmp_path / kind.__name__, tiny_tokenizers.VOCABULARY)
        report = convert(folder, tmp_path / f"{kind.__name__}.gguf", options())
        if kind is tiny_tokenizers.bpe:
            expected = transformers.AutoTokenizer.from_pretrained(folder).encode(
                HARD_TEXT, add_special_tokens=False
            )
        else:
            model = str(folder / "tokenizer.model")
            expected = sentencepiece.SentencePieceProcessor(model_file=model).encode(HARD_TEXT)
        assert tokens(report.path, HARD_TEXT) == expected


def test_model_card_and_template_file(converter, tmp_path: Path) -> None:
    folder = small_llama(tiny_tokenizers.sentencepiece, tmp_path / "Tiny-Card-1B", tiny_tokenizers.VOCABULARY)
    card = "---\nlicense: mit\nlanguage: [de, en]\ntags: [test]\n---\n# A card\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}ü"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    found = read_header(convert(folder, tmp_path / "out.gguf", options()).path).metadata
    assert found["general.license"] == "mit"
    assert found["general.languages"] == ["de", "en"] and "test" in found["general.tags"]
    assert found["tokenizer.chat_template"] == template


# ---- the command line


def test_options_of_the_command(
    tiny_model_f32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rules = tmp_path / "rules"
    rules.write_text("# last wins\nffn_down=q8_0\nffn=f16\n", encoding="utf-8")
    command = ["convert", str(tiny_model_f32), "--outfile", "m-{ftype}.gguf", "--no-calibration", "--json"]
    command += ["--tensor-type-file", str(rules), "--tensor-type", "blk.0.ffn_down=q4_0", "--model-name", "N"]
    result = CliRunner().invoke(app, [*command, "--override-kv", "x.y=str:z", "--threads", "1"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["path"] == "m-spk4.gguf" and report["files"] == ["m-spk4.gguf"]
    types = {tensor["name"]: tensor["target_type"] for tensor in report["plan"]["tensors"]}
    assert types["blk.0.ffn_down.weight"] == "Q4_0" and types["blk.1.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "F16" and types["blk.0.attn_q.weight"] == "SPK4"
    assert read_header(Path("m-spk4.gguf")).metadata["x.y"] == "z"
    assert os.listdir(tmp_path) and not list(tmp_path.glob("*.partial"))


def test_the_shell_completes_commands() -> None:
    environment = {**os.environ, "_SPIKEQUANT_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    environment["COMP_WORDS"] = "spikequant de"
    command = [
        sys.executable,
        "-c",
        "import sys; sys.argv[0] = 'spikequant'; from spikequant_gguf.cli import main; main()",
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert sorted(result.stdout.split()) == ["demo", "dequantize"]
