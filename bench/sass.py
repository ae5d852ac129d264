"""Counts the warp-instructions that a kernel's program executes, out of its SASS and without running it.

Every instruction knows the line of Triton's IR (TTIR) that it came from: the kernel is compiled with `USE_IR_LOC=ttir`.
TTIR says in plain regions what SASS has in branches: each `scf.for` or `scf.while` is a loop, each `scf.if` a branch.
A case states, in TTIR's order (the source's, a function once for each place that calls it, without tl.static_range):

    trips: how often a loop's body runs each time the loop is reached, the mean where programs differ
    shares: of those who reach an `if`, how many take its first arm

Loops of SASS are the natural loops of its control flow. Which of TTIR's a loop is, and which arm of an `if` a block is,
most of its instructions say; what moved elsewhere counts where it is now. A block that every pass runs takes no share
into account, whatever its lines say. How many of TTIR's trips one pass of a SASS loop makes (unrolling), and how many
are written out before and after it (peeling), products say, or stores, or else loads: each is in TTIR's loop once a
trip, and what it costs in instructions the layouts of TTGIR say. Where this does not come out, there is an error and no
number.

Left out, since they are rare: a call at a branch (a 64-bit division's or a denormal's slow way), more than one turn of
a loop that waits for a barrier. Predicated instructions count: they are issued.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from .triton_ir import LOADS, PRODUCTS, SCALAR_PRODUCTS, STORES, Anchor, CountError, Region, anchors, regions

TENSOR, MEMORY, MUFU, OTHER = KINDS = ("tensor", "memory", "mufu", "other")
_TENSOR = re.compile(r"[HIQBDO]G?MMA|UTC\w*MMA")
_MEMORY = re.compile(r"LD[GSLT]?(\.|$)|LDGSTS|LDSM|ST[GSLT]?(\.|$)|STSM|ATOM|RED(\.|G|$)|UTMA|UBLKCP|LDTM|STTM")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """op: with its modifiers. line: of TTIR, 0 if unknown. target: label that it may jump to. always: no predicate."""

    op: str
    line: int = 0
    target: str = ""
    always: bool = True

    @property
    def kind(self) -> str:
        if _TENSOR.match(self.op):
            return TENSOR
        if _MEMORY.match(self.op):
            return MEMORY
        return MUFU if self.op.startswith("MUFU") else OTHER


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """`nvdisasm -c -g` -> instructions, and label -> the instruction behind it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    line = 0
    for row in text.splitlines():
        if mark := re.match(r"\s*//## File .*, line (\d+)", row):
            line = int(mark[1])
        elif label := re.match(r"\s*(\.L_x_\d+):", row):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", row):
            given = re.match(r"(@!?U?P\w+\s+)?(\S+)\s*(.*)", code[1])
            assert given
            predicate, op, rest = given.groups()
            target = re.search(r"\(?(\.L_x_\d+)", rest)
            jumps = op.startswith(("BRA", "JMP", "CALL")) and target
            always = not predicate and not re.match(r"!?U?P\d", rest)
            instructions.append(Instruction(op, line, target[1] if jumps and target else "", always))
    return instructions, labels


_LOWER = re.compile(r"UIADD3 (UR\d+), (UP\d), (UR\d+), \S+, URZ")
_UPPER = re.compile(r"UIADD3\.X UR\d+, (UR\d+), -?0x[0-9a-f]+, URZ, (UP\d)")
_WRITES = re.compile(r"(\S+) (?:UP\d, )?UR(\d+)\b")
_UPPER_HALVES = ("UMOV", "UIADD3.X", "USHF.R.S32.HI", "UIMAD")
"""What writes one: 0, a carried sum, a sign."""


def lost_bases(text: str) -> list[str]:
    """Sums of a 64-bit base and a constant, in uniform registers, that read a half of the base where it no longer is.

    ptxas 12.8, of Triton 3.6 and 3.7, makes such sums for the descriptors of a product's factors in shared memory,
    where their base was known before a loop and is wanted behind it: the product then reads something else.
    """
    code = (re.sub(r"/\*.*?\*/", "", row) for row in text.splitlines())
    rows = [re.sub(r"^@!?\w+ ", "", " ".join(row.split())) for row in code]
    lower: dict[str, tuple[int, str]] = {}
    found = []
    for at, row in enumerate(rows):
        if match := _LOWER.match(row):
            lower[match[2]] = at, match[3]
        elif (match := _UPPER.match(row)) and match[2] in lower:
            first, base = lower[match[2]]
            writer, upper = _writer(rows, at, match[1])
            same = match[1] == base and writer < first  # both halves are read from one register
            if same or not upper:
                found.append(f"{rows[first]} {row}")
    return found


