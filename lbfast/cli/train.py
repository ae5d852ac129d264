"""`lbfast train` and `lbfast export`."""

from __future__ import annotations

import signal
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from lbfast.cli.app import app, errors, plain_errors, say
from lbfast.cli.options import CacheDir, Revision, Split
from lbfast.messages import plain

if TYPE_CHECKING:
    from lbfast.model.languagebind import LanguageBindModel
    from lbfast.training.batches import Batches
    from lbfast.training.recipes import Recipe
    from lbfast.training.run import Summary

Engine = Enum("Engine", {name: name for name in ("auto", "ddp", "fsdp")})  # type: ignore[misc]
Style = Enum("Style", {name: name for name in ("upstream", "plain", "merged", "peft")})  # type: ignore[misc]


@app.command(
    help="Binds a modality to language, and writes the model and how it went to a folder.\n\n"
    "Example: lbfast train --recipe depth --model LanguageBind_Image --data train.csv --out runs/depth\n\n"
    "The gradient is that of the whole global batch; memory depends on the micro-batch alone. A run that was stopped "
    "or killed goes on from its last checkpoint when the same command is given again. Several processes: "
    "[bold]torchrun --nproc-per-node N -m lbfast train ...[/]\n\n"
    "OUT gets checkpoints/, metrics.jsonl, tensorboard/, training.png and, at the end, model/ (as upstream writes it) "
    "and adapter/ (as peft does). Exit status: 0 at the end; 1 after an error; 130 after Ctrl-C, 143 after SIGTERM, "
    "129 after SIGHUP: then the same command goes on."
)
def train(
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME_OR_FILE", help="image, video-lora, video-full, audio, depth, thermal, or a .yaml file."
        ),
    ],
    model: Annotated[
        str, typer.Option(metavar="DIR_OR_NAME", help="What to start from: LanguageBind of any modality, or CLIP.")
    ],
    data: Annotated[
        list[str], typer.Option(metavar="PATH", help="Manifest, shards, folder of them, or a URL. May be repeated.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where everything of this run goes. Needed but with --plan.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe.")
    ] = None,
    resume: Annotated[str, typer.Option(help="auto, never, or the directory of a checkpoint.")] = "auto",
    random: Annotated[bool, typer.Option("--random", help="Draw the weights; MODEL may be a config.json.")] = False,
    text: Annotated[
        str | None, typer.Option(metavar="DIR_OR_NAME", help="Take language (tower, tokenizer) from here.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on from these adapters, in peft's format.")
    ] = None,
    media: Annotated[str | None, typer.Option(help="The data's column or suffix of media; see the README.")] = None,
    caption: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Column or field of captions; of several, one is drawn.")
    ] = None,
    split: Split = "first",
    raw: Annotated[bool, typer.Option("--raw", help="Keep pixels as bytes until they are embedded.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    engine: Annotated[Engine, typer.Option(help="How several processes share the work.")] = Engine["auto"],
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    keep: Annotated[int, typer.Option(min=1, help="Checkpoints that stay.")] = 2,
    steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps in all.")] = None,
    text_cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep caption embeddings here, for this run and others.")
    ] = None,
    eval_: Annotated[
        list[str] | None,
        typer.Option(
            "--eval",
            metavar="PATH",
            help="Data to evaluate on meanwhile and at the end: classes' folders or path,label for zero-shot, "
            "manifests or shards with captions for retrieval.",
        ),
    ] = None,
    eval_every: Annotated[int | None, typer.Option(min=1, help="Steps between them. Else: --save-every.")] = None,
    best: Annotated[
        str | None, typer.Option(metavar="NAME", help="Keep the checkpoint of the best R@1, top-1, ema/R@1...")
    ] = None,
    log: Annotated[list[str] | None, typer.Option(help="wandb: numbers go there as well.")] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Print the memory and time that the run would take, and do nothing.")
    ] = False,
    tflops: Annotated[
        float | None, typer.Option(help="With --plan: the towers' TFLOP/s to compute time by. Else it is measured.")
    ] = None,
    cache_dir: CacheDir = None,
    revision: Revision = None,
) -> None:
    from lbfast.processing.processor import transform_dict
    from lbfast.training import recipes, trainer
    from lbfast.training.batches import Batches
    from lbfast.training.engine import processes
    from lbfast.training.start import initial_model, tokenizer_of
    from lbfast.training.watch import Evaluation

    with plain_errors(), processes(device) as place:
        if out is None and not plan_only:
            raise ValueError("out: expected a directory for the run, got none")
        fields = changes(set_ or [])
        if caption:
            if "captions" in fields:
                raise ValueError("caption: expected columns by --caption or with weights by --set captions=, got both")
            fields["captions"] = dict.fromkeys(caption, 1.0)
        plan = recipes.recipe(recipe, **fields)
        hub: dict[str, Any] = {"cache_dir": cache_dir, "revision": revision}
        made = initial_model(model, plan, random=random, text=text, adapter=adapter, **hub)
        tokenizer, files = tokenizer_of(text or model, plan.modality, **hub)
        evaluation = None
        if best is not None and not eval_:
            raise ValueError(f"best: expected data by --eval for {best}, got none")
        if eval_:
            views = None if plan.captions is None else {name: 1.0 for name, weight in plan.captions.items() if weight}
            evaluation = Evaluation(
                list(eval_), tokenizer, eval_every or save_every, best, views, media, split, workers=workers
            )

        def skipped(key: str, reason: str) -> None:
            errors.print(
                f"[yellow]skipped[/] {escape(plain(reason if key in reason else f'{key}: {reason}'))}", highlight=False
            )

        batches = Batches(
            list(data),
            transform_dict[plan.modality](made.config, tokenizer),
            tokenizer,
            batch_size=plan.batch_size,
            rank=place.rank,
            world_size=place.world,
            workers=workers,
            seed=plan.seed,
            captions=plan.captions,
            media=media,
            split=split,
            raw=raw,
            context_length=plan.context_length,
            on_skip=skipped,
        )
        if out is None or plan_only:
            if place.first:
                _plan(plan, made.to(place.device), batches, place.world, workers, tflops)  # type: ignore[arg-type]
            return
        where = str(Path(model).resolve()) if Path(model).exists() else model
        summary = trainer.train(
            plan,
            made.to(place.device),  # type: ignore[arg-type]
            batches,
            out,
            resume=resume,
            save_every=save_every,
            keep=keep,
            engine=engine.value,
            place=place,
            text_cache=text_cache,
            steps=steps,
            files=files,
            origin={
                "where": where,
                "random": random,
                "text": text,
                "adapter": adapter and str(adapter),
                **{key: value and str(value) for key, value in hub.items()},
            },
            console=errors,
            evaluation=evaluation,
            log=log or (),
        )
        if place.first:
            _summarise(summary, len(batches.skipped), best)
    if summary.stopped:
        raise typer.Exit(128 + int(summary.stopped))


