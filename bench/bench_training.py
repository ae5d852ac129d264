"""A training step: the exact large-batch step beside one dense batch and beside open_clip's accumulation.

python -m bench.bench_training                         time at a batch where all fit, memory from 64 to 512 pairs
python -m bench.bench_training --batch 1024 --micro-batch 128 --width 1024 --layers 24     on a GPU

dense: forward and backward of the whole batch. accumulation: embed all of it without gradients; then, for each
micro-batch, embed it again and back-propagate the loss of the whole batch, all of its logits each time (open_clip's
accum-freq, which upstream uses). Extra memory is what a step needs beyond weights and the batch itself, pixels
included; gradients are made anew in each step. Every size takes as many steps as see the largest one's pairs: the
allocator's fragments grow with the work done; medians of three. The towers are cut down so that a CPU can do it;
random weights.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from lbfast import ops
from lbfast.model.config import config_dict
from lbfast.model.languagebind import LanguageBindModel, model_dict
from lbfast.training.parameters import prepare
from lbfast.training.recipes import recipe
from lbfast.training.step import LargeBatchStep, Towers, unit

from . import harness, peers

KINDS = ("dense", "accumulation", "lbfast")
TUNED = {"full": 0, "lora": 16}


def model_of(tuned: str, width: int, layers: int, device: str) -> LanguageBindModel:
    """An image model of 14 x 14 patches of 16 pixels and a small text tower, prepared."""
    plan = recipe("depth", modality="image", lora_r=TUNED[tuned], patch_dropout=0.0, lock_image=True)
    tower = {"num_attention_heads": width // 64, "hidden_size": width, "intermediate_size": 4 * width}
    text = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = config_dict["image"](
        text_config={**text, "hidden_act": "gelu"},
        vision_config={**tower, "num_hidden_layers": layers, "patch_size": 16, "hidden_act": "gelu", "lora_r": 0},
        projection_dim=256,
    )
    torch.manual_seed(0)
    return prepare(model_dict["image"](config), plan).to(device)  # type: ignore[arg-type]


def pairs(count: int) -> SimpleNamespace:
    """On the CPU, where the data comes from."""
    ids = torch.randint(1, 49000, (count, 16))
    ids[:, -1] = 49407
    pixels = torch.randn(count, 3, 224, 224)
    return SimpleNamespace(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids))


def step(
    kind: str, tuned: str, batch: int, micro_batch: int, width: int, layers: int, device: str, times: int = 1
) -> Callable[[], Any]:
    """Training steps without the optimiser's; for harness.cpu_memory too, which makes them in a process of its own."""
    model = model_of(tuned, width, layers, device)
    data = pairs(batch)
    autocast = torch.bfloat16 if device == "cuda" else None
    large = LargeBatchStep(Towers(model), micro_batch, autocast=autocast)

    def arithmetic() -> Any:
        return torch.autocast(device, dtype=autocast, enabled=autocast is not None)

    def image(start: int, end: int) -> torch.Tensor:
        with arithmetic():
            return unit(model.get_image_features(data.pixel_values[start:end].to(device)))

    def dense() -> None:
        texts = large.embed_captions(data.input_ids, data.attention_mask)
        ops.info_nce(image(0, batch), texts, model.logit_scale.exp()).backward()

    def accumulation() -> None:
        texts = large.embed_captions(data.input_ids, data.attention_mask)
        edges = [(start, min(start + micro_batch, batch)) for start in range(0, batch, micro_batch)]
        with torch.no_grad():
            images = [image(*edge) for edge in edges]
        for i, edge in enumerate(edges):
            whole = torch.cat([*images[:i], image(*edge), *images[i + 1 :]])
            peers.clip_loss(whole, texts, model.logit_scale.exp()).backward()

    ways: dict[str, Callable[[], Any]] = {
        "dense": dense,
        "accumulation": accumulation,
        "lbfast": lambda: large(data, 0),
    }

    def run() -> None:
        for _ in range(times):
            model.zero_grad(set_to_none=True)
            ways[kind]()

    return run


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="pairs, for the times (%(default)s)")
    parser.add_argument("--memory-batch", type=int, nargs="*", default=[64, 512], help="pairs, for the memory")
    parser.add_argument("--micro-batch", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--width", type=int, default=256, help="of the vision tower (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the vision tower (%(default)s)")
    parser.add_argument("--tuned", nargs="+", choices=list(TUNED), default=list(TUNED), help="what is trained")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each candidate (%(default)s)")
    parser.add_argument("--out", help="a JSON file")
    given = parser.parse_args(argv)
    device = harness.device()
    record = harness.Record("Training step", device, given.out)
    size = (given.micro_batch, given.width, given.layers, device)
    for tuned in given.tuned:
        runs = {kind: step(kind, tuned, given.batch, *size) for kind in KINDS}
        times = harness.interleaved(runs, device, given.seconds)
        record.add(
            {
                "what": "time",
                "trained": tuned,
                "step": kind,
                "batch": given.batch,
                "micro_batch": given.batch if kind == "dense" else given.micro_batch,
                "ms": times[kind].median_ms,
                "p20_ms": times[kind].p20_ms,
                "p80_ms": times[kind].p80_ms,
                "of_dense": round(times[kind].median_ms / times["dense"].median_ms, 3),
            }
            for kind in KINDS
        )
        del runs
        for kind in KINDS:
            for batch in given.memory_batch:
                if kind == "dense" and batch > given.batch and device == "cpu":
                    continue  # it needs as many times more
                arguments = (kind, tuned, batch, *size, 1 if kind == "dense" else max(given.memory_batch) // batch)
                if device == "cuda":
                    extra = harness.gpu_extra_mib(step(*arguments))
                else:
                    warm = (kind, tuned, 2, 1, *size[1:])
                    peaks = [harness.cpu_memory(step, *arguments, warm=warm).extra for _ in range(3)]
                    extra = statistics.median(peaks)  # they differ by a tenth: the allocator's doing
                record.add([{"what": "memory", "trained": tuned, "step": kind, "batch": batch, "MiB": round(extra, 1)}])
    show(record)
    return 0


def show(record: harness.Record) -> None:
    print(harness.describe(record.header))
    rows = [row for row in record.rows if row["what"] == "time"]
    columns = ["trained", "step", "batch", "micro_batch", "ms", "p20_ms", "p80_ms", "of_dense"]
    print(harness.table(columns, [[row[name] for name in columns] for row in rows], left=2))
    rows = [row for row in record.rows if row["what"] == "memory"]
    columns = ["trained", "step", "batch", "MiB"]
    print(harness.table(columns, [[row[name] for name in columns] for row in rows], left=2))


if __name__ == "__main__":
    sys.exit(main())
