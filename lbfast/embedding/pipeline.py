"""Files and captions -> a Parquet file of unit embeddings: micro-batches, decoding ahead, resumable."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lbfast
from lbfast.data.decode import Decoder, Task, Undecodable, default_workers
from lbfast.data.suffixes import LANGUAGE
from lbfast.embedding.embedder import BadFileError, Embedder, check_count
from lbfast.embedding.fused import Group, find_groups, fused_rows, modalities_of
from lbfast.embedding.items import Failure, Item, find_items
from lbfast.embedding.journal import CHANGED, Journal, differences, partial_path, read_finished, signature
from lbfast.embeds import usable

Progress = Callable[[str, int, int], None]
"""progress(modality, done, total) after each batch; rows done in an earlier run count as done."""

_FUSED_AT_ONCE = 4096


@dataclass
class Summary:
    """What a run did.

    Attributes:
        out: the Parquet file; None where nothing could be embedded.
        embedded: rows by modality, those of earlier runs included.
        resumed: rows that an earlier run had finished.
        finished: whether an earlier run had finished everything, so that nothing was left to do.
        failures: files that are not in `out`, as this run met them. failed: how many an earlier, finished one met.
        ignored: what folders held besides, counted by reason.
    """

    out: Path | None = None
    embedded: dict[str, int] = field(default_factory=dict)
    resumed: int = 0
    finished: bool = False
    failed: int = 0
    failures: list[Failure] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)


def embed_files(
    inputs: Sequence[str | os.PathLike[str]],
    models: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    modality: str | None = None,
    fuse: str | Sequence[str] | None = None,
    dim: int | None = None,
    batch_size: int = 8,
    workers: int | None = 0,
    dtype: str = "auto",
    precision: str | None = None,
    device: str = "auto",
    strict: bool = False,
    allow_urls: bool = False,
    overwrite: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    on_failure: Callable[[Failure], None] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Embeds files of any modality and the captions of text files into one Parquet file.

    Its rows are (id, modality, path, embedding, model): id unique, embedding a fixed-size list of float32 of unit
    length, not multiplied by a temperature. They are sorted by modality, then as given, folders by name. Files are
    embedded by the model of their modality, captions (text files, one a line) by the text tower of the last model.

    A run that was interrupted, killed even, goes on where it stopped when it is called again with the same settings.
    One that was finished has nothing left to do when inputs and settings are the same.

    Args:
        inputs: files and folders, each optionally as "MODALITY=PATH"; see `find_items` for how a modality is found.
        models: checkpoints, each optionally as "MODALITY=DIR_OR_NAME"; else config.json says the modality.
        out: Parquet file. Complete or absent; finished rows wait in OUT.partial.
        modality: of every file whose input names none; "language" for captions.
        fuse: "video+audio": a row more, of that modality, for every two files of one stem (the path below the folder
            given, without its suffix); their embeddings as `lbfast.fuse` makes them one. Of three or more as well.
        dim: keep the first `dim` numbers of each embedding, of unit length again, as nested ones are. None: all.
        batch_size: files or captions at a time. For videos, that many clips.
        workers: processes that decode files while the model computes; 0: none; None: see `default_workers`. With
            workers, call this from a script under `if __name__ == "__main__":`, as multiprocessing asks.
        dtype: "float32", "bfloat16", "float16" or "auto": bfloat16 where the device computes in it, else float32 (see
            `lbfast.model.inference.best_dtype`). Embeddings are normalised and written in float32.
        precision: None, or "int8" or "fp8": of the layers' products, as `lbfast.optimize_for_inference` takes it.
        device: "auto" (a GPU where there is one), or of torch.
        strict: stop at the first file that cannot be embedded, or is damaged.
        allow_urls: take URLs of files among the inputs, by fsspec, which is then needed.
        overwrite: replace `out`, and throw away rows of an unfinished run with other settings.
        cache_dir, revision, token: of downloads.
        on_failure: called with each failure when it is met.
        progress: called after each batch.

    Raises:
        BadFileError: with `strict`. FileExistsError: `out` is there, of other inputs or settings, without `overwrite`;
        or it is a link or a device, or was made by somebody else since this run began.
        FileNotFoundError: its folder is not. ValueError: an argument is wrong, or the settings differ from those of the
        unfinished run. OSError, CheckpointError: a checkpoint cannot be had or used.
    """
    check_count("batch_size", batch_size, 1)
    if workers is not None:
        check_count("workers", workers, 0)
    if not inputs:
        raise ValueError("inputs: expected at least one file or folder, got none")
    out = _check_out(Path(out))
    embedder = Embedder(
        models,
        dtype=dtype,
        precision=precision,
        batch_size=batch_size,
        device=device,
        dim=dim,
        allow_urls=allow_urls,
        strict=strict,
        cache_dir=cache_dir,
        revision=revision,
        token=token,
    )
    checkpoints, weights = embedder.checkpoints, embedder.dtype
    fused = () if fuse is None else modalities_of(fuse, checkpoints.keys())
    summary = Summary()

    def failed(failure: Failure) -> None:
        if strict:
            raise BadFileError(_named(failure))
        summary.failures.append(failure)
        if on_failure is not None:
            on_failure(failure)

    listing = find_items(inputs, checkpoints.keys(), modality, allow_urls)
    summary.ignored = listing.ignored
    for failure in listing.failures:
        failed(failure)
    if not listing.items:
        return summary
    last = embedder.text_checkpoint
    settings: dict[str, Any] = {
        "lbfast": lbfast.__version__,
        "dtype": str(weights).removeprefix("torch."),
        "precision": precision,
        "models": {name: [c.name, c.fingerprint()] for name, c in checkpoints.items()},
        "language": [last.name, last.fingerprint(), last.tokenizer_fingerprint()],
    }
    groups = find_groups(listing.items, inputs, fused)
    if fused:
        settings["fuse"] = list(fused)
    if dim is not None:
        settings["dim"] = dim
    for reason, count in groups.ignored.items():
        summary.ignored[reason] = count
    before, inputs = signature(out), _digest(listing.items)
    if before is not None and not overwrite:
        _take_finished(out, settings, inputs, strict, summary)
        with contextlib.suppress(ValueError, OSError):  # killed between the two, the run left its journal
            if partial_path(out).exists():
                Journal(out, embedder.size, settings).remove()
        return summary
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(errno.EACCES, "out: cannot write in this folder", str(out.parent))
    for failure in groups.failures:
        failed(failure)
    journal = Journal(out, embedder.size, settings, restart=overwrite)
    try:
        if signature(out) != before:  # by a run that held the journal until now
            raise FileExistsError(errno.EEXIST, CHANGED, str(out))
        heard = progress or (lambda *_: None)
        left = sum(item not in journal and item.modality != LANGUAGE for item in listing.items)
        workers = default_workers(left, embedder.device) if workers is None else workers
        run = _Run(embedder, journal, workers, failed, heard)
        summary.resumed = sum(item in journal for item in listing.items)
        run.embed(listing.items)
        run.fuse(groups.whole)
        items = [*listing.items, *(group.item for group in groups.whole)]
        finished = [item for item in items if item in journal]
        for item in finished:
            summary.embedded[item.modality] = summary.embedded.get(item.modality, 0) + 1
        if finished:
            journal.finish(
                finished, {"inputs": inputs, "rows": summary.embedded, "failed": len(summary.failures)}, before
            )
            summary.out = out
    finally:
        journal.close()
    return summary


