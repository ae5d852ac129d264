"""InfoNCE against its peers: time and extra memory, forward, backward and both.

    python -m bench.bench_info_nce                      sizes fit for this machine; writes bench/results/
    python -m bench.bench_info_nce --size 16384 --dim 768 --dtype bf16
    pytest bench/bench_info_nce.py                      one size, under pytest-benchmark

Peers: open_clip's arithmetic (`dense`), the same from one product (`dense, one product`), row chunks in plain torch
under autograd (`row-chunked`); memeff and inf-cl where installed and a GPU is there. Inputs are unit rows, the scale
14.3 and learnt. A column of TFLOP/s counts 8 B^2 D for forward and backward, 2 and 6 for one alone.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable
from typing import Annotated, Any

import pytest
import torch
import torch.nn.functional as F
import typer

from bench import harness, peers
from lbfast.ops.info_nce import IMPLEMENTATIONS, info_nce

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GPU_SIZES, CPU_SIZES = [1024, 4096, 8192, 16384, 32768, 65536, 131072], [1024, 4096, 8192, 16384]
FLOPS = {"fwd": 2, "bwd": 6, "both": 8}  # times B^2 D
DENSE_LIMIT_GIB = {"cpu": 8, "cuda": 100}
"""Dense candidates that would need more than this are left out."""

PEERS: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "dense": (peers.clip_loss, ""),
    "dense, one product": (peers.clip_loss_one_product, ""),
    "row-chunked": (peers.clip_loss_row_chunked, ""),
    "memeff": (peers.memeff_loss, "memeff"),
    "inf-cl": (peers.inf_cl_loss, "inf_cl"),
}


def inputs(size: int, dim: int, dtype: str, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(size, dim, generator=generator), dim=-1) for _ in range(2)]
    made = [x.to(device, DTYPES[dtype]).requires_grad_() for x in rows]
    return [*made, torch.tensor(peers.SCALE, device=device, requires_grad=True)]


def loss_of(name: str) -> Callable[..., torch.Tensor]:
    if name.startswith("lbfast "):
        return lambda *tensors: info_nce(*tensors, impl=name.removeprefix("lbfast "))
    return PEERS[name][0]


def step(name: str, part: str, tensors: list[torch.Tensor]) -> Callable[[], Any]:
    """A callable that runs forward, backward or both; gradients are made anew each time."""
    loss = loss_of(name)
    tensors = list(tensors)
    if name == "memeff":
        wanted = tensors[:2]
    else:
        wanted = tensors
    if part == "fwd":
        return lambda: loss(*tensors)
    if part == "bwd":
        kept = loss(*tensors)
        return lambda: torch.autograd.grad(kept, wanted, retain_graph=True)
    return lambda: torch.autograd.grad(loss(*tensors), wanted)


def whole_step(name: str, size: int, dim: int, dtype: str) -> Callable[[], Any]:
    """Forward and backward on the CPU, inputs included: for harness.cpu_extra_mib."""
    return step(name, "both", inputs(size, dim, dtype, "cpu"))


def candidates(size: int, dtype: str, device: str) -> tuple[list[str], dict[str, str]]:
    """Names that can be measured, and those that cannot: why."""
    probe = torch.zeros(1, 2, dtype=DTYPES[dtype], device=device)
    names, absent = [], {}
    for impl, why_not in IMPLEMENTATIONS.items():
        reasons = why_not(probe, probe)
        if impl == "triton" and device == "cpu":
            reasons = ["needs a GPU"]
        if reasons:
            absent[f"lbfast {impl}"] = "absent: " + "; ".join(reasons)
        else:
            names.append(f"lbfast {impl}")
    for name, (_, package) in PEERS.items():
        reason = peers.missing(package) if package else ""
        if name.startswith("dense"):
            need = 7 * size**2 * DTYPES[dtype].itemsize / 2**30
            if need > DENSE_LIMIT_GIB[device]:
                reason = f"left out: would need about {need:.0f} GiB"
        if reason:
            absent[name] = reason
        else:
            names.append(name)
    return names, absent


def measure(size: int, dim: int, dtype: str, device: str, parts: list[str], seconds: float) -> list[dict[str, Any]]:
    names, absent = candidates(size, dtype, device)
    tensors = inputs(size, dim, dtype, device)
    shape = {"B": size, "D": dim, "dtype": dtype}
    rows: list[dict[str, Any]] = [{**shape, "name": name, "note": reason} for name, reason in absent.items()]
    if device == "cuda":
        memory = {name: harness.gpu_extra_mib(step(name, "both", tensors)) for name in names}
    else:
        small = (64, dim, dtype)
        memory = {
            name: harness.cpu_extra_mib(whole_step, name, size, dim, dtype, warm=(name, *small)) for name in names
        }
    for part in parts:
        # kept graphs of dense candidates add up: backward alone is measured one candidate after the other
        groups = [[name] for name in names] if part == "bwd" else [names]
        for group in groups:
            timings = harness.interleaved({n: step(n, part, tensors) for n in group}, device, seconds)
            for name, timing in timings.items():
                row = {**shape, "name": name, "part": part, **dataclasses.asdict(timing)}
                row["tflops"] = round(FLOPS[part] * size**2 * dim / timing.median_ms / 1e9, 3)
                if part == "both":
                    row["extra_MiB"] = round(memory[name], 1)
                rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="InfoNCE")
    for column in ("B", "D", "dtype", "part", "name", "median ms", "p20", "p80", "TFLOP/s", "extra MiB", "dense ="):
        table.add_column(column, justify="left" if column in ("name", "part", "dtype") else "right")
    dense = {
        (r["B"], r["D"], r["dtype"], r["part"]): r["median_ms"] for r in rows if r["name"] == "dense" and "part" in r
    }
    for r in rows:
        if "part" not in r:
            table.add_row(str(r["B"]), str(r["D"]), r["dtype"], "", r["name"], r["note"])
            continue
        base = dense.get((r["B"], r["D"], r["dtype"], r["part"]))
        table.add_row(
            str(r["B"]),
            str(r["D"]),
            r["dtype"],
            r["part"],
            r["name"],
            *(f"{r[k]:.2f}" for k in ("median_ms", "p20_ms", "p80_ms", "tflops")),
            f"{r['extra_MiB']:.0f}" if "extra_MiB" in r else "",
            f"{base / r['median_ms']:.2f}x" if base else "",
        )
    Console(width=150).print(table)


def main(
    size: Annotated[list[int] | None, typer.Option(help="B; repeat for more. Default: a sweep.")] = None,
    dim: Annotated[list[int] | None, typer.Option(help="D; repeat for more. Default: 512, 768, 1024.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bf16, fp16, fp32. Default: bf16 and fp32.")] = None,
    part: Annotated[list[str] | None, typer.Option(help="fwd, bwd, both. Default: all.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each candidate of a case.")] = 3.0,
    out: Annotated[str, typer.Option(help="Name of the result file; empty: none.")] = "",
) -> None:
    """Measures; prints a table; with --out writes bench/results/<out>.json."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for b in size or (GPU_SIZES if device == "cuda" else CPU_SIZES):
        for d in dim or [512, 768, 1024]:
            for kind in dtype or ["bf16", "fp32"]:
                rows += measure(b, d, kind, device, part or list(FLOPS), seconds)
                if out:
                    harness.write(out, device, rows)
    typer.echo(f"{harness.header(device)} {platform.platform()}")
    show(rows)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", [*(f"lbfast {impl}" for impl in IMPLEMENTATIONS), *PEERS])
def test_info_nce(benchmark, name, dtype):
    """Forward and backward at B = 2048, D = 768."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names, absent = candidates(2048, dtype, device)
    if name not in names:
        pytest.skip(absent[name])
    run = step(name, "both", inputs(2048, 768, dtype, device))

    def once():
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(once)


if __name__ == "__main__":
    typer.run(main)
