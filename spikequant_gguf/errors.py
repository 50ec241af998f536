"""The exceptions of this package: one sentence about what is wrong, and what to do about it."""

from __future__ import annotations

__all__ = [
    "BuildError",
    "FormatError",
    "InputError",
    "OutputError",
    "RuntimeMissingError",
    "SpikeQuantError",
    "UnsupportedError",
]


_LONGEST = 1000


class SpikeQuantError(Exception):
    """Base of all errors that this package raises on purpose.

    Names in the message may come from a hostile file: lines are joined, what a terminal obeys is escaped,
    and what is too long is shortened.

    Attributes:
        message: one sentence that says what is wrong.
        remedy: what the user can do about it, or None.
        exit_code: exit status of the command line for this kind of error.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str | None = None) -> None:
        message = _printable(message)
        super().__init__(message)
        self.message = message
        self.remedy = remedy


def _printable(text: str) -> str:
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in " ".join(text.splitlines())
    )


class InputError(SpikeQuantError):
    """A file, a text or an argument is missing, unreadable or wrong."""

    exit_code = 3


class FormatError(InputError):
    """Spike data that breaks a rule of the format.

    Args:
        reason: the broken rule, without the place.
        remedy: what to do about it; a general advice by default.
        tensor: name of the tensor.
        row: index of the row (of weights) or token (of activations).
        block: index of the block in its row.
        row_word: what a row is called in the message.
    """

    def __init__(
        self,
        reason: str,
        remedy: str
        | None = "the data is damaged or was written by something else: download or convert it again",
        *,
        tensor: str | None = None,
        row: int | None = None,
        block: int | None = None,
        row_word: str = "row",
    ) -> None:
        place = []
        if tensor is not None:
            place.append(f"tensor '{tensor}'")
        if row is not None:
            place.append(f"{row_word} {row}")
        if block is not None:
            place.append(f"block {block}")
        super().__init__(f"{', '.join(place)}: {reason}" if place else reason, remedy)
        self.reason = reason
        self.tensor = tensor
        self.row = row
        self.block = block


class RuntimeMissingError(SpikeQuantError):
    """llama-cpp-python is absent, not patched, or patched for another version."""

    exit_code = 4


class BuildError(SpikeQuantError):
    """Downloading, patching or compiling llama-cpp-python failed."""

    exit_code = 5


class OutputError(SpikeQuantError):
    """A result cannot be written: no space, no permission, or the file is there already."""

    exit_code = 6


class UnsupportedError(SpikeQuantError):
    """A model architecture, tensor type or dimension that this package does not handle."""

    exit_code = 7
