"""Whole encoders against upstream's arithmetic: items/s, latency, peak memory, cosine to float32, and MFU.

    python -m bench.bench_languagebind video --batch 1
    python -m bench.bench_languagebind image --layers 2 --batch 1 2 4 8 16 32 64
    python -m bench.bench_languagebind --arch H/14 --dtype bfloat16

Random weights, the same in every candidate. Depth and thermal pictures run image's arithmetic, and are not measured
apart. Text is captions of 5 to 20 tokens, padded to 77 as tokenizers are asked to (--tokens 20: to their longest).
Pixels come as float32, and casting them is inside what is timed.

Candidates: lbfast as a change of the import gives it ("drop-in"), and after `optimize_for_inference` in float32, in
the shorter dtype, in float8 on a GPU and int8 on a CPU that have it; the eager reference, which is upstream's
arithmetic, in float32 and under autocast of float32 weights, which is how upstream runs in a shorter dtype; PyPI's
`languagebind` where it can be imported; the latter two under torch.compile (--compile layers: layer by layer, which
compiles one of them; whole: the encoder at once, minutes; max-autotune: that, with its products tuned); what a user
can have of PyTorch alone, the reference with SDPA and weights in the shorter dtype under torch.compile; and on a CPU
torchao's int8 under torch.compile, OpenVINO and ONNX Runtime (bench/exported.py), where they are installed. Those of
one precision take turns, one precision after the other, in one run.
MFU: FLOP that the embeddings need (no padding, the last layer for the pooled token) over time, as a part of the rate of
the library's matrix product, measured in the same run. --busy: each again, while other processes take the cores. Peak
memory: on a CPU the resident size of a process that does nothing else, libraries and weights included, and that without
libraries ("own"); on a GPU weights and what the call allocates.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lbfast.model import checkpoint
from lbfast.model.config import published_config
from lbfast.model.inference import optimize_for_inference
from lbfast.model.languagebind import LanguageBindModel, model_dict, normalised
from lbfast.profiling.count import Counter
from lbfast.reference import languagebind as reference

from . import contest, exported, harness, options, peers

ARCHS = {"L/14": "large", "H/14": "huge"}
MODALITIES = ("image", "video", "audio", "text")
BATCHES = {  # what fits a CPU's time, and a GPU's
    "cpu": {"image": [1, 8], "video": [1], "audio": [2], "text": [64]},
    "cuda": {"image": [1, 8, 64, 256], "video": [1, 8, 32], "audio": [1, 8, 64], "text": [1, 64, 1024]},
}
COMPILED = ("layers", "whole", "max-autotune")
LEAST_COSINE = {"float32": 0.99999, "float16": 0.999, "bfloat16": 0.999, "fp8": 0.98, "int8": 0.9}

Inputs = Mapping[str, torch.Tensor]
Embed = Callable[[Inputs], torch.Tensor]


@dataclasses.dataclass
class Subject:
    """One modality's encoder with random weights: what candidates are made of. They share its float32 weights.

    Attributes:
        modality: "image", "video", "audio" or "text".
        model: in float32, in eval mode; the tower that is not looked at has one layer, and few words.
        short: the shorter dtype.
        compile: how torch.compile is used: one of COMPILED.
        tokens: what captions are padded to.
        alone: there is one candidate, which may have `model` itself.
    """

    modality: str
    model: LanguageBindModel
    short: torch.dtype
    compile: str = "layers"
    tokens: int = 77
    alone: bool = False

    @property
    def method(self) -> str:
        return "get_text_features" if self.modality == "text" else "get_image_features"

    def optimized(self, dtype: torch.dtype, **more: Any) -> LanguageBindModel:
        return optimize_for_inference(self.model if self.alone else copy.deepcopy(self.model), dtype=dtype, **more)

    def eager(self) -> reference.LanguageBind:
        modality = self.model.config.modality
        with torch.device("meta"):
            made = reference.LanguageBind(self.model.config, modality.temporal_mlp, modality.mel_grid)
        made.load_state_dict(self.model.state_dict(), strict=True, assign=True)
        return made.eval()


class SdpaAttention(reference.Attention):
    """The reference's attention by PyTorch's own kernel."""

    def forward(
        self, x: torch.Tensor, causal: torch.Tensor | None = None, padding: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        b, n, _ = x.shape
        q, k, v = (
            linear(x).view(b, n, self.heads, self.head_dim).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        masks = [mask for mask in (causal, padding) if mask is not None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=sum(masks) if masks else None)
        return self.out_proj(y.transpose(1, 2).reshape(b, n, self.width)), x  # there are no weights to give back


def subject(modality: str, arch: str, layers: int | None, short: str, device: str) -> Subject:
    name = "image" if modality == "text" else modality
    config = published_config(name, ARCHS[arch])
    towers = {"text": config.text_config, "vision": config.vision_config}
    looked_at = towers.pop("text" if modality == "text" else "vision")
    looked_at.num_hidden_layers = layers or looked_at.num_hidden_layers
    (other,) = towers.values()
    other.num_hidden_layers = 1
    if modality != "text":
        other.vocab_size = 320
    with torch.device("meta"):
        model = model_dict[name](config)
    checkpoint.assign(model, _random(model.state_dict(), device), torch.float32)
    return Subject(modality, model.eval(), getattr(torch, short))


def _random(state: Mapping[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    """Weights as at the start of a training, more or less, but nothing that a compiler would leave out.

    Of equal weights one product is made; biases that are 0 and norms whose weights are 1 are passed over.
    """
    generator = torch.Generator().manual_seed(0)
    made = {}
    for key, like in state.items():
        mean = 2.6592 if not like.ndim else float("norm" in key and key.endswith("weight"))
        wide = like.ndim > 1 and "embedding" not in key
        spread = 0.7 * like.flatten(1).shape[1] ** -0.5 if wide else 0.02
        made[key] = torch.empty(like.shape).normal_(mean, spread, generator=generator).to(device)
    return made


def inputs(about: Subject, batch: int, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if about.modality == "text":
        lengths = torch.randint(5, 21, (batch, 1), generator=generator)
        columns = torch.arange(about.tokens)
        ids = torch.randint(320, 49000, (batch, about.tokens), generator=generator)
        ids = ids.masked_fill(columns >= lengths - 1, 49407)
        ids[:, 0] = 49406
        return {"input_ids": ids.to(device), "attention_mask": (columns < lengths).long().to(device)}
    height, width = about.model.vision_model.embeddings.pixel_shape[1:]
    frames = (about.model.config.vision_config.num_frames,) if about.modality == "video" else ()
    pixels = torch.randn(batch, 3, *frames, height, width, generator=generator)
    return {"pixel_values": pixels.to(device)}


def flops(about: Subject, given: Inputs) -> float:
    """What the embeddings need: no padding, of the last layer the pooled token's part. Pictures are not computed."""
    model = about.model
    if about.modality != "text":
        with torch.device("meta"):
            model, given = type(model)(model.config), {name: torch.empty(x.shape) for name, x in given.items()}
    with Counter() as counter, torch.no_grad():
        getattr(model, about.method)(**given)
    return sum(work.flops for work in counter.work.values())


