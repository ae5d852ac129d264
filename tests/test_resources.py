"""Every Triton kernel, compiled without a GPU for every architecture, keeps to the registers and the memory it has."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.resources import op_of
from lbfast.kernels import configs

ROOT = Path(__file__).resolve().parent.parent
ARCHS = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}


def environment():
    return {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}


def resources(*arguments):
    command = [sys.executable, "-m", "bench.resources", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.stdout.startswith("["), done.stderr[-2000:]
    return json.loads(done.stdout), done.returncode


@pytest.mark.slow
def test_every_kernel_fits():
    rows, code = resources("--json", "--reduced", "--workers", "2")
    bad = [
        f"{r['case']} {r['arch']}: {r['error'] or ''} {r['spills']} of {r['spills_limit']} B spilt, "
        f"{r['shared']} of {r['shared_limit']} B"
        for r in rows
        if not r["fits"]
    ]
    assert not bad, "\n".join(bad)
    assert code == 0
    files = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"primitives", "configs", "pairs"}
    kernels = {op_of(name) for name in files}
    compiled = {(op_of(r["kernel"]), r["arch"]) for r in rows}
    assert compiled == {(kernel, arch) for kernel in kernels for arch in ARCHS}
    cores = {r["arch"]: r["tensor_cores"] for r in rows if r["kernel"] == "info_nce" and r["tensor_cores"]}
    assert cores == {
        **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), "mma"),
        "sm_90": "wgmma",
        "sm_100": "tcgen05",
        "gfx942": "mfma",
    }
    assert all(r["registers"] > 0 and (r["floor_us"] > 0 or "no tile" in r["case"]) for r in rows)
    check_counts([r for r in rows if r["arch"] == "sm_90"])


def check_counts(rows):
    """Each case's warp-instructions, counted for sm_90, lie below its ceiling; both in millions of a launch."""
    ceilings = json.loads((ROOT / "bench" / "ceilings.json").read_text(encoding="utf-8"))
    counts = {r["case"]: (r["instructions"] or 0) / 1e6 for r in rows}
    assert all(counts.values()), f"cases without a grid: {[case for case, count in counts.items() if not count]}"
    assert counts.keys() == ceilings.keys(), f"not in both: {sorted(counts.keys() ^ ceilings.keys())}"
    above = [f"{case}: {count:.3f} > {ceilings[case]}" for case, count in counts.items() if count > ceilings[case]]
    assert not above, "more warp-instructions than bench/ceilings.json allows, in millions:\n" + "\n".join(above)
    assert all(0 < r["tensor"] + r["memory"] + r["mufu"] < 1 and r["ctas"] > 0 and r["waves"] > 0 for r in rows)


LAUNCHES = [(arch, "bfloat16") for arch in ("gfx942", "sm_80", "sm_90", "sm_100")] + [("sm_90", "float32")]
"""One architecture of each family: what is made of its launches differs no further, and `test_every_kernel_fits` has
them all."""

ONLY_OF_16_BITS = {
    "_attention_bwd_whole_kernel",
    "_attention_fwd_head_kernel",
    "_info_nce_again_kernel",
    "_info_nce_bwd_kept_kernel",
    "_info_nce_bwd_left_kernel",
}
"""Heads whose tokens' products a block keeps, and exponentials that the backward finds again."""


@pytest.fixture(scope="module")
def launches():
    """Which has imported torch and Triton, once for all."""
    command, pipe = [sys.executable, "-m", "tests.launches"], subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=pipe, stdout=pipe, text=True)
    yield process
    process.communicate(timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype"), LAUNCHES)
def test_every_launch_compiles(arch, dtype, launches, tmp_path):
    """With what a launch makes constant: numbers that are 1, tensors that are None."""
    launches.stdin.write(f"{arch} {dtype} {tmp_path}\n")
    launches.stdin.flush()
    status = launches.stdout.readline()
    assert status == "0\n", status + (tmp_path / "stderr").read_text()[-3000:]
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("*.py"))
    wanted = set(re.findall(r"^def (_\w+_kernel)\(", sources, re.MULTILINE))
    if arch not in configs.ATTENTION_BWD_WHOLE:
        wanted -= {"_attention_bwd_whole_kernel"}
    if arch in {"sm_80", "gfx942"}:  # which have no float8 products of ours
        wanted = {name for name in wanted if "float8" not in name}
    if dtype == "float32":
        wanted -= ONLY_OF_16_BITS
    assert set((tmp_path / "stdout").read_text().split()) == wanted
