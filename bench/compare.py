"""Two results side by side, and what got slower:

    python -m bench.compare before.json after.json
    python -m bench.compare --floors               measures a few ratios here and now against bench/floors.json

Exit status 1 where something got slower than its spread and --margin allow, or where a ratio is below its floor.

A ratio is of two things that take turns in one run, so that it says the same on a busy machine and on a quiet one; a
floor is what it must reach on any CPU, well below what was measured. A ratio that misses is measured twice more, and
says nothing where the calls of one side differ so much that other work must have disturbed them.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import bench_files, bench_info_nce, bench_languagebind, harness, options

FLOORS = harness.HERE / "floors.json"
DISTURBED = 1.25
"""80th over 20th percentile of one side's calls."""
Key = tuple[str, ...]


def read(path: str | Path) -> dict[str, Any]:
    """A result: {"header": ..., "rows": [...]}, or all of a GPU's as one. ValueError where it is neither."""
    result = json.loads(Path(path).read_text())
    if isinstance(result, dict) and "run" in result:
        rows = [{**row, "case": f"{what}: {row.get('case', '')}"} for what in result for row in result[what]["rows"]]
        result = {"header": result["run"]["header"], "rows": rows}
    if not isinstance(result, dict) or not {"header", "rows"} <= result.keys():
        raise ValueError(f"{path}: expected a result with header and rows")
    return result


def key_of(row: Mapping[str, Any]) -> Key:
    return (row["case"], row["dtype"], row.get("part", ""), row["name"])


def compare(before: Mapping[str, Any], after: Mapping[str, Any], margin: float) -> tuple[list[tuple[Any, ...]], int]:
    """Table rows (case, dtype, pass, name, ms before, ms after, ratio, verdict), and how many got slower.

    Slower: the new 20th percentile is above the old 80th by more than `margin`.
    """
    old = {key_of(row): row for row in before["rows"] if "median_ms" in row}
    table, slower = [], 0
    for row in after["rows"]:
        was = old.pop(key_of(row), None) if "median_ms" in row else None
        if was is None:
            continue
        verdict = ""
        if row["p20_ms"] > was["p80_ms"] * (1 + margin):
            verdict, slower = "slower", slower + 1
        elif row["p80_ms"] * (1 + margin) < was["p20_ms"]:
            verdict = "faster"
        ratio = f"{was['median_ms'] / row['median_ms']:.2f} x"
        table.append((*key_of(row), f"{was['median_ms']:.3f}", f"{row['median_ms']:.3f}", ratio, verdict))
    table += [(*key, f"{row['median_ms']:.3f}", "", "", "gone") for key, row in old.items()]
    return table, slower


# Floors: name -> what makes the two that take turns, (the slow one, ours).

Pair = tuple[Callable[[], Any], Callable[[], Any]]


def _loss(theirs: str, dtype: str, size: int = 2048, dim: int = 512) -> Pair:
    tensors = bench_info_nce.inputs(size, dim, dtype, "cpu")
    names, _ = bench_info_nce.candidates(size, dtype, "cpu")  # ours come first, the fastest of them before the others
    return bench_info_nce.step(theirs, "both", tensors), bench_info_nce.step(names[0], "both", tensors)


def _file(kind: str, other: str) -> Pair:
    with tempfile.TemporaryDirectory() as folder:
        path = bench_files.KINDS[kind].make(Path(folder)).read_bytes()
    ours, theirs = bench_files.processor(bench_files.KINDS[kind].modality), bench_files.KINDS[kind].others[other]
    return (lambda: theirs(io.BytesIO(path))), (lambda: ours([path]))


def _encoder(modality: str, batch: int, layers: int, theirs: str, ours: str) -> Pair:
    about = bench_languagebind.subject(modality, "L/14", layers, "bfloat16", "cpu")
    given = bench_languagebind.inputs(about, batch, "cpu")
    built = [bench_languagebind.CANDIDATES[name](about) for name in (theirs, ours)]
    first, second = (torch.inference_mode()(lambda embed=embed: embed(given)) for embed in built)
    return first, second


