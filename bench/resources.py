"""Compiles every Triton kernel at LanguageBind's shapes, without a GPU, and prints what it takes beside its floor.

    python -m bench.resources                      every kernel for every architecture
    python -m bench.resources --arch sm_90 --kernel layer_norm --json
    python -m bench.resources --arch sm_90 --out bench/results/kernels-ahead-of-time.json     for bench.report

A kernel file kernels/X.py takes part by its `aot_cases(arch) -> list[AotCase]`. Registers and stack come from the
compiled binary: a kernel without arrays of its own has a stack only where registers were spilt. Exits with 1 where
a kernel spills more than its row in kernels/configs.py allows, asks for more shared memory than the architecture gives
a block, was assembled wrongly (`lost_bases` in bench/sass.py), or cannot be counted.

The warp-instructions of a launch are counted in its SASS by bench/sass.py, for cases that state their grid. "issue" is
the time in which four schedulers a multiprocessor issue them: a bound that no kernel reaches, as the floor is. CTAs:
blocks that a multiprocessor holds by registers, shared memory and threads, whichever is least; waves: of such blocks.
AMD's kernels are not counted.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import sass
from lbfast import files

KERNELS = Path(__file__).resolve().parent.parent / "kernels"


@dataclasses.dataclass(frozen=True)
class Arch:
    """device: the one whose peaks (dense 16-bit FLOP/s, bytes/s) set the floor. shared: most bytes a block can have.

    clock: Hz. threads, blocks: most that a multiprocessor holds.
    """

    device: str
    flops: float
    bytes: float
    shared: int
    clock: float
    threads: int = 0
    blocks: int = 0


# H200: measured (8192^3 matmul, device copy; its clock under load). The others: the makers' figures, clocks boosted.
ARCHS = {
    "sm_80": Arch("A100 80 GB", 312e12, 2.0e12, 163 * 1024, 1.41e9, 2048, 32),
    "sm_86": Arch("A10", 125e12, 0.6e12, 99 * 1024, 1.695e9, 1536, 16),
    "sm_89": Arch("L40S", 362e12, 0.86e12, 99 * 1024, 2.52e9, 1536, 24),
    "sm_90": Arch("H200", 790e12, 4.3e12, 227 * 1024, 1.755e9, 2048, 32),
    "sm_100": Arch("B200", 2250e12, 8.0e12, 227 * 1024, 1.965e9, 2048, 32),
    "sm_120": Arch("RTX 5090", 209e12, 1.79e12, 99 * 1024, 2.407e9, 1536, 24),
    "gfx942": Arch("MI300X", 1307e12, 5.3e12, 64 * 1024, 2.1e9),
}

_TENSOR_CORES = (
    ("tcgen05", r"tcgen05\.mma"),
    ("wgmma", r"wgmma\.mma_async"),
    ("mma", r"mma\.sync"),
    ("mfma", r"v_mfma"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """registers, spills (bytes): a thread's. shared (bytes): a block's. floor_us: of the resource that is slower.

    instructions: warp-instructions of a launch, and which share of them are products on tensor cores, accesses to
    memory, special functions; None where they are not counted. uncounted: why they cannot be.
    """

    kernel: str
    case: str
    arch: str
    warps: int
    registers: int
    spills: int
    spills_limit: int
    shared: int
    shared_limit: int
    tensor_cores: str
    floor_us: float
    bound: str
    error: str = ""
    ctas: int | None = None
    waves: float | None = None
    instructions: int | None = None
    tensor: float | None = None
    memory: float | None = None
    mufu: float | None = None
    issue_us: float | None = None
    uncounted: str = ""

    @property
    def fits(self) -> bool:
        wrong = self.error or self.uncounted
        return not wrong and self.spills <= self.spills_limit and self.shared <= self.shared_limit


def kernel_names() -> list[str]:
    """The kernel files that describe how they are compiled ahead of time."""
    return sorted(path.stem for path in KERNELS.glob("*.py") if "def aot_cases(" in path.read_text(encoding="utf-8"))


def op_of(kernel: str) -> str:
    """The op that a kernel file serves: attention, of attention.py, attention_tiles.py and attention_bwd.py."""
    ops = (path.stem for path in (KERNELS.parent / "lbfast" / "ops").glob("[a-z]*.py"))
    return next((op for op in ops if re.fullmatch(rf"{op}(_\w+)?", kernel)), kernel)


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


def compile_case(kernel: str, index: int, arch: str, counted: bool = True) -> Row:
    """Compiles one case, reads the binary, and counts its instructions if it is to be."""
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
        return Row(*described, 0, 0, case.spilt, 0, peak.shared, "", *floor, error=message)
    registers, spills = _amd(compiled) if arch.startswith("gfx") else _nvidia(compiled)
    text = compiled.asm["amdgcn" if arch.startswith("gfx") else "ptx"]
    tensor_cores = next((name for name, pattern in _TENSOR_CORES if re.search(pattern, text)), "")
    shared = compiled.metadata.shared
    row = Row(*described, registers, spills, case.spilt, shared, peak.shared, tensor_cores, *floor)
    if not counted or arch.startswith("gfx") or not case.programs:
        return row
    multiprocessors = importlib.import_module("lbfast.kernels.primitives").MULTIPROCESSORS[arch]
    ctas = _ctas(peak, registers, shared, compiled.metadata.num_warps)
    waves = round(case.programs / (ctas * multiprocessors), 2) if ctas else None
    row = dataclasses.replace(row, ctas=ctas, waves=waves)
    try:
        if "scf." in compiled.asm["ttir"]:  # the same again, with TTIR's lines in place of the source's
            compiled = _compile(case, arch, lines=True)
        text = disassembled(compiled.asm["cubin"])
        if lost := sass.lost_bases(text):
            return dataclasses.replace(row, error=f"ptxas reads registers that hold something else: {lost[0]}")
        count = sass.count(text, compiled.asm["ttir"], compiled.asm["ttgir"], case.trips, case.shares)
    except sass.CountError as error:
        return dataclasses.replace(row, uncounted=str(error))
    total = round(count.total * compiled.metadata.num_warps * case.programs)
    shares = {kind: round(count.kinds[kind] / count.total, 4) for kind in (sass.TENSOR, sass.MEMORY, sass.MUFU)}
    issue = round(total / (multiprocessors * 4 * peak.clock) * 1e6, 1)
    return dataclasses.replace(row, instructions=total, issue_us=issue, **shares)


def _ctas(peak: Arch, registers: int, shared: int, warps: int) -> int:
    """Blocks that a multiprocessor holds: registers go to warps by 256, in four parts; a block has 1 KiB more."""
    by_registers = 16384 // (math.ceil(registers * 32 / 256) * 256) * 4 // warps
    by_shared = (peak.shared + 1024) // (shared + 1024)
    return min(by_registers, by_shared, peak.threads // (32 * warps), peak.blocks)


def _compile(case: Any, arch: str, lines: bool = False) -> Any:
    """lines: instructions know their line of TTIR."""
    import triton
    from triton import knobs
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
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if not lines:
        return triton.compile(source, target, options)
    silent = contextlib.redirect_stdout(io.StringIO())  # Triton says that it does so
    with knobs.compilation.scope(), knobs.cache.scope(), silent:
        knobs.compilation.use_ir_loc = "ttir"
        knobs.cache.dir = str(Path(knobs.cache.dir) / "lines")  # its key does not tell the two apart
        return triton.compile(source, target, options)


def disassembled(cubin: bytes) -> str:
    """SASS of a binary, kept in Triton's cache: it takes longer than all else that is done with a compiled kernel."""
    from triton.runtime.cache import get_cache_manager

    name = "disassembled.sass"
    kept = get_cache_manager(hashlib.sha256(cubin).hexdigest())
    if (found := kept.get_file(name)) is None:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            found = kept.put(_tool("nvdisasm", "-c", "-g", file.name), name, binary=False)
    return Path(found).read_text(encoding="utf-8")


