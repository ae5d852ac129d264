"""Compiles every Triton kernel at LanguageBind's shapes, without a GPU, and prints what it takes beside its floor.

    python -m bench.resources                      every kernel for every architecture
    python -m bench.resources --arch sm_90 --kernel layer_norm --json

A kernel file kernels/X.py takes part by its `aot_cases(arch) -> list[AotCase]`. Registers and stack come from the
compiled binary: a kernel without arrays of its own has a stack only where registers were spilt. Exits with 1 where
a kernel spills or asks for more shared memory than the architecture gives a block.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

KERNELS = Path(__file__).resolve().parent.parent / "kernels"


@dataclasses.dataclass(frozen=True)
class Arch:
    """device: the one whose peaks (dense 16-bit FLOP/s, bytes/s) set the floor. shared: most bytes a block can have."""

    device: str
    flops: float
    bytes: float
    shared: int


# H200: measured (8192^3 matmul, device copy). The others: the makers' figures.
ARCHS = {
    "sm_80": Arch("A100 80 GB", 312e12, 2.0e12, 163 * 1024),
    "sm_86": Arch("A10", 125e12, 0.6e12, 99 * 1024),
    "sm_89": Arch("L40S", 362e12, 0.86e12, 99 * 1024),
    "sm_90": Arch("H200", 790e12, 4.3e12, 227 * 1024),
    "sm_100": Arch("B200", 2250e12, 8.0e12, 227 * 1024),
    "sm_120": Arch("RTX 5090", 209e12, 1.79e12, 99 * 1024),
    "gfx942": Arch("MI300X", 1307e12, 5.3e12, 64 * 1024),
}

_TENSOR_CORES = (
    ("tcgen05", r"tcgen05\.mma"),
    ("wgmma", r"wgmma\.mma_async"),
    ("mma", r"mma\.sync"),
    ("mfma", r"v_mfma"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """registers, spills (bytes): a thread's. shared (bytes): a block's. floor_us: of the resource that is slower."""

    kernel: str
    case: str
    arch: str
    warps: int
    registers: int
    spills: int
    shared: int
    shared_limit: int
    tensor_cores: str
    floor_us: float
    bound: str
    error: str = ""

    @property
    def fits(self) -> bool:
        return not self.error and self.spills == 0 and self.shared <= self.shared_limit


def kernel_names() -> list[str]:
    """The kernel files that describe how they are compiled ahead of time."""
    return sorted(path.stem for path in KERNELS.glob("*.py") if "def aot_cases(" in path.read_text(encoding="utf-8"))


def cases(kernel: str, arch: str) -> list[Any]:
    return importlib.import_module(f"lbfast.kernels.{kernel}").aot_cases(arch)


def plan(archs: list[str], kernels: list[str], reduced: bool) -> list[tuple[str, int, str]]:
    """(kernel file, index of the case, architecture); reduced: all for sm_90, elsewhere one case a jit function."""
    jobs = []
    for kernel in kernels:
        for arch in archs:
            seen = set()
            for index, case in enumerate(cases(kernel, arch)):
                name = case.kernel.__name__
                if reduced and arch != "sm_90" and name in seen:
                    continue
                seen.add(name)
                jobs.append((kernel, index, arch))
    return jobs


def compile_case(kernel: str, index: int, arch: str) -> Row:
    """Compiles one case and reads the binary."""
    case = cases(kernel, arch)[index]
    peak = ARCHS[arch]
    compute, memory = case.flops / peak.flops * 1e6, case.bytes / peak.bytes * 1e6
    bound = "compute" if compute > memory else "memory"
    described = (kernel, case.name, arch, case.num_warps)
    floor = (round(max(compute, memory), 1), bound)
    try:
        compiled = _compile(case, arch)
    except Exception as error:
        message = f"{type(error).__name__}: {str(error).strip()[-500:]}"
        return Row(*described, 0, 0, 0, peak.shared, "", *floor, error=message)
    registers, spills = _amd(compiled) if arch.startswith("gfx") else _nvidia(compiled)
    text = compiled.asm["amdgcn" if arch.startswith("gfx") else "ptx"]
    tensor_cores = next((name for name, pattern in _TENSOR_CORES if re.search(pattern, text)), "")
    return Row(*described, registers, spills, compiled.metadata.shared, peak.shared, tensor_cores, *floor)


def _compile(case: Any, arch: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64)
    else:
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    names = case.kernel.arg_names
    unknown = {*case.signature, *case.constants} ^ set(names)
    if unknown or set(case.signature) & set(case.constants):
        raise ValueError(f"{case.name}: signature and constants do not cover the arguments once each: {unknown}")
    signature = {name: case.signature.get(name, "constexpr").removesuffix(":16") for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    aligned = {(names.index(name),) for name, kind in case.signature.items() if kind.endswith(":16")}
    attributes = {position: [["tt.divisibility", 16]] for position in aligned}
    source = ASTSource(case.kernel, signature, constants, attributes)
    return triton.compile(source, target, {"num_warps": case.num_warps, "num_stages": case.num_stages})


def _nvidia(compiled: Any) -> tuple[int, int]:
    """(registers, bytes of stack) from the cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    usage = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amd(compiled: Any) -> tuple[int, int]:
    """(registers, bytes of scratch memory) from the assembly's notes. Scalars spilt to vector lanes need no memory."""
    notes = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", compiled.asm["amdgcn"]))
    return int(notes["vgpr_count"]), int(notes["private_segment_fixed_size"])


