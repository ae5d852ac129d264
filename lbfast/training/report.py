"""What a run shows: a line that moves on a terminal, metrics.jsonl, TensorBoard's files, and a plot at the end."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lbfast import files
from lbfast.training.recipes import Recipe

METRICS, TENSORBOARD, PLOT = "metrics.jsonl", "tensorboard", "training.png"
PLAIN_SECONDS = 30.0
"""Where stderr is no terminal, a line this often."""


class Report:
    """Takes the numbers of each step. `with report: report.step({...})`.

    Args:
        folder: of metrics.jsonl, the folder tensorboard and the plot; None: nothing is written.
        total: steps of the run. start: steps done before; what later ones an earlier run has written is dropped.
        console: where progress is shown; None: nowhere.
        log: "wandb": the numbers go to Weights & Biases too, one run for this folder, resumed or not.
        recipe: shown there.

    Raises ValueError for another log, ImportError where its package is not installed.
    """

    def __init__(
        self,
        folder: Path | None,
        total: int,
        start: int,
        console: Console | None = None,
        log: Sequence[str] = (),
        recipe: Recipe | None = None,
    ):
        self.folder, self.total, self.console = folder, total, console
        self._wandb: Any = None
        self._log, self._recipe, self._found = check_log(log), recipe, ""
        self._start, self._shown = start, float("-inf")
        self._file: Any = None
        self._board: Any = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Report:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            keep_until(self.folder / METRICS, self._start)
            self._file = open(self.folder / METRICS, "a", encoding="utf-8")
            if importlib.util.find_spec("tensorboard") is not None:
                from torch.utils.tensorboard import SummaryWriter

                # events of steps that are taken again are hidden
                self._board = SummaryWriter(str(self.folder / TENSORBOARD), purge_step=self._start + 1)
            if "wandb" in self._log:
                self._wandb = _wandb(self.folder, self._recipe)
        if self.console is not None and self.console.is_terminal:
            self._bar = _bar(self.console)
            self._task = self._bar.add_task("training", total=self.total, completed=self._start, numbers="")
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(error[0] is not None))

    def step(self, numbers: Mapping[str, float]) -> None:
        """One step's numbers: step, epoch, loss, lr, scale, samples_per_second, memory_mib, eval/R@1 and the like.

        Those of training are not there where a step had no samples.
        """
        if self._file is not None:
            try:
                self._file.write(json.dumps(dict(numbers)) + "\n")
                self._file.flush()
            except OSError as error:  # which does not say where
                raise OSError(error.errno, error.strerror, self._file.name) from error
        if self._board is not None:
            for name, value in numbers.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(numbers["step"]))
        if self._wandb is not None:
            self._wandb.log(dict(numbers))
        if (found := headline(numbers)) is not None:
            self._found = f"{found.partition('/')[2]} {100 * numbers[found]:.1f} %  "
        if "loss" not in numbers:
            return
        line = (  # what is worth most first: a narrow terminal shows no more
            f"loss {numbers['loss']:.4f}  {self._found}{rate(numbers['samples_per_second'])}/s  "
            f"{numbers['memory_mib'] / 1024:.2f} GiB  lr {numbers['lr']:.2e}  scale {numbers['scale']:.2f}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=numbers["step"], numbers=line)
        elif self.console is not None and time.monotonic() - self._shown > PLAIN_SECONDS:
            self._shown = time.monotonic()
            self.console.print(f"step {int(numbers['step'])}/{self.total}  {line}", highlight=False)

    def evaluates(self, step: int) -> None:
        """An evaluation of the model of this step begins; its numbers come with the step's."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers="evaluating")

    def plot(self) -> Path | None:
        """Draws loss, learning rate and scale of the whole run; None without matplotlib or metrics."""
        if self.folder is None:
            return None
        if importlib.util.find_spec("matplotlib") is None:
            if self.console is not None:
                self.console.print(f"no {PLOT}: it needs matplotlib: pip install 'lbfast\\[train]'", highlight=False)
            return None
        rows = read(self.folder / METRICS)
        return _plot(rows, self.folder / PLOT) if rows else None


def rate(value: float) -> str:
    """A rate in three figures or more."""
    return f"{value:.{1 if value < 100 else 0}f}"


def headline(numbers: Mapping[str, float]) -> str | None:
    """The first of an evaluation's numbers, if there was one."""
    return next((name for name in numbers if name.startswith("eval/")), None)


def check_log(log: Sequence[str]) -> Sequence[str]:
    """Raises ValueError for another than "wandb", ImportError where that is not installed."""
    for name in log:
        if name != "wandb":
            raise ValueError(f"log: expected wandb, got {name!r}")
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise ImportError("log: wandb is not installed: pip install 'lbfast[wandb]'")
    return log


def _wandb(folder: Path, recipe: Recipe | None) -> Any:
    """A run of Weights & Biases; resumed, it is the same one."""
    import wandb

    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    run = wandb.init(
        project="lbfast", id=key, name=folder.name, dir=str(folder), resume="allow",
        config=None if recipe is None else recipe.to_dict(),
    )  # fmt: skip
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def read(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line that a crash cut short is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and "step" in row:
                    rows.append(row)
    return rows


def keep_until(path: Path, step: int) -> None:
    """Drops the rows after a step: a resumed run takes these steps again."""
    rows = [row for row in read(path) if row["step"] <= step]
    if path.is_file():
        files.write(path, "".join(json.dumps(row) + "\n" for row in rows))


def memory_mib(device: torch.device) -> float:
    """The most that has been in use: of the GPU's memory, or of this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _bar(console: Console) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    return Progress(
        BarColumn(bar_width=12),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=console,
    )


def _plot(rows: list[dict[str, float]], path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8))
    FigureCanvasAgg(figure)
    evaluated = {name for row in rows if (name := headline(row)) is not None}
    panels = figure.subplots(3 + bool(evaluated), sharex=True)
    for axes, name in zip(panels, ("loss", "lr", "scale")):
        axes.plot(*zip(*((row["step"], row[name]) for row in rows if name in row)), linewidth=1)
        axes.set_ylabel({"lr": "learning rate", "scale": "logit scale"}.get(name, name))
        axes.grid(alpha=0.3)
        axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 4))
    for name in sorted(evaluated | {name.replace("eval/", "ema/") for name in evaluated}):
        found = [(row["step"], 100 * row[name]) for row in rows if name in row]
        if found:
            panels[-1].plot(*zip(*found), marker=".", linewidth=1, label=name)
    if evaluated:
        panels[-1].set_ylabel("%")
        panels[-1].legend()
        panels[-1].grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    for axes in panels:  # where matplotlib's layouts put them, each of which measures every label first
        axes.yaxis.set_label_coords(-0.09, 0.5)
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.06, top=0.98, hspace=0.2)
    with files.replacing(path) as staged:
        figure.savefig(staged, dpi=120)
    return path
