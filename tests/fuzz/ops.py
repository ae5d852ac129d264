"""Random calls of the ops, in processes of their own, some with fewer instructions: right against float64, or refused.

`python -m tests.fuzz.ops --seed S --first I --count N` runs some of them in this process, and says how each ended;
what failed is done again so.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lbfast.testing import ROUNDING, order_of_sums, poisoned_empty
from tests.fuzz.cases import Case, case

ROOT = Path(__file__).resolve().parents[2]
BATCH, MOST = 20, 200
INTERPRETED = 10
ENVIRONMENTS: tuple[tuple[str, dict[str, str]], ...] = (
    *[("all instructions", {})] * 7,
    ("avx2", {"ATEN_CPU_CAPABILITY": "avx2"}),
    ("plain", {"ATEN_CPU_CAPABILITY": "default"}),
    ("triton", {"TRITON_INTERPRET": "1"}),
)
"""Batches of calls take turns in them; they grow from BATCH to MOST, as each imports torch."""


def run(seconds: float, seed: int, most: int = 10**9) -> list[str]:
    """Failures of so many calls, or seconds of them; prints the number of calls of each op."""
    counts: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    ends, first, batch = time.monotonic() + seconds, 0, 0
    while first < most and (left := ends - time.monotonic()) > 0:
        name, environment = ENVIRONMENTS[batch % len(ENVIRONMENTS)]
        count = min(most - first, INTERPRETED if name == "triton" else min(MOST, BATCH << batch))
        failures += run_batch(seed, first, count, name, environment, left + 30, counts)
        first, batch = first + count, batch + 1
    for key, number in sorted(counts.items()):
        print(f"  {number:6d} {key}")
    return failures


def run_batch(
    seed: int, first: int, count: int, name: str, environment: dict[str, str], seconds: float, counts: Any
) -> list[str]:
    """Cases first .. first + count - 1 in a process of their own, and another after each signal."""
    failures, last = [], first + count
    patience = time.monotonic() + seconds

    def again(index: int) -> str:
        given = "".join(f"{key}={value} " for key, value in environment.items())
        return f"{given}python -m tests.fuzz.ops --seed={seed} --first={index} --count=1"

    while first < last:
        command = [
            sys.executable,
            "-m",
            "tests.fuzz.ops",
            f"--seed={seed}",
            f"--first={first}",
            f"--count={last - first}",
        ]
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                told = json.loads(line)
                if "end" in told:
                    counts[f"{name}: {told['end']}"] += 1
                    first = told["case"] + 1
                if "failure" in told:
                    failures.append(f"{again(told['case'])}: {told['failure']}")
                if time.monotonic() > patience:
                    process.kill()
                    return failures
            code = process.wait()
        if code:  # in the case that did not end
            how = signal.Signals(-code).name if code < 0 else f"exit {code}"
            failures.append(f"{again(first)}: {how}")
            first += 1
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("seed", "first", "count"):
        parser.add_argument(f"--{option}", type=int, required=True)
    options = parser.parse_args()
    impl = None
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests import interpreter

        interpreter.install()
        importlib.import_module("lbfast.ops._pairs").INTERPRETER_KNOWS_BFLOAT16 = True  # type: ignore[attr-defined]
        impl = "triton"
    for index in range(options.first, options.first + options.count):
        print(json.dumps({"case": index}), flush=True)
        told = one(random.Random(f"{options.seed} {index}"), impl)
        print(json.dumps({"case": index, **told}), flush=True)


def one(rng: random.Random, impl: str | None) -> dict[str, str]:
    """Runs a case: how it ended, and what was wrong."""
    from tests.fuzz.doors import knock

    if impl is None and rng.random() < 0.2:
        try:
            return {"end": knock(rng)}
        except Exception as error:
            return {"end": "native", "failure": f"{type(error).__name__}: {error}"}
    torch.set_num_threads(rng.choice((1, 1, 2, 3)))
    made = case(rng, impl)
    try:
        with poisoned_empty():
            wrong = compare(made, rng)
    except Exception as error:
        wrong = f"{type(error).__name__}: {str(error)[:500]}"
    what = f"{made.op} {made.what} {[(str(t.dtype)[6:], tuple(t.shape), t.stride()) for t in made.tensors]}"
    return {"end": made.op, **({"failure": f"{what}: {wrong}"} if wrong else {})}


def compare(made: Case, rng: random.Random) -> str:
    """What is wrong with a call's results and gradients, or an empty string; with other threads they are the same."""
    wanted = [t.is_floating_point() and (not made.wanted or made.wanted[i]) for i, t in enumerate(made.tensors)]
    if rng.random() < 0.2:
        wanted = [False] * len(wanted)
    elif rng.random() < 0.2:
        wanted = [want and rng.random() < 0.5 for want in wanted]
    before = [t.clone() for t in made.tensors]
    got = results(made.call, made.tensors, wanted)
    for old, new in zip(before, made.tensors):
        if not torch.equal(old.nan_to_num(), new.nan_to_num()):
            return "an input was written to"
    if "native" in made.what:
        threads = torch.get_num_threads()
        torch.set_num_threads(threads % 3 + 1)
        again = results(made.call, made.tensors, wanted)
        torch.set_num_threads(threads)
        if any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, again)):
            return f"results change with the threads, {threads} and {threads % 3 + 1}"
    exact = results(made.reference, [t.double() if t.is_floating_point() else t for t in made.tensors], wanted)
    plain = []
    for function in made.plain:
        with contextlib.suppress(RuntimeError):  # SDPA takes no overlapping bfloat16, and without AVX-512 no 16 bits
            plain.append(results(function, made.tensors, wanted))
    moved = [results(made.reference, nudged(made, rng), wanted) for _ in range(3)]
    floors = [0.0] * len(exact)
    if made.floors is not None:
        every = made.floors(*made.tensors)
        outs = len(exact) - sum(wanted)
        floors = every[:outs] + [f for f, want in zip(every[outs:], wanted) if want]
    for i, (mine, true) in enumerate(zip(got, exact)):
        problem = beyond(mine, true, [p[i] for p in plain], [m[i] for m in moved], floors[i], made)
        if problem:
            return f"result {i} of {len(got)} ({wanted}): {problem}"
    return ""