def measure(jobs: list[tuple[str, int, str]], workers: int) -> list[Row]:
    """Compiles all jobs in `workers` processes, in order."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(pool.map(compile_case, *zip(*jobs)))


def show(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="Kernels compiled without a GPU; floor on: " + ", ".join(f"{a} {ARCHS[a].device}" for a in ARCHS)
    )
    for column in (
        "case",
        "arch",
        "warps",
        "registers",
        "spills B",
        "shared B",
        "of",
        "tensor cores",
        "floor us",
        "by",
    ):
        table.add_column(column, justify="left" if column in ("case", "arch", "tensor cores", "by") else "right")
    for row in rows:
        numbers = (row.warps, row.registers, row.spills, row.shared, row.shared_limit)
        cells = [row.case, row.arch, *map(str, numbers), row.tensor_cores or "-", f"{row.floor_us:.1f}", row.bound]
        table.add_row(*cells, style=None if row.fits else "red")
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table)
    for row in rows:
        if row.error:
            console.print(f"{row.case} {row.arch}: {row.error}", style="red", markup=False)


def main(
    arch: Annotated[list[str] | None, typer.Option(help="Architecture; repeat for more. Default: all.")] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="Kernel file; repeat for more. Default: all.")] = None,
    reduced: Annotated[bool, typer.Option(help="All cases for sm_90; one case a jit function elsewhere.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Rows as JSON instead of a table.")] = False,
    workers: Annotated[int, typer.Option(help="Compiling processes.")] = min(8, os.cpu_count() or 1),
) -> None:
    """Registers, spills, shared memory, tensor-core instructions and floors of every kernel."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise typer.BadParameter("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled; unset it")
    for name, given, known in (("--arch", arch, list(ARCHS)), ("--kernel", kernel, kernel_names())):
        if unknown := sorted(set(given or ()) - set(known)):
            raise typer.BadParameter(f"{name}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    rows = measure(plan(arch or list(ARCHS), kernel or kernel_names(), reduced), workers)
    if as_json:
        print(json.dumps([{**dataclasses.asdict(row), "fits": row.fits} for row in rows], indent=1))
    else:
        show(rows)
    raise typer.Exit(0 if all(row.fits for row in rows) else 1)


if __name__ == "__main__":
    typer.run(main)
