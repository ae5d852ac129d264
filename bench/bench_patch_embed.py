"""ops.patch_embed beside convolutions, from bytes and from floats, with all patches and with half of them kept.

python -m bench.bench_patch_embed --dtype bfloat16 --clips 32
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer

from bench import contest
from lbfast import ops
from lbfast.reference.patch_embed import patch_embed as reference

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


def contenders(options: dict[str, Any]):
    def call(function, **more):
        return lambda weight, classes, position, pixels, kept=None: function(
            pixels, weight, class_embedding=classes, position_embedding=position, kept=kept, **more, **options
        )

    return {
        "reference": call(reference),
        "torch": call(eager),
        "torch.compile": torch.compile(call(eager), dynamic=False),
        **{f"lbfast {impl}": call(ops.patch_embed, impl=impl) for impl in ("torch", "native", "triton")},
    }


def cases(device: str, dtype: torch.dtype, clips: int, bytes: bool) -> list[contest.Case]:
    """L/14 and H/14 on clips of 8 frames of 224 x 224; (B, C, T, H, W) views of (B, T, C, H, W), as processors give."""
    found = []
    for d in (1024, 1280):
        shape = (clips, 8, 3, 224, 224)
        raw = torch.randint(0, 256, shape, device=device, dtype=torch.uint8)
        pixels = (raw if bytes else (raw / 127.5 - 1).to(dtype)).transpose(1, 2)
        shapes = ((d, 3, 14, 14), (d,), (257, d))
        parameters = [(torch.randn(s, device=device, dtype=dtype) * 0.1).requires_grad_() for s in shapes]
        half = torch.stack([torch.randperm(256)[:128] for _ in range(clips)]).to(device)
        for what, kept, k in (("all", [], 256), ("half", [half], 128)):
            flops = 2.0 * clips * 8 * k * 588 * d
            moved = clips * 8 * (k * 588 * pixels.element_size() + (1 + k) * d * parameters[0].element_size())
            inputs = (*parameters, pixels, *kept)
            name = f"{'x'.join(map(str, pixels.shape))} {'uint8 ' if bytes else ''}-> {d}, {what}"
            found.append(contest.Case(name, inputs, (flops, flops), (moved, moved)))
    return found


def main(
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    clips: Annotated[int, typer.Option(help="Clips of 8 frames; default 32 on a GPU, 1 on a CPU.")] = 0,
    bytes: Annotated[bool, typer.Option(help="From uint8 pixels; --no-bytes: from floats.")] = True,
    seconds: Annotated[float, typer.Option(help="Time for each number.")] = 1.0,
    out: Annotated[str, typer.Option(help="Name of the result file; empty: none.")] = "",
) -> None:
    """Forward, backward (of the parameters) and both, at the video towers' shapes."""
    device = contest.device()
    options = {name: torch.tensor(v, device=device) for name, v in (("mean", MEAN), ("std", STD))} if bytes else {}
    found = cases(device, getattr(torch, dtype), clips or (32 if device == "cuda" else 1), bytes)
    contest.show("patch_embed", contest.run(found, contenders(options), seconds=seconds), out)


if __name__ == "__main__":
    typer.run(main)
