"""What an evaluation of files found."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lbfast import files
from lbfast.evaluation.ranking import Ranking


@dataclass
class Report:
    """The results, and what they leave out.

    Attributes:
        task: "zero-shot" or "retrieval".
        rankings: by name: "video -> text"; for zero-shot "top", recall at k being top-k accuracy.
        counts: how many items, captions, classes... took part.
        skipped: key -> reason, of samples that could not be read.
    """

    task: str
    rankings: dict[str, Ranking]
    counts: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rankings = {name: ranking.as_dict() for name, ranking in self.rankings.items()}
        return {"task": self.task, "results": rankings, "counts": self.counts, "skipped": self.skipped}

    def write(self, file: str | os.PathLike[str], **more: Any) -> None:
        """Writes it as JSON, with `more` fields."""
        files.write(file, json.dumps({**more, **self.as_dict()}, indent=2, ensure_ascii=False) + "\n")


def check_place(file: str | os.PathLike[str]) -> None:
    """Raises FileExistsError where `Report.write` would replace something else than an earlier report."""
    path = Path(file)
    if not path.is_file():  # nothing, or /dev/stdout
        return
    try:
        found = json.loads(path.read_text("utf-8"))
        if {"task", "results", "counts"} <= found.keys():
            return
    except (ValueError, AttributeError, RecursionError):
        pass
    raise FileExistsError(errno.EEXIST, "expected a new file, or an earlier report: this is something else", str(file))


def nothing_left(data: object, skipped: dict[str, str]) -> ValueError:
    """The error where no sample could be used: how many were skipped, and why the last."""
    why = f"; {len(skipped)} skipped, the last: {list(skipped.values())[-1]}" if skipped else ""
    named = ", ".join(map(str, data)) if isinstance(data, list | tuple) else data
    return ValueError(f"{named}: expected samples that can be evaluated, got none{why}")
