"""Measured cases of a long measurement, kept in a file, so that it goes on where it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from .files import atomic_path
from .ggml_patch.cache import make_folder

__all__ = ["Journal"]


class Journal:
    """Rows by case, one JSON line each, written as soon as a case is measured.

    path: of the file, in a folder that exists or is made. identity: what the rows depend on (arguments,
    machine, patch); a file of another identity is begun anew.
    """

    def __init__(self, path: Path, identity: object) -> None:
        self._path = path
        self._identity = json.dumps(identity, sort_keys=True)
        self._cases: dict[str, list[dict]] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for line in lines[1:] if lines[:1] == [self._identity] else []:
            case = json.loads(line)
            self._cases[case["case"]] = case["rows"]

    def __contains__(self, case: str) -> bool:
        return case in self._cases

    def __getitem__(self, case: str) -> list[dict]:
        """Rows of a case that was measured."""
        return self._cases[case]

    def rows(self, case: str, measure: Callable[[], list[dict]]) -> list[dict]:
        """Rows of a case: those kept, or those that `measure` gives."""
        if case not in self._cases:
            self._cases[case] = measure()
            lines = [json.dumps({"case": name, "rows": rows}) for name, rows in self._cases.items()]
            make_folder(self._path.parent)
            with atomic_path(self._path) as partial:
                partial.write_text("\n".join([self._identity, *lines]) + "\n", encoding="utf-8")
        return self._cases[case]

    def close(self) -> None:
        """All is measured and kept elsewhere."""
        self._path.unlink(missing_ok=True)
