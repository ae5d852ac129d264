"""Files and captions -> a Parquet file of unit embeddings: micro-batches, decoding ahead, resumable."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

import lbfast
from lbfast.checkpoints import pick_device
from lbfast.data.decode import default_workers
from lbfast.data.suffixes import LANGUAGE, ORDER
from lbfast.embedding.devices import Devices
from lbfast.embedding.embedder import BadFileError, Embedder, check_count
from lbfast.embedding.finished import Finished, Found, read_finished
from lbfast.embedding.fused import Group, find_groups, folders_of, modalities_of, stem_of
from lbfast.embedding.items import Failure, Item, find_items, mean_of, share_of, split_modality
from lbfast.embedding.journal import CHANGED, Journal, differences, partial_path, signature
from lbfast.embedding.places import listed
from lbfast.embedding.run import Progress, Run
from lbfast.embedding.spool import Chained, Spool
from lbfast.processing.media import Reading
from lbfast.processing.nvdec import available
from lbfast.processing.segments import CUT, Cuts

SEGMENTS = "segments"
"""What `fuse` calls the means of parts."""


LIST = "-"
"""The input that stands for a list of inputs."""

_ENOUGH = 1000  # files that keep any number of workers busy


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
        kept: rows of an earlier run whose files are not among the inputs of this one; they are in `out`.
        gone: rows of an earlier run whose files are no longer in the folders given; they are not in `out` any more.
    """

    out: Path | None = None
    embedded: dict[str, int] = field(default_factory=dict)
    resumed: int = 0
    finished: bool = False
    failed: int = 0
    failures: list[Failure] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    gone: int = 0


