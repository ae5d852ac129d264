"""`make sanitize` in brief: one file of csrc under the sanitizers is clean, and a planted overflow is not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lbfast import native

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined -O0"
CALLS = """
import sys, torch
from lbfast import ops
torch.ops.load_library(sys.argv[1])
torch.library.define("planted::temporal_attention_native", "(Tensor q, Tensor k, Tensor v, float scale) -> Tensor")
for b, t, n, h, d in ((2, 5, 3, 1, 7), (1, 8, 2, 2, 64), (2, 32, 3, 1, 128), (1, 1, 1, 1, 1)):
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(b, t, n, h, 2 * d)[..., :d].to(dtype) for _ in range(3))
        torch.ops.lbfast.temporal_attention_native(q, k, v, 1.0)
        torch.ops.lbfast.temporal_attention_native_bwd(q, q, k, v, 1.0)
print("done", flush=True)
q = torch.randn(1, 8, 2, 2, 64)
torch.ops.planted.temporal_attention_native(q, q, q, 1.0)
print("nothing was seen")
"""


def runtimes():
    """The libraries that must be loaded first; empty where the compiler has none."""
    compiler = native._compiler()
    if compiler is None:
        return []
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    found = [subprocess.run([compiler, f"-print-file-name={n}"], capture_output=True, text=True).stdout for n in names]
    return [path.strip() for path in found] if all(os.path.isabs(path) for path in found) else []


def with_a_planted_fault(source):
    """The file, and itself once more with rows of too little room, as the ops planted::X: headers are parsed once."""
    planted = source.replace("float data[kMaxFrames * kMaxDim];", "float data[kMaxDim];")
    assert planted != source
    code = "\n".join(line for line in planted.splitlines() if not line.startswith("#include"))
    return f"{source}\nnamespace planted {{\n{code.replace('_IMPL(lbfast,', '_IMPL(planted,')}\n}}\n"


@pytest.mark.slow
@pytest.mark.skipif(not runtimes(), reason="no sanitizers here")
def test_sanitizers_see_what_is_wrong_and_nothing_else(tmp_path, monkeypatch):
    source = (ROOT / "csrc/cpu/temporal_attention.cpp").read_text()
    (tmp_path / "temporal_attention.cpp").write_text(with_a_planted_fault(source))
    for header in (ROOT / "csrc/cpu").glob("*.h"):
        shutil.copy(header, tmp_path)
    monkeypatch.setattr(native, "_sources", lambda: [tmp_path / "temporal_attention.cpp"])
    monkeypatch.setenv("LBFAST_CXXFLAGS", FLAGS)
    version = Path(runtimes()[0]).resolve().name
    library = native.cache_folder() / f"{version}{native.library_name.__wrapped__()}"  # of these sources and flags
    if not library.exists():
        native.compile_library(library)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LD_PRELOAD": " ".join(runtimes()),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
    }
    command = [sys.executable, "-c", CALLS, str(library)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.stdout == "done\n", ran.stderr[-2000:]
    assert ran.returncode and "AddressSanitizer: stack-buffer-overflow" in ran.stderr, ran.stderr[-2000:]