# Candidates: name -> a function that makes what embeds inputs, or raises why there is none.


def _ours(make: Callable[[Subject], LanguageBindModel]) -> Callable[[Subject], Embed]:
    return lambda about: _as_is(getattr(make(about), about.method))


def _fp8(about: Subject) -> LanguageBindModel:
    if harness.device() == "cpu":
        raise RuntimeError("absent: float8 is only emulated on a CPU")
    return about.optimized(about.short, precision="fp8")


def _int8(about: Subject) -> LanguageBindModel:
    if harness.device() != "cpu":
        raise RuntimeError("absent: int8 is for CPUs")
    return about.optimized(about.short, precision="int8")


def _exported(export: Callable[..., Embed], dtype: str) -> Callable[[Subject], Embed]:
    """Another runtime's, made at its first call for the shapes that come."""

    def build(about: Subject) -> Embed:
        if harness.device() != "cpu":
            raise RuntimeError("absent: measured on CPUs")
        wanted = str(about.short).removeprefix("torch.") if dtype == "short" else dtype
        made: list[Embed] = []

        def embed(given: Inputs) -> torch.Tensor:
            if not made:
                with torch.inference_mode(False):
                    made.append(export(about.eager(), about.method, given, wanted))
            return made[0](given)

        return embed

    return build


