"""`make demo`: the demo, then what L/14 takes against the eager baseline: same random weights, same inputs, one run.

The demo's own model is too small to time. Two layers of L/14's width are; `--whole image video` times whole encoders,
on one file each, instead: minutes on a CPU. The two take turns, so that a machine that slows down slows both; medians
are compared.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lbfast import demo
from lbfast.doctor import cpu_name
from lbfast.model.config import MODALITIES, LanguageBindConfig, published_config
from lbfast.model.languagebind import LanguageBindModel, model_dict, normalised
from lbfast.processing.processor import transform_dict
from lbfast.processing.text import default_tokenizer
from lbfast.reference import languagebind as reference

LAYERS = 2
LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 3, 15, 2.5
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""How far two unit embeddings may be apart in any number: some thirty times what rounding was seen to do."""


@dataclass(frozen=True)
class Comparison:
    """One encoder, timed: seconds of each call, and how far the unit embeddings are apart at most."""

    name: str
    shape: tuple[int, ...]
    ours: list[float]
    theirs: list[float]
    difference: float


def take_turns(first: Callable[[], object], second: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Seconds of each call of two functions that take turns. Both have been called before."""
    times: tuple[list[float], list[float]] = ([], [])
    begin = time.perf_counter()
    while len(times[0]) < LEAST_ROUNDS or (len(times[0]) < MOST_ROUNDS and time.perf_counter() - begin < SECONDS):
        for function, spent in zip((first, second), times):
            start = time.perf_counter()
            function()
            spent.append(time.perf_counter() - start)
    return times


def configs(names: Iterable[str], layers: int | None) -> dict[str, LanguageBindConfig]:
    """L/14 of each modality, with all its layers or so many in both towers."""
    found = {}
    for name in names:
        found[name] = published_config(name, **({} if layers is None else {"num_hidden_layers": layers}))
        if layers is not None:
            found[name].text_config.num_hidden_layers = layers
    return found


def models(made: Mapping[str, LanguageBindConfig], dtype: torch.dtype) -> Iterator[LanguageBindModel]:
    """Models with random weights, one at a time."""
    for name, config in made.items():
        torch.manual_seed(0)
        yield model_dict[name](config).to(dtype).eval()  # type: ignore[arg-type]


def inputs(made: Mapping[str, LanguageBindConfig], shown: demo.Demo) -> dict[str, Mapping[str, torch.Tensor]]:
    """What the encoders take, of one of the demo's files of each modality; and five captions, padded."""
    found: dict[str, Mapping[str, torch.Tensor]] = {
        name: transform_dict[name](config)(shown.files[name][:1]) for name, config in made.items()
    }
    captions = [lines[0] for lines in shown.captions.values()]
    found["language"] = default_tokenizer()(captions, max_length=77, padding="max_length", return_tensors="pt")
    return found


@torch.inference_mode()
def compare(
    models: Iterable[LanguageBindModel], inputs_of: Mapping[str, Mapping[str, torch.Tensor]], dtype: torch.dtype
) -> list[Comparison]:
    """Every modality's encoder, and with images the text tower, on the inputs of its name."""
    results = []
    for model in models:
        name, baseline = model.config.modality.name, reference.like(model)
        calls = [(name, "get_image_features", inputs_of[name])]
        if name == "image":
            calls.append(("language", "get_text_features", inputs_of["language"]))
        for label, method, inputs in calls:
            inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
            ours, theirs = getattr(model, method), getattr(baseline, method)
            apart = normalised(ours(**inputs).float()) - normalised(theirs(**inputs).float())
            times = take_turns(lambda: ours(**inputs), lambda: theirs(**inputs))  # noqa: B023  (called at once)
            shape = tuple(next(iter(inputs.values())).shape)
            results.append(Comparison(label, shape, *times, difference=apart.abs().max().item()))
    return results


def table(results: list[Comparison], dtype: torch.dtype) -> Table:
    """Medians in milliseconds, with the fastest and slowest call."""
    made = Table(
        "encoder",
        "input",
        "lbfast ms",
        "reference ms",
        "speed-up",
        "difference",
        title=f"Time against the eager reference, {str(dtype).removeprefix('torch.')}",
        title_justify="left",
    )
    for result in results:
        made.add_row(
            result.name,
            "x".join(map(str, result.shape)),
            _spread(result.ours),
            _spread(result.theirs),
            f"{statistics.median(result.theirs) / statistics.median(result.ours):.2f} x",
            f"{result.difference:.1e}",
        )
    return made


def _spread(seconds: list[float]) -> str:
    return "{:.0f} ({:.0f}-{:.0f})".format(*(1000 * f(seconds) for f in (statistics.median, min, max)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the files it makes")
    parser.add_argument("--whole", nargs="+", choices=tuple(MODALITIES), help="time whole encoders of these modalities")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the timed encoders")
    arguments = parser.parse_args()
    console = Console()
    made = demo.run(arguments.out, console)
    dtype = getattr(torch, arguments.dtype)
    layers = None if arguments.whole else LAYERS
    chosen = configs(arguments.whole or MODALITIES, layers)
    if not arguments.whole:
        demo.show(console, made)
    with console.status("timing"):
        results = compare(models(chosen, dtype), inputs(chosen, made), dtype)
    console.print(table(results, dtype))
    console.print(
        f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
        f"{platform.python_version()}; encoders of L/14's width with random weights and "
        f"{'all' if layers is None else layers} of its 24 layers, 1 file of each "
        "modality; median (fastest-slowest), the two taking turns; difference: the "
        "largest between the unit embeddings. GPU: not measured.",
        highlight=False,
    )
    if not arguments.whole:
        console.print(
            "The last layer is computed for the pooled token alone: of 2 layers that is half, of a whole encoder's 24 "
            "little. --whole times whole encoders.",
            highlight=False,
        )
    wrong = [result.name for result in results if not result.difference <= LIMITS[dtype]]
    if wrong:
        sys.exit(f"error: the embeddings are not those of the reference: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
