"""What a run measured: rows of tables, and goals; to and from JSON and CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.timing import Quartiles

Scalar = float | int | str | bool | None
Value = Scalar | Quartiles


@dataclass(frozen=True)
class Row:
    """One measurement: the table it stands in, what was measured, and the values.

    The names of values end in their unit, such as "time [ms]".
    """

    table: str
    key: Mapping[str, Scalar]
    values: Mapping[str, Value]


@dataclass(frozen=True)
class Goal:
    """A measured number beside its goal; ``sign`` says on which side of it it should lie.

    ``measured`` is None where it could not be measured, and ``note`` says why.
    """

    what: str
    measured: float | None
    sign: Literal[">=", "<="]
    wanted: float
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times better than wanted; below 1 is a miss."""
        if self.measured is None:
            return None
        over, under = self.measured, self.wanted
        if self.sign == "<=":
            over, under = under, over
        return over / under if under > 0 else math.inf

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        met = self.measured >= self.wanted if self.sign == ">=" else self.measured <= self.wanted
        return "met" if met else "MISSED"


@dataclass
class Results:
    """Everything that one run of the benchmarks found."""

    header: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    def add(self, table: str, key: Mapping[str, Scalar], values: Mapping[str, Value]) -> None:
        self.rows.append(Row(table, dict(key), dict(values)))

    def goal(
        self,
        what: str,
        measured: float | None,
        sign: Literal[">=", "<="],
        wanted: float,
        note: str = "",
    ) -> None:
        """Add a line to the goals at the end. A missed one shows there; it fails no run."""
        self.goals.append(Goal(what, measured, sign, wanted, note))

    def table(self, name: str) -> list[Row]:
        return [row for row in self.rows if row.table == name]

    @property
    def tables(self) -> list[str]:
        """Names of the tables, in the order in which they began."""
        return list(dict.fromkeys(row.table for row in self.rows))

    def write(self, folder: Path) -> None:
        """Write results.json, and a CSV for every table, below ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "header": self.header,
            "rows": [
                {"table": r.table, "key": r.key, "values": _plain(r.values)} for r in self.rows
            ],
            "goals": [{**asdict(g), "ratio": g.ratio, "verdict": g.verdict} for g in self.goals],
        }
        text = json.dumps(_finite(content), indent=1, allow_nan=False)
        (folder / "results.json").write_text(text + "\n", encoding="utf-8")
        for name in self.tables:
            flat = [_flat(row) for row in self.table(name)]
            columns = list(dict.fromkeys(column for row in flat for column in row))
            with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(flat)

    @staticmethod
    def read(path: Path) -> Results:
        """Read what `write` wrote.

        Raises:
            ValueError: there is no such file, or it holds something else.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = [
                Row(row["table"], row["key"], {k: _value(v) for k, v in row["values"].items()})
                for row in content["rows"]
            ]
            goals = [
                Goal(g["what"], g["measured"], g["sign"], g["wanted"], g["note"])
                for g in content["goals"]
            ]
            return Results(content["header"], rows, goals)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: not a results.json of these benchmarks "
                f"({type(error).__name__}: {error}); write one with --benchmark-out DIR"
            ) from error


def _plain(values: Mapping[str, Value]) -> dict[str, Any]:
    return {k: asdict(v) if isinstance(v, Quartiles) else v for k, v in values.items()}


def _value(value: Any) -> Value:
    return Quartiles(**value) if isinstance(value, dict) else value


def _finite(content: Any) -> Any:
    """JSON knows no infinity and no NaN: both become null."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def _flat(row: Row) -> dict[str, Scalar]:
    flat = dict(row.key)
    for name, value in row.values.items():
        if isinstance(value, Quartiles):
            flat.update({name: value.median, f"{name} q1": value.q1, f"{name} q3": value.q3})
        else:
            flat[name] = value
    return flat
