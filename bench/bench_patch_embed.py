"""ops.patch_embed beside convolutions, from bytes and from floats, with all patches and with half of them kept.

python -m bench.bench_patch_embed --dtype bfloat16 --clips 32
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lbfast import ops
from lbfast.reference.patch_embed import patch_embed as reference

from . import contest, harness, options

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def eager(pixels, weight, *, class_embedding, position_embedding, kept=None, mean=None, std=None):
    """As upstream does: normalise, convolve every frame, concatenate, add, then drop."""
    frames = pixels.transpose(1, 2).flatten(0, 1)
    if mean is not None:
        frames = (frames / 255 - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
    patches = F.conv2d(frames.to(weight.dtype), weight, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    classes = class_embedding.expand(len(patches), 1, -1)
    tokens = torch.cat([classes, patches], dim=1) + position_embedding
    if kept is None:
        return tokens
    rows = torch.cat([torch.zeros_like(kept[:, :1]), 1 + kept], dim=1).repeat_interleave(pixels.shape[2], 0)
    return tokens.gather(1, rows[..., None].expand(-1, -1, tokens.shape[-1]))


def contenders(constants: dict[str, Any]):
    def call(function, **more):
        return lambda weight, classes, position, pixels, kept=None: function(
            pixels, weight, class_embedding=classes, position_embedding=position, kept=kept, **more, **constants
        )

    return {
        "reference": call(reference),
        "torch": call(eager),
        "torch.compile": torch.compile(call(eager), dynamic=False),
        **{f"lbfast {impl}": call(ops.patch_embed, impl=impl) for impl in ("torch", "native", "triton")},
    }


def cases(
    device: str, dtype: torch.dtype, clips: int, bytes: bool, side: int, widths: Sequence[int]
) -> list[contest.Case]:
    """Patches of 14 x 14, clips of 8 frames; (B, C, T, H, W) views of (B, T, C, H, W), as processors give."""
    found = []
    every = (side // 14) ** 2
    for d in widths:
        shape = (clips, 8, 3, side, side)
        raw = torch.randint(0, 256, shape, device=device, dtype=torch.uint8)
        pixels = (raw if bytes else (raw / 127.5 - 1).to(dtype)).transpose(1, 2)
        shapes = ((d, 3, 14, 14), (d,), (1 + every, d))
        parameters = [(torch.randn(s, device=device, dtype=dtype) * 0.1).requires_grad_() for s in shapes]
        half = torch.stack([torch.randperm(every)[: every // 2] for _ in range(clips)]).to(device)
        for what, kept, k in (("all", [], every), ("half", [half], every // 2)):
            flops = 2.0 * clips * 8 * k * 588 * d
            moved = clips * 8 * (k * 588 * pixels.element_size() + (1 + k) * d * parameters[0].element_size())
            inputs = (*parameters, pixels, *kept)
            name = f"{'x'.join(map(str, pixels.shape))} {'uint8 ' if bytes else ''}-> {d}, {what}"
            found.append(contest.Case(name, inputs, (flops, flops), (moved, moved)))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = contest.arguments(__doc__)
    parser.add_argument("--clips", type=options.count, help="of 8 frames; default 32 on a GPU, 1 on a CPU")
    parser.add_argument("--floats", action="store_true", help="from normalised floats; default: from bytes")
    parser.add_argument("--side", type=options.count, default=224, help="of the pictures, in pixels (%(default)s)")
    parser.add_argument("--width", type=options.count, nargs="+", default=[1024, 1280], help="default: 1024 1280")
    given = parser.parse_args(argv)
    record = harness.Record("Patch embedding", harness.device(), given.out)
    pairs = () if given.floats else (("mean", MEAN), ("std", STD))
    constants = {name: torch.tensor(v, device=record.device) for name, v in pairs}
    clips = given.clips or (32 if record.device == "cuda" else 1)
    for dtype in given.dtype:
        found = cases(record.device, getattr(torch, dtype), clips, not given.floats, given.side, given.width)
        contest.run(found, contenders(constants), record, given)
    return contest.show(record)


if __name__ == "__main__":
    sys.exit(main())