def _digest(items: Sequence[Item]) -> str:
    """Changes with the items, their order and their content."""
    key = hashlib.sha256()
    for item in items:
        key.update(f"{item.id}\0{item.stamp}\n".encode())
    return key.hexdigest()


def _take_finished(out: Path, settings: Mapping[str, Any], inputs: str, strict: bool, summary: Summary) -> None:
    """What there is to say of `out` where an earlier run of the same inputs and settings has made it."""
    found = read_finished(out)
    if found is None:
        why = "no run has made it"
    elif other := differences(found[0], settings):
        why = f"of a run with other settings ({other})"
    elif found[1].get("inputs") != inputs:
        why = "of a run with other inputs"
    elif strict and found[1].get("failed"):
        why = f"of a run that left out {found[1]['failed']} files that failed"
    else:
        summary.embedded = {str(name): int(count) for name, count in found[1]["rows"].items()}
        summary.resumed, summary.finished, summary.out = sum(summary.embedded.values()), True, out
        summary.failed = int(found[1]["failed"])
        return
    raise FileExistsError(errno.EEXIST, f"out: it is there already, {why}; overwrite replaces it", str(out))


@dataclass
class _Run:
    """The part of a run that needs the models."""

    embedder: Embedder
    journal: Journal
    workers: int
    failed: Callable[[Failure], None]
    progress: Progress

    def embed(self, items: Sequence[Item]) -> None:
        """Embeds what the journal does not have yet. One model is loaded at a time, and only if it has work."""
        left = [item for item in items if item not in self.journal]
        tasks = [Task(item.modality, item.path) for item in left if item.modality != LANGUAGE]
        work, ahead = self.embedder.processors(), 2 * self.embedder.batch_size + self.workers
        names = list(dict.fromkeys(item.modality for item in items))
        batches = {name: list(self._batches(item for item in items if item.modality == name)) for name in names}
        sizes = [len(batch) for name in names if name != LANGUAGE for batch in batches[name]]
        with Decoder(work, tasks, self.workers, ahead, sizes, self.embedder.device) as decoder, _Late() as late:
            decoded = iter(decoder)
            for name in names:
                total = sum(item.modality == name for item in items)
                done = total - sum(map(len, batches[name]))
                self.progress(name, done, total)
                if not batches[name]:
                    continue
                late.do()  # before the next model is loaded
                self.embedder.open(name, alone=True)
                for batch in batches[name]:
                    good, values = self._values(name, batch, decoded)
                    embeds = self.embedder.embed_values(name, values) if good else torch.empty(0, self.embedder.size)
                    done += len(batch)
                    late.put(self._keeping(good, embeds, values, (name, done, total)))
                    if not embeds.is_cuda:  # then it is computed
                        late.do()
        self.embedder.close()

    def _batches(self, items: Iterator[Item]) -> Iterator[list[Item]]:
        """Batches of the items of one modality, without what is finished: the same batches whatever that is.

        What a row is to the last bit depends on what is embedded with it.
        """
        while batch := list(itertools.islice(items, self.embedder.batch_size)):
            if left := [item for item in batch if item not in self.journal]:
                yield left

    def fuse(self, groups: Sequence[Group]) -> None:
        """Makes one row of the rows of each group whose parts are all finished."""
        todo = [group for group in groups if group.item not in self.journal]
        todo = [group for group in todo if all(part in self.journal for part in group.parts)]
        for start in range(0, len(todo), _FUSED_AT_ONCE):
            some = todo[start : start + _FUSED_AT_ONCE]
            modalities = range(len(some[0].parts))
            rows = [self.journal.embeddings([group.parts[i] for group in some]) for i in modalities]
            model = "+".join(self.embedder.checkpoint_of(part.modality).name for part in some[0].parts)
            good = []
            for group, row in fused_rows(some, rows):
                if row is None:
                    self.failed(Failure(group.item.id, "the embeddings of its files point in opposite directions"))
                else:
                    good.append((group.item, row))
            if good:
                self.journal.append([item for item, _ in good], np.stack([row for _, row in good]), model)

    def _values(
        self, modality: str, batch: list[Item], decoded: Iterator[np.ndarray | Undecodable]
    ) -> tuple[list[Item], list[Any]]:
        """The items that have pixel values, or are captions, and these."""
        if modality == LANGUAGE:
            return batch, [item.text for item in batch]
        good: list[Item] = []
        pixels: list[np.ndarray] = []
        for item in batch:
            result = next(decoded)
            if isinstance(result, Undecodable):
                self.failed(Failure(item.path, result.reason))
            else:
                good.append(item)
                pixels.append(result)
        return good, pixels

    def _keeping(
        self, items: list[Item], embeds: torch.Tensor, values: list[Any], so_far: tuple[str, int, int]
    ) -> Callable[[], None]:
        """What is left to do of a batch when `embeds`, which a GPU may still compute from `values`, are there."""
        rows = embeds.to("cpu", non_blocking=True)
        there = torch.cuda.current_stream(embeds.device).record_event() if embeds.is_cuda else None

        def keep() -> None:
            if there is not None:
                there.synchronize()
            values.clear()  # until now they were in use
            self._keep(items, rows, so_far[0])
            self.progress(*so_far)

        return keep

    def _keep(self, items: list[Item], rows: torch.Tensor, modality: str) -> None:
        """Writes the rows that are finite."""
        finite = usable(rows)
        for item, good in zip(items, finite.tolist()):
            if not good:
                self.failed(Failure(item.path, self.embedder.not_finite()))
        kept = [item for item, good in zip(items, finite.tolist()) if good]
        if kept:
            self.journal.append(kept, rows[finite].numpy(), self.embedder.checkpoint_of(modality).name)


