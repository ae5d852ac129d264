"""What runs on the machines of a Ray cluster: tasks that decode, actors that embed."""

from __future__ import annotations

import contextlib
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data.block import BlockAccessor

from lbfast.data.decode import Decoder, Undecodable
from lbfast.embedding import parts
from lbfast.embedding.columns import HEAVY, column
from lbfast.embedding.embedder import Embedder
from lbfast.embedding.items import Item
from lbfast.embedding.parts import Keys

ADDED = ("embedding", "modality", "model", "error")
"""Columns that rows come back with."""

_READ = (*HEAVY, "path", "text", "modality", "start_sec", "end_sec")  # columns that an Embedder reads
_ITEM = ("id", "modality", "path", "stamp", "text")
_ATTEMPTS = 16  # at a task whose worker or node dies: Ray's own would never end where that is the task's fault


def dtype_of(embedder: Embedder) -> str:
    """Of the weights, where this runs."""
    return str(embedder.dtype).removeprefix("torch.")


def unfinished(table: pa.Table, key: Sequence[str], finished: Sequence[ray.ObjectRef]) -> pa.Table:
    """The rows whose keys are not among the finished ones."""
    found = parts.digests_of(table, key)
    done = np.zeros(len(found), bool)
    for some in ray.get(list(finished)):
        done |= Keys.within(found, some)
    return table.filter(pa.array(~done))


def _go_to(folder: str) -> None:
    """Relative paths are of the driver's folder, where there is one of this name: a worker begins in Ray's own."""
    with contextlib.suppress(OSError):
        os.chdir(folder)


def decode(table: pa.Table, embedder: Embedder, folder: str) -> pa.Table:
    """Rows as an Embedder takes them -> one row, the batch of them decoded. `folder`: the driver's."""
    return _decoded(
        table, {name: _values(table, name) for name in _READ if name in table.column_names}, embedder, folder
    )


def _decoded(table: pa.Table, given: Mapping[str, Any], embedder: Embedder, folder: str) -> pa.Table:
    """`given`: the columns of the table that the Embedder reads."""
    _go_to(folder)
    columns = _decode_apart(given, table.num_rows, embedder) if _attempt() else embedder.decode(given)
    kept = table.drop_columns([name for name in (*HEAVY, *ADDED) if name in table.column_names])
    columns = {name: values for name, values in columns.items() if name in (*_READ, "error")} | {
        "pixels": [_sent(pixels) for pixels in columns["pixels"]]
    }
    return _packed({"columns": columns, "kept": kept})


def _sent(pixels: np.ndarray | None) -> tuple[np.ndarray | None, int]:
    """Pixel values without planes that repeat the first, and how many there are: those of a short sound are one."""
    if pixels is None or any(not np.array_equal(plane, pixels[0]) for plane in pixels[1:]):
        return pixels, 1
    return pixels[:1], len(pixels)


def _received(sent: tuple[np.ndarray | None, int]) -> np.ndarray | None:
    pixels, times = sent
    return pixels if pixels is None or times == 1 else np.repeat(pixels, times, axis=0)


def as_row(batch: Sequence[Item]) -> dict[str, bytes]:
    """A batch as one row, for `decode_together`."""
    columns = {name: [getattr(item, name, None) for item in batch] for name in (*_ITEM, "data")}
    return {"batch": pickle.dumps(columns)}


def decode_together(table: pa.Table, embedder: Embedder, folder: str) -> pa.Table:
    """A row that is a batch -> the batch decoded."""
    columns = pickle.loads(table["batch"][0].as_buffer())
    rows = pa.table({name: pa.array(columns[name], pa.string()) for name in _ITEM})
    return _decoded(rows, {name: columns[name] for name in _READ if name in columns}, embedder, folder)


class Embed:
    """Batches that `decode` has made -> rows with embeddings. An actor's models stay open from one to the next."""

    def __init__(self, embedder: Embedder, folder: str, alone: bool):
        _go_to(folder)
        self._embedder, self._alone = embedder, alone
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is it written

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        _attempt()
        for row in range(table.num_rows):
            batch = _unpacked(table, row)
            columns, kept = batch["columns"], batch["kept"]
            if self._alone and (names := {*columns["modality"]} - {None}):
                self._embedder.open(names.pop(), alone=True)
            made = self._embedder.embed({**columns, "pixels": [_received(sent) for sent in columns["pixels"]]})
            flat = pa.array(made["embedding"].reshape(-1))
            added = {"embedding": pa.FixedSizeListArray.from_arrays(flat, self._embedder.size)}
            added |= {name: pa.array(list(made[name]), pa.string()) for name in ADDED[1:]}
            yield pa.table({**dict(zip(kept.column_names, kept.columns)), **added})


def _attempt() -> int:
    """How often Ray began this task before; 1 where that cannot be told, for it has no public name.

    Raises RuntimeError where it is time to give up.
    """
    try:
        attempt = ray._private.worker.global_worker.core_worker.get_current_task_attempt_number()
    except AttributeError:
        return 1
    if attempt >= _ATTEMPTS:
        raise RuntimeError(f"a task has ended {attempt} workers; what is finished is kept: call again")
    return attempt


@dataclass(frozen=True)
class _OneRow:
    """A task of `Decoder`: a row that is decoded in a process of its own."""

    path: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class _Rows:
    """The work of `Decoder`."""

    embedder: Embedder

    def decode(self, task: _OneRow) -> Any:
        return self.embedder.decode(task.columns)


def _decode_apart(given: Mapping[str, Any], count: int, embedder: Embedder) -> dict[str, Any]:
    """As `embedder.decode`, in another process: for the task whose worker died over it, perhaps of one of the files.

    The file that ends two processes is an error of its row, and the others are decoded all the same.
    """
    names = given.get("path", [None] * count)
    tasks = [_OneRow(str(names[i]), {name: values[i : i + 1] for name, values in given.items()}) for i in range(count)]
    made: dict[str, list[Any]] = {}
    with Decoder(_Rows(embedder), tasks, workers=1, ahead=1) as decoder:
        for task, result in zip(tasks, decoder):
            if isinstance(result, Undecodable):
                kept = {name: value for name, value in task.columns.items() if name not in HEAVY}
                result = {"modality": [None], **kept, "pixels": [None], "error": [result.reason]}
            for name, values in result.items():
                made.setdefault(name, []).extend(values)
    return {name: column(values) for name, values in made.items()}


def _values(table: pa.Table, name: str) -> Any:
    if name == "data":  # arrays, which Ray keeps in a type of its own
        return BlockAccessor.for_block(table.select([name])).to_numpy(name)
    return table[name].to_pylist()


def _packed(content: Any) -> pa.Table:
    """One row: a pickle, and the memory of its arrays beside it, which whoever reads it does not copy."""
    buffers: list[pickle.PickleBuffer] = []
    message = pickle.dumps(content, protocol=5, buffer_callback=buffers.append)
    memory = pa.array([[buffer.raw() for buffer in buffers]], pa.list_(pa.large_binary()))
    return pa.table({"message": pa.array([message], pa.large_binary()), "memory": memory})


def _unpacked(table: pa.Table, row: int) -> Any:
    message, memory = table["message"][row], table["memory"][row].values
    return pickle.loads(message.as_buffer(), buffers=[part.as_buffer() for part in memory])
