"""Turns a Hugging Face checkpoint into a temporary GGUF file, with the converter of the runtime's llama.cpp.

So every architecture that llama.cpp knows can be converted, and tokenizers come out as llama.cpp makes them.
Code in a checkpoint is never run: the converter sees a folder of links that holds weights, tokenizer and
configuration only.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gguf.constants import GGMLQuantizationType

from spikequant_gguf.errors import InputError, OutputError, SpikeQuantError, UnsupportedError
from spikequant_gguf.ggml_patch.cache import link_or_copy
from spikequant_gguf.runtime import converter_script

from .progress import CHECKPOINT, DOWNLOAD, Progress, no_progress
from .shards import Shards, check_shards

__all__ = ["Checkpoint", "checkpoint_tensors", "checkpoint_to_gguf", "download", "hub_id", "open_checkpoint"]

_HUB_ID = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# What a conversion may need beside the weights: configuration, tokenizer, chat template, model card.
_PATTERNS = (
    *("*.json", "*.jsonl", "*.jinja", "*.md", "*.model", "*.model.v3", "*.tiktoken", "*.txt"),
    *("additional_chat_templates/*.jinja", "[0-9]_*/config.json"),
)
_POLL_SECONDS = 0.2
_EXTRA = "pip install 'spikequant-gguf[convert]'"
_TENSOR_LINE = re.compile(r"^INFO:hf-to-gguf:(\S+),\s+\S+ --> (\w+), shape = \{([\d, ]+)\}\s*$", re.MULTILINE)
# Architectures for which plan.py has rules of their own.
_PLANNED_AS = {
    "FalconForCausalLM": "falcon",
    "RWForCausalLM": "falcon",
    "Glm5NextForConditionalGeneration": "glm5-next",
}
# Architectures whose configuration the converter reads under names that transformers 5 has changed.
_RENAMED_KEYS = ("GPTNeoXForCausalLM",)
_TYPE_BYTES = {"f16": 2, "bf16": 2, "f32": 4}


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint.

    Attributes:
        folder: that holds it.
        name: its id on Hugging Face, or the folder's name.
        shards: its weights.
        files: all files that its conversion depends on, the weights included, by their path in the folder.
        architecture: as config.json names it, for example ``LlamaForCausalLM``.
        stamps: size and time of change of each file, when they were checked.
    """

    folder: Path
    name: str
    shards: Shards
    files: dict[str, Path]
    architecture: str
    stamps: dict[str, tuple[int, int]]

    @property
    def gguf_bytes(self) -> int:
        """About how large the temporary GGUF file will be."""
        size = _TYPE_BYTES[self.shards.float_type]
        weights = sum(_elements(tensor.shape) for tensor in self.shards.tensors)
        return weights * size + (16 << 20)

    def check_unchanged(self) -> None:
        """Raises InputError if a file has been written to since the checkpoint was opened."""
        try:
            unchanged = _stamps(self.files) == self.stamps
        except OSError:
            unchanged = False
        if not unchanged:
            raise InputError(
                f"{self.folder}: a file changed while it was read", "start again when all are complete"
            )


def hub_id(text: str) -> bool:
    """Whether a text has the form of an id on Hugging Face, ``owner/name``."""
    return _HUB_ID.fullmatch(text) is not None


def open_checkpoint(folder: Path, name: str | None = None) -> Checkpoint:
    """Checks a checkpoint folder and reads no weights yet.

    Raises:
        InputError: weights or config.json are missing or damaged, see shards.check_shards.
        UnsupportedError: it holds an adapter instead of a model.
    """
    shards = check_shards(folder)
    config_path = folder / "config.json"
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        architectures = config.get("architectures") or ["unknown"]
        architecture = str(architectures[0])
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: there is no config.json in it", "download the whole checkpoint"
        ) from error
    except (OSError, ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise InputError(
            f"{config_path}: the configuration cannot be read", "download the checkpoint again"
        ) from error
    files = {
        path.relative_to(folder).as_posix(): path
        for pattern in _PATTERNS
        for path in folder.glob(pattern)
        if path.is_file() and not path.name.startswith(".")
    }
    files |= {path.name: path for path in shards.paths}
    return Checkpoint(folder, name or folder.resolve().name, shards, files, architecture, _stamps(files))


def download(model_id: str, progress: Progress = no_progress) -> Path:
    """Fetches the files of a checkpoint from Hugging Face into its cache; returns their folder.

    Raises:
        InputError: there is no such model, no access to it, or no connection.
    """
    _require_packages("huggingface_hub")
    import huggingface_hub
    from huggingface_hub import errors

    progress(DOWNLOAD, model_id, 0, 0)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model_id,
                allow_patterns=[*_PATTERNS, "*.safetensors"],
                ignore_patterns=["*/*.safetensors", "consolidated*.safetensors"],
            )
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"'{model_id}': Hugging Face asks for an account with access to this model",
            "accept its terms on its page, then run `hf auth login`",
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise InputError(
            f"'{model_id}' is neither a file or folder here nor a public model on Hugging Face",
            "check the spelling; for a private model run `hf auth login`",
        ) from error
    except (OSError, RuntimeError, ValueError) as error:  # offline, time-outs, HTTP errors, no space
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise OutputError(f"'{model_id}' cannot be stored: {error.strerror}", "check the disk") from error
        raise InputError(
            f"'{model_id}' is no file or folder here, and Hugging Face cannot be reached to download it",
            "check the connection, or give the path of a checkpoint folder or a GGUF file",
        ) from error