def _autocast(method: Callable[..., torch.Tensor], short: torch.dtype) -> Embed:
    def embed(given: Inputs) -> torch.Tensor:
        with torch.autocast(next(iter(given.values())).device.type, dtype=short):
            return method(**given)

    return embed


def _cast(method: Callable[..., torch.Tensor], short: torch.dtype) -> Embed:
    return lambda given: method(**{name: x.to(short) if x.is_floating_point() else x for name, x in given.items()})


def _as_is(method: Callable[..., torch.Tensor]) -> Embed:
    return lambda given: method(**given)


def _theirs(make: Callable[[Subject], Any], compiled: bool, short: bool) -> Any:
    def build(about: Subject) -> Embed:
        model = make(about)
        method = getattr(model, about.method)
        if compiled and about.compile == "layers":
            tower = model.text_model if about.modality == "text" else model.vision_model
            for layer in tower.encoder.layers:
                layer.compile(dynamic=False)
        elif compiled:
            mode = None if about.compile == "whole" else about.compile
            method = torch.compile(method, dynamic=False, mode=mode)
        if next(model.parameters()).dtype == about.short:  # of the embeddings, whatever its products have
            return _cast(method, about.short)
        return _autocast(method, about.short) if short else _as_is(method)

    return build


def _sdpa(about: Subject) -> Any:
    model = copy.deepcopy(about.eager()).to(about.short)
    for module in model.modules():
        if type(module) is reference.Attention:
            module.__class__ = SdpaAttention
    return model


def _torchao(about: Subject) -> Any:
    """Dynamic int8 of the layers' Linears, a scale for each token and output, as torchao's guide has it."""
    if harness.device() != "cpu":
        raise RuntimeError("absent: measured on CPUs")
    torchao = peers.absent("torchao.quantization")
    model = _sdpa(about)
    tower = model.text_model if about.modality == "text" else model.vision_model
    torchao.quantize_(tower.encoder, torchao.Int8DynamicActivationInt8WeightConfig())
    return model


def _upstream(about: Subject) -> Any:
    return peers.languagebind_model(about.model)


CANDIDATES: dict[str, Callable[[Subject], Embed]] = {
    "reference float32": _theirs(Subject.eager, compiled=False, short=False),
    "reference autocast": _theirs(Subject.eager, compiled=False, short=True),
    "lbfast drop-in float32": _ours(lambda about: about.model),
    "lbfast float32": _ours(lambda about: about.optimized(torch.float32)),
    "lbfast short": _ours(lambda about: about.optimized(about.short)),
    "lbfast fp8": _ours(_fp8),
    "lbfast int8": _ours(_int8),
    "openvino float32": _exported(exported.openvino, "float32"),
    "openvino short": _exported(exported.openvino, "short"),
    "openvino int8": _exported(exported.openvino, "int8"),
    "onnxruntime float32": _exported(exported.onnxruntime, "float32"),
    "onnxruntime int8": _exported(exported.onnxruntime, "int8"),
    "reference torch.compile float32": _theirs(Subject.eager, compiled=True, short=False),
    "reference torch.compile autocast": _theirs(Subject.eager, compiled=True, short=True),
    "sdpa torch.compile short": _theirs(_sdpa, compiled=True, short=True),
    "torchao torch.compile int8": _theirs(_torchao, compiled=True, short=True),
    "languagebind float32": _theirs(_upstream, compiled=False, short=False),
    "languagebind autocast": _theirs(_upstream, compiled=False, short=True),
    "languagebind torch.compile autocast": _theirs(_upstream, compiled=True, short=True),
}
"""The first is what all are compared with. "short" stands for the shorter dtype's name."""


def dtype_of(name: str, short: str) -> str:
    return next((dtype for dtype in ("float32", "fp8", "int8") if name.endswith(dtype)), short)


def once(
    name: str, modality: str, arch: str, layers: int | None, short: str, tokens: int, batch: int
) -> Callable[[], torch.Tensor]:
    """One candidate alone on the CPU: for harness.cpu_memory."""
    about = subject(modality, arch, layers, short, "cpu")
    about.alone, about.tokens = True, tokens
    given = inputs(about, batch, "cpu")
    embed = CANDIDATES[name](about)
    gc.collect()
    return torch.inference_mode()(functools.partial(embed, given))


