"""A training step: the exact large-batch step beside one dense batch, open_clip's accumulation and GradCache's way.

python -m bench.bench_training                         time at a batch where all fit, memory from 64 to 512 pairs
python -m bench.bench_training --arch L/14 --batch 1024 --micro-batch 128 --memory-batch 512 8192     on a GPU
python -m bench.bench_training --arch L/14 --once --modality image video --batch 8 --micro-batch 2    on a CPU

dense: forward and backward of the whole batch. accumulation: embed all of it without gradients; then, for each
micro-batch, embed it again and back-propagate the loss of the whole batch, all of its logits each time (open_clip's
accum-freq, which upstream uses). grad cache: embed all of it without gradients; the gradient of the loss for the
embeddings; then embed each micro-batch again and back-propagate its rows of it (arXiv 2101.06983). Extra memory is what
a step needs beyond weights and the batch itself, pixels included; gradients are made anew in each step. On a CPU every
size takes as many steps as see the largest one's pairs: the allocator's fragments grow with the work done; medians of
three. On a GPU, whose allocator counts, memory above --batch is that of one step, and of lbfast's alone. The towers are
cut down so that a CPU can do it; --arch L/14: those of L/14, in full. --once: time and memory of one and the same step,
each way in a process of its own, after a step of one pair. Captions of 16 tokens; language stays. Kept: by the forward
of what is back-propagated at once, for its backward. Random weights. A step that can't be taken, for want of memory, is
a row that says so.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace
from typing import Any

import torch

from lbfast import ops
from lbfast.model.config import config_dict, published_config
from lbfast.model.languagebind import LanguageBindModel, model_dict
from lbfast.training import memory
from lbfast.training.parameters import prepare
from lbfast.training.recipes import Recipe, recipe
from lbfast.training.step import LargeBatchStep, Towers, unit

from . import contest, harness, options, peers

KINDS = ("dense", "accumulation", "grad cache", "lbfast")
TUNED = {"full": 0, "lora": 16}
ARCHS = ("small", "L/14")


@dataclasses.dataclass(frozen=True)
class Size:
    """micro_batch: pairs. width, layers: of the vision tower; arch "L/14": of so many layers (0: all)."""

    micro_batch: int
    width: int
    layers: int
    arch: str = "small"
    modality: str = "image"


def model_of(tuned: str, size: Size, device: str) -> LanguageBindModel:
    """L/14, or a model of 14 x 14 patches of 16 pixels and a small text tower; prepared."""
    if size.arch == "L/14":
        config = published_config(size.modality)
        config.vision_config.num_hidden_layers = size.layers or config.vision_config.num_hidden_layers
    else:
        width = size.width
        tower = {"num_attention_heads": width // 64, "hidden_size": width, "intermediate_size": 4 * width}
        text = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = config_dict[size.modality](
            text_config={**text, "hidden_act": "gelu"},
            vision_config={
                **tower, "num_hidden_layers": size.layers, "patch_size": 16, "hidden_act": "gelu", "lora_r": 0,
                **({"add_time_attn": True, "num_frames": 8} if size.modality == "video" else {}),
            },
            projection_dim=256,
        )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = model_dict[size.modality](config)
    return prepare(model, _recipe(tuned, size)).to(device)  # type: ignore[arg-type]


def _recipe(tuned: str, size: Size) -> Recipe:
    return recipe("depth", modality=size.modality, lora_r=TUNED[tuned], patch_dropout=0.0, lock_image=True)


def pairs(count: int, modality: str = "image") -> SimpleNamespace:
    """On the CPU, where the data comes from. Drawing pixels takes long: they repeat."""
    ids = torch.randint(1, 49000, (count, 16))
    ids[:, -1] = 49407
    shape = (3, 8, 224, 224) if modality == "video" else (3, 224, 224)
    drawn = torch.randn(min(count, 512 if modality == "image" else 64), *shape)
    pixels = drawn.repeat(-(-count // len(drawn)), *[1] * len(shape))[:count]
    return SimpleNamespace(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids))


def step(kind: str, tuned: str, batch: int, size: Size, device: str, times: int = 1) -> Callable[[], Any]:
    """Training steps without the optimiser's, which return the model with its gradients; for harness.cpu_memory too,
    which makes them in a process of its own."""
    model = model_of(tuned, size, device)
    data, micro_batch = pairs(batch, size.modality), size.micro_batch
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

    edges = [(start, min(start + micro_batch, batch)) for start in range(0, batch, micro_batch)]

    def accumulation() -> None:
        texts = large.embed_captions(data.input_ids, data.attention_mask)
        with torch.no_grad():
            images = [image(*edge) for edge in edges]
        for i, edge in enumerate(edges):
            whole = torch.cat([*images[:i], image(*edge), *images[i + 1 :]])
            peers.clip_loss(whole, texts, model.logit_scale.exp()).backward()

    def grad_cache() -> None:
        texts = large.embed_captions(data.input_ids, data.attention_mask)
        with torch.no_grad():
            leaf = torch.cat([image(*edge) for edge in edges])
        leaf.requires_grad_()
        peers.clip_loss(leaf, texts, model.logit_scale.exp()).backward()
        for start, end in edges:
            image(start, end).backward(leaf.grad[start:end])

    ways: dict[str, Callable[[], Any]] = {
        "dense": dense,
        "accumulation": accumulation,
        "grad cache": grad_cache,
        "lbfast": lambda: large(data, 0),
    }

    def run() -> LanguageBindModel:
        for _ in range(times):
            model.zero_grad(set_to_none=True)
            ways[kind]()
        return model

    return run


def main(argv: Sequence[str] | None = None) -> int:
    parser = options.parser(__doc__)
    parser.add_argument("--batch", type=options.count, default=64, help="pairs, for the times (%(default)s)")
    parser.add_argument(
        "--memory-batch", type=options.count, nargs="*", default=[64, 512], help="pairs, for the memory"
    )
    parser.add_argument("--micro-batch", type=options.count, default=16, help="(%(default)s)")
    parser.add_argument("--width", type=options.count, default=256, help="of the vision tower (%(default)s)")
    parser.add_argument("--layers", type=options.count, default=0, help="of the vision tower (4; of L/14 all)")
    parser.add_argument("--arch", choices=ARCHS, default="small", help="of the towers (%(default)s)")
    known = ("image", "video")
    parser.add_argument(
        "--modality", nargs="+", choices=known, metavar="NAME", default=["image"], help="image, video (image)"
    )
    parser.add_argument("--once", action="store_true", help="one step each way: its time and its memory")
    parser.add_argument("--tuned", nargs="+", choices=list(TUNED), default=list(TUNED), help="what is trained")
    parser.add_argument("--seconds", type=options.seconds, default=6.0, help="for each candidate (%(default)s)")
    parser.add_argument("--out", help="a JSON file")
    given = parser.parse_args(argv)
    record = harness.Record("Training step", harness.device(), given.out)
    layers = given.layers or (4 if given.arch == "small" else 0)
    for modality in given.modality:
        size = Size(given.micro_batch, given.width, layers, given.arch, modality)
        if given.once:
            for tuned in given.tuned:
                measure_once(tuned, given.batch, size, record)
            continue
        for tuned in given.tuned:
            measure_time(tuned, given.batch, size, record, given.seconds)
        for batch in given.memory_batch:  # of all before the larger one: it takes longest
            for tuned in given.tuned:
                measure_memory(tuned, batch, size, record, given.batch, max(given.memory_batch))
    show(record)
    return 0


def measure_once(tuned: str, batch: int, size: Size, record: harness.Record) -> None:
    for kind in KINDS:
        rows = batch if kind == "dense" else size.micro_batch
        about = {"what": "step", "modality": size.modality, "trained": tuned, "step": kind, "batch": batch}
        record.begins(f"{size.modality}, {tuned}, {kind}")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                found = pool.submit(_one, kind, tuned, batch, size, rows, record.device).result()
            except (BrokenProcessPool, torch.OutOfMemoryError) as error:
                record.add([{**about, "note": f"out of memory: {contest.reason(error)}"}])
                continue
        row = {**about, "micro_batch": rows, **found, "ms_a_pair": round(found["ms"] / batch, 1)}
        first = next((r for r in record.rows if {**about, "step": "dense"}.items() <= r.items()), row)
        if "ms" in first:
            row["of_dense"] = round(found["ms"] / first["ms"], 3)
        record.add([row])


def _one(kind: str, tuned: str, batch: int, size: Size, rows: int, device: str) -> dict[str, float]:
    """ms of a step, MiB that it needs beyond weights and batch, and that the forward of `rows` pairs keeps."""
    towers, plan = Towers(model_of(tuned, size, device)), _recipe(tuned, size)
    first, each = memory.activations(
        towers, plan, torch.device(device), lambda: torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    )
    kept = (first + each * rows) / harness.MIB
    del towers
    step(kind, tuned, 1, dataclasses.replace(size, micro_batch=1), device)()  # loads what is loaded late
    _give_back(device)
    run, times = step(kind, tuned, batch, size, device), [0.0]

    def timed() -> None:
        begun = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times[0] = (time.perf_counter() - begun) * 1e3

    extra = harness.gpu_extra_mib(timed, warm=False) if device == "cuda" else harness.cpu_memory_here(timed).extra
    return {"ms": round(times[0], 1), "MiB": round(extra, 1), "kept_MiB": round(kept, 1)}


def measure_time(tuned: str, batch: int, size: Size, record: harness.Record, seconds: float) -> None:
    about = {"what": "time", "modality": size.modality, "trained": tuned, "batch": batch}
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
        about = {"what": "memory", "modality": size.modality, "trained": tuned, "step": kind, "batch": batch}
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
    names = ["modality", "trained", "step", "batch"]
    for what, numbers in (
        ("time", ["micro_batch", "ms", "p20_ms", "p80_ms", "of_dense"]),
        ("memory", ["MiB"]),
        ("step", ["micro_batch", "ms", "ms_a_pair", "of_dense", "MiB", "kept_MiB"]),
    ):
        rows = [row for row in record.rows if row["what"] == what and "note" not in row]
        if rows:
            columns = [*names, *numbers]
            print(harness.table(columns, [[row.get(name, "") for name in columns] for row in rows], left=3))
    for row in record.rows:
        if "note" in row:
            about = ", ".join(str(row[name]) for name in ("modality", "trained", "step"))
            print(f"{about}, batch {row['batch']}, {row['what']}: {row['note']}")


if __name__ == "__main__":
    sys.exit(main())
