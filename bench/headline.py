"""From a result's rows to what is said of it: each case's fastest of ours beside the fastest of the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]

COLUMNS = ("bench", "case", "dtype", "lbfast", "ms", "fastest other", "its ms", "speed-up", "of floor")


@dataclasses.dataclass(frozen=True)
class Line:
    """One case in one dtype: our fastest row and theirs; the pass is forward and backward where there is one."""

    ours: Row
    theirs: Row | None

    @property
    def speedup(self) -> float:
        return self.theirs["median_ms"] / self.ours["median_ms"] if self.theirs else float("nan")

    @property
    def of_floor(self) -> float:
        """Of the measured rates: an encoder's MFU, an op's part of its floor."""
        return self.ours.get("mfu", self.ours.get("of_floor", 0.0))

    def cells(self, bench: str) -> tuple[str, ...]:
        ours = (self.ours["name"].removeprefix("lbfast "), f"{self.ours['median_ms']:.2f}")
        theirs = ("-", "", "")
        if self.theirs:
            theirs = (self.theirs["name"], f"{self.theirs['median_ms']:.2f}", f"{self.speedup:.2f} x")
        share = f"{self.of_floor:.0%}" if self.of_floor else ""
        return (bench, self.ours["case"], self.ours["dtype"], *ours, *theirs, share)


def lines(rows: Iterable[Row], part: str = "both") -> list[Line]:
    """In the order of the rows. Rows without a time, and of other passes than `part`, are left out."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "median_ms" in row and row.get("part", part) == part:
            groups.setdefault((row["case"], row["dtype"]), []).append(row)
    found = []
    for group in groups.values():
        ours = [row for row in group if row["name"].startswith("lbfast")]
        theirs = [row for row in group if not row["name"].startswith("lbfast")]
        if ours:
            found.append(Line(min(ours, key=_time), min(theirs, key=_time) if theirs else None))
    return found


def _time(row: Row) -> float:
    return row["median_ms"]