def embed_files(
    inputs: Sequence[str | os.PathLike[str]],
    models: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    modality: str | None = None,
    fuse: str | Sequence[str] | None = None,
    segment: str | float | None = None,
    hop: str | float | None = None,
    dim: int | None = None,
    shard: str | None = None,
    column: str | None = None,
    batch_size: int = 8,
    workers: int | None = 0,
    dtype: str = "auto",
    precision: str | None = None,
    device: str = "auto",
    strict: bool = False,
    allow_urls: bool = False,
    decoder: str = "ffmpeg",
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
    One that was finished has nothing left to do when inputs and settings are the same. Given other inputs with the same
    settings it embeds what `out` lacks and what has changed; rows of files that are not among the inputs stay, but for
    those of a folder that is given and does not have them any more.

    Args:
        inputs: files, folders, tables, tars and URLs, each optionally as "MODALITY=PATH"; see `find_items` for how a
            modality is found. "-": a list of them on the standard input, one a line, or each ended by a NUL.
        models: checkpoints, each optionally as "MODALITY=DIR_OR_NAME"; else config.json says the modality.
        out: Parquet file. Complete or absent; finished rows wait in OUT.partial.
        modality: of every file whose input names none; "language" for captions.
        fuse: "video+audio": a row more, of that modality, for every two files of one stem (the path below the folder
            given, without its suffix); their embeddings as `lbfast.fuse` makes them one. Of three or more as well.
            "segments": a row more for every file that is embedded in parts, of its id and their mean. Both, as a list.
        segment: embed videos and sounds in parts of so many seconds ("10s", "2min", 1.5), as `Cuts` has it. Rows have
            `start_sec` and `end_sec`, null where they are of something whole, and ids as "video:a.mp4#10-20".
        hop: seconds from the beginning of one part to that of the next; None: `segment`.
        dim: keep the first `dim` numbers of each embedding, of unit length again, as nested ones are. None: all.
        shard: "2/5": only the second of five shares of what is found, by a hash of the id, for as many machines.
        column: of tables: the one with paths, bytes of files, or captions. None: that of bytes, or `path`.
        batch_size: files or captions at a time. For videos, that many clips; of recordings in parts those of one file.
        workers: processes that decode files while the model computes; 0: none; None: see `default_workers`. With
            workers, call this from a script under `if __name__ == "__main__":`, as multiprocessing asks.
        dtype: "float32", "bfloat16", "float16" or "auto": bfloat16 where the device computes in it, else float32 (see
            `lbfast.model.inference.best_dtype`). Embeddings are normalised and written in float32.
        precision: None, or "int8" or "fp8": of the layers' products, as `lbfast.optimize_for_inference` takes it.
        device: "auto" (a GPU where there is one), or of torch; several as "cuda:0,cuda:1": a process each.
        strict: stop at the first file that cannot be embedded, or is damaged.
        allow_urls: take URLs of files among the inputs, by fsspec, which is then needed.
        decoder: of videos: "ffmpeg", or "torchcodec-cuda" for a GPU's (docs/files.md), in each process that decodes.
        overwrite: replace `out`, and throw away rows of an unfinished run with other settings.
        cache_dir, revision, token: of downloads.
        on_failure: called with each failure when it is met.
        progress: called after each batch.

    Raises:
        BadFileError: with `strict`. FileExistsError: `out` is there, of other inputs or settings, without `overwrite`;
        or it is a link or a device, or was made by somebody else since this run began.
        FileNotFoundError: its folder is not. ValueError: an argument is wrong, or the settings differ from those of the
        unfinished run. ImportError, RuntimeError: what `decoder` needs is not here. OSError, CheckpointError: a
        checkpoint cannot be had or used.
    """
    check_count("batch_size", batch_size, 1)
    if workers is not None:
        check_count("workers", workers, 0)
    if not inputs:
        raise ValueError("inputs: expected at least one file or folder, got none")
    if decoder != "ffmpeg":
        if segment is not None:
            raise ValueError(f"decoder: expected ffmpeg with segment, got {decoder!r}")
        available(Reading(decoder=decoder).decoder)
    out = _check_out(Path(out))
    names = device.split(",")
    for name in names:
        pick_device(name)
    embedder = Embedder(
        models,
        dtype=dtype,
        precision=precision,
        batch_size=batch_size,
        device=names[0],
        dim=dim,
        allow_urls=allow_urls,
        decoder=decoder,
        strict=strict,
        cache_dir=cache_dir,
        revision=revision,
        token=token,
    )
    checkpoints, weights = embedder.checkpoints, embedder.dtype
    cuts = _cuts(segment, hop)
    means, fused = _kinds(fuse, checkpoints.keys(), cuts)
    summary = Summary()

    def failed(failure: Failure) -> None:
        if strict:
            raise BadFileError(_named(failure))
        summary.failures.append(failure)
        if on_failure is not None:
            on_failure(failure)

    given = [name for name in (os.fspath(one) for one in inputs) if name != LIST]
    share = None if shard is None else _share(share_of(shard), given, fused)
    with contextlib.ExitStack() as closing:
        items = closing.enter_context(Spool(out.parent, () if cuts is None else CUT, share))
        lists = [items.keep(listed())] if len(given) < len(inputs) else []
        if lists and next(iter(lists[0]), None) is None:
            failed(Failure(LIST, "no names on the standard input"))
        listing = find_items(
            Chained(given, *lists), checkpoints.keys(), modality, allow_urls, column, items, items.marks
        )
        where = os.path.abspath(out)
        files = (os.path.abspath(split_modality(name)[1]) for name in given)
        if where in files or any(f"{name}={where}" in items.marks for name in ORDER):
            raise FileExistsError(errno.EEXIST, "out: it is one of the inputs; name another file", str(out))
        summary.ignored = listing.ignored
        for failure in listing.failures:
            failed(failure)
        if not len(items):
            return summary
        last = embedder.text_checkpoint
        settings: dict[str, Any] = {
            "lbfast": lbfast.__version__,
            "dtype": str(weights).removeprefix("torch."),
            "precision": precision,
            "models": {name: [c.name, c.fingerprint()] for name, c in checkpoints.items()},
            "language": [last.name, last.fingerprint(), last.tokenizer_fingerprint()],
        }
        if fused or means:
            settings["fuse"] = [*([SEGMENTS] if means else []), *fused]
        if cuts is not None:
            settings["segment"] = [str(cuts.length), str(cuts.hop)]
        if dim is not None:
            settings["dim"] = dim
        if decoder != "ffmpeg":
            settings["decoder"] = decoder
        groups = find_groups(items if fused else (), given, fused)
        for reason, count in groups.ignored.items():
            summary.ignored[reason] = count
        before, digest, base = signature(out), _digest(items), None
        if before is not None and not overwrite:
            if _is_finished(out, settings, digest, strict, summary):
                with contextlib.suppress(ValueError, OSError):  # killed between the two, the run left its journal
                    if partial_path(out).exists():
                        Journal(out, embedder.size, settings, parts=cuts is not None).remove()
                return summary
            base = closing.enter_context(_base(out))
        if not os.access(out.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "out: cannot write in this folder", str(out.parent))
        for failure in groups.failures:
            failed(failure)
        journal = Journal(out, embedder.size, settings, overwrite, cuts is not None, base)
        closing.callback(journal.close)
        if signature(out) != before:  # by a run that held the journal until now
            raise FileExistsError(errno.EEXIST, CHANGED, str(out))
        others = closing.enter_context(Spool(out.parent, () if cuts is None else CUT))
        made = _Made(items, others, groups.whole, means)
        unlisted = {failure.path for failure in listing.failures}
        stale = _sort(base, made, given, unlisted, share, summary)
        summary.resumed = sum(map(journal.count, made.of_inputs())) if journal.rows or base else 0
        if workers is None:
            left = (item for item in items if item not in journal and item.modality != LANGUAGE)
            workers = default_workers(sum(1 for _ in itertools.islice(left, _ENOUGH)), embedder.device)
        devices = None if len(names) == 1 else closing.enter_context(Devices(embedder, names))
        run = Run(embedder, journal, workers, failed, progress or (lambda *_: None), cuts, devices)
        run.embed(items)
        if means:
            run.means(items)
        run.fuse(groups.whole)
        for item in made:
            if count := journal.count(item):
                summary.embedded[item.modality] = summary.embedded.get(item.modality, 0) + count
        if base is not None and not journal.rows and not stale and not summary.gone:
            journal.remove()
            summary.out, summary.finished = out, not summary.failures
        elif summary.embedded:
            counts = {"inputs": digest, "rows": summary.embedded, "failed": len(summary.failures)}
            journal.finish(made, counts, before)
            summary.out = out
    return summary


@dataclass
class _Made:
    """What the output is to have, in order: what `others` has, what is among the inputs, and means and fused rows."""

    items: Spool
    others: Spool
    groups: Sequence[Group]
    means: bool

    def __iter__(self) -> Iterator[Item]:
        for name in sorted({*self.items.names(), *self.others.names()} & {*ORDER}, key=ORDER.index):
            yield from self._with_means(itertools.chain(self.others.of(name), self.items.of(name)))
        for name in {*self.others.names()} - {*ORDER}:
            yield from self.others.of(name)
        yield from (group.item for group in self.groups)

    def of_inputs(self) -> Iterator[Item]:
        yield from self._with_means(self.items)
        yield from (group.item for group in self.groups)

    def _with_means(self, items: Iterable[Item]) -> Iterator[Item]:
        for item in items:
            yield item
            if self.means and item.cut:
                yield mean_of(item)


def _share(is_in: Callable[[str], bool], inputs: Sequence[str], fused: Collection[str]) -> Callable[[Item], bool]:
    """Which items are in a share: by their ids, but what may be fused by its stem, so that it stays together."""
    folders = folders_of(inputs)

    def accept(item: Item) -> bool:
        if "+" in item.modality:
            return is_in(item.id.partition(":")[2])
        return is_in(stem_of(item, folders) if item.modality in fused else item.id)

    return accept


def _cuts(segment: str | float | None, hop: str | float | None) -> Cuts | None:
    if segment is None and hop is not None:
        raise ValueError(f"hop: expected with segment, the length of a part, got {hop!r} alone")
    return None if segment is None else Cuts.of(segment, hop)


def _kinds(
    fuse: str | Sequence[str] | None, available: Collection[str], cuts: Cuts | None
) -> tuple[bool, tuple[str, ...]]:
    """Whether means of segments are wanted, and which modalities are to be fused. ValueError."""
    if fuse is None:
        return False, ()
    given = [fuse] if isinstance(fuse, str) else list(fuse)
    others = [name for name in given if name != SEGMENTS]
    if len(others) < len(given) and cuts is None:
        raise ValueError(f"fuse: {SEGMENTS}: expected with segment, the length of a part")
    means = len(others) < len(given)
    return means, modalities_of("+".join(others), available) if others or not means else ()


def _base(out: Path) -> Finished:
    """The rows that are there already."""
    try:
        return Finished(out)
    except (ValueError, OSError, pa.ArrowException) as error:
        why = f"of a run with other inputs, and does not say of which files ({error})"
        raise FileExistsError(
            errno.EEXIST, f"out: it is there already, {why}; overwrite replaces it", str(out)
        ) from None


def _sort(
    base: Finished | None,
    made: _Made,
    inputs: Sequence[str],
    unlisted: Collection[str],
    share: Callable[[Item], bool] | None,
    summary: Summary,
) -> int:
    """Puts what else is in `base` and stays there into `made.others`; how many rows are of files that have changed.

    What is no longer in an input goes, but for what lies in one that could not be listed now (`unlisted`).
    """
    fused = {group.item.id: group.item.stamp for group in made.groups}
    names = {split_modality(one)[1].rstrip("/") for one in inputs}
    unlisted = {name.rstrip("/") for name in unlisted}
    stale = 0
    for found in base or ():
        cut = found.tag.number is not None
        file = found.id.rpartition("#")[0] if cut else found.id
        stamp = fused.get(file) or made.items.stamp(file)
        item = Item(file, found.modality, found.path, found.tag.stamp, cut=cut)
        if stamp is not None:
            stale += stamp != found.tag.stamp
        elif (
            _lies_in(_file_of(found), names)
            and not _lies_in(_file_of(found), unlisted)
            and (share is None or share(item))
        ):
            summary.gone += 1
        else:
            summary.kept += 1
            made.others.append(item)
    return stale


def _file_of(found: Found) -> str:
    """The path of a row; of a caption with its line, of a table's row with its number."""
    return found.id.partition(":")[2] if found.modality == LANGUAGE else found.path


def _lies_in(path: str, names: Collection[str]) -> bool:
    """Whether a path is one of the names, or lies in one: a folder, a tar, a table, a text file."""
    return path in names or any(path[:i] in names for i, letter in enumerate(path) if letter in "/#")


def _digest(items: Iterable[Item]) -> str:
    """Changes with the items, their order and their content."""
    key = hashlib.sha256()
    for item in items:
        key.update(f"{item.id}\0{item.stamp}\n".encode())
    return key.hexdigest()


def _is_finished(out: Path, settings: Mapping[str, Any], inputs: str, strict: bool, summary: Summary) -> bool:
    """Whether an earlier run has done all of this; then the summary says what. FileExistsError: `out` is of another."""
    found = read_finished(out)
    if found is None:
        why = "no run has made it"
    elif other := differences(found[0], settings):
        why = f"of a run with other settings ({other})"
    elif found[1].get("inputs") != inputs:
        return False
    elif strict and found[1].get("failed"):
        why = f"of a run that left out {found[1]['failed']} files that failed"
    else:
        summary.embedded = {str(name): int(count) for name, count in found[1]["rows"].items()}
        summary.resumed, summary.finished, summary.out = sum(summary.embedded.values()), True, out
        summary.failed = int(found[1]["failed"])
        return True
    raise FileExistsError(errno.EEXIST, f"out: it is there already, {why}; overwrite replaces it", str(out))


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