def _tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _nvidia(compiled: Any) -> tuple[int, int]:
    """(registers, bytes of stack) from the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = _tool("cuobjdump", "--dump-resource-usage", file.name)
    usage = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amd(compiled: Any) -> tuple[int, int]:
    """(registers, bytes of scratch memory) from the assembly's notes. Scalars spilt to vector lanes need no memory."""
    notes = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", compiled.asm["amdgcn"]))
    return int(notes["vgpr_count"]), int(notes["private_segment_fixed_size"])


def measure(jobs: list[tuple[str, int, str]], workers: int, counted: Sequence[str]) -> list[Row]:
    """Compiles all jobs in `workers` processes, in order; counts those for the architectures `counted`.

    They are forked from this one, which has imported all there is to import, and computed nothing.
    """
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(pool.map(compile_case, *zip(*jobs), (arch in counted for _, _, arch in jobs)))


def show(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="Kernels compiled without a GPU; floor on: " + ", ".join(f"{a} {ARCHS[a].device}" for a in ARCHS)
    )
    for name in HEADINGS:
        table.add_column(name, justify="left" if name in ("case", "arch", "cores") else "right")
    for row in rows:
        table.add_row(*cells(dataclasses.asdict(row)), style=None if row.fits else "red")
    console = Console(width=None if sys.stdout.isatty() else 220)
    console.print(table)
    for row in rows:
        if wrong := row.error or row.uncounted:
            console.print(f"{row.case} {row.arch}: {wrong}", style="red", markup=False)