class _Late:
    """The end of a batch, done when the next one is with the device, which computes meanwhile.

    Used as a context manager: what was put is done, however the block ends.
    """

    def __init__(self) -> None:
        self._put: Callable[[], None] | None = None

    def __enter__(self) -> _Late:
        return self

    def __exit__(self, *error: object) -> None:
        self.do()

    def put(self, end: Callable[[], None]) -> None:
        """Takes this one's, and does the one before."""
        before, self._put = self._put, end
        if before is not None:
            before()

    def do(self) -> None:
        """What was put, now."""
        end, self._put = self._put, None
        if end is not None:
            end()


def _named(failure: Failure) -> str:
    """The reason, beginning with the path where it does not name it already."""
    return failure.reason if failure.path in failure.reason else f"{failure.path}: {failure.reason}"


def _check_out(out: Path) -> Path:
    if not out.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "out: no such folder", str(out.parent))
    if out.is_symlink():
        raise FileExistsError(errno.EEXIST, f"out: it is a link, to {os.readlink(out)}; name the file itself", str(out))
    if out.is_dir():
        raise IsADirectoryError(errno.EISDIR, "out: expected a file to write, got a folder", str(out))
    if out.exists() and not out.is_file():
        raise FileExistsError(errno.EEXIST, "out: expected a file to write, got a device or a pipe", str(out))
    return out


__all__ = ["BadFileError", "Failure", "Summary", "embed_files", "partial_path"]
