"""Finds the launch parameters of this GPU and writes them as kernels/configs.py has them:

    python -m bench.tune                          every table; prints what would change
    python -m bench.tune --only ATTENTION --write
    python -m bench.tune --check                  compiles the rows and compares them, times nothing
    python -m bench.tune --plan sm_90             no GPU: chooses the rows to try, into bench/tune.json
    python -m bench.tune --take bench/results/nvidia-h200.json    no GPU: writes what was found elsewhere

At most eight rows a table are tried: those that `--plan` chose, which compiles every row of the grids below for an
architecture, leaves out what spills or needs too much shared memory, and ranks by counted instructions; without a plan
eight spread over the grid. A row must compute what the present one computes before it is timed; one that the GPU cannot
launch is left out. The present row stays unless another is faster by 2 %. Shapes are those of LanguageBind L/14 in
bfloat16; the rows "wide", "large", "short" and "interpreter", which all devices share, are left alone.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import contextlib
import dataclasses
import difflib
import importlib
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lbfast import files, ops
from lbfast.testing import relative_error

from . import contest, harness, options

CONFIGS = harness.HERE.parent / "kernels" / "configs.py"
PLAN = harness.HERE / "tune.json"
MOST = 8  # rows of a table that are tried
GAIN = 0.02  # by which another row must be faster to take the place
TOLERANCE = 2e-2  # between rows, which sum in other orders

Inputs = list[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Tunable:
    """A row of a table in configs.py and the call that it serves.

    Attributes:
        table: its name there.
        grid: tile name -> sizes to try.
        warps, stages: to try.
        inputs: device -> tensors; the backward differentiates those that require grad.
        call: op of these tensors, by its Triton kernels.
        suffix: of the row's key, behind the architecture.
        backward: whether the backward is timed, not the forward.
    """

    table: str
    grid: Mapping[str, Sequence[int]]
    inputs: Callable[[str], Inputs]
    call: Callable[..., Any]
    warps: Sequence[int] = (4, 8)
    stages: Sequence[int] = (1,)
    suffix: str = ""
    backward: bool = False

    def key(self, arch: str) -> str:
        return f"{arch} {self.suffix}".strip()

    @property
    def name(self) -> str:
        return f"{self.table} {self.suffix}".strip()

    def every(self) -> list[Any]:
        """The whole grid."""
        launch = _configs().Launch
        return [
            launch(dict(zip(self.grid, sizes)), num_warps=warps, num_stages=stages)
            for sizes in itertools.product(*self.grid.values())
            for warps, stages in itertools.product(self.warps, self.stages)
        ]

    def candidates(self, arch: str) -> list[Any]:
        """Rows to try: as planned for the architecture, or spread over the grid; at most MOST."""
        planned = json.loads(PLAN.read_text()).get(arch, {}).get(self.name) if PLAN.exists() else None
        if planned is not None:
            return [_configs().Launch(**row) for row in planned][:MOST]
        grid = self.every()
        return grid[:: -(-len(grid) // MOST)]

    def step(self, device: str) -> Callable[[], Any]:
        """One call of what is timed; it returns tensors to compare."""
        tensors = self.inputs(device)
        wanted = [t for t in tensors if t.requires_grad]
        if not self.backward:
            return torch.no_grad()(lambda: self.call(*tensors))
        outs = contest.as_tuple(self.call(*tensors))
        along = [torch.ones_like(out) for out in outs]
        return lambda: torch.autograd.grad(outs, wanted, along, retain_graph=True)


def _configs() -> Any:
    return importlib.import_module("lbfast.kernels.configs")


def _random(device: str, *shapes: Sequence[int], grads: Sequence[bool] | None = None) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    made = [(torch.randn(tuple(s), generator=generator) * s[-1] ** -0.5).to(device, dtype) for s in shapes]
    return [t.requires_grad_(need) for t, need in zip(made, grads or [True] * len(made))]


CLIPS, FRAMES, TOKENS, WIDTH = 8, 8, 257, 1024


def _rows(device: str) -> Inputs:
    return _random(device, (CLIPS * FRAMES * TOKENS, WIDTH), (WIDTH,), (WIDTH,))


def _heads(device: str) -> Inputs:
    return _random(device, *[(CLIPS * FRAMES, TOKENS, 16, 64)] * 3)


def _spectrograms(device: str) -> Inputs:
    return _random(device, *[(CLIPS * FRAMES, 593, 16, 64)] * 3)


def _frames(device: str) -> Inputs:
    return _random(device, *[(CLIPS, FRAMES, TOKENS, 16, 64)] * 3)


def _mlp(device: str) -> Inputs:
    shapes = ((CLIPS * FRAMES * TOKENS, WIDTH), (4 * WIDTH, WIDTH), (4 * WIDTH,), (WIDTH, 4 * WIDTH), (WIDTH,))
    return _random(device, *shapes)


def _activations(device: str) -> Inputs:
    return _random(device, (CLIPS * FRAMES * TOKENS, 4 * WIDTH), grads=(False,))


def _patches(device: str) -> Inputs:
    shapes = ((CLIPS, 3, FRAMES, 224, 224), (WIDTH, 3, 14, 14), (WIDTH,), (TOKENS, WIDTH))
    return _random(device, *shapes, grads=(False, False, False, True))


def _half_of_the_patches(device: str) -> Inputs:
    kept = torch.rand(CLIPS, TOKENS - 1, generator=torch.Generator().manual_seed(0)).argsort(1)[:, : TOKENS // 2]
    return [*_patches(device), kept.to(device)]


def _embeddings(device: str) -> Inputs:
    made = [F.normalize(t.detach(), dim=-1) for t in _random(device, (16384, 768), (16384, 768))]
    return [*(t.requires_grad_() for t in made), torch.tensor(14.3, device=device, requires_grad=True)]


def _patch_embed(pixels: Any, weight: Any, classes: Any, position: Any, kept: Any = None) -> Any:
    given = {"class_embedding": classes, "position_embedding": position, "kept": kept, "impl": "triton"}
    return ops.patch_embed(pixels, weight, **given)


def _attention(*x: Any) -> Any:
    return ops.attention(*x, impl="triton")


def _temporal(*x: Any) -> Any:
    return ops.temporal_attention(*x, impl="triton")


def _layer_norm(*x: Any) -> Any:
    return ops.layer_norm(*x, impl="triton")


def _perceptron(*x: Any) -> Any:
    return ops.mlp(*x, activation="gelu", impl="triton")


def _float8(h: Any) -> Any:
    """Values and scales as one tensor, to be compared."""
    from lbfast.ops.mlp import activate_float8

    values, scales = activate_float8(h, "gelu", impl="triton")
    return values.float() * scales


def _loss(*x: Any) -> Any:
    return ops.info_nce(*x, impl="triton")


def _loss_of_classes(x: Any, y: Any, scale: Any) -> Any:
    return ops.info_nce(x, y, scale, ids=torch.arange(len(x), device=x.device) % 5000, impl="triton")


_LOGITS = {"BLOCK_M": (64, 128), "BLOCK_N": (64, 128, 256), "BLOCK_K": (32, 64), "GROUP": (8,)}
_LOSSES = {"grid": _LOGITS, "inputs": _embeddings, "stages": (2, 3, 4)}
TUNABLES = (
    Tunable("LAYER_NORM_FWD", {"NUMBERS": (16, 32, 64, 128)}, _rows, _layer_norm, warps=(4, 8)),
    Tunable(
        "LAYER_NORM_BWD",
        {"NUMBERS": (16, 20, 32, 40), "PER_SM": (1, 2, 3, 4)},
        _rows,
        _layer_norm,
        backward=True,
    ),
    Tunable("MLP_FWD", {"BLOCK": (2048, 4096, 8192)}, _mlp, _perceptron),
    Tunable(
        "MLP_BWD",
        {"BLOCK_M": (4, 8), "BLOCK_F": (256, 512, 1024), "ROWS_EACH": (128, 256, 512)},
        _mlp,
        _perceptron,
        backward=True,
    ),
    Tunable("MLP_FLOAT8", {"NUMBERS": (16, 32, 64)}, _activations, _float8),
    Tunable("PATCH_EMBED_ROWS", {"BLOCK_M": (16, 32, 64, 128), "BLOCK_K": (64, 128)}, _patches, _patch_embed),
    Tunable(
        "PATCH_EMBED_BWD_POSITION",
        {"BLOCK_B": (4, 8, 16), "BLOCK_D": (128, 256, 512)},
        _half_of_the_patches,
        _patch_embed,
        backward=True,
    ),
    Tunable("TEMPORAL_ATTENTION_FWD", {"ROWS": (32, 64, 128)}, _frames, _temporal),
    Tunable("TEMPORAL_ATTENTION_BWD", {"ROWS": (32, 64, 128)}, _frames, _temporal, backward=True),
    Tunable("ATTENTION_FWD_HEAD", {"ROWS": (64, 128), "KEYS": (80, 272)}, _heads, _attention, stages=(1, 2)),
    Tunable("ATTENTION_FWD", {"ROWS": (64, 128), "COLS": (64, 128)}, _spectrograms, _attention, stages=(2, 3, 4)),
    Tunable(
        "ATTENTION_BWD",
        {"ROWS": (64, 128), "COLS": (32, 64)},
        _spectrograms,
        _attention,
        stages=(2, 3, 4),
        backward=True,
    ),
    Tunable("INFO_NCE", call=_loss, **_LOSSES),  # type: ignore[arg-type]
    Tunable("INFO_NCE", call=_loss, suffix="bwd", backward=True, **_LOSSES),  # type: ignore[arg-type]
    Tunable("INFO_NCE", call=_loss_of_classes, suffix="labels", **_LOSSES),  # type: ignore[arg-type]
)

Timer = Callable[[Callable[[], Any]], float]


def timer(step: Callable[[], Any]) -> float:
    """Milliseconds of a call: the median of replays of a CUDA graph, with a cold L2."""
    replay = contest.captured(step)
    return harness.interleaved({"": replay}, "cuda", seconds=0.05, least=5)[""].median_ms


@dataclasses.dataclass
class Tuned:
    """present, best: rows. before, after: their milliseconds. rejected: what was not timed, and why."""

    present: Any
    best: Any
    before: float
    after: float
    rejected: list[str]


def tune(tunable: Tunable, arch: str, device: str, clock: Timer) -> Tuned:
    """Tries the rows. The table is left as it was."""
    module = _configs()
    table, key = getattr(module, tunable.table), tunable.key(arch)
    before = dict(table)
    try:
        with _side_stream(device):
            step = tunable.step(device)
            expected = [t.detach().clone() for t in contest.as_tuple(step())]
            present = table.get(key) or table.get(tunable.suffix) or table.get(arch) or table["default"]
            first = clock(step)
            found = Tuned(present, present, first, first, [])
            for candidate in tunable.candidates(arch):
                if candidate == present:
                    continue
                table[key] = candidate
                try:
                    got = contest.as_tuple(step())
                    error = max(relative_error(a, b) for a, b in zip(got, expected))
                    if error > TOLERANCE:
                        found.rejected.append(f"{_launch(candidate)}: {error:.1e} from the present row")
                        continue
                    ms = clock(step)
                except Exception as error:  # too much shared memory, too many registers: each has an error of its own
                    found.rejected.append(f"{_launch(candidate)}: {contest.reason(error)}")
                    continue
                if ms < found.after * (1 - GAIN if found.best is present else 1):
                    found.best, found.after = candidate, ms
    finally:
        table.clear()
        table.update(before)
    return found


def _side_stream(device: str) -> Any:
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()


def written(source: str, changes: Mapping[str, Mapping[str, Any]]) -> str:
    """configs.py with rows changed or added: table -> key -> Launch."""
    lines = source.splitlines()
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.AnnAssign)]
    for node in sorted(nodes, key=lambda node: -node.lineno):
        name = getattr(node.target, "id", "")
        if name not in changes or not isinstance(node.value, ast.Dict):
            continue
        rows = {ast.literal_eval(key): ast.unparse(row) for key, row in zip(node.value.keys, node.value.values) if key}
        rows |= {key: _launch(row) for key, row in changes[name].items()}
        body = [f"    {json.dumps(key)}: {row}," for key, row in rows.items()]
        head = f"{name}: {ast.unparse(node.annotation)} = {{"
        lines[node.lineno - 1 : node.end_lineno] = [head, *(line.replace("'", '"') for line in body), "}"]
    return "\n".join(lines) + "\n"


def _launch(row: Any) -> str:
    stages = f", num_stages={row.num_stages}" if row.num_stages != 1 else ""
    return f"Launch({json.dumps(dict(row.tile))}, num_warps={row.num_warps}{stages})"


def run(
    tunables: Sequence[Tunable], arch: str, device: str, clock: Timer, record: harness.Record, path: Path | None = None
) -> None:
    """Tunes one after the other; each is in the record, and in the file `path`, before the next begins."""
    for tunable in tunables:
        about: dict[str, Any] = {"name": tunable.table, "key": tunable.key(arch)}
        try:
            found = tune(tunable, arch, device, clock)
        except Exception as error:  # one table that fails leaves the others
            record.add([{**about, "note": contest.reason(error)}])
            print(f"{tunable.table}[{about['key']!r}]: not tuned: {contest.reason(error)}", flush=True)
            continue
        times = {"before_ms": round(found.before, 4), "after_ms": round(found.after, 4)}
        row = {**about, **times, "changed": found.best != found.present, **dataclasses.asdict(found.best)}
        record.add([{**row, "rejected": found.rejected}])
        kept = "" if row["changed"] else " (as it was)"
        print(f"{tunable.table}[{about['key']!r}]: {found.before:.4f} ms -> {found.after:.4f} ms, ", end="")
        print(f"{_launch(found.best)}{kept}", *found.rejected, sep="\n  ", flush=True)
        if path is not None:
            files.write(path, written(path.read_text(), changes([row])))


def changes(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Table -> key -> Launch, of a result's rows."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.get("changed"):
            launch = _configs().Launch(row["tile"], row["num_warps"], row["num_stages"])
            found.setdefault(row["name"], {})[row["key"]] = launch
    return found


def rows_of(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of a result of `tune`, or of a file with many results, one of them `tune`'s."""
    return (content if "rows" in content else content["tune"])["rows"]


