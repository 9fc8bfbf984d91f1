"""Compare two results of the benchmarks: ``python -m benchmarks.compare OLD.json NEW.json``.

Times of the peers (torchdeq, SciPy) tell how much faster or slower the machine itself was; ours are
measured against that. Ends with exit code 1 if something of ours got worse, 2 if a file is unfit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.methods import OURS
from benchmarks.results import Results, Row, Value
from benchmarks.tables import align, number
from benchmarks.timing import Quartiles

# What is worse when it grows. Counts and bytes repeat exactly; only times need the machine's drift.
_TIME = "[ms]"
_UNITS = (_TIME, "[MB]", "evaluations", "rows evaluated", "distance", "gradient error")
# Columns of times beside ours that tell of the machine.
_MACHINES = ("torchdeq [ms]", "least [ms]")
_MACHINE = ("device", "gpu", "dtype", "cpu", "cores", "threads", "torch", "torchdeq", "scipy")


@dataclass(frozen=True)
class Change:
    """One value of both runs."""

    table: str
    key: str
    column: str
    ours: bool
    old: Value
    new: Value

    @property
    def timed(self) -> bool:
        return self.column.endswith(_TIME)

    @property
    def ratio(self) -> float:
        """new / old."""
        old, new = _middle(self.old), _middle(self.new)
        return new / old if old > 0 else 1.0

    def apart(self, drift: float) -> bool:
        """Whether the quartiles do not overlap, the old ones moved by the machine's drift."""
        if not (isinstance(self.old, Quartiles) and isinstance(self.new, Quartiles)):
            return True
        old = self.old.scaled(drift)
        return self.new.q1 > old.q3 or self.new.q3 < old.q1


@dataclass(frozen=True)
class Comparison:
    """Changes beyond ``threshold``.

    Attributes:
        drift: median of new / old over all times of peers, 1 where there are none.
        worse, better: ours, beyond the drift, quartiles apart; the largest change first.
        failed: rows of ours that reached their tolerance in the old run and not in the new one.
        lost: other values of ours that only the old run has.
        compared: how many values of ours were compared.
    """

    drift: float
    worse: list[Change]
    better: list[Change]
    failed: list[str]
    lost: list[str]
    compared: int


def compare(old: Results, new: Results, threshold: float) -> Comparison:
    """Match the rows of two runs; ``threshold`` 0.1 lets ten per cent pass."""
    before, after = dict(_values(old)), dict(_values(new))
    changes = [Change(*name, value, after[name]) for name, value in before.items() if name in after]
    peers = [change.ratio for change in changes if change.timed and not change.ours]
    drift = statistics.median(peers) if peers else 1.0

    def relative(change: Change) -> float:
        return change.ratio / drift if change.timed else change.ratio

    ours = [change for change in changes if change.ours]
    significant = [c for c in ours if c.apart(drift if c.timed else 1.0)]
    worse = [c for c in significant if relative(c) > 1 + threshold]
    better = [c for c in significant if relative(c) < 1 / (1 + threshold)]
    failed = _reached(old) - _reached(new)
    failed &= {name[:2] for name in after}  # else the row is lost
    return Comparison(
        drift,
        sorted(worse, key=relative, reverse=True),
        sorted(better, key=relative),
        [f"{table}: {key}" for table, key in sorted(failed)],
        [
            f"{n[0]}: {n[1]}: {n[2]}"
            for n in before
            if n[3] and n not in after and n[:2] not in failed
        ],
        len(ours),
    )


def _reached(results: Results) -> set[tuple[str, str]]:
    return {
        (row.table, _key(row))
        for row in results.rows
        if row.values.get("reached") and row.key.get("library", OURS) == OURS
    }


def _key(row: Row) -> str:
    """What was measured; the radius is a result, though tables show it among the keys."""
    named = (f"{name} {number(value)}" for name, value in row.key.items() if name != "radius")
    return ", ".join(named)


def _values(results: Results) -> Iterator[tuple[tuple[str, str, str, bool], Value]]:
    for row in results.rows:
        key = _key(row)
        for column, value in row.values.items():
            if not column.endswith(_UNITS) or isinstance(value, (str, bool)) or value is None:
                continue
            ours = row.key.get("library", OURS) == OURS and column not in _MACHINES
            yield (row.table, key, column, ours), value


def _middle(value: Value) -> float:
    return value.median if isinstance(value, Quartiles) else float(value)  # type: ignore[arg-type]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.1,
        help="changes up to this share of the old value pass; default: 0.1",
    )
    options = parser.parse_args(arguments)
    if options.threshold < 0:
        parser.error(f"--threshold must be at least 0, got {options.threshold}")
    try:
        old, new = Results.read(options.old), Results.read(options.new)
    except ValueError as error:
        parser.error(str(error))
    for name in _MACHINE:
        if old.header.get(name) != new.header.get(name):
            print(f"caution, {name}: {old.header.get(name)} -> {new.header.get(name)}")
    found = compare(old, new, options.threshold)
    print(f"peers took {found.drift:.2f} times as long: taken as the machine's drift")
    for title, changes in (("worse", found.worse), ("better", found.better)):
        if changes:
            print(f"\n{title}")
            grid = [["table", "what", "value", "old", "new", "new / old"]]
            grid += [
                [c.table, c.key, c.column, number(c.old), number(c.new), number(c.ratio)]
                for c in changes
            ]
            print("\n".join(align(grid)))
    for line in found.failed:
        print(f"no longer reached: {line}")
    for line in found.lost:
        print(f"only in {options.old}: {line}")
    if not found.compared:
        parser.error("the two files have no value in common")
    print(
        f"\n{found.compared} values: {len(found.worse)} worse, {len(found.better)} better; "
        f"{len(found.failed)} tolerances no longer reached"
    )
    return 1 if found.worse or found.failed else 0


if __name__ == "__main__":
    sys.exit(main())