@app.command(
    help="Writes the model of a training run to a folder, as others read it.\n\n"
    "Example: lbfast export runs/depth --out depth-model --style merged\n\n"
    "RUN is a run's directory, for its newest checkpoint, or one of its checkpoints. Styles: [bold]upstream[/], "
    "adapters apart, as upstream saves; [bold]plain[/], our names; [bold]merged[/], adapters added into the weights; "
    "[bold]peft[/], adapters alone, with the other trained parameters beside them.\n\n"
    "DIR is new, empty or an earlier export."
)
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The model's files in an earlier export are replaced.")],
    style: Annotated[Style, typer.Option()] = Style["upstream"],
    ema: Annotated[bool, typer.Option("--ema", help="The averaged weights of a run with ema.")] = False,
) -> None:
    from lbfast.training.exporter import check_place, export as write, rebuilt

    with plain_errors():
        check_place(out, run)
        made, checkpoint, files = rebuilt(run, averages=ema)
        write(made, out, style.value, files=files)
    say(f"{checkpoint} -> {out}")


def changes(given: list[str]) -> dict[str, Any]:
    """Fields and values from FIELD=VALUE; values as YAML reads them."""
    import yaml

    found = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set: expected FIELD=VALUE, got {item!r}")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set: {item!r}: {error}") from None
    return found


def _plan(
    recipe: Recipe, model: LanguageBindModel, batches: Batches, world: int, workers: int, tflops: float | None
) -> None:
    from lbfast.training.plan import plan as make

    errors.print("a few steps of few rows are measured", highlight=False)
    with errors.status("measuring") as status:
        made = make(
            recipe, model, batches, world=world, workers=workers, tflops=tflops,
            tell=lambda what: status.update(f"measuring: {what}"),
        )  # fmt: skip
    say(made.text())


def _summarise(summary: Summary, skipped: int, best: str | None) -> None:
    from lbfast.training.report import rate

    speed = rate(summary.samples / summary.seconds if summary.seconds else 0.0)
    line = f"{summary.steps} of {summary.total} steps, {summary.samples} samples at {speed}/s"
    if summary.loss is not None:
        line += f", loss {summary.loss:.4f}"
    if skipped:
        line += f", {skipped} samples skipped"
    if summary.stopped:
        line += f"; stopped by {signal.Signals(summary.stopped).name}: the same command goes on"
    say(f"{line} -> {summary.model or summary.checkpoint}")
    if summary.best is not None:
        say(f"the best by {best}: {summary.best}")