def measure(modality: str, batch: int, record: harness.Record, given: argparse.Namespace) -> None:
    """Rows of one modality at one batch size."""
    device, short = record.device, given.dtype
    about = subject(modality, given.arch, given.layers, short, device)
    about.compile, about.tokens = given.compile, given.tokens
    fields, layers = inputs(about, batch, device), given.layers or "all"
    padded = f", {given.tokens} tokens" if modality == "text" and given.tokens != 77 else ""
    case = {
        "case": f"{modality} {given.arch}, batch {batch}{padded}",
        "modality": modality,
        "batch": batch,
        "layers": layers,
    }
    work = flops(about, fields)
    rows: list[dict[str, Any]] = []
    expected: list[torch.Tensor] = []
    for names in groups(chosen(given), short):
        for row in _measure_group(names, about, fields, case, expected, record, given):
            row["items_s"] = round(1e3 * batch / row["median_ms"], 2)
            row["tflops"] = round(work / row["median_ms"] / 1e9, 3)
            dtype = about.short if row["dtype"] in ("fp8", "int8") else getattr(torch, row["dtype"])
            row["mfu"] = round(work / (row["median_ms"] / 1e3) / record.rates(dtype).flops, 3)
            record.add([row])
            rows.append(record.rows[-1])
    if given.no_memory or device == "cuda":
        return
    del about, expected
    gc.collect()
    for row in rows:
        name = row["name"].replace(f" {short}", " short")
        if "torch.compile" not in name:  # whose compiler would be counted
            arguments = (name, modality, given.arch, given.layers, short, given.tokens, batch)
            memory = harness.cpu_memory(once, *arguments)
            row |= {"peak_MiB": round(memory.peak), "own_MiB": round(memory.own)}
    record.write()


def groups(names: Sequence[str], short: str) -> list[list[str]]:
    """Candidates of one precision each: all of them at once would take more memory than many machines have."""
    dtypes = dict.fromkeys(dtype_of(name, short) for name in names)
    return [[name for name in names if dtype_of(name, short) == dtype] for dtype in dtypes]


