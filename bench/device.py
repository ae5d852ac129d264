"""What a GPU's benches are measured against: the library's products and a copy, on this device, in this minute.

    python -m bench.device --out device.json

Products of 8192 x 8192 matrices in each dtype, and in bfloat16 those of LanguageBind's layers (65,792 tokens: 32 clips
of 8 frames), which reach less; a copy of 1 GiB. Sampled meanwhile, where nvidia-ml-py is there: clocks and power. The
header names the packages of others that the benches can compare with here.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lbfast.profiling import power

from . import contest, harness, options

TOKENS = 32 * 8 * 257
PRODUCTS = {  # (M, N, K)
    "8192^3": (8192, 8192, 8192),
    "qkv": (TOKENS, 3072, 1024),
    "out": (TOKENS, 1024, 1024),
    "fc1": (TOKENS, 4096, 1024),
    "fc2": (TOKENS, 1024, 4096),
    "patches": (TOKENS, 1024, 592),
}
PEERS = ("memeff", "inf_cl", "siglip_kernel", "liger_kernel", "flash_attn", "xformers", "languagebind", "pynvml")


def _product(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> Callable[[], Any]:
    a, b = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
    if dtype != torch.float8_e4m3fn:
        return lambda: a @ b.T
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def cases(smaller: int) -> list[tuple[str, str, Callable[[str], tuple[Callable[[], Any], float, float]]]]:
    """(case, dtype, device -> (call, FLOP, bytes)); sides `smaller` times smaller."""

    def product(sides: Sequence[int], dtype: torch.dtype) -> Callable[[str], tuple[Callable[[], Any], float, float]]:
        m, n, k = (side // smaller for side in sides)
        moved = (m * k + n * k + m * n) * dtype.itemsize
        return lambda device: (_product(m, n, k, dtype, device), 2.0 * m * n * k, float(moved))

    def copy(device: str) -> tuple[Callable[[], Any], float, float]:
        source = torch.randn(2**28 // smaller, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 0.0, 2.0 * source.numel() * source.element_size()

    square = PRODUCTS["8192^3"]
    others = (torch.float16, torch.float32, torch.float8_e4m3fn)
    found = [(f"product {name}", "bfloat16", product(sides, torch.bfloat16)) for name, sides in PRODUCTS.items()]
    found += [("product 8192^3", str(t).removeprefix("torch."), product(square, t)) for t in others]
    return [("copy of 1 GiB", "float32", copy), *found]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=options.seconds, default=0.3, help="for each (%(default)s)")
    parser.add_argument("--smaller", type=options.count, default=1, help="divides the sides (%(default)s)")
    parser.add_argument("--out", help="JSON file of the results; default: none")
    given = parser.parse_args(argv)
    record = harness.Record("Device: what products and copies reach", harness.device(), given.out)
    record.header["cores"] = os.cpu_count()
    for what, wanted in (("peers", True), ("absent peers", False)):
        record.header[what] = " ".join(p for p in PEERS if (importlib.util.find_spec(p) is not None) == wanted)
    for case, dtype, make in cases(given.smaller):
        about = {"case": case, "dtype": dtype, "name": "library"}
        try:
            call, flops, moved = make(record.device)
            with power.sampling() if record.device == "cuda" else power.nothing() as samples:
                timing = harness.interleaved({"": call}, record.device, given.seconds)[""]
        except Exception as error:  # float8 that the device has not, memory that is not there
            record.add([{**about, "note": contest.reason(error)}])
            continue
        rate = {"tflops": round(flops / timing.median_ms / 1e9, 1), "gbytes": round(moved / timing.median_ms / 1e6, 1)}
        times = {"median_ms": timing.median_ms, "p20_ms": timing.p20_ms, "p80_ms": timing.p80_ms}
        clocks = {key: value for key, value in samples.summary().items() if key in ("sm_mhz", "memory_mhz", "watts")}
        record.add([{**about, **times, **rate, **clocks}])
    print(harness.describe(record.header))
    shown = [row for row in record.rows if "median_ms" in row]
    columns = ("case", "dtype", "median_ms", "tflops", "gbytes")
    print(harness.table(columns, [[row[key] for key in columns] for row in shown], left=2))
    for row in record.rows:
        if "note" in row:
            print(f"{row['case']}, {row['dtype']}: {row['note']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
