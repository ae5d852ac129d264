"""Reads Triton's IR for bench/sass.py: TTIR's loops and ifs, and what each line of TTGIR costs a thread."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence


class CountError(Exception):
    """The count cannot be told."""


@dataclasses.dataclass
class Region:
    """A loop of TTIR, or an arm of an if. weight: its trips, or its share. path: outermost first, itself included."""

    loop: bool
    first: int
    parent: Region | None
    weight: float = 1.0
    last: int = 0

    @property
    def path(self) -> list[Region]:
        return [*(self.parent.path if self.parent else ()), self]

    @property
    def loops(self) -> list[Region]:
        return [region for region in self.path if region.loop]

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def regions(ttir: str, trips: Sequence[float], shares: Sequence[float]) -> tuple[list[Region], dict[int, Region]]:
    """TTIR's loops, and line -> innermost loop or arm."""
    found: list[Region] = []
    inside: dict[int, Region] = {}
    stack: list[Region | None] = []
    branches = 0
    for number, line in enumerate(ttir.splitlines(), 1):
        text = re.sub(r"\s*loc\(.*\)\s*$", "", line).strip()
        if "cf.cond_br" in text:
            raise CountError("an early return makes branches that no share describes: write it as an if")
        arm = None
        if text.startswith("}") and stack:
            closed = stack.pop()
            if closed and text.startswith(("} else", "} do")):
                if closed.loop:
                    stack.append(closed)
                    continue
                arm = Region(False, number, closed.parent, 1 - closed.weight)
            if closed:
                closed.last = number
        current = next((region for region in reversed(stack) if region), None)
        if current:
            inside[number] = current
        if not text.endswith("{"):
            continue
        if re.search(r"\bscf\.(for|while)\b", text):
            arm = Region(True, number, current, trips[len(found)] if len(found) < len(trips) else math.nan)
            found.append(arm)
        elif re.search(r"\bscf\.if\b", text):
            arm = Region(False, number, current, shares[branches] if branches < len(shares) else math.nan)
            branches += 1
        stack.append(arm)
        if arm:
            inside[number] = arm
    if (len(trips), len(shares)) != (len(found), branches):
        raise CountError(
            f"the kernel has {len(found)} loops and {branches} ifs, the case states {len(trips)} trips and "
            f"{len(shares)} shares"
        )
    return found, inside


PRODUCTS, SCALAR_PRODUCTS, STORES, LOADS = range(4)


@dataclasses.dataclass(frozen=True)
class Anchor:
    """What TTIR's line does once a trip: rank (of the above, the best one counts), and how much of it as by `work`."""

    line: int
    rank: int
    amount: float


def anchors(ttir: str, ttgir: str) -> list[Anchor]:
    """Of TTGIR whose locations are TTIR's lines. Compilers split products: their length is TTIR's."""
    shapes = r"tt\.dot .* : tensor<(?:\d+x)*(\d+)x\w+> \* tensor<"
    lengths = {n: int(at[1]) for n, row in enumerate(ttir.splitlines(), 1) if (at := re.search(shapes, row))}
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*>)$", ttgir, re.MULTILINE))
    lines = {
        name: int(number) for name, number in re.findall(r'^(#loc\d*) = loc\(".*":(\d+):\d+\)$', ttgir, re.MULTILINE)
    }
    found = []
    for row in ttgir.splitlines():
        at = re.search(r'loc\((#loc\d*|".*":(\d+):\d+)\)$', row)
        line = (int(at[2]) if at[2] else lines.get(at[1], 0)) if at else 0
        if not line:
            continue
        if "warp_group_dot " in row or re.search(r"= tt\.dot ", row):
            result = re.search(r"-> tensor<([\dx]+)x\w+, (#\w+)>", row)
            if result and line in lengths:
                layout = layouts.get(result[2], "")
                rank = SCALAR_PRODUCTS if layout.startswith("#ttg.blocked") else PRODUCTS
                found.append(Anchor(line, rank, _threads(result[1], layout, layouts) * lengths[line] * 32))
        elif move := re.search(
            r"(tt\.store|tt\.load|ttg\.async_copy_global_to_local) .*?: ((?:tensor<[\dx]+x)?!tt\.ptr<.*)", row
        ):
            size = re.search(r"!tt\.ptr<\w*?(\d+)>", move[2])
            shape = re.match(r"tensor<([\dx]+)x!tt\.ptr<\w+>, (#[\w.]+(?:<.*?>)?)>", move[2])
            threads = _threads(shape[1], layouts.get(shape[2], shape[2]), layouts) if shape else 1
            width = max(8, int(size[1]) if size else 32) // 8
            found.append(Anchor(line, STORES if move[1] == "tt.store" else LOADS, threads * width))
    return list(dict.fromkeys(anchor for anchor in found if anchor.amount))


def _threads(shape: str, layout: str, layouts: Mapping[str, str]) -> float:
    """Numbers of a tensor that a thread has, each once; 0 where the layout is one that is not understood here."""
    sizes = [int(size) for size in shape.split("x")]
    if part := re.match(r"#ttg\.slice<\{dim = (\d+), parent = (#.*)\}>", layout):
        sizes.insert(int(part[1]), 1)
        layout = layouts.get(part[2], part[2])
        if not layout.startswith("#ttg.blocked"):
            return 0

    def listed(name: str) -> list[int]:
        given = re.search(rf"{name} = \[([\d, ]*)\]", layout)
        return [int(number) for number in given[1].split(",")] if given else []

    if layout.startswith("#ttg.blocked"):
        out = 1
        for size, each, lanes, warps in zip(
            sizes, listed("sizePerThread"), listed("threadsPerWarp"), listed("warpsPerCTA")
        ):
            own = min(each, size)
            spread = min(lanes, size // own)
            out *= own * max(1, size // (own * spread * min(warps, max(1, size // (own * spread)))))
        return out
    if part := re.match(r"#ttg\.linear<\{register = (\[.*?\]), lane", layout):
        return 2 ** sum(any(map(int, re.findall(r"\d+", basis))) for basis in re.findall(r"\[([\d, ]+)\]", part[1]))
    if layout.startswith("#ttg.nvidia_mma"):
        tile, warps = listed("instrShape"), listed("warpsPerCTA")
        steps = [
            math.ceil(size / (one * warp))
            for size, one, warp in zip(sizes[-2:], tile[-3:] if len(tile) > 2 else tile, warps[-2:])
        ]
        return math.prod(steps) * tile[0] * tile[1] / 32
    return 0
