"""One run: its state and parts, its steps, its checkpoints, and what it hands over at the end."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

from lbfast.messages import shown
from lbfast.model.checkpoint import CheckpointError
from lbfast.model.languagebind import LanguageBindModel
from lbfast.training import checkpoints, engine as engines, memory
from lbfast.training.averages import Averages
from lbfast.training.captions import TextCache, weights_digest
from lbfast.training.checkpoints import step_of
from lbfast.training.engine import Place
from lbfast.training.exporter import ADAPTER, CHECKPOINTS, MODEL, MODEL_EMA, export
from lbfast.training.parameters import gradient_norm, groups, local, trained, training_mode
from lbfast.training.recipes import MEMORY_FIELDS, Recipe
from lbfast.training.report import METRICS, Report, memory_mib
from lbfast.training.step import LargeBatchStep, Rows, Towers
from lbfast.training.stopping import StopSignals
from lbfast.training.watch import AVERAGES, RAW, Evaluation, Watch, told

LARGEST_LOG_SCALE = math.log(100)
LITTLE = 0.1
"""Of the learning rate, for all that is trained: it is told."""
_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TrainingError(RuntimeError):
    """Training that cannot go on: a loss that is not a number. The last checkpoint is as it was."""


class Batches(Protocol):
    """The data of a run, as this process sees it.

    Attributes:
        steps_per_epoch: on every process the same.
    """

    @property
    def steps_per_epoch(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Rows]:
        """This process's rows of the steps of an epoch from number `start` on, the same whenever it is asked."""
        ...


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        steps: taken in all, by earlier runs too. total: of the recipe.
        loss: of the last step; None where none was taken now.
        samples: pairs seen by this run. seconds: it took.
        checkpoint: the last. model: the exported directory, once training is complete.
        stopped: the signal that ended it early, or None.
        micro_batch: rows that were back-propagated at once.
        best: the checkpoint of the best evaluation, where one is kept.
    """

    steps: int
    total: int
    loss: float | None
    samples: int
    seconds: float
    checkpoint: Path | None
    model: Path | None
    stopped: int | None
    micro_batch: int
    best: Path | None = None


class Run:
    """State and parts of one run."""

    def __init__(
        self,
        recipe: Recipe,
        model: LanguageBindModel,
        batches: Batches,
        out: Path,
        engine: engines.Engine,
        place: Place,
        text_cache: str | os.PathLike[str] | None,
        files: Sequence[Path],
        console: Console | None,
        evaluation: Evaluation | None = None,
        log: Sequence[str] = (),
    ):
        self.recipe, self.model, self.batches, self.out, self.place = recipe, model, batches, out, place
        self.folder, self.files, self.console = out / CHECKPOINTS, files, console
        self.log = log
        self.watch = None if evaluation is None else Watch(evaluation, recipe, place, recipe.ema is not None)
        self.best: dict[str, Any] | None = None  # name, value and step of the best evaluation
        self.last: Path | None = None
        self.whole: set[Path] = set()  # checkpoints that are known to be
        self.step, self.total = 0, batches.steps_per_epoch * recipe.epochs
        model.to(place.device)  # type: ignore[arg-type]
        training_mode(model)
        self.frozen = weights_digest((name, p) for name, p in model.named_parameters() if not p.requires_grad)
        self.data = {"paths or captions": batches.fingerprint()} if hasattr(batches, "fingerprint") else {}
        self.data["the tokenizer's files"] = _digest(files)
        autocast = autocast_dtype(recipe, place.device)
        if autocast is torch.float16 and engine == "fsdp":
            raise ValueError("precision: expected float32 or bfloat16 with the engine fsdp, got float16")
        for tower in (model.vision_model, model.text_model) if recipe.train_text else (model.vision_model,):
            memory.recompute(tower.encoder, recipe.checkpointing)
        towers = Towers(model)
        most = -(-recipe.batch_size // place.world)
        micro_batch = recipe.micro_batch or memory.fitting_rows(
            towers, recipe, place.device, lambda: _arithmetic(place.device, autocast), most
        )
        cache = None
        if text_cache is not None and not towers.text_trained:
            cache = TextCache(text_cache, _text_tower(model, autocast, place.device), model.config.projection_dim)
        wrapped = engines.wrap(towers, engine, place)
        self.parameters = trained(model)
        if not self.parameters:
            raise ValueError("model: expected parameters to train, got none; call prepare(model, recipe) first")
        self.optimizer = torch.optim.AdamW(
            groups(model, recipe),
            lr=recipe.lr,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.eps,
            fused=place.device.type in ("cpu", "cuda"),
        )
        self.averages = None if recipe.ema is None else Averages(self.parameters, recipe.ema)
        self.scaler = torch.amp.GradScaler(place.device.type) if autocast is torch.float16 else None
        self.large = LargeBatchStep(
            wrapped,
            micro_batch,
            group=place.group,
            seed=recipe.seed,
            autocast=autocast,
            scaler=self.scaler,
            loss=recipe.loss,
            dims=recipe.dims,
            label_smoothing=recipe.label_smoothing,
            mask_repeats=recipe.mask_repeats,
            offload=recipe.offload,
            cache=cache,
        )

    def find(self, resume: str | os.PathLike[str]) -> Path | None:
        """The checkpoint to start from; the same on every process, as they share a file system."""
        if resume == "auto":
            found = checkpoints.newest(self.folder)
            torn = [p.name for p in checkpoints.existing(self.folder) if found is None or p.name > found.name]
            if torn:
                self._say(f"passed over what is no complete checkpoint: {', '.join(torn)}")
            return found
        if resume == "never":
            if checkpoints.existing(self.folder):
                raise ValueError(f"resume: {self.folder} has checkpoints of an earlier run; remove them, or go on")
            return None
        if not Path(resume).is_dir():
            raise ValueError(f"resume: expected 'auto', 'never' or the directory of a checkpoint, got {str(resume)!r}")
        return Path(resume)

    def start(self, checkpoint: Path | None) -> None:
        """Takes up a checkpoint if there is one, and sets aside what lies after it."""
        self.last = checkpoint
        inside = checkpoint is not None and checkpoint.parent.resolve() == self.folder.resolve()
        if checkpoint is not None:
            with checkpoints.foreign(checkpoint):
                self._restore(checkpoint)
            self._say(f"going on from {checkpoint}")
        if checkpoint is not None and inside:
            self.whole.add(self.folder / checkpoint.name)
        failure: OSError | None = None
        engines.agreed(0, self.place)  # every process has read it
        if self.place.first:
            later = [path for path in checkpoints.existing(self.folder) if not inside or step_of(path) > self.step]
            try:
                aside = checkpoints.set_aside(later, self.out / METRICS)
            except OSError as error:
                failure = error
            else:
                if aside is not None:
                    names = ", ".join(path.name for path in later)
                    self._say(f"step {self.step} begins a new line of history; set aside in {aside}: {names}")
        together(failure, "set checkpoints aside", self.place)

    def train(self, until: int, save_every: int, keep: int) -> Summary:
        """Takes the steps up to number `until`; see `train`."""
        begun = mark = time.perf_counter()
        samples, loss, stopped, model = 0, None, None, None
        evaluated: dict[str, float]
        if self.step == 0 and self.recipe.warmup > self.total:
            self._say(
                f"warmup: {self.recipe.warmup} steps, and the run has {self.total}: its learning rate ends at "
                f"{scheduled(self.recipe, self.total - 1, self.total):.2g}, not at lr {self.recipe.lr:.2g}; "
                f"`--set warmup={-(-self.total // 10)}` is a tenth of the run"
            )
        if self.step == 0 and not self.recipe.lora_r and self.recipe.coef_lr < LITTLE:
            self._say(
                f"coef_lr: without adapters all that is trained learns at coef_lr {self.recipe.coef_lr:g} of lr, "
                f"{self.recipe.lr * self.recipe.coef_lr:.2g}; `--set coef_lr=1` is the whole"
            )
        with (
            StopSignals() as signals,
            Report(
                self.out if self.place.first else None, self.total, self.step, self.console, self.log, self.recipe
            ) as report,
        ):
            for epoch, batch in self._rest(until):
                numbers = self._one(batch)
                del batch  # before the next is made: its pixels may be most of the memory
                samples += int(numbers["rows"])
                now = time.perf_counter()
                numbers |= {"epoch": epoch, "samples_per_second": numbers["rows"] / (now - mark)}
                better, mark, evaluated = False, now, {}
                if self.watch is not None and self.watch.due(self.step, self.total):
                    report.evaluates(self.step)
                    evaluated = self._evaluate(self.watch)
                    better, mark = self._is_best(evaluated), time.perf_counter()
                if numbers["rows"]:
                    loss = numbers["loss"]
                    report.step({**numbers, **evaluated})
                else:
                    self._say(f"step {self.step}: none of its samples could be read, so that nothing was learnt")
                    if evaluated:
                        report.step({"step": self.step, "epoch": epoch, "rows": 0, **evaluated})
                stopped = engines.agreed(signals.seen, self.place) or None
                if stopped or better or self.step == until or self.step % save_every == 0:
                    self.last = self._save(keep)
                if stopped:
                    break
            if self.step == self.total and not stopped:
                model = self._export()
                report.plot()
        seconds = time.perf_counter() - begun
        return Summary(
            self.step, self.total, loss, samples, seconds, self.last, model, stopped, self.large.micro_batch,
            self.best_checkpoint,
        )  # fmt: skip

    def _evaluate(self, watch: Watch) -> dict[str, float]:
        """Numbers of the model as it is, and of its averages."""
        found = watch(self.model, RAW)
        if self.averages is not None:
            with self.averages.in_place():
                found |= watch(self.model, AVERAGES)
        self._say(f"step {self.step}: {told(found)}")
        return found

    def _is_best(self, found: Mapping[str, float]) -> bool:
        """Notes an evaluation that is better than those before."""
        name = None if self.watch is None else self.watch.best
        if name is None or (self.best is not None and found[name] <= self.best["value"]):
            return False
        self.best = {"name": name, "value": found[name], "step": self.step}
        return True

    @property
    def best_checkpoint(self) -> Path | None:
        """Of the best evaluation, while it is there."""
        path = None if self.best is None else checkpoints.path_of(self.folder, self.best["step"])
        return path if path is not None and path.is_dir() else None

    def _rest(self, until: int) -> Iterator[tuple[int, Rows]]:
        """(epoch, this process's rows) of the steps still to take."""
        each = self.batches.steps_per_epoch
        while self.step < until:
            epoch, start = divmod(self.step, each)
            rows: Any = self.batches.epoch(epoch, start)
            try:
                with contextlib.suppress(StopIteration):
                    for _ in range(min(each - start, until - self.step)):
                        yield epoch, next(rows)  # by no name, which would keep it
            finally:
                if hasattr(rows, "close"):  # a generator's workers end now, not when it is collected
                    rows.close()
            if self.step < min((epoch + 1) * each, until):
                raise ValueError(f"batches: expected {each} steps in epoch {epoch}, got {self.step - epoch * each}")

    def _one(self, batch: Rows) -> dict[str, float]:
        """Takes one step and returns its numbers."""
        self.optimizer.zero_grad(set_to_none=True)
        result = self.large(batch, self.step)
        lr = scheduled(self.recipe, self.step, self.total)
        self.step += 1
        numbers = {"step": self.step, "lr": lr, "rows": result.rows, "loss": float(result.loss)}
        if not result.rows:  # every sample of it was corrupt
            return numbers
        self._check("loss", numbers["loss"])
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = float(gradient_norm(self.parameters.values(), self.place.group))
        if self.scaler is None:  # the scaler passes over steps whose gradients overflowed
            self._check("norm of the gradient", norm)
        if self.recipe.clip_norm is not None and norm > self.recipe.clip_norm:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    local(parameter.grad).mul_(self.recipe.clip_norm / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["share"]
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        with torch.no_grad():
            scale = self.model.logit_scale.clamp_(0, LARGEST_LOG_SCALE).exp()
        if self.averages is not None:
            self.averages.update(self.step)
        return {**numbers, "scale": float(scale), "norm": norm, "memory_mib": round(memory_mib(self.place.device), 1)}

    def _check(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        last = checkpoints.newest(self.folder)
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise TrainingError(
            f"the {what} is {value} at step {self.step} of {self.total}: a smaller lr, a longer warmup, clip_norm or "
            f"another precision may help; {kept}"
        )

    def _save(self, keep: int) -> Path:
        """Writes a checkpoint; every process takes part, the first writes."""
        tensors = {name: engines.full(parameter) for name, parameter in self.parameters.items()}
        moments = {
            name: {key: engines.full(value) if torch.is_tensor(value) else value for key, value in found.items()}
            for name, found in ((name, self.optimizer.state.get(p, {})) for name, p in self.parameters.items())
        }
        averages = None if self.averages is None else self.averages.state()
        failure: Exception | None = None
        if self.place.first:
            state = {
                "format": 1,
                "step": self.step,
                "steps_per_epoch": self.batches.steps_per_epoch,
                "recipe": self.recipe.to_dict(),
                "frozen": self.frozen,
                "data": self.data,
                "micro_batch": self.large.micro_batch,
                "optimizer": {name: {k: v.cpu() for k, v in found.items()} for name, found in moments.items()},
                "averages": averages and {name: value.cpu() for name, value in averages.items()},
                "best": self.best,
                "scaler": None if self.scaler is None else self.scaler.state_dict(),
                "generators": checkpoints.generators(),
            }
            try:
                checkpoints.save(
                    self.folder,
                    self.step,
                    tensors,
                    state,
                    keep,
                    self.whole,
                    None if self.best is None else checkpoints.path_of(self.folder, self.best["step"]),
                )
            except checkpoints.CheckpointWriteError as error:
                failure = error
        together(failure, "write the checkpoint", self.place)
        return checkpoints.path_of(self.folder, self.step)

    def _restore(self, path: Path) -> None:
        """Takes up a checkpoint of the same run."""
        tensors, state = checkpoints.load(path)
        self._same(path, state)
        if tensors.keys() != self.parameters.keys():
            odd = sorted(tensors.keys() ^ self.parameters.keys())
            raise CheckpointError(f"{path}: expected the parameters that this run trains; these differ: {odd[:4]}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if tensors[name].shape != parameter.shape:
                    raise CheckpointError(
                        f"{path}: {name}: expected {tuple(parameter.shape)}, got {tuple(tensors[name].shape)}"
                    )
                moments = state["optimizer"][name]
                if moments and {key: x.shape for key, x in moments.items()} != _shapes(parameter):
                    raise CheckpointError(f"{path}: expected AdamW's moments of {name}, got others")
                parameter.copy_(engines.as_part_of(tensors[name], parameter))
                self.optimizer.state[parameter] = {
                    key: engines.as_part_of(value, parameter) if value.ndim else value.to(parameter.device)
                    for key, value in moments.items()
                }
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        if self.averages is not None:
            self.averages.load(state.get("averages"), path)
        checkpoints.restore_generators(state["generators"])
        if all(state["recipe"].get(name) == getattr(self.recipe, name) for name in MEMORY_FIELDS):
            if type(state["micro_batch"]) is not int or state["micro_batch"] < 1:
                raise CheckpointError(f"{path}: micro_batch: expected at least 1, got {shown(state['micro_batch'])}")
            self.large.micro_batch = state["micro_batch"]
        self.step = state["step"]
        self._take_up_best(path, state.get("best"))

    def _take_up_best(self, path: Path, best: Any) -> None:
        """The best so far, if it was found by the same number and its checkpoint is still there."""
        if best is None or self.watch is None:
            return
        if not isinstance(best, dict) or type(best.get("step")) is not int or type(best.get("value")) is not float:
            raise CheckpointError(f"{path}: best: expected a name, a value and a step, got {shown(best)}")
        if best.get("name") == self.watch.best:
            self.best = best
            if self.best_checkpoint is None:
                self.best = None

    def _same(self, path: Path, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError where a checkpoint is of a run with another recipe, model or data."""
        ours = self.recipe.to_dict()
        theirs = {**Recipe(self.recipe.modality).to_dict(), **state["recipe"]}  # of before a field was: its default
        changed = [k for k in ours if k not in MEMORY_FIELDS and theirs.get(k) != ours[k]]
        if changed:
            listed = ", ".join(f"{k} was {theirs.get(k)!r} and is {ours[k]!r}" for k in changed)
            raise CheckpointError(f"{path}: of a run with another recipe: {listed}")
        if state["steps_per_epoch"] != self.batches.steps_per_epoch:
            raise CheckpointError(
                f"{path}: of a run with other data: an epoch had {state['steps_per_epoch']} steps and has "
                f"{self.batches.steps_per_epoch}"
            )
        changed = [name for name, digest in self.data.items() if state.get("data", {}).get(name, digest) != digest]
        if changed:
            raise CheckpointError(f"{path}: of a run with other data: {' and '.join(changed)} have changed since")
        if state["frozen"] != self.frozen:
            raise CheckpointError(f"{path}: of a run that began with another model: the weights that stay differ")

    def _export(self) -> Path:
        export(self.model, self.out / MODEL, "upstream", files=self.files, write=self.place.first)
        if self.recipe.lora_r:
            export(self.model, self.out / ADAPTER, "peft", write=self.place.first)
        if self.averages is not None:
            with self.averages.in_place():
                export(self.model, self.out / MODEL_EMA, "upstream", files=self.files, write=self.place.first)
        return self.out / MODEL

    def _say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, highlight=False)


def _shapes(parameter: torch.Tensor) -> dict[str, torch.Size]:
    """Of what AdamW keeps of a parameter."""
    return {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}


def scheduled(recipe: Recipe, step: int, total: int) -> float:
    """The learning rate of step 0.. of `total`: a straight line up to recipe.lr, then half a cosine down to 0."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(total - recipe.warmup, 1)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * done))


def _digest(files: Sequence[Path]) -> str:
    """Of the names and contents of files."""
    key = hashlib.sha256()
    for file in sorted(files):
        content = file.read_bytes()
        key.update(f"{file.name} {len(content)} ".encode() + content)
    return key.hexdigest()


def _text_tower(model: LanguageBindModel, autocast: torch.dtype | None, device: torch.device) -> str:
    """What the embeddings of captions depend on besides the captions."""
    parameters = [*model.text_model.named_parameters(), *model.text_projection.named_parameters()]
    fields = model.config.text_config.to_json_string(use_diff=False)
    return f"{weights_digest(parameters)} {fields} {autocast} {device.type} {torch.__version__}"


def autocast_dtype(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """Of the towers' arithmetic; None for float32."""
    if recipe.precision != "auto":
        return _PRECISIONS[recipe.precision]
    return torch.bfloat16 if device.type == "cuda" else None


def _arithmetic(device: torch.device, autocast: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)


def together(failure: Exception | None, what: str, place: Place) -> None:
    """Raises the first process's failure there, and TrainingError on the others."""
    failed = engines.agreed(int(failure is not None), place)
    if failure is not None:
        raise failure
    if failed:
        raise TrainingError(f"the first process could not {what}; it says why")