def checkpoint_to_gguf(checkpoint: Checkpoint, workspace: Path, progress: Progress = no_progress) -> Path:
    """Converts to GGUF in the type that holds the weights without loss; returns the path of the file.

    Args:
        checkpoint: to convert.
        workspace: an existing, empty folder for the file and other temporary ones.
        progress: of the stage ``checkpoint``.

    Raises:
        InputError, UnsupportedError, OutputError: llama.cpp's converter fails, with its reason.
        RuntimeMissingError: the converter is not there.
    """
    target = workspace / "model.gguf"
    _run(checkpoint, workspace, target, [], progress)
    if not target.is_file():
        raise InputError(f"{checkpoint.folder}: llama.cpp's converter wrote no file", "report this as a bug")
    return target


def checkpoint_tensors(
    checkpoint: Checkpoint, workspace: Path
) -> tuple[str, list[tuple[str, tuple[int, ...], GGMLQuantizationType]]]:
    """What checkpoint_to_gguf would write, without writing it.

    Returns:
        Architecture as far as a plan depends on it, and name, shape (inputs first) and type of each tensor.
    """
    log = _run(checkpoint, workspace, workspace / "model.gguf", ["--dry-run"], no_progress)
    tensors = [
        (name, tuple(int(size) for size in shape.split(",")), GGMLQuantizationType[kind])
        for name, kind, shape in _TENSOR_LINE.findall(log)
    ]
    if not tensors:
        raise InputError(
            f"{checkpoint.folder}: llama.cpp's converter names no tensors", "report this as a bug"
        )
    return _PLANNED_AS.get(checkpoint.architecture, checkpoint.architecture), tensors


def _run(
    checkpoint: Checkpoint, workspace: Path, target: Path, options: list[str], progress: Progress
) -> str:
    """Runs the converter to its end; returns its log."""
    _require_packages("torch", "transformers", "sentencepiece")
    script = converter_script()
    folder = _link_files(checkpoint, workspace)
    log_path = workspace / "converter.log"
    # the name of the file decides nothing; llama.cpp would replace {ftype} in it
    command = [sys.executable]
    if checkpoint.architecture in _RENAMED_KEYS:
        command.append(str(Path(__file__).with_name("renamed_keys.py")))
    command += [str(script), str(folder), "--outfile", str(target)]
    command += ["--outtype", checkpoint.shards.float_type, *options]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=_environment(script, workspace),
        )
        try:
            while True:
                try:
                    status = process.wait(_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    done = target.stat().st_size if target.exists() else 0
                    progress(
                        CHECKPOINT, checkpoint.name, min(done, checkpoint.gguf_bytes), checkpoint.gguf_bytes
                    )
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    text = log_path.read_text(encoding="utf-8", errors="replace")
    if status != 0:
        raise _failure(checkpoint, status, text)
    progress(CHECKPOINT, checkpoint.name, checkpoint.gguf_bytes, checkpoint.gguf_bytes)
    return text


def _link_files(checkpoint: Checkpoint, workspace: Path) -> Path:
    """A folder of the model's name with links to all that a conversion depends on, and none to code."""
    folder = workspace / "checkpoint" / (Path(checkpoint.name).name or "model")
    for name, path in checkpoint.files.items():
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.symlink_to(path.resolve())
        except OSError:  # Windows lets few users make symbolic links
            link_or_copy(path.resolve(), link)
    return folder


def _environment(script: Path, workspace: Path) -> dict[str, str]:
    paths = [str(script.parent / "gguf-py"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        # nothing is fetched, and no code that an earlier download left in the cache is found
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": str(workspace / "hub"),
        "HF_MODULES_CACHE": str(workspace / "hub" / "modules"),
        "TQDM_DISABLE": "1",
    }


def _require_packages(*names: str) -> None:
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise SpikeQuantError(f"checkpoints need the Python package {' and '.join(missing)}", f"run {_EXTRA}")


def _failure(checkpoint: Checkpoint, status: int, log: str) -> SpikeQuantError:
    """The converter's log in one sentence."""
    place = str(checkpoint.folder)
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if re.search(r"Model \S+ is not supported|Architecture \S+ not supported", log):
        return UnsupportedError(
            f"{place}: llama.cpp knows no architecture {checkpoint.architecture}",
            "only models that llama.cpp runs can be converted",
        )
    if "pre-tokenizer was not recognized" in log:
        return UnsupportedError(
            f"{place}: llama.cpp does not know this tokenizer", "use a model that llama.cpp runs"
        )
    missing = re.search(r"No module named '([\w.]+)'", last)
    if missing is not None:
        return SpikeQuantError(
            f"{place}: its conversion needs the Python package {missing.group(1)}", f"run {_EXTRA}"
        )
    if "No space left on device" in log:
        return OutputError(
            f"{place}: no space for the temporary GGUF file of about {checkpoint.gguf_bytes / 2**30:.1f} GiB",
            "free space on the disk of the output, or write to another one with -o",
        )
    if status < 0:
        return InputError(
            f"{place}: llama.cpp's converter was ended by signal {-status}",
            "check the free memory, then try again",
        )
    if "trust_remote_code" in last:
        return UnsupportedError(
            f"{place}: its tokenizer needs code from the checkpoint, which is not run",
            "use a model that llama.cpp runs",
        )
    reason = re.sub(r"^(ERROR:[\w.-]+:|\w*(Error|Exception): )", "", last) or f"status {status}"
    return InputError(
        f"{place}: llama.cpp's converter fails: {reason}", "check that the checkpoint is complete"
    )


def _stamps(files: dict[str, Path]) -> dict[str, tuple[int, int]]:
    states = {name: path.stat() for name, path in files.items()}
    return {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()}


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