def _writer(rows: Sequence[str], at: int, register: str) -> tuple[int, bool]:
    """The last row before `at` that writes a uniform register (-1: none), and whether that may be an upper half."""
    number = int(register.removeprefix("UR"))
    for index in range(at - 1, -1, -1):
        if match := _WRITES.match(rows[index]):
            op, written = match[1], int(match[2])
            if number == written:
                return index, op.startswith(_UPPER_HALVES) or ".64" in op
            if number == written + 1 and (".64" in op or "WIDE" in op):
                return index, True
    return -1, True


@dataclasses.dataclass
class Loop:
    """A natural loop. blocks: nested ones' too. passes: how often its body runs each time it is reached."""

    header: int
    blocks: set[int]
    parent: Loop | None = None
    region: Region | None = None
    fused: Region | None = None
    passes: float = 1.0

    @property
    def chain(self) -> list[Loop]:
        return [*(self.parent.chain if self.parent else ()), self]


class Flow:
    """Basic blocks (ranges of instructions), edges between them, natural loops, and which blocks every pass runs."""

    def __init__(self, instructions: Sequence[Instruction], labels: Mapping[str, int]) -> None:
        self.instructions = instructions
        ends = {i + 1 for i, one in enumerate(instructions) if re.match("BRA|JMP|BRX|EXIT|RET|CALL|KILL", one.op)}
        starts = sorted({0, *labels.values(), *ends} - {len(instructions)})
        self.blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(instructions)])]
        at = {block.start: index for index, block in enumerate(self.blocks)}
        self.next: list[list[int]] = [self._next(index, block, labels, at) for index, block in enumerate(self.blocks)]
        self.reached = _reach(0, self.next)
        self.loops = self._find_loops()

    def _next(self, index: int, block: range, labels: Mapping[str, int], at: Mapping[int, int]) -> list[int]:
        last = self.instructions[block[-1]]
        following = [index + 1] if index + 1 < len(self.blocks) else []
        if last.op.startswith("BRX"):
            raise CountError("a jump table")
        if last.op.startswith(("BRA", "JMP")):
            slow = last.op.startswith("BRA.DIV")
            jump = [at[labels[last.target]]] if labels.get(last.target) in at and not slow else []
            return list(dict.fromkeys(jump + ([] if last.always and not slow else following)))
        if last.op.startswith(("EXIT", "RET", "KILL")):
            return [] if last.always else following
        return following

    def _find_loops(self) -> list[Loop]:
        dominators = _dominators(0, self.reached, self.next)
        before = _reverse(self.reached, self.next)
        found: dict[int, set[int]] = {}
        for a in self.reached:
            for b in self.next[a]:
                if b in dominators[a]:
                    body = found.setdefault(b, {b})
                    pending = [a]
                    while pending:
                        if (block := pending.pop()) not in body:
                            body.add(block)
                            pending += before[block]
        loops = sorted((Loop(header, body) for header, body in found.items()), key=lambda loop: -len(loop.blocks))
        for index, loop in enumerate(loops):
            loop.parent = next((o for o in reversed(loops[:index]) if loop.header in o.blocks), None)
        return loops

    def innermost(self, block: int) -> Loop | None:
        return next((loop for loop in reversed(self.loops) if block in loop.blocks), None)

    def always_run(self, loop: Loop | None) -> set[int]:
        """Blocks of the loop (None: of the program) that every pass runs, whichever way it takes."""
        blocks = loop.blocks if loop else self.reached
        header = loop.header if loop else 0
        end = len(self.blocks)
        edges: dict[int, list[int]] = {end: []}
        for block in blocks:
            inner = [b for b in self.next[block] if b in blocks and b != header]
            leaves = len(inner) < len(self.next[block]) or not self.next[block]
            last = self.instructions[self.blocks[block][-1]]
            leaves |= last.op.startswith("EXIT")
            edges[block] = inner + [end] * leaves
        back = _reverse(edges, edges)
        everything = set(edges)
        after = _dominators(end, everything, [back.get(i, []) for i in range(end + 1)])
        return after.get(header, set()) - {end}

    def code(self, blocks: Iterable[int]) -> Iterable[Instruction]:
        for block in blocks:
            yield from (self.instructions[i] for i in self.blocks[block])


def _reach(start: int, edges: Sequence[Sequence[int]]) -> set[int]:
    seen, pending = {start}, [start]
    while pending:
        for block in edges[pending.pop()]:
            if block not in seen:
                seen.add(block)
                pending.append(block)
    return seen


def _reverse(blocks: Iterable[int], edges: Mapping[int, Sequence[int]] | Sequence[Sequence[int]]) -> dict[int, list]:
    back: dict[int, list[int]] = collections.defaultdict(list)
    for block in blocks:
        for following in edges[block]:
            back[following].append(block)
    return back


