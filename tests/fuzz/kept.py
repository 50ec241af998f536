"""kept.py TARGET WHY FILE... [--folder FOLDER]: keeps inputs of a native fuzz target, crashes above all.

They become lines of kept/TARGET.txt, in hexadecimal digits with the reason behind them. `test_fuzz.py`
replays all of them with sanitizers, and `make fuzz` starts from them. What a reader or the runtime falls
over becomes a case of `tests/hostile.py` instead, which makes the file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

FOLDER = Path(__file__).parent / "kept"


def kept_inputs(target: str, folder: Path = FOLDER) -> list[bytes]:
    """Inputs kept for a target, in the order of the file; none if there is no file."""
    path = folder / f"{target}.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [bytes.fromhex(line.partition("#")[0]) for line in lines]


def keep(target: str, why: str, inputs: list[bytes], folder: Path = FOLDER) -> int:
    """Adds those that are not yet there; returns how many."""
    known = set(kept_inputs(target, folder))
    new = [data for data in dict.fromkeys(inputs) if data not in known]
    folder.mkdir(exist_ok=True)
    with (folder / f"{target}.txt").open("a", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{data.hex()} # {why}\n" for data in new)
    return len(new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("why")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    given = parser.parse_args()
    inputs = [path.read_bytes() for path in given.files]
    number = keep(given.target, given.why, inputs, given.folder)
    print(f"{number} of {len(inputs)} added to {given.folder / given.target}.txt")


if __name__ == "__main__":
    main()
