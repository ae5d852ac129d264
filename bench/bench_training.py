"""A training step: the exact large-batch step beside one dense batch and beside open_clip's accumulation.

python -m bench.bench_training                         time at a batch where all fit, memory from 64 to 512 pairs
python -m bench.bench_training --published --batch 1024 --micro-batch 128 --memory-batch 512 8192     on a GPU

dense: forward and backward of the whole batch. accumulation: embed all of it without gradients; then, for each
micro-batch, embed it again and back-propagate the loss of the whole batch, all of its logits each time (open_clip's
accum-freq, which upstream uses). Extra memory is what a step needs beyond weights and the batch itself, pixels
included; gradients are made anew in each step. On a CPU every size takes as many steps as see the largest one's pairs:
the allocator's fragments grow with the work done; medians of three. On a GPU, whose allocator counts, memory above
--batch is that of one step, and of lbfast's alone. The towers are cut down so that a CPU can do it; --published: those
of L/14. Random weights. A step that can't be taken, for want of memory, is a row that says so.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from lbfast import ops
from lbfast.model.config import config_dict, published_config
from lbfast.model.languagebind import LanguageBindModel, model_dict
from lbfast.training.parameters import prepare
from lbfast.training.recipes import recipe
from lbfast.training.step import LargeBatchStep, Towers, unit

from . import contest, harness, options, peers

KINDS = ("dense", "accumulation", "lbfast")
TUNED = {"full": 0, "lora": 16}


@dataclasses.dataclass(frozen=True)
class Size:
    """micro_batch: pairs. width, layers: of the vision tower; published: L/14's, of so many layers (0: all)."""

    micro_batch: int
    width: int
    layers: int
    published: bool = False


def model_of(tuned: str, size: Size, device: str) -> LanguageBindModel:
    """L/14, or an image model of 14 x 14 patches of 16 pixels and a small text tower; prepared."""
    plan = recipe("depth", modality="image", lora_r=TUNED[tuned], patch_dropout=0.0, lock_image=True)
    if size.published:
        config = published_config("image")
        config.vision_config.num_hidden_layers = size.layers or config.vision_config.num_hidden_layers
    else:
        width = size.width
        tower = {"num_attention_heads": width // 64, "hidden_size": width, "intermediate_size": 4 * width}
        text = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = config_dict["image"](
            text_config={**text, "hidden_act": "gelu"},
            vision_config={
                **tower, "num_hidden_layers": size.layers, "patch_size": 16, "hidden_act": "gelu", "lora_r": 0
            },
            projection_dim=256,
        )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = model_dict["image"](config)
    return prepare(model, plan).to(device)  # type: ignore[arg-type]


def pairs(count: int) -> SimpleNamespace:
    """On the CPU, where the data comes from. Drawing pixels takes long: pictures repeat."""
    ids = torch.randint(1, 49000, (count, 16))
    ids[:, -1] = 49407
    drawn = torch.randn(min(count, 512), 3, 224, 224)
    pixels = drawn.repeat(-(-count // len(drawn)), 1, 1, 1)[:count]
    return SimpleNamespace(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids))


def step(kind: str, tuned: str, batch: int, size: Size, device: str, times: int = 1) -> Callable[[], Any]:
    """Training steps without the optimiser's; for harness.cpu_memory too, which makes them in a process of its own."""
    model = model_of(tuned, size, device)
    data, micro_batch = pairs(batch), size.micro_batch
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
    parser = options.parser(__doc__)
    parser.add_argument("--batch", type=int, default=64, help="pairs, for the times (%(default)s)")
    parser.add_argument("--memory-batch", type=int, nargs="*", default=[64, 512], help="pairs, for the memory")
    parser.add_argument("--micro-batch", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--width", type=int, default=256, help="of the vision tower (%(default)s)")
    parser.add_argument("--layers", type=int, default=0, help="of the vision tower (4; with --published all)")
    parser.add_argument("--published", action="store_true", help="the towers of L/14")
    parser.add_argument("--tuned", nargs="+", choices=list(TUNED), default=list(TUNED), help="what is trained")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each candidate (%(default)s)")
    parser.add_argument("--out", help="a JSON file")
    given = parser.parse_args(argv)
    record = harness.Record("Training step", harness.device(), given.out)
    layers = given.layers or (0 if given.published else 4)
    size = Size(given.micro_batch, given.width, layers, given.published)
    for tuned in given.tuned:
        measure_time(tuned, given.batch, size, record, given.seconds)
    for batch in given.memory_batch:  # of all before the larger one: it takes longest
        for tuned in given.tuned:
            measure_memory(tuned, batch, size, record, given.batch, max(given.memory_batch))
    show(record)
    return 0


def measure_time(tuned: str, batch: int, size: Size, record: harness.Record, seconds: float) -> None:
    about = {"what": "time", "trained": tuned, "batch": batch}
    runs: dict[str, Callable[[], Any]] = {}
    for kind in KINDS:
        try:
            run = step(kind, tuned, batch, size, record.device)
            run()
            runs[kind] = run
        except torch.OutOfMemoryError as error:
            record.add([{**about, "step": kind, "note": contest.reason(error)}])
        _give_back(record.device)
    times = harness.interleaved(runs, record.device, seconds, warm=False)
    for kind, timing in times.items():
        row = {**about, "step": kind, "micro_batch": batch if kind == "dense" else size.micro_batch}
        row |= {"ms": timing.median_ms, "p20_ms": timing.p20_ms, "p80_ms": timing.p80_ms}
        if "dense" in times:
            row["of_dense"] = round(timing.median_ms / times["dense"].median_ms, 3)
        record.add([row])


def measure_memory(tuned: str, batch: int, size: Size, record: harness.Record, compared: int, largest: int) -> None:
    """Up to `compared` pairs of every kind of step."""
    for kind in KINDS:
        if batch > compared and (kind == "dense" if record.device == "cpu" else kind != "lbfast"):
            continue  # it needs as many times more memory, or time
        about = {"what": "memory", "trained": tuned, "step": kind, "batch": batch}
        try:
            if record.device == "cuda":
                extra = harness.gpu_extra_mib(step(kind, tuned, batch, size, "cuda"), warm=batch <= compared)
            else:
                times = 1 if kind == "dense" else largest // batch
                warm = (kind, tuned, 2, dataclasses.replace(size, micro_batch=1), "cpu")
                arguments = (kind, tuned, batch, size, "cpu", times)
                peaks = [harness.cpu_memory(step, *arguments, warm=warm).extra for _ in range(3)]
                extra = statistics.median(peaks)  # they differ by a tenth: the allocator's doing
            record.add([{**about, "MiB": round(extra, 1)}])
        except torch.OutOfMemoryError as error:
            record.add([{**about, "note": contest.reason(error)}])
        _give_back(record.device)


def _give_back(device: str) -> None:
    """What a step that ended held, to the next one."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def show(record: harness.Record) -> None:
    harness.say(harness.describe(record.header))
    columns = ["trained", "step", "batch", "micro_batch", "ms", "p20_ms", "p80_ms", "of_dense"]
    rows = [row for row in record.rows if "ms" in row]
    print(harness.table(columns, [[row.get(name, "") for name in columns] for row in rows], left=2))
    columns = ["trained", "step", "batch", "MiB"]
    rows = [row for row in record.rows if "MiB" in row]
    print(harness.table(columns, [[row[name] for name in columns] for row in rows], left=2))
    for row in record.rows:
        if "note" in row:
            print(f"{row['trained']}, {row['step']}, batch {row['batch']}, {row['what']}: {row['note']}")


if __name__ == "__main__":
    sys.exit(main())