COLUMNS = (
    ("case", "{case}"),
    ("arch", "{arch}"),
    ("warps", "{warps}"),
    ("registers", "{registers}"),
    ("spills B", "{spills} of {spills_limit}"),
    ("shared KiB", "{shared_kib:.1f} of {limit_kib:.0f}"),
    ("CTAs", "{ctas}"),
    ("waves", "{waves:.2f}"),
    ("cores", "{tensor_cores}"),
    ("M warp-instr", "{millions:.3f}"),
    ("tensor", "{tensor:.1%}"),
    ("memory", "{memory:.1%}"),
    ("MUFU", "{mufu:.1%}"),
    ("other", "{other:.1%}"),
    ("issue us", "{issue_us:.1f}"),
    ("floor us", "{floor_us:.1f}"),
    ("by", "{bound}"),
)
"""Of the table: heading, and how to write it. M warp-instr: of a launch, in millions."""
HEADINGS = tuple(name for name, _ in COLUMNS)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row, as --json has it, for COLUMNS; "-" where there is nothing."""
    more: dict[str, Any] = {"shared_kib": row["shared"] / 1024, "limit_kib": row["shared_limit"] / 1024}
    if row["instructions"] is not None:
        more["millions"] = row["instructions"] / 1e6
        more["other"] = 1 - row["tensor"] - row["memory"] - row["mufu"]
    known = {key: value for key, value in {**row, **more}.items() if value is not None and value != ""}
    return [form.format(**known) if re.findall(r"\{(\w+)", form)[0] in known else "-" for _, form in COLUMNS]


def _header() -> dict[str, str]:
    import triton

    return {"slug": "kernels", "title": "Kernels compiled ahead of time", "triton": triton.__version__}


def main(
    arch: Annotated[list[str] | None, typer.Option(help="Architecture; repeat for more. Default: all.")] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="Kernel file; repeat for more. Default: all.")] = None,
    reduced: Annotated[bool, typer.Option(help="All for sm_90; elsewhere one case a function, uncounted.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Rows as JSON instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option(help="File for the rows, for bench.report.")] = None,
    workers: Annotated[int, typer.Option(help="Compiling processes.")] = min(8, os.cpu_count() or 1),
) -> None:
    """Registers, spills, shared memory, instructions and floors of every kernel."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise typer.BadParameter("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled; unset it")
    for name, given, known in (("--arch", arch, list(ARCHS)), ("--kernel", kernel, kernel_names())):
        if unknown := sorted(set(given or ()) - set(known)):
            raise typer.BadParameter(f"{name}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    counted = ["sm_90"] if reduced else list(ARCHS)
    rows = measure(plan(arch or list(ARCHS), kernel or kernel_names(), reduced), workers, counted)
    listed = [{**dataclasses.asdict(row), "fits": row.fits} for row in rows]
    if out:
        files.write(out, json.dumps({"header": _header(), "rows": listed}, indent=1) + "\n")
    if as_json:
        print(json.dumps(listed, indent=1))
    else:
        show(rows)
    raise typer.Exit(0 if all(row.fits for row in rows) else 1)


if __name__ == "__main__":
    typer.run(main)