def results(function: Any, tensors: list[torch.Tensor], wanted: list[bool]) -> list[torch.Tensor]:
    """What it gives, and the gradients of what is wanted."""
    given = [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted)]
    with contextlib.nullcontext() if any(wanted) else torch.no_grad():
        outs = function(*given)
        outs = [outs] if isinstance(outs, torch.Tensor) else list(outs)
    live = [o for o in outs if o.requires_grad]
    if not live:
        return [*outs, *(torch.zeros_like(t) for t, want in zip(given, wanted) if want)]
    along = []
    for o in live:
        along.append(torch.randn(o.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(o.dtype))
    asked = [t for t, want in zip(given, wanted) if want]
    grads = torch.autograd.grad(live, asked, along, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(asked, grads)]
    return [*(o.detach() for o in outs), *grads]


def nudged(made: Case, rng: random.Random) -> list[torch.Tensor]:
    """The inputs in float64, each number off by a rounding of its dtype and what the order of float32 sums can do."""
    out = []
    for t in made.tensors:
        if not t.is_floating_point():
            out.append(t)
            continue
        unit = ROUNDING[t.dtype] / 2
        if t.dtype != torch.float64:
            unit += order_of_sums(made.terms)
        noise = torch.randn(t.shape, generator=torch.Generator().manual_seed(rng.randrange(2**31)), dtype=torch.float64)
        out.append(t.double() * (1 + unit * noise))
    return out


def beyond(
    mine: torch.Tensor,
    true: torch.Tensor,
    plain: list[torch.Tensor],
    moved: list[torch.Tensor],
    floor: float,
    made: Case,
) -> str:
    """How a result is beyond what rounding allows, or an empty string.

    Allowed are twice plain PyTorch's error; one rounding, and what another order of float32 sums can add, of the
    result, or of what it is the difference of; and twice what nearly the same inputs move the exact result by.
    """
    if mine.shape != true.shape:
        return f"shape {tuple(mine.shape)}, expected {tuple(true.shape)}"
    if mine.dtype != plain[0].dtype:
        return f"dtype {mine.dtype}, expected {plain[0].dtype}"
    finite = torch.isfinite(true) & torch.isfinite(true.to(mine.dtype))
    if not torch.isfinite(mine[finite]).all():
        return "not finite where float64 is"
    true = torch.where(finite, true, 0.0)

    def error(x: torch.Tensor) -> float:
        return float((torch.where(finite, x.double(), 0.0) - true).norm())

    off = error(mine)
    near = max((e for e in map(error, plain) if e == e and e != float("inf")), default=0.0)
    rounding = (ROUNDING[mine.dtype] + made.order) * max(float(true.norm()), floor)
    smallest = torch.finfo(mine.dtype).smallest_normal * max(1, true.numel()) ** 0.5  # below it numbers are coarse
    allowed = 2 * near + rounding + 2 * max(error(m) for m in moved) + smallest
    if off <= allowed:
        return ""
    norm = float(true.norm())
    return f"error {off:.3e}, allowed {allowed:.3e} (plain {near:.3e}, rounding {rounding:.3e}, norm {norm:.3e})"


if __name__ == "__main__":
    main()
