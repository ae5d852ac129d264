"""Where the time of whole encoders goes on this machine, and what it draws meanwhile: `lbfast profile` as a bench.

    python -m bench.profile --batch 256 32 --out profile.json

Random weights of L/14, `optimize_for_inference`, its best dtype, no CUDA graphs (which have no operators to show). A
row is an operator in one call: its time, its part of the whole, and the least time that its FLOP and bytes could take
over that. Beside the JSON file lies a trace of each modality for chrome://tracing and Perfetto, compressed.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from lbfast.profiling import power, subjects, trace

from . import contest, harness, options

OPERATORS = 16  # of each modality, the longest first


def measure(modality: str, batch: int, layers: int | None, record: harness.Record, seconds: float) -> None:
    device = torch.device(record.device)
    with device:
        model = subjects.random_model("L/14", modality, layers)
    call, dtype = subjects.subject(model, modality, "inference", batch, device, None)
    with tempfile.TemporaryDirectory() as folder:
        found = trace.run(call, batch, device, dtype, Path(folder), seconds)
        if record.out:
            packed = record.out.with_name(f"{modality}.trace.json.gz")
            with (Path(folder) / "trace.json").open("rb") as source, gzip.open(packed, "wb") as target:
                shutil.copyfileobj(source, target)
    about = {"case": f"{modality} L/14, batch {batch}", "dtype": str(dtype).removeprefix("torch.")}
    shown = found.operators[:OPERATORS]
    whole = {"ms": round(found.ms, 3), "items_s": round(1e3 * batch / found.ms, 1), "part_of": 1.0}
    rows = [{**about, "name": "all", **whole, "of_floor": round(found.of_matmul_rate, 3), **found.energy}]
    for op in shown:
        part = {"ms": round(op.ms, 3), "calls": op.calls, "part_of": round(op.ms / found.ms, 3)}
        rows.append({**about, "name": op.name, **part, "of_floor": round(op.roofline, 3)})
    record.add(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modality", nargs="*", default=["image", "video"], help="default: image video")
    parser.add_argument("--batch", type=options.count, nargs="+", default=[256, 32], help="of each (%(default)s)")
    parser.add_argument("--layers", type=options.count, help="of the encoder; default all")
    parser.add_argument("--seconds", type=options.seconds, default=1.0, help="for each (%(default)s)")
    parser.add_argument("--out", help="JSON file of the results; default: none")
    given = parser.parse_args(argv)
    record = harness.Record("Where an encoder's time goes", harness.device(), given.out)
    if record.device == "cuda" and (why := power.why_not()):
        record.add([{"name": "power and clocks", "note": f"not sampled: {why}"}])
    for modality, batch in zip(given.modality, given.batch):
        try:
            measure(modality, batch, given.layers, record, given.seconds)
        except Exception as error:  # the other modality is not lost
            record.add([{"case": f"{modality} L/14, batch {batch}", "name": "all", "note": contest.reason(error)}])
    print(harness.describe(record.header))
    columns = ("case", "name", "ms", "part_of", "of_floor")
    timed = [row for row in record.rows if "ms" in row]
    print(harness.table(columns, [[row[key] for key in columns] for row in timed], left=2))
    for row in record.rows:
        if "note" in row:
            print(f"{row['name']}: {row['note']}")
    return int(len(timed) == 0)


if __name__ == "__main__":
    sys.exit(main())
