"""Training: takes the directory of a run, goes on where it was, and takes its steps."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lbfast import files as lbfast_files
from lbfast.model.languagebind import LanguageBindModel
from lbfast.training import engine as engines
from lbfast.training.engine import Place
from lbfast.training.exporter import ADAPTER, CHECKPOINTS, EXPORT, MODEL, MODEL_EMA, START
from lbfast.training.recipes import Recipe, write
from lbfast.training.report import METRICS, PLOT, TENSORBOARD
from lbfast.training.run import Batches, Run, Summary, together
from lbfast.training.watch import Evaluation

RECIPE = "recipe.yaml"
_OWN = (CHECKPOINTS, METRICS, PLOT, TENSORBOARD, RECIPE, START, MODEL, ADAPTER, MODEL_EMA)
"""What a run makes in its directory."""


def train(
    recipe: Recipe,
    model: LanguageBindModel,
    batches: Batches,
    out: str | os.PathLike[str],
    *,
    resume: str | os.PathLike[str] = "auto",
    save_every: int = 500,
    keep: int = 2,
    engine: engines.Engine = "auto",
    place: Place | None = None,
    text_cache: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    files: Sequence[Path] = (),
    origin: Mapping[str, Any] | None = None,
    console: Console | None = None,
    evaluation: Evaluation | None = None,
    log: Sequence[str] = (),
) -> Summary:
    """Trains a prepared model as the recipe says, and exports it.

    Args:
        recipe: see Recipe.
        model: from `initial_model`, or any model after `prepare`. It is moved to the place's device, trained in place.
        batches: of the global batch size of the recipe.
        out: directory for checkpoints/, metrics.jsonl, tensorboard/, training.png, and the trained model in model/ (as
            upstream writes it) and, with adapters, adapter/ (as peft does).
        resume: "auto" goes on from the newest complete checkpoint in `out`, if there is one; "never" starts anew, and
            raises where there are checkpoints; a path is one to go on from.
        save_every: steps between checkpoints; one is also written at the end. keep: how many stay.
        engine: with several processes, "ddp" (also "auto") or "fsdp".
        place: of this process; default: alone or in the default process group, on the model's device.
        text_cache: directory of caption embeddings that runs share, where language is not trained.
        steps: end after so many steps in all, with a checkpoint, as if a signal had come. None: the recipe's.
        files: copied beside the exported model: its tokenizer's.
        origin: arguments of `initial_model`, kept in start.json so that `lbfast export` can make the model again.
        console: for progress.
        evaluation: what is evaluated during the run: numbers in the metrics, on the progress line, in the plot and in
            TensorBoard. A run that is killed meanwhile goes on from its last checkpoint and evaluates again.
        log: "wandb": the metrics go there too.

    SIGTERM, SIGHUP and the first SIGINT (Ctrl-C) let the step finish, write a checkpoint and return with `stopped`; in
    the main thread only.

    Going on from a checkpoint that is not the newest begins a new line of history: what lies after it is set aside in
    checkpoints/set-aside-N, with the metrics as they were.

    Raises:
        TrainingError: a loss or gradient that is not finite, with its step; nothing is written.
        CheckpointWriteError: a full disk, say. CheckpointError, ValueError: a checkpoint of another run.
        FileExistsError: `out` has files of these names that no run has made. BlockingIOError: a run goes on there.
    """
    if save_every < 1 or keep < 1:
        raise ValueError(f"save_every, keep: expected at least 1, got {save_every} and {keep}")
    if place is None:
        place = engines.here(next(model.parameters()).device)
    if batches.steps_per_epoch < 1:
        raise ValueError(f"batches: expected at least one batch of {recipe.batch_size} in an epoch, got none")
    with _held(Path(out), recipe, place):
        run = Run(
            recipe, model, batches, Path(out), engine, place, text_cache, files, console if place.first else None,
            evaluation, log,
        )  # fmt: skip
        until = run.total if steps is None else min(steps, run.total)
        run.start(run.find(resume))
        if place.first:
            write(recipe, run.out / RECIPE)
            if origin is not None:
                content = json.dumps({"recipe": recipe.to_dict(), **origin}, indent=2) + "\n"
                lbfast_files.write(run.out / START, content)
        return run.train(until, save_every, keep)


@contextlib.contextmanager
def _held(out: Path, recipe: Recipe, place: Place) -> Iterator[None]:
    """Holds the directory of a run: the first process does so for all of them."""
    with contextlib.ExitStack() as stack:
        failure: OSError | None = None
        if place.first:
            try:
                written = {MODEL: True, ADAPTER: recipe.lora_r > 0, MODEL_EMA: recipe.ema is not None}
                for name in (name for name, wanted in written.items() if wanted):
                    lbfast_files.check_claim(out / name, EXPORT, None)
                stack.enter_context(lbfast_files.claimed(out, "run", _OWN))
            except OSError as error:
                failure = error
        together(failure, "take the directory of the run", place)
        yield
