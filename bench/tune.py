"""Finds the launch parameters of this GPU and writes them as kernels/configs.py has them:

    python -m bench.tune                          every table; prints what would change
    python -m bench.tune --only ATTENTION --write

Every candidate of a grid must compute what the present row computes before it is timed; one that the GPU cannot launch
is left out. The present row stays unless another is faster by 2 %. Shapes are those of LanguageBind L/14 in bfloat16;
the rows "wide", "short" and "interpreter", which all devices share, are left alone.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lbfast import ops
from lbfast.testing import relative_error

from . import contest, harness

CONFIGS = harness.HERE.parent / "kernels" / "configs.py"
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

    def candidates(self) -> Iterator[Any]:
        configs = _configs()
        for sizes in itertools.product(*self.grid.values()):
            for warps, stages in itertools.product(self.warps, self.stages):
                yield configs.Launch(dict(zip(self.grid, sizes)), num_warps=warps, num_stages=stages)

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


def _frames(device: str) -> Inputs:
    return _random(device, *[(CLIPS, FRAMES, TOKENS, 16, 64)] * 3)


def _mlp(device: str) -> Inputs:
    shapes = ((CLIPS * FRAMES * TOKENS, WIDTH), (4 * WIDTH, WIDTH), (4 * WIDTH,), (WIDTH, 4 * WIDTH), (WIDTH,))
    return _random(device, *shapes)


def _patches(pixels: bool, weight: bool, position: bool) -> Callable[[str], Inputs]:
    def make(device: str) -> Inputs:
        shapes = ((CLIPS, 3, FRAMES, 224, 224), (WIDTH, 3, 14, 14), (WIDTH,), (TOKENS, WIDTH))
        return _random(device, *shapes, grads=(pixels, weight, False, position))

    return make


def _embeddings(device: str) -> Inputs:
    made = [F.normalize(t.detach(), dim=-1) for t in _random(device, (16384, 768), (16384, 768))]
    return [*(t.requires_grad_() for t in made), torch.tensor(14.3, device=device, requires_grad=True)]


def _patch_embed(pixels: Any, weight: Any, classes: Any, position: Any) -> Any:
    return ops.patch_embed(pixels, weight, class_embedding=classes, position_embedding=position, impl="triton")


def _attention(*x: Any) -> Any:
    return ops.attention(*x, impl="triton")


def _temporal(*x: Any) -> Any:
    return ops.temporal_attention(*x, impl="triton")


def _layer_norm(*x: Any) -> Any:
    return ops.layer_norm(*x, impl="triton")


def _perceptron(*x: Any) -> Any:
    return ops.mlp(*x, activation="gelu", impl="triton")


def _loss(*x: Any) -> Any:
    return ops.info_nce(*x, impl="triton")


def _loss_of_classes(x: Any, y: Any, scale: Any) -> Any:
    return ops.info_nce(x, y, scale, ids=torch.arange(len(x), device=x.device) % 5000, impl="triton")


_ATTENTION = {"ROWS": (64, 128), "COLS": (32, 64)}
_GEMM = {"BLOCK_M": (64, 128), "BLOCK_N": (64, 128, 256), "BLOCK_K": (32, 64)}
_LOGITS = {"BLOCK_M": (64, 128), "BLOCK_N": (64, 128, 256), "BLOCK_K": (32, 64), "GROUP": (8,)}
_LOSSES = {"grid": _LOGITS, "inputs": _embeddings, "stages": (2, 3, 4)}
TUNABLES = (
    Tunable("LAYER_NORM_FWD", {"ELEMENTS": (2048, 4096, 8192)}, _rows, _layer_norm, warps=(2, 4, 8)),
    Tunable(
        "LAYER_NORM_BWD",
        {"ELEMENTS": (1024, 2048, 4096), "PER_SM": (2, 4, 8)},
        _rows,
        _layer_norm,
        warps=(2, 4, 8),
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
    Tunable("PATCH_EMBED_FWD", _GEMM, _patches(False, True, False), _patch_embed, stages=(2, 3, 4)),
    Tunable(
        "PATCH_EMBED_BWD_WEIGHT",
        {"BLOCK_M": (32, 64), "BLOCK_N": (64, 128), "BLOCK_K": (64, 128), "SPLITS": (4, 8, 16)},
        _patches(False, True, False),
        _patch_embed,
        stages=(2, 3),
        backward=True,
    ),
    Tunable(
        "PATCH_EMBED_BWD_PIXELS",
        {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64), "BLOCK_K": (64, 128)},
        _patches(True, False, False),
        _patch_embed,
        stages=(2, 3),
        backward=True,
    ),
    Tunable(
        "PATCH_EMBED_BWD_POSITION",
        {"BLOCK_B": (4, 8, 16), "BLOCK_D": (128, 256, 512)},
        _patches(False, False, True),
        _patch_embed,
        backward=True,
    ),
    Tunable("TEMPORAL_ATTENTION_FWD", {"ROWS": (32, 64, 128)}, _frames, _temporal),
    Tunable("TEMPORAL_ATTENTION_BWD", {"ROWS": (32, 64, 128)}, _frames, _temporal, backward=True),
    Tunable("ATTENTION_FWD", _ATTENTION, _heads, _attention, stages=(2, 3, 4)),
    Tunable("ATTENTION_BWD", _ATTENTION, _heads, _attention, stages=(1, 2, 3), backward=True),
    Tunable("INFO_NCE", call=_loss, **_LOSSES),  # type: ignore[arg-type]
    Tunable("INFO_NCE", call=_loss, suffix="bwd", backward=True, **_LOSSES),  # type: ignore[arg-type]
    Tunable("INFO_NCE", call=_loss_of_classes, suffix="labels", **_LOSSES),  # type: ignore[arg-type]
)

Timer = Callable[[Callable[[], Any]], float]


def timer(step: Callable[[], Any]) -> float:
    """Milliseconds of a call: the median of replays of a CUDA graph, with a cold L2."""
    replay = contest.captured(step)
    return harness.interleaved({"": replay}, "cuda", seconds=0.05, least=5)[""].median_ms


def tune(tunable: Tunable, arch: str, device: str, clock: Timer) -> tuple[Any, Any, float, float]:
    """(present row, best row, ms of each). The table is left as it was."""
    module = _configs()
    table, key = getattr(module, tunable.table), tunable.key(arch)
    before = dict(table)
    try:
        with _side_stream(device):
            step = tunable.step(device)
            expected = [t.detach().clone() for t in contest.as_tuple(step())]
            present = table.get(key) or table.get(tunable.suffix) or table.get(arch) or table["default"]
            best, first = present, clock(step)
            least = first
            for candidate in tunable.candidates():
                if candidate == present:
                    continue
                table[key] = candidate
                try:
                    got = contest.as_tuple(step())
                    if all(relative_error(a, b) <= TOLERANCE for a, b in zip(got, expected)):
                        ms = clock(step)
                        if ms < least * (1 - GAIN if best is present else 1):
                            best, least = candidate, ms
                except Exception as error:  # too much shared memory, too many registers: each has an error of its own
                    print(f"  {candidate}: {contest.reason(error)}")
    finally:
        table.clear()
        table.update(before)
    return present, best, first, least


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


def run(tunables: Sequence[Tunable], arch: str, device: str, clock: Timer, path: Path, write: bool) -> str:
    """Tunes, and returns the difference to the file, which is written where asked."""
    changes: dict[str, dict[str, Any]] = {}
    for tunable in tunables:
        name = f"{tunable.table}[{tunable.key(arch)!r}]"
        try:
            present, best, before, after = tune(tunable, arch, device, clock)
        except Exception as error:  # one table that fails leaves the others
            print(f"{name}: not tuned: {contest.reason(error)}")
            continue
        print(f"{name}: {before:.4f} ms -> {after:.4f} ms, {_launch(best)}{'' if best != present else ' (as it was)'}")
        if best != present:
            changes.setdefault(tunable.table, {})[tunable.key(arch)] = best
    old = path.read_text()
    new = written(old, changes)
    if write:
        path.write_text(new)
    difference = difflib.unified_diff(old.splitlines(True), new.splitlines(True), "kernels/configs.py", "tuned")
    return "".join(difference)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="tables whose name has one of these in it")
    parser.add_argument("--write", action="store_true", help="write kernels/configs.py, too")
    given = parser.parse_args(argv)
    if harness.device() != "cuda":
        print("error: launch tables are tuned on a GPU, and torch finds none", file=sys.stderr)
        return 1
    from lbfast.kernels.primitives import arch

    chosen = [t for t in TUNABLES if any(part in t.table for part in given.only)]
    if not chosen:
        parser.error(f"--only: expected part of {', '.join(dict.fromkeys(t.table for t in TUNABLES))}")
    print(harness.describe(harness.header("cuda")))
    print(run(chosen, arch(torch.device("cuda")), "cuda", timer, CONFIGS, given.write) or "nothing would change")
    return 0


if __name__ == "__main__":
    sys.exit(main())
