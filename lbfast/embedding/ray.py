"""Ray Data: files decoded by tasks on CPUs, embedded by a pool of actors, their rows in parts.

    dataset -> unfinished (tasks) -> decode (tasks) -> Embed (actors) -> the driver, which alone writes

What goes through the object store is what the model takes, in its dtype: normalised planes cannot be made again from
resized uint8 within the tolerances, and what was decoded is larger before it is resized. Between the two stages a row
is a whole batch: what is embedded together is what was put together. Ray does again what a dead worker, actor or node
has not given back, and the driver counts what comes: every row once.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

import lbfast
from lbfast.data.suffixes import ORDER
from lbfast.embedding import parts
from lbfast.embedding.embedder import BadFileError, Embedder, check_count
from lbfast.embedding.items import Failure, Item, find_items
from lbfast.embedding.journal import differences
from lbfast.embedding.parts import Keys, Parts
from lbfast.embedding.pipeline import Summary

try:
    import ray
    import ray.data
    from ray.exceptions import RayError, RayTaskError

    from lbfast.embedding import remote
except ModuleNotFoundError as error:
    raise ImportError(f"engine: expected Ray Data, got {error}; pip install 'lbfast[ray]'") from error

if TYPE_CHECKING:
    from ray.data import Dataset

_BATCHES_A_BLOCK = 64
_ROW = ("id", "modality", "path", "embedding", "model", "error", "stamp")


@dataclass(frozen=True)
class Pool:
    """How much of a cluster a job takes.

    Attributes:
        actors: at most so many embed, each with its model. None: one a GPU; without GPUs one a machine.
        num_gpus: of each. None: one where the cluster has any, unless the embedder's device is the CPU.
        num_cpus: of each, and so many threads. None: beside a GPU one, else half the cores of a machine.
        decoders: at most so many tasks decode at a time, on a core each. None: as many as there are cores.
    """

    actors: int | None = None
    num_gpus: float | None = None
    num_cpus: float | None = None
    decoders: int | None = None


def with_embeddings(dataset: Dataset, embedder: Embedder, pool: Pool | None = None) -> Dataset:
    """The rows of a dataset with their embeddings, as a dataset to go on with: nothing is computed yet.

    Args:
        dataset: of rows as `lbfast.Embedder` takes them: a column of `path`, `bytes`, `data` or `text`, and perhaps
            `modality`, `start_sec` and `end_sec`. `ray.data.read_binary_files(..., include_paths=True)` is one.
        embedder: its `batch_size` rows are decoded by a task, and embedded together. Every machine of the cluster
            opens its checkpoints by their names.

    Returns:
        Its columns without `data` and `bytes`, and ADDED: embedding (float32 of unit length, NaN where there is an
        error), modality, model, error (null, or why there is no embedding).

    Raises:
        TypeError: no Embedder. ValueError: its device is not in the cluster.
    """
    return _Job(embedder, pool or Pool()).embedded(dataset)


def embed_dataset(
    dataset: Dataset,
    embedder: Embedder,
    out: str | os.PathLike[str],
    *,
    id: str | None = None,
    pool: Pool | None = None,
    overwrite: bool = False,
    on_failure: Callable[[Failure], None] | None = None,
) -> Summary:
    """Embeds the rows of a dataset into a folder of Parquet parts, and goes on where an earlier call stopped.

    Args:
        dataset, embedder, pool: see `with_embeddings`.
        out: the folder, on the machine of the caller, which alone writes. Complete or absent: parts wait in
            OUT.partial. One that is there gets the rows it has not; rows that failed are tried again.
        id: the column that tells rows apart. None: `id`, else `path` with `start_sec` and `end_sec`.
        overwrite: replace `out`, and throw away the parts of an unfinished run.
        on_failure: called with each row that has an error.

    Raises:
        ValueError: there is no such column, or two rows are of one key. BadFileError: the embedder is strict. And what
        `parts.opened` raises, and opening a checkpoint.
    """
    job = _Job(embedder, pool or Pool())
    key = _key(list((dataset.schema() or pa.schema([])).names), id)
    summary = Summary()
    with parts.opened(out, job.settings(), key, overwrite=overwrite) as made:
        done = made.finished.arrays
        if done:
            dataset = dataset.map_batches(
                remote.unfinished,
                batch_size=None,
                batch_format="pyarrow",
                fn_kwargs={"key": key, "finished": [ray.put(some) for some in done]},
            )
        _collect(job.embedded(dataset), made, _hearing(summary, embedder.reading.strict, on_failure))
        _finish(made, summary, {})
    return summary


def embed_files(
    inputs: Sequence[str | os.PathLike[str]],
    models: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    address: str | None = None,
    modality: str | None = None,
    fuse: None = None,
    segment: None = None,
    hop: None = None,
    shard: None = None,
    column: None = None,
    workers: int | None = None,
    overwrite: bool = False,
    on_failure: Callable[[Failure], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **settings: Any,
) -> Summary:
    """`lbfast.embedding.embed_files` on a Ray cluster: the same rows, in a folder of Parquet parts.

    Args:
        inputs: files and folders, which every machine of the cluster has under these names.
        out: a folder on the machine of the caller; see `embed_dataset`. Its rows are (id, modality, path, stamp,
            embedding, model, error), in no order; `stamp` changes with a file's content.
        address: of the cluster; "auto": the one that was started on this machine. None: the one that this process is
            connected to, or one is started here, and ended.
        fuse, segment, hop, shard, column: of one machine only.
        workers: at most so many tasks decode at a time. None: as many as there are cores.
        progress: is Ray's own.
        settings: of `lbfast.Embedder`: batch_size, dtype, precision, device, dim, strict, allow_urls, decoder,
            cache_dir, revision, token.

    Raises what `lbfast.embedding.embed_files` raises, and ConnectionError: no cluster is there.
    """
    if not inputs:
        raise ValueError("inputs: expected at least one file or folder, got none")
    refused = {"fuse": fuse, "segment": segment, "hop": hop, "shard": shard, "column": column}
    for name, value in refused.items():
        if value is not None:
            raise ValueError(f"{name}: expected none with the engine ray, got {value}")
    if workers is not None:
        check_count("workers", workers, 1)
    parts.check_out(Path(out))
    embedder = Embedder(models, **settings)
    listing = find_items(inputs, embedder.checkpoints.keys(), modality, embedder.reading.allow_urls)
    summary = Summary(ignored=listing.ignored)
    heard = _hearing(summary, embedder.reading.strict, on_failure)
    for failure in listing.failures:
        heard(failure)
    items = list(listing.items)
    if not items:
        return summary
    found = parts.digests([[item.id for item in items], [item.stamp for item in items]])
    inputs_digest = hashlib.sha256(found.tobytes()).hexdigest()
    with cluster(address):
        job = _Job(embedder, Pool(decoders=workers), alone=True)
        given = job.settings()
        if not overwrite and _is_finished(Path(out), given, inputs_digest, embedder.reading.strict, summary):
            return summary
        with parts.opened(out, given, ("id", "stamp"), Keys(found), overwrite) as made:
            batches = list(_batches(items, ~made.finished.have(found), embedder.batch_size))
            if batches:
                _collect(job.embedded(_dataset(batches), together=True), made, heard, _ROW)
            lost = int((~made.finished.have(found)).sum())
            if lost:
                raise RuntimeError(f"{lost} files did not come back from the cluster; call again: the others are kept")
            _finish(made, summary, {"inputs": inputs_digest})
    return summary


@contextlib.contextmanager
def cluster(address: str | None = None) -> Iterator[None]:
    """A Ray cluster: that of an address, or the one that this process is connected to; else one of its own for a time.

    Raises ConnectionError where there is none at the address.
    """
    if address is not None:
        _check_answers(address)
    if ray.is_initialized():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(address=address, **({} if address else {"include_dashboard": False}))
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # Ray's own ends the process on the spot
                signal.signal(number, handler)
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raises ConnectionError where nobody listens at HOST:PORT: Ray itself would wait for a very long time."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # "auto", "local"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=20).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"address: expected a Ray cluster at {address}, got {error}") from error


class _Job:
    """An embedder as the whole cluster uses it: of one dtype, on the devices that were chosen.

    Args:
        alone: an actor keeps one model at a time, as batches come sorted by modality.
    """

    def __init__(self, embedder: Embedder, pool: Pool, alone: bool = False):
        if not isinstance(embedder, Embedder):
            raise TypeError(
                "embedder: expected a lbfast.Embedder, which is sent without its models and opens them where it is "
                f"used, got {type(embedder).__name__}"
            )
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        gpus, cores = int(ray.cluster_resources().get("GPU", 0)), min((int(m["CPU"]) for m in machines), default=1)
        wanted = embedder.wanted_device
        if wanted not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device: expected auto, cpu or cuda, for Ray says which GPU it is, got {wanted!r}")
        if wanted == "cuda" and not gpus:
            raise ValueError("device: expected one that is in the cluster, got 'cuda': it has no GPU")
        num_gpus = pool.num_gpus if pool.num_gpus is not None else float(gpus > 0 and wanted != "cpu")
        num_cpus = pool.num_cpus if pool.num_cpus is not None else min(cores - 1, 1) if num_gpus else cores // 2
        actors = pool.actors or (int(gpus / num_gpus) if num_gpus else len(machines)) or 1
        decoders = pool.decoders
        if decoders is None and num_cpus == 1 and not num_gpus:
            decoders = _cores()  # a bound, for what asks for the same and has none is made one with the actors
        self._resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self._actors = ray.data.ActorPoolStrategy(min_size=1, max_size=actors)
        self._decoders = ray.data.TaskPoolStrategy(size=decoders)
        self._alone = alone
        device, dtype = "cuda" if num_gpus else "cpu", embedder.wanted_dtype
        if dtype == "auto":  # what it means there: all compute in one
            asked = ray.remote(**self._resources)(remote.dtype_of)
            try:
                dtype = ray.get(asked.remote(embedder.settled(device, dtype)))
            except RayError as error:
                last = str(_cause(error)).rstrip().rpartition("\n")[2]
                raise RuntimeError(f"ray: expected lbfast on every machine of the cluster, got {last}") from error
        self.embedder = embedder.settled(device, dtype)

    def settings(self) -> dict[str, Any]:
        """What rows depend on besides the files."""
        made, last = self.embedder, self.embedder.text_checkpoint
        settings: dict[str, Any] = {
            "lbfast": lbfast.__version__,
            "dtype": made.wanted_dtype,
            "precision": made.precision,
            "models": {name: [each.name, each.fingerprint()] for name, each in made.checkpoints.items()},
            "language": [last.name, last.fingerprint(), last.tokenizer_fingerprint()],
        }
        if made.reading.decoder != "ffmpeg":
            settings["decoder"] = made.reading.decoder
        return settings if made.dim is None else {**settings, "dim": made.dim}

    def embedded(self, dataset: Dataset, together: bool = False) -> Dataset:
        """`together`: the rows of the dataset are batches, as `remote.as_row` makes them."""
        sent = {"embedder": self.embedder, "folder": os.getcwd()}
        dataset = dataset.map_batches(
            remote.decode_together if together else remote.decode,
            batch_size=1 if together else self.embedder.batch_size,
            batch_format="pyarrow",
            compute=self._decoders,
            fn_kwargs=sent,
            num_cpus=1,
        )
        return dataset.map_batches(
            remote.Embed,
            batch_size=1,
            batch_format="pyarrow",
            compute=self._actors,
            fn_constructor_kwargs={**sent, "alone": self._alone},
            **self._resources,
        )


def _batches(items: Sequence[Item], left: np.ndarray, size: int) -> Iterator[list[Item]]:
    """Batches of the items of one modality, without what is finished: the same whatever that is, as on one machine."""
    marked = zip(items, left.tolist())
    for _, some in itertools.groupby(marked, key=lambda pair: pair[0].modality):
        while batch := list(itertools.islice(some, size)):
            if unfinished_ones := [item for item, wanted in batch if wanted]:
                yield unfinished_ones


def _dataset(batches: Sequence[Sequence[Item]]) -> Dataset:
    """Of rows that are batches; so many in a block that there are several for each core."""
    size = min(max(len(batches) // (4 * _cores()), 1), _BATCHES_A_BLOCK)
    return ray.data.from_items(
        [remote.as_row(batch) for batch in batches], override_num_blocks=-(-len(batches) // size)
    )


def _cores() -> int:
    return max(int(ray.cluster_resources().get("CPU", 1)), 1)


def _key(columns: Sequence[str], id: str | None) -> tuple[str, ...]:
    """The columns that tell rows apart."""
    if id is None:
        id = next((name for name in ("id", "path") if name in columns), None)
    if id is None or id not in columns:
        raise ValueError(
            f"id: expected a column that tells rows apart, got a dataset of {', '.join(columns) or 'none'}; "
            "read_binary_files gives one with include_paths=True"
        )
    return (id, *(name for name in ("start_sec", "end_sec") if id == "path" and name in columns))


def _collect(
    dataset: Dataset, made: Parts, on_failure: Callable[[Failure], None], columns: Sequence[str] | None = None
) -> None:
    """Runs a dataset, whose rows, or some columns of them, become parts as they come.

    Raises what a task or an actor raised, RuntimeError where Ray gave up.
    """
    try:
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            table = table if columns is None else table.select(columns)
            again = made.append(table)
            name = "path" if "path" in table.column_names else made.key[0]
            for row in again.select([name]).to_pylist():
                on_failure(
                    Failure(str(row[name]), f"left out: there is a row of this {' and '.join(made.key)} already")
                )
            for row in table.filter(table["error"].is_valid()).select([name, "error"]).to_pylist():
                on_failure(Failure(str(row[name]), row["error"]))
    except RayTaskError as error:
        raise _cause(error) from None
    except RayError as error:
        raise RuntimeError(f"ray: {error}; what is finished is kept: call again") from error


def _cause(error: BaseException) -> BaseException:
    """What the task of ours raised, below Ray's own errors."""
    while isinstance(error, RayError) and (below := getattr(error, "cause", None) or error.__cause__) is not None:
        error = below
    return error


