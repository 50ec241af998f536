"""Whether products or models became slower: two documents of a benchmark, before and after a change.

Compared are ratios to Q4_0, which was measured in turns with the rest, so that a machine that is slower
today raises no alarm. A row falls if its median is lower by more than the limit and no round came up to the
median of before; all rows together fall if their geometric mean does. Exit status 1 if anything falls.

    python benchmarks/matmul.py --quick --results before      # then the change
    python benchmarks/matmul.py --quick --results after
    python benchmarks/alarm.py before/matmul-*.json after/matmul-*.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import rich.console
from common import show_table

from spikequant_gguf.console import Console
from spikequant_gguf.errors import InputError
from spikequant_gguf.variants import SPIKE_TYPE

LIMIT = 0.05
_RATIOS = ("ratio_q4_0", "pp_ratio", "tg_ratio")
_CASE = ("model", "rows", "inputs", "tokens", "threads", "silent_target")
_MACHINE = ("cpu", "kernel")


@dataclass(frozen=True)
class Change:
    """A ratio to Q4_0 in both documents. ``falls``: the alarm."""

    case: str
    ratio: str
    before: float
    after: float
    falls: bool

    @property
    def change(self) -> float:
        """Relative: -0.05 is five per cent slower."""
        return self.after / self.before - 1


def compare(before: dict, after: dict, limit: float = LIMIT) -> list[Change]:
    """The rows of SPK4 that both documents have, and their geometric mean last.

    Raises:
        InputError: the documents are of two machines or two benchmarks, or have no row in common.
    """
    for name, old, new in (
        ("benchmark", before["benchmark"], after["benchmark"]),
        *((name, before["host"][name], after["host"][name]) for name in _MACHINE),
    ):
        if old != new:
            raise InputError(
                f"the documents differ in {name}: {old} and {new}", "measure before and after on one machine"
            )
    old_rows, changes = dict(_ratios(before)), []
    for key, (ratio, _, best) in _ratios(after):
        if key in old_rows:
            median = old_rows[key][0]
            falls = ratio < (1 - limit) * median and best < median
            changes.append(Change(*key, median, ratio, falls))
    if not changes:
        raise InputError(
            "the documents have no row of SPK4 in common", "measure the same shapes, tokens and threads"
        )
    means = [
        math.exp(sum(math.log(getattr(each, side)) for each in changes) / len(changes))
        for side in ("before", "after")
    ]
    return [*changes, Change("geometric mean", "", *means, means[1] < (1 - limit) * means[0])]


def _ratios(document: dict) -> Iterator[tuple[tuple[str, str], tuple[float, float, float]]]:
    """Case and name of a ratio, with its median, smallest and largest round."""
    for row in document["rows"]:
        if row["type"].lower() != SPIKE_TYPE:
            continue
        case = ", ".join(f"{name} {row[name]}" for name in _CASE if row.get(name) is not None)
        for name in _RATIOS:
            if row.get(name):
                yield (case, name), (row[name], row[f"{name}_min"], row[f"{name}_max"])


def _read(path: Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not all(key in document for key in ("benchmark", "host", "rows")):
            raise ValueError
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not a document of a benchmark", "give the JSON files of two runs of one benchmark"
        ) from error
    return document


def _render(out: rich.console.Console, changes: Sequence[Change]) -> None:
    rows = [
        [each.case, each.ratio, f"{each.before:.3f}", f"{each.after:.3f}", f"{each.change:+.1%}"]
        + ["falls" if each.falls else ""]
        for each in changes
    ]
    show_table(out, ("SPK4", "to Q4_0", "before", "after", "change", "alarm"), rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path, help="JSON document of a benchmark")
    parser.add_argument("after", type=Path, help="another one of the same benchmark, on the same machine")
    parser.add_argument("--limit", type=float, default=LIMIT, help="share that may be lost (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document on stdout")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    options = parser.parse_args(argv)
    console = Console(json_output=options.json, quiet=False, verbose=options.verbose)
    with console.exit_codes(SystemExit):
        changes = compare(_read(options.before), _read(options.after), options.limit)
        console.result(
            lambda: {"rows": [asdict(each) | {"change": each.change} for each in changes]},
            lambda out: _render(out, changes),
        )
    return int(any(each.falls for each in changes))


if __name__ == "__main__":
    sys.exit(main())
