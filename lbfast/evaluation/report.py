"""What an evaluation of files found."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
        Path(file).write_text(json.dumps({**more, **self.as_dict()}, indent=2, ensure_ascii=False) + "\n", "utf-8")


def nothing_left(data: object, skipped: dict[str, str]) -> ValueError:
    """The error where no sample could be used: how many were skipped, and why the last."""
    why = f"; {len(skipped)} skipped, the last: {list(skipped.values())[-1]}" if skipped else ""
    return ValueError(f"{data}: expected samples that can be evaluated, got none{why}")
