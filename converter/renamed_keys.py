"""Runs llama.cpp's converter with configuration keys under the names that it knows.

    renamed_keys.py SCRIPT ARGUMENT...

transformers 5 gives some keys new names when it reads a config.json, of which the pinned converter knows the
old ones only. A program of its own: it runs with the converter's gguf package, not ours.
"""

from __future__ import annotations

import runpy
import sys
from functools import wraps
from pathlib import Path
from typing import Any

# Old name: dictionary and key that hold the value now.
_RENAMED = {"rotary_pct": ("rope_parameters", "partial_rotary_factor")}


def _with_old_names(config: Any) -> Any:
    for old, (place, new) in _RENAMED.items():
        values = getattr(config, place, None)
        if not hasattr(config, old) and isinstance(values, dict) and new in values:
            setattr(config, old, values[new])
    return config


def main() -> None:
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained

    @wraps(read)
    def from_pretrained(*arguments: Any, **options: Any) -> Any:
        return _with_old_names(read(*arguments, **options))

    AutoConfig.from_pretrained = from_pretrained
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