def _hearing(summary: Summary, strict: bool, on_failure: Callable[[Failure], None] | None) -> Callable[[Failure], None]:
    def failed(failure: Failure) -> None:
        if strict:
            known = failure.path in failure.reason
            raise BadFileError(failure.reason if known else f"{failure.path}: {failure.reason}")
        summary.failures.append(failure)
        if on_failure is not None:
            on_failure(failure)

    return failed


def _finish(made: Parts, summary: Summary, run: Mapping[str, Any]) -> None:
    """`out` from the parts, where any row has an embedding; what there is to say of it."""
    summary.embedded = {name: made.rows[name] for name in ORDER if made.rows[name]}
    summary.resumed = made.kept
    if summary.embedded:
        made.finish({**run, "rows": summary.embedded, "failed": len(summary.failures)})
        summary.out = made.out
    else:
        made.discard()


def _is_finished(out: Path, settings: Mapping[str, Any], inputs: str, strict: bool, summary: Summary) -> bool:
    """Whether an earlier run of the same inputs and settings has made `out`; what there is to say of it."""
    found = parts.read_manifest(out)
    if found is None or found["run"].get("inputs") != inputs or (strict and found["run"]["failed"]):
        return False
    if differences({**found["settings"], "key": None}, {**settings, "key": None}):
        return False
    summary.embedded = {str(name): int(count) for name, count in found["run"]["rows"].items()}
    summary.resumed, summary.finished, summary.out = sum(summary.embedded.values()), True, out
    summary.failed = int(found["run"]["failed"])
    return True
