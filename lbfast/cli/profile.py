"""`lbfast profile`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lbfast.cli.app import app, errors, plain_errors, say
from lbfast.cli.options import CHECKPOINT, DTYPE, MODALITY, Device, Modality, Precision

if TYPE_CHECKING:
    from lbfast.profiling.trace import Profile

Mode = Enum("Mode", {name: name for name in ("inference", "train")})  # type: ignore[misc]
Arch = Enum("Arch", {name: name for name in ("L/14", "H/14")})  # type: ignore[misc]

MADE = ("trace.json", "profile.json", "roofline.png", "memory.png")
TOP = 20
WIDE = 110  # columns of a terminal that the whole table fits


@app.command(
    help="Prints where a model's time goes, and writes a trace and plots to a folder.\n\n"
    "Example: lbfast profile --arch L/14 --modality video --out profile-out\n\n"
    "OUT gets [bold]trace.json[/] (for chrome://tracing and Perfetto), [bold]profile.json[/], and with matplotlib "
    "[bold]roofline.png[/] and [bold]memory.png[/]. With a GPU and nvidia-ml-py its power, clocks, temperature and "
    "memory are sampled too. --mode train: loss and gradients, without the optimizer's step."
)
def profile(
    model: Annotated[str | None, typer.Option(metavar=CHECKPOINT, help="A checkpoint. Or give --arch.")] = None,
    arch: Annotated[Arch | None, typer.Option(help="An architecture with random weights.")] = None,
    modality: Annotated[
        Modality | None, typer.Option(metavar=MODALITY, help="Or language. Default: the checkpoint's, or video.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Clips, pictures, sounds or captions in a call.")] = 1,
    mode: Annotated[Mode, typer.Option(help="Embeddings, or loss and gradients.")] = Mode["inference"],
    layers: Annotated[int | None, typer.Option(min=1, help="With --arch: of both towers. Default: all.")] = None,
    lora: Annotated[int, typer.Option(min=0, help="With --arch: rank of adapters that train alone.")] = 0,
    dtype: Annotated[
        Precision, typer.Option(metavar=DTYPE, help="Of the products: auto, float32, bfloat16 or float16.")
    ] = Precision["auto"],
    device: Device = "auto",
    seconds: Annotated[float, typer.Option(min=0, help="Calls are timed for so long, three at least.")] = 1.0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the files go.")] = Path("profile-out"),
) -> None:
    import torch

    from lbfast import files
    from lbfast.profiling import plot, power, subjects, trace

    with plain_errors():
        files.check_claim(out, "profile", MADE)
        if (model is None) == (arch is None):
            raise ValueError("expected either --model or --arch")
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        if place.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device: expected cpu, for torch finds no GPU, got {device!r}")
        wanted = None if dtype.value == "auto" else getattr(torch, dtype.value)
        if arch is not None:
            name = modality.value if modality else "video"
            ready = subjects.random_model(arch.value, name, layers, lora)
        else:
            if layers or lora:
                raise ValueError("--layers, --lora: expected with --arch, a checkpoint has its own")
            from lbfast.checkpoints import open_checkpoints
            from lbfast.model.languagebind import model_dict

            found = next(iter(open_checkpoints([str(model)]).values()))
            name = modality.value if modality else found.modality
            if name not in (found.modality, subjects.LANGUAGE):
                raise ValueError(f"--modality: expected {found.modality}, which {model} is of, got {name!r}")
            ready = model_dict[found.modality].from_pretrained(found.where, merge_lora=mode.value == "inference")
        call, used = subjects.subject(ready, name, mode.value, batch, place, wanted)
        with files.claimed(out, "profile", MADE):
            result = trace.run(call, batch, place, used, out, seconds)
            result.header |= {"modality": name, "batch": batch, "mode": mode.value, "dtype": str(used)[6:]}
            result.write(out / "profile.json")
            missing = plot.why_not()
            if not missing:
                plot.roofline(result, out / "roofline.png")
                plot.memory(result, out / "memory.png")
        show(result, Console())
        if missing:
            errors.print(f"no plots: {escape(missing)}")
        if place.type == "cuda" and not result.energy:
            errors.print(f"no power or clocks: {escape(power.why_not(place.index or 0) or 'nothing was sampled')}")
        say(f"{out / 'trace.json'}: open it at https://ui.perfetto.dev or chrome://tracing")


def show(result: Profile, console: Console) -> None:
    """The header, the operators that took longest, and the sums."""
    console.print(escape(", ".join(f"{key} {value}" for key, value in result.header.items())), highlight=False)
    table = Table(title="One call, operators by time", title_justify="left")
    table.add_column("operator", no_wrap=True)
    columns = ("calls", "ms", "share", "GFLOP", "MB", "TFLOP/s", "GB/s", "roofline")
    shown = columns if console.width >= WIDE else ("calls", "ms", "share", "roofline")
    for column in shown:
        table.add_column(column, justify="right")
    whole = sum(op.ms for op in result.operators)
    for op in result.operators[:TOP]:
        rates = (op.flops / op.ms / 1e9, op.bytes / op.ms / 1e6)
        cells = {"calls": f"{op.calls:.0f}", "ms": f"{op.ms:.2f}", "share": f"{op.ms / whole:.0%}"}
        if op.roofline > 0:
            cells |= {"GFLOP": f"{op.flops / 1e9:.1f}", "MB": f"{op.bytes / 1e6:.0f}", "TFLOP/s": f"{rates[0]:.2f}"}
            cells |= {"GB/s": f"{rates[1]:.0f}", "roofline": f"{op.roofline:.0%}"}
        table.add_row(escape(op.name.removeprefix("aten::")), *(cells.get(column, "") for column in shown))
    console.print(table)
    rest = result.operators[TOP:]
    if rest:
        console.print(f"and {len(rest)} more operators, {sum(op.ms for op in rest):.2f} ms")
    peak = max((mib for _, mib in result.memory), default=0.0)
    console.print(
        f"{result.ms:.2f} ms a call, {1e3 * result.items / result.ms:.2f} items/s, {result.flops / 1e9:.0f} GFLOP, "
        f"{result.of_matmul_rate:.0%} of the measured matmul rate ({result.rates.flops / 1e12:.2f} TFLOP/s; copies "
        f"{result.rates.bytes / 1e9:.0f} GB/s), tensors of up to {peak:.0f} MiB",
        highlight=False,
    )
    if result.energy:
        console.print(", ".join(f"{key} {value}" for key, value in result.energy.items()), highlight=False)
