"""Pictures of a profile, by matplotlib (the extra `bench`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lbfast import files
from lbfast.profiling.trace import Profile

NAMED = 8  # operators with their names in the roofline


def why_not() -> str:
    """Why nothing can be drawn; empty where it can."""
    found = importlib.util.find_spec("matplotlib") is not None
    return "" if found else "matplotlib is not installed (pip install 'lbfast[bench]')"


def roofline(profile: Profile, path: Path) -> None:
    """FLOP/s of each operator over FLOP per byte, under what the machine gives; larger dots took longer.

    Operators without FLOP are not on it.
    """
    from matplotlib.figure import Figure

    rates, shown = profile.rates, [op for op in profile.operators if op.flops and op.bytes]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    ridge = rates.flops / rates.bytes
    low = min([ridge / 30, *(op.intensity / 2 for op in shown)])
    high = max([ridge * 30, *(op.intensity * 2 for op in shown)])
    axes.plot([low, ridge, high], [low * rates.bytes / 1e12, rates.flops / 1e12, rates.flops / 1e12], color="black")
    longest = max((op.ms for op in shown), default=1.0)
    for i, op in enumerate(shown):
        x, y = op.intensity, op.flops / op.ms / 1e9
        axes.scatter([x], [y], s=15 + 200 * op.ms / longest, alpha=0.7)
        if i < NAMED:
            axes.annotate(f"{op.name} ({op.ms:.1f} ms)", (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    axes.set_title(f"{profile.header['device']}: {profile.ms:.1f} ms, {profile.of_matmul_rate:.0%} of the matmul rate")
    axes.grid(which="both", alpha=0.2)
    with files.replacing(path) as staged:
        figure.savefig(staged)


def memory(profile: Profile, path: Path) -> None:
    """MiB of tensors over the time of one profiled call, beyond what was there before it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.fill_between([ms for ms, _ in profile.memory], [mib for _, mib in profile.memory], step="post", alpha=0.6)
    axes.set(xlabel="ms", ylabel="MiB", title="tensors made by the call")
    axes.grid(alpha=0.2)
    with files.replacing(path) as staged:
        figure.savefig(staged)
