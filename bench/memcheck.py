"""One small case of each Triton kernel, forward and backward, for compute-sanitizer:

compute-sanitizer --tool memcheck --error-exitcode 99 python -m bench.memcheck [OP ...]

Sizes are ragged, so that every mask is at work. TRITON_INTERPRET=1 runs it on a CPU, where it checks only itself.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lbfast import ops

from . import harness


def cases(device: str, dtype: torch.dtype) -> dict[str, tuple[Callable[..., Any], list[torch.Tensor]]]:
    """Name -> an op by its Triton kernels, and its inputs."""

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    def attention(causal: bool) -> Callable[..., Any]:
        return lambda q, k, v: ops.attention(q, k, v, causal=causal, impl="triton")

    pixels = torch.randint(0, 256, (1, 3, 2, 42, 28), dtype=torch.uint8, device=device)
    kept = torch.tensor([[0, 2, 5]], device=device)
    about = {name: torch.tensor([0.4, 0.5, 0.6], device=device) for name in ("mean", "std")}

    def patches(weight: Any, classes: Any, position: Any, **more: Any) -> torch.Tensor:
        return ops.patch_embed(
            more.pop("pixels"), weight, class_embedding=classes, position_embedding=position, impl="triton", **more
        )

    table = [new(40, 3, 14, 14), new(40), new(7, 40)]
    unit = [F.normalize(new(70, 40).float(), dim=-1).to(dtype).detach().requires_grad_() for _ in range(2)]
    scale = torch.tensor(14.3, device=device, requires_grad=True)
    return {
        "attention": (attention(False), [new(1, 33, 2, 80) for _ in range(3)]),
        "attention, many tokens": (attention(False), [new(1, 141, 1, 32) for _ in range(3)]),
        "attention, causal": (attention(True), [new(2, 19, 1, 32) for _ in range(3)]),
        "temporal_attention": (
            lambda q, k, v: ops.temporal_attention(q, k, v, impl="triton"),
            [new(1, 3, 5, 2, 80) for _ in range(3)],
        ),
        "layer_norm": (lambda x, w, b: ops.layer_norm(x, w, b, impl="triton"), [new(5, 72), new(72), new(72)]),
        "layer_norm + residual": (
            lambda x, w, b, r: ops.layer_norm(x, w, b, residual=r, impl="triton"),
            [new(2, 3, 5, 72), new(72), new(72), new(1, 3, 1, 72)],
        ),
        "mlp": (
            lambda *x: ops.mlp(*x, activation="gelu", impl="triton"),
            [new(9, 24), new(88, 24), new(88), new(24, 88), new(24)],
        ),
        "patch_embed from bytes": (lambda *x: patches(*x, pixels=pixels, kept=kept, **about), table),
        "patch_embed from floats": (
            lambda p, *x: patches(*x, pixels=p),
            [(pixels / 255).to(dtype).requires_grad_(), *table],
        ),
        "info_nce": (lambda *x: ops.info_nce(*x, impl="triton"), [*unit, scale]),
        "sigmoid_loss": (lambda *x: ops.sigmoid_loss(*x, -5.0, impl="triton"), [*unit, scale]),
    }


def main(argv: Sequence[str] | None = None) -> int:
    wanted = sys.argv[1:] if argv is None else argv
    device = harness.device()
    for dtype in (torch.float16, torch.float32) if device == "cpu" else (torch.bfloat16, torch.float32):
        for name, (op, inputs) in cases(device, dtype).items():
            if wanted and re.split(r"[ ,]", name)[0] not in wanted:
                continue
            out = op(*inputs)
            outs = [out] if isinstance(out, torch.Tensor) else list(out)
            grads = torch.autograd.grad(outs, inputs, [torch.randn_like(o) for o in outs])
            if device == "cuda":
                torch.cuda.synchronize()
            finite = all(bool(torch.isfinite(t).all()) for t in (*outs, *grads))
            print(f"{name}, {str(dtype).removeprefix('torch.')}: {'ok' if finite else 'not finite'}", flush=True)
            if not finite:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
