"""kept.py TARGET WHY FILE...: keeps inputs of a native fuzz target, crashes above all, for every test run.

They become lines of kept/TARGET.txt, in hexadecimal digits with the reason behind them. `test_fuzz.py`
replays all of them with sanitizers, and `make fuzz` starts from them. What a reader or the runtime falls over
becomes a case of `tests/hostile.py` instead, which makes the file. PYTHONPATH names the folder of the tests.
"""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "kept"


def kept_inputs(target: str) -> list[bytes]:
    """Inputs kept for a target, in the order of the file; none if there is no file."""
    path = FOLDER / f"{target}.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [bytes.fromhex(line.partition("#")[0]) for line in lines]


def keep(target: str, why: str, inputs: list[bytes]) -> int:
    """Adds those that are not yet there; returns how many."""
    known = set(kept_inputs(target))
    new = [data for data in dict.fromkeys(inputs) if data not in known]
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / f"{target}.txt").open("a", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{data.hex()} # {why}\n" for data in new)
    return len(new)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(f"usage: {sys.argv[0]} TARGET WHY FILE...")
    number = keep(sys.argv[1], sys.argv[2], [Path(name).read_bytes() for name in sys.argv[3:]])
    print(f"{number} of {len(sys.argv) - 3} added to {FOLDER / sys.argv[1]}.txt")