def use(content: Mapping[str, Any]) -> None:
    """From here on this process launches with the rows that were found."""
    for table, rows in changes(rows_of(content)).items():
        getattr(_configs(), table).update(rows)


# Ahead of time: which rows are worth a GPU's seconds.


def plan(tunables: Sequence[Tunable], arch: str, workers: int) -> dict[str, list[dict[str, Any]]]:
    """Name of the tunable -> at most MOST rows that fit the architecture, the fewest counted instructions first."""
    jobs = [(t.table, t.key(arch), row, arch) for t in tunables for row in t.every()]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        costs = iter(list(pool.map(_cost, *zip(*jobs))))
    found = {}
    for tunable in tunables:
        priced = [(cost, i, row) for i, row in enumerate(tunable.every()) if (cost := next(costs)) is not None]
        found[tunable.name] = [dataclasses.asdict(row) for _, _, row in sorted(priced, key=lambda p: p[:2])[:MOST]]
        print(f"{tunable.name}: {len(priced)} of {len(tunable.every())} fit", flush=True)
    return found


def _lines(known: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    """JSON, a row of a table on each line."""
    archs = []
    for arch, tables in known.items():
        shown = [
            f"  {json.dumps(name)}: [\n   " + ",\n   ".join(map(json.dumps, tables[name])) + "]" for name in tables
        ]
        archs.append(f" {json.dumps(arch)}: {{\n" + ",\n".join(shown) + "}")
    return "{\n" + ",\n".join(archs) + "}\n"


def _cost(table: str, key: str, row: Any, arch: str) -> float | None:
    """Counted microseconds of what the row changes in what is compiled; None where that won't fit, or is nothing."""
    from . import resources

    names, rows = resources.kernel_names(), getattr(_configs(), table)
    present, before = [resources.cases(name, arch) for name in names], dict(rows)
    rows[key] = row
    try:
        costs = []
        for name, old in zip(names, present):
            for index, (case, other) in enumerate(zip(resources.cases(name, arch), old)):
                if case != other:
                    compiled = resources.compile_case(name, index, arch)
                    if not compiled.fits:
                        return None
                    costs.append(compiled.issue_us or 0.0)
        return sum(costs) if costs else None
    finally:
        rows.clear()
        rows.update(before)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="tables whose name has one of these in it")
    parser.add_argument("--table", help="this table alone")
    parser.add_argument("--write", action="store_true", help="write kernels/configs.py, too, after each table")
    parser.add_argument("--check", action="store_true", help="compile and compare every row; time nothing")
    parser.add_argument("--plan", metavar="ARCH", help="choose the rows to try, by compiling all of them; no GPU")
    parser.add_argument("--take", metavar="RESULT", type=Path, help="write kernels/configs.py from a result; no GPU")
    parser.add_argument("--workers", type=options.count, default=os.cpu_count() or 1, help="of --plan (%(default)s)")
    parser.add_argument("--out", help="JSON file of the results; default: none")
    given = parser.parse_args(argv)
    chosen = [t for t in TUNABLES if any(part in t.table for part in given.only) and given.table in (None, t.table)]
    if not chosen:
        parser.error(f"--only, --table: expected part of {', '.join(dict.fromkeys(t.table for t in TUNABLES))}")
    if given.take:
        files.write(CONFIGS, written(CONFIGS.read_text(), changes(rows_of(json.loads(given.take.read_text())))))
        return 0
    if given.plan:
        known = json.loads(PLAN.read_text()) if PLAN.exists() else {}
        known[given.plan] = {**known.get(given.plan, {}), **plan(chosen, given.plan, given.workers)}
        files.write(PLAN, _lines(known))
        return 0
    if harness.device() != "cuda":
        print("error: launch tables are tuned on a GPU, and torch finds none", file=sys.stderr)
        return 1
    from lbfast.kernels.primitives import arch

    record = harness.Record("Launch tables", "cuda", given.out)
    print(harness.describe(record.header))
    old = CONFIGS.read_text()
    run(
        chosen,
        arch(torch.device("cuda")),
        "cuda",
        (lambda step: 0.0) if given.check else timer,
        record,
        CONFIGS if given.write else None,
    )
    new = written(old, changes(record.rows))
    difference = difflib.unified_diff(old.splitlines(True), new.splitlines(True), "kernels/configs.py", "tuned")
    print("".join(difference) or "nothing would change")
    return 0


if __name__ == "__main__":
    sys.exit(main())