def _measure_group(
    names: Sequence[str],
    about: Subject,
    fields: Inputs,
    case: Mapping[str, Any],
    expected: list[torch.Tensor],
    record: harness.Record,
    given: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Rows of candidates that take turns, with times and cosines to what is expected, which the first of all gives."""
    device = record.device
    able: dict[str, Callable[[], torch.Tensor]] = {}
    found: dict[str, dict[str, Any]] = {}
    torch.compiler.reset()
    for name in names:
        row = _row(case, name, given)
        try:
            before = torch.cuda.memory_allocated() if device == "cuda" else 0
            embed = CANDIDATES[name](about)
            call = torch.inference_mode()(functools.partial(embed, fields))
            out = normalised(call().double())
            if device == "cuda" and not given.no_memory:
                own = name.startswith(("lbfast", "sdpa")) and "drop-in" not in name
                row["peak_MiB"] = round(_gpu_peak(call, before, about, own=own))
        except Exception as error:  # absent, or not able to
            record.add([{**row, "note": contest.reason(error)}])
            continue
        expected.append(out)
        del expected[1:]
        cosine = float((out * expected[0]).sum(-1).min())
        if cosine >= LEAST_COSINE[row["dtype"]]:
            able[name] = call
            found[name] = {**row, "cosine": round(cosine, 6)}
        else:
            record.add([{**row, "note": f"wrong: a cosine of {cosine:.5f} to float32: not timed"}])
    quiet = harness.interleaved(able, device, given.seconds, warm=False)
    with harness.busy(given.busy):
        beside = harness.interleaved(able, device, given.seconds, warm=False) if given.busy else {}
    for name, timing in quiet.items():
        found[name] |= dataclasses.asdict(timing)
        if name in beside:
            found[name] |= {"busy": given.busy, "busy_ms": beside[name].median_ms}
    able.clear()
    gc.collect()
    return list(found.values())


def _row(case: Mapping[str, Any], name: str, given: argparse.Namespace) -> dict[str, Any]:
    row = {**case, "dtype": dtype_of(name, given.dtype), "name": name.replace("short", given.dtype)}
    return {**row, "compile": given.compile} if "torch.compile" in name else row


def _gpu_peak(call: Callable[[], Any], before: int, about: Subject, own: bool) -> float:
    """MiB that a candidate holds at most: what it made since `before`, and the weights, unless it has its own."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    weights = 0 if own else sum(p.numel() * p.element_size() for p in about.model.parameters())
    return (torch.cuda.max_memory_allocated() - before + weights) / harness.MIB


def chosen(given: argparse.Namespace) -> list[str]:
    return [
        name
        for name in CANDIDATES
        if (not given.candidates or name in given.candidates)
        and not (given.no_compile and "torch.compile" in name)
        and not (given.no_upstream and name.startswith("languagebind"))
    ]


def show(record: harness.Record) -> int:
    harness.say(harness.describe(record.header))
    columns = ("case", "layers", "name", "dtype", "median ms", "p20", "p80", "items/s", "MFU", "cosine", "peak MiB")
    columns += ("own MiB",) * any("own_MiB" in row for row in record.rows)
    columns += ("busy ms",) * any("busy" in row for row in record.rows)
    rows = []
    for row in record.rows:
        if "median_ms" in row:
            times = [f"{row[key]:.1f}" for key in ("median_ms", "p20_ms", "p80_ms")]
            numbers = [f"{row['items_s']:.2f}", f"{row['mfu']:.0%}", f"{row['cosine']:.6f}", row.get("peak_MiB", "")]
            if "own MiB" in columns:
                numbers.append(row.get("own_MiB", ""))
            if "busy ms" in columns:
                numbers.append(f"{row['busy_ms']:.1f}" if "busy" in row else "")
            rows.append((row["case"], row["layers"], row["name"], row["dtype"], *times, *numbers))
    print(f"\n{record.title}\n\n{harness.table(columns, rows, left=4)}\n")
    for note in dict.fromkeys(f"{row['name']}: not timed: {row['note']}" for row in record.rows if "note" in row):
        harness.say(note)
    if record.out:
        print(record.out)
    return int(any(contest.is_wrong(row) for row in record.rows))


def main(argv: Sequence[str] | None = None) -> int:
    parser = options.parser(__doc__)
    parser.add_argument(
        "modality", nargs="*", default=list(MODALITIES), help=f"of {', '.join(MODALITIES)}; default all"
    )
    parser.add_argument("--arch", default="L/14", choices=tuple(ARCHS), help="%(default)s")
    parser.add_argument("--batch", type=options.count, nargs="+", help="default: a few that fit the machine")
    parser.add_argument("--layers", type=options.count, help="of the encoder; default all")
    parser.add_argument(
        "--tokens",
        type=int,
        choices=range(20, 78),
        default=77,
        metavar="20..77",
        help="of a caption, padded (%(default)s)",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"), help="the shorter one")
    parser.add_argument("--seconds", type=options.seconds, default=3.0, help="time for each number (%(default)s)")
    parser.add_argument("--candidates", nargs="+", choices=list(CANDIDATES), metavar="NAME", help="default: all")
    said = f"how torch.compile is used: {', '.join(COMPILED)} (%(default)s)"
    parser.add_argument("--compile", default="layers", choices=COMPILED, metavar="HOW", help=said)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-upstream", action="store_true", help="leave PyPI's languagebind out")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    said = "also time each beside so many processes that never rest (%(default)s)"
    parser.add_argument("--busy", type=int, choices=range(9), default=0, metavar="0..8", help=said)
    parser.add_argument("--out", help="JSON file of the results; default: none")
    given = parser.parse_args(argv)
    if unknown := sorted(set(given.modality) - set(MODALITIES)):
        parser.error(f"modality: expected some of {', '.join(MODALITIES)}, got {', '.join(unknown)}")
    record = harness.Record("LanguageBind encoders, random weights", harness.device(), given.out)
    for modality in given.modality:
        for batch in given.batch or BATCHES[record.device][modality]:
            measure(modality, batch, record, given)
    return show(record)


if __name__ == "__main__":
    sys.exit(main())