PAIRS: dict[str, Callable[[], Pair]] = {
    "info_nce 2048x512 float32, forward and backward, over dense": lambda: _loss("dense", "float32"),
    "info_nce 2048x512 bfloat16, forward and backward, over dense": lambda: _loss("dense", "bfloat16"),
    "image, 3 layers, batch 2, float32, over the reference": lambda: _encoder(
        "image", 2, 3, "reference float32", "lbfast float32"
    ),
    "image, 3 layers, batch 2, bfloat16, over the reference under autocast": lambda: _encoder(
        "image", 2, 3, "reference autocast", "lbfast short"
    ),
    "video, 2 layers, 1 clip, float32, over the reference": lambda: _encoder(
        "video", 1, 2, "reference float32", "lbfast float32"
    ),
    "text, 3 layers, 32 captions, float32, over the reference": lambda: _encoder(
        "text", 32, 3, "reference float32", "lbfast float32"
    ),
    "JPEG 500 x 375 to a tensor, over upstream's arithmetic": lambda: _file("JPEG 500 x 375", "upstream"),
}


@dataclasses.dataclass(frozen=True)
class Ratio:
    name: str
    floor: float
    measured: float
    spread: float

    @property
    def verdict(self) -> str:
        """MISSED, where calls were alike; where other work on the machine spread them, a ratio proves nothing."""
        if self.measured >= self.floor:
            return ""
        return "MISSED" if self.spread < DISTURBED else f"below, but calls differ {self.spread:.1f} x: disturbed"


def ratio(pair: Callable[[], Pair], seconds: float) -> tuple[float, float]:
    """The slow one's time over ours, of their faster calls; and the larger 80th over 20th percentile of the two."""
    theirs, ours = pair()
    timing = harness.interleaved({"theirs": theirs, "ours": ours}, "cpu", seconds, least=5)
    spread = max(timing[name].p80_ms / timing[name].p20_ms for name in ("theirs", "ours"))
    return timing["theirs"].p20_ms / timing["ours"].p20_ms, spread


def check_floors(floors: Mapping[str, float], seconds: float) -> list[Ratio]:
    """Measures every ratio that has a floor; one that misses it twice more, and the best counts."""
    if floors.keys() != PAIRS.keys():
        different = ", ".join(sorted(floors.keys() ^ PAIRS.keys()))
        raise ValueError(f"{FLOORS.name}: expected a floor for each ratio; different: {different}")
    found = []
    for name, pair in PAIRS.items():
        best = ratio(pair, seconds)
        for _ in range(2):
            if best[0] < floors[name]:
                best = max(best, ratio(pair, 2 * seconds))
        found.append(Ratio(name, floors[name], *best))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", metavar="RESULT.json", help="the one before, and the one after")
    parser.add_argument("--floors", action="store_true", help="measure ratios against bench/floors.json")
    parser.add_argument("--margin", type=float, default=0.1, help="beyond the spread, of a result (%(default)s)")
    parser.add_argument("--seconds", type=options.seconds, default=0.4, help="for each side of a ratio (%(default)s)")
    given = parser.parse_args(argv)
    if given.floors == bool(given.results) or len(given.results) not in (0, 2):
        parser.error("expected two results, or --floors")
    if given.floors:
        ratios = check_floors(json.loads(FLOORS.read_text()), given.seconds)
        rows = [(r.name, f"{r.floor:.2f} x", f"{r.measured:.2f} x", r.verdict) for r in ratios]
        print(harness.describe(harness.header("cpu")))
        print(harness.table(("ratio", "floor", "measured", ""), rows))
        return int(any(r.verdict == "MISSED" for r in ratios))
    try:
        before, after = map(read, given.results)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for result in (before, after):
        print(harness.describe(result["header"]))
    table, slower = compare(before, after, given.margin)
    columns = ("case", "dtype", "pass", "name", "ms before", "ms after", "ratio", "")
    print(harness.table(columns, table, left=4))
    print(f"{slower} slower")
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