def _dominators(start: int, blocks: set[int], edges: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    before = _reverse(blocks, edges)
    found = {block: set(blocks) for block in blocks}
    found[start] = {start}
    changed = True
    while changed:
        changed = False
        for block in sorted(blocks - {start}):
            known = [found[b] for b in before[block] if b in blocks]
            new = {block} | (set.intersection(*known) if known else set())
            changed |= new != found[block]
            found[block] = new
    return found


def work(one: Instruction, rank: int) -> float:
    """Products: multiplications and additions of a warp. Stores, loads: bytes of a thread in global memory."""
    if rank == PRODUCTS:
        if mma := re.match(r"[HIQBDO]GMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)", one.op):
            return math.prod(map(int, mma.groups())) / 4
        mma = re.match(r"[HIQBDO]MMA\.(?:SP\.)?168(\d+)", one.op)
        return 16 * 8 * int(mma[1]) if mma else 0
    if rank == SCALAR_PRODUCTS:
        return {"FFMA": 32, "FFMA2": 64, "DFMA": 32}.get(one.op.split(".")[0], 0)
    if not one.op.startswith(("STG", "ST.") if rank == STORES else ("LDG", "LD.")):
        return 0
    width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", one.op)
    return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[width[1]] if width else 4


@dataclasses.dataclass(frozen=True)
class Count:
    """Warp-instructions of one warp of the mean program, in all and by kind."""

    total: float
    kinds: Mapping[str, float]


def count(sass: str, ttir: str, ttgir: str, trips: Sequence[float], shares: Sequence[float]) -> Count:
    """Of a kernel; raises CountError where it cannot be told."""
    found, inside = regions(ttir, trips, shares)
    flow = Flow(*parse(sass))
    _name_loops(flow, inside)
    _solve_passes(flow, found, inside, anchors(ttir, ttgir) if found else [])
    kinds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    runs = {id(loop): flow.always_run(loop) for loop in (None, *flow.loops)}
    for block in sorted(flow.reached):
        weight = _weight(flow, block, inside, runs)
        for one in flow.code([block]):
            kinds[one.kind] += weight
    total = sum(kinds.values())
    if not math.isfinite(total):
        raise CountError("trips or shares are no numbers")
    return Count(total, kinds)


def _vote(instructions: Iterable[Instruction], inside: Mapping[int, Region]) -> list[Region]:
    """The innermost region that holds more than half of those instructions whose line is known, with its path."""
    votes: collections.Counter[Region] = collections.Counter()
    known = 0
    for one in instructions:
        if one.line:
            known += 1
            votes.update(inside[one.line].path if one.line in inside else ())
    likely = [region for region, number in votes.items() if 2 * number > known]
    return max((region.path for region in likely), key=len, default=[])


def _name_loops(flow: Flow, inside: Mapping[int, Region]) -> None:
    """Says which of TTIR's loops each of SASS's is; inner ones first."""
    for loop in reversed(flow.loops):
        nested = [other for other in flow.loops if other.parent is loop]
        own = list(flow.code(loop.blocks.difference(*(other.blocks for other in nested))))
        hidden = {other.region for other in nested if other.region}
        if hidden:
            allowed = set.intersection(*({r for r in region.loops if r is not region} for region in hidden))
            path = [r for r in _vote((o for o in own if not _within(o, hidden, inside)), inside) if r in allowed]
        else:
            path = [region for region in _vote(own, inside) if region.loop]
        if path:
            loop.region = path[-1]
        elif not any("TRYWAIT" in one.op or "NANOSLEEP" in one.op for one in own):
            raise CountError(f"a loop of {len(own)} instructions that the source does not have")
        if loop.region and any("TRYWAIT" in one.op for one in own) and len(own) < 12:
            loop.region = None  # waits for a barrier, within a loop of the source


def _within(one: Instruction, hidden: set[Region], inside: Mapping[int, Region]) -> bool:
    return one.line in inside and bool(hidden & set(inside[one.line].path))


def _solve_passes(flow: Flow, found: Sequence[Region], inside: Mapping[int, Region], known: Sequence[Anchor]) -> None:
    """Sets `passes` of every loop by what the source's loop does once a trip."""
    trips: dict[Region | None, int] = {None: 1}  # of the source's loop that SASS's one has, in all its copies
    for region in found:
        copies = [loop for loop in flow.loops if loop.region is region]
        inner = [loop for loop in flow.loops if loop.region and region in loop.region.loops[:-1]]
        if not copies and inner and any(inside.get(o.line) is region for o in flow.code(inner[0].blocks)):
            if len(inner) > 1:
                raise CountError(f"{len(inner)} loops where TTIR nests one in another at line {region.first}")
            inner[0].fused = region
            continue
        if not copies:
            continue
        rank, needed = _needed(region, inside, known)
        if not needed:
            if len(copies) > 1 or not inner:
                raise CountError(f"the loop at TTIR line {region.first} has no product, store or load to count by")
            needed, order = 1.0, [(1, copies[0])]
        else:
            order = [(round(_done(rank, flow.code(_own(flow, loop))) / needed), loop) for loop in copies]
            order.sort(key=lambda pair: -pair[0])
        ratios = [ratio for ratio, _ in order]
        if 0 in ratios or len(set(ratios)) < len(ratios) or len(ratios) > 2:
            raise CountError(f"the loop at TTIR line {region.first} is {len(ratios)} in SASS, unrolled {ratios}")
        trips[region] = sum(ratios)
        left = region.weight - (_peeled(flow, region, inside, known, rank) if rank < LOADS else 0)
        for ratio, loop in order[:-1]:
            loop.passes = left // ratio
            left -= loop.passes * ratio
        order[-1][1].passes = left / order[-1][0]
        if left < 0:
            raise CountError(f"the loop at TTIR line {region.first} has more than its {region.weight} trips beside it")
    for region in found:
        _check_written_out(flow, region, found, inside, known, trips)
    for loop in flow.loops:
        if loop.fused:
            loop.passes *= loop.fused.weight


def _needed(region: Region | None, inside: Mapping[int, Region], known: Sequence[Anchor]) -> tuple[int, float]:
    """The rank that tells most of a loop (None: of what is in none), and how much of it a trip has."""
    own = [a for a in known if (inside[a.line].loops[-1:] if a.line in inside else []) == ([region] if region else [])]
    rank = min((anchor.rank for anchor in own), default=PRODUCTS)
    return rank, sum({a.line: a.amount for a in own if a.rank == rank}.values())


def _peeled(flow: Flow, region: Region, inside: Mapping[int, Region], known: Sequence[Anchor], rank: int) -> int:
    """How many trips of a loop are written out beside it."""
    within = set().union(*(loop.blocks for loop in flow.loops if loop.region is region))
    strays = (one for one in flow.code(flow.reached - within) if _within(one, {region}, inside))
    return round(_done(rank, strays) / _needed(region, inside, known)[1])


def _check_written_out(
    flow: Flow,
    region: Region,
    found: Sequence[Region],
    inside: Mapping[int, Region],
    known: Sequence[Anchor],
    trips: Mapping[Region | None, int],
) -> None:
    """Raises where a loop of the source that SASS has none for is not all there, trip by trip.

    By the work of all that surrounds it: products may bear the line of a neighbour.
    """
    if region in trips or any(loop.fused is region for loop in flow.loops):
        return
    rank, needed = _needed(region, inside, known)
    around = next((outer for outer in reversed(region.loops[:-1]) if outer in trips), None)
    blocks = flow.reached.difference(*(loop.blocks for loop in flow.loops if loop.region)) if around is None else set()
    for loop in flow.loops:
        if around and loop.region is around:
            blocks |= _own(flow, loop)
    gone = [r for r in found if r not in trips and (r is region or around is None or around in r.loops)]
    expected = sum(_needed(r, inside, known)[1] * r.weight for r in gone if _needed(r, inside, known)[0] == rank)
    surrounding = _needed(around, inside, known)
    expected += surrounding[1] if surrounding[0] == rank else 0
    done = _done(rank, flow.code(blocks)) / trips[around]
    if not needed or abs(done - expected) > needed / 2:
        raise CountError(f"the loop at TTIR line {region.first} is none in SASS, nor written out as often as it runs")


def _own(flow: Flow, loop: Loop) -> set[int]:
    """Its blocks that are in no other loop of the source within it."""
    return loop.blocks.difference(*(o.blocks for o in flow.loops if o is not loop and loop in o.chain and o.region))


def _done(rank: int, code: Iterable[Instruction]) -> float:
    return sum(work(one, rank) for one in code)


def _weight(flow: Flow, block: int, inside: Mapping[int, Region], runs: Mapping[int, set[int]]) -> float:
    """How often a warp of the mean program runs a block."""
    loop = flow.innermost(block)
    calls = flow.instructions[flow.blocks[block][-1]].op.startswith("CALL")
    weight, taken = 1.0, set()
    for one in loop.chain if loop else ():
        for region in one.region.path if one.region else ():
            if not region.loop and region not in taken:
                taken.add(region)
                weight *= region.weight
        weight *= one.passes
    if block in runs[id(loop)]:
        if calls:
            raise CountError("a call that every pass makes")
        return weight
    if calls:
        return 0.0
    path = _vote(flow.code([block]), inside)
    for region in path:
        if not region.loop and region not in taken:
            weight *= region.weight
    if loop and loop.fused and loop.region not in path and loop.fused in path:
        weight /= loop.passes / loop.fused.weight
    return weight
