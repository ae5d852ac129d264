"""`Embedder`: columns of files, data and texts -> unit embeddings; picklable, its models opened where it is used."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lbfast.checkpoints import (
    Checkpoint,
    check_device,
    check_dtype,
    checked_dim,
    open_checkpoints,
    pick_device,
    pick_dtype,
)
from lbfast.data.decode import Processors, Undecodable, plain_fields
from lbfast.data.suffixes import LANGUAGE
from lbfast.embedding import columns
from lbfast.embedding.columns import Columns, Row
from lbfast.embeds import media_features, text_features, unit, usable
from lbfast.processing.media import Reading
from lbfast.processing.threads import one_thread

if TYPE_CHECKING:
    from lbfast.model.pair import TwoTowers

MOST = 2**31 - 1
"""Of a count."""
PRECISIONS = (None, "int8", "fp8")
_SENT = {np.dtype(np.int16): torch.bfloat16, np.dtype(np.float16): torch.float16, np.dtype(np.float32): torch.float32}


class BadFileError(ValueError):
    """Something that could not be embedded, where that is to stop everything."""


class Embedder:
    """Files, bytes, data in memory and texts -> unit embeddings, with the models of their modalities.

    It is light until it is used: making it reads the checkpoints' configs. What is opened at the first use, models and
    tokenizers, stays in its process: a copy that is pickled opens its own. A row is to the last bit what `lbfast embed`
    writes of it where the same `batch_size` rows of its modality come together. Safe to call from several threads.

        embedder = lbfast.Embedder(["LanguageBind_Video_FT", "LanguageBind_Audio_FT"])
        embedder.encode(["clips/a.mp4", "sounds/b.wav", "a dog in the rain"])     # (3, 768) float32
        dataset.map_batches(embedder)                                             # columns in, columns out

    Args:
        models: checkpoints, each optionally as "MODALITY=DIR_OR_NAME"; else config.json says the modality. Texts are
            embedded by the text tower of the last.
        dtype: "float32", "bfloat16", "float16" or "auto": bfloat16 where the device computes in it, else float32.
        precision: None, "int8" or "fp8": of the layers' products, as `lbfast.optimize_for_inference` takes it.
        batch_size: rows of one modality at a time.
        device: "auto" (a GPU where there is one), or of torch; looked for where it is used.
        dim: keep the first `dim` numbers of each embedding, of unit length again. None: all.
        allow_urls: open paths that are URLs, by fsspec.
        decoder: of videos: "ffmpeg", or "torchcodec-cuda" for a GPU's; see `Reading`.
        strict: raise BadFileError at the first row that cannot be embedded, or is damaged.
        cache_dir, revision, token: of downloads.

    Attributes:
        checkpoints: by modality, in the order of `models`.
        size: numbers of an embedding.

    Raises:
        ValueError: an argument is wrong. OSError, CheckpointError: a config cannot be had or used.
    """

    def __init__(
        self,
        models: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        dtype: str = "auto",
        precision: str | None = None,
        batch_size: int = 8,
        device: str = "auto",
        dim: int | None = None,
        allow_urls: bool = False,
        decoder: str = "ffmpeg",
        strict: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ):
        check_count("batch_size", batch_size, 1)
        check_dtype(dtype)
        check_device(device)
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected None, 'int8' or 'fp8', got {precision!r}")
        given = [models] if isinstance(models, str | os.PathLike) else models
        self.checkpoints = open_checkpoints(given, cache_dir=cache_dir, revision=revision, token=token)
        width = self.text_checkpoint.config.projection_dim
        self.dim = checked_dim(dim, width)
        self.size = self.dim or width
        self.batch_size, self.precision = batch_size, precision
        self._dtype, self._device = dtype, device
        self.reading = Reading(strict=strict, allow_urls=allow_urls, decoder=decoder)
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._models: dict[str, TwoTowers] = {}  # by modality of the checkpoint
        self._tokenizer: Any = None
        self._processors: dict[torch.dtype, Processors] = {}

    def __getstate__(self) -> dict[str, Any]:
        opened = ("_lock", "_models", "_tokenizer", "_processors")
        return {name: value for name, value in vars(self).items() if name not in opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __repr__(self) -> str:
        models = ", ".join(f"{name}={each.name}" for name, each in self.checkpoints.items())
        return f"Embedder({models}; batch_size={self.batch_size}, device={self._device!r}, dtype={self._dtype!r})"

    def settled(self, device: str, dtype: str) -> Embedder:
        """Another of the same models, for machines where "auto" would not mean what it does here; none is open."""
        made = copy.copy(self)
        made._device, made._dtype = device, dtype
        return made

    @property
    def wanted_device(self) -> str:
        """As it was given: "auto" too."""
        return self._device

    @property
    def wanted_dtype(self) -> str:
        """As it was given: "auto" too."""
        return self._dtype

    @property
    def text_checkpoint(self) -> Checkpoint:
        """The last of the models, whose text tower embeds texts."""
        return list(self.checkpoints.values())[-1]

    @property
    def device(self) -> torch.device:
        """Where it computes, in this process. ValueError: it is not here."""
        return pick_device(self._device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, in this process."""
        return pick_dtype(self._dtype, self.device)

    def on(self, device: str) -> Embedder:
        """A copy of it, unopened, that computes on another device in the same dtype."""
        other = copy.copy(self)
        other._device, other._dtype = device, str(self.dtype).removeprefix("torch.")
        return other

    @property
    def _strictly(self) -> str | None:
        return "batch" if self.reading.strict else None

    def checkpoint_of(self, modality: str) -> Checkpoint:
        return self.text_checkpoint if modality == LANGUAGE else self.checkpoints[modality]

    def __call__(self, batch: Mapping[str, Any]) -> Columns:
        """Embeds the rows of a batch.

        Args:
            batch: columns of n values each (lists or arrays; None, or NaN, is no value), of which these are read:
                data: in memory, as the modality's processor takes an item: arrays, PIL pictures, (waveform, rate),
                    values of Hugging Face datasets. bytes: of an encoded file. path: of a file. text: a caption. Of
                    these a row's first that is not None is embedded; where there is data or bytes, path is its name.
                modality: "image", ..., "language"; else the path's suffix says it, or there is one model only.
                start_sec, end_sec: the part of a file that is wanted.

        Returns:
            The columns of the batch, and these:
            embedding: (n, size) float32 of unit length; NaN where there is an error.
            modality, model: of each row; None where it cannot be told.
            error: None, or why there is no embedding.

        Raises:
            TypeError, ValueError: `batch` has no such columns, or of different lengths. BadFileError: with strict.
            RuntimeError: batch_size rows do not fit into the memory of the device.
        """
        given, count = columns.checked(batch)
        return {**given, **self._embedded(self._rows(given, count), None, self._strictly)}

    def encode(self, items: Sequence[Any], modality: str | None = None) -> np.ndarray:
        """Embeds whatever is in a list.

        Args:
            items: files (a Path; a string that is a URL, ends in a suffix of media, or names a file that is there),
                texts (every other string), bytes of encoded files, data in memory.
            modality: of all of them. With one, strings are files, with "language" texts.

        Returns:
            (n, size) float32 of unit length.

        Raises:
            BadFileError: for the first that cannot be embedded: "items[2]: PATH: expected ...". TypeError: no list.
        """
        if isinstance(items, str | bytes | os.PathLike | Set | Mapping) or not hasattr(items, "__len__"):
            raise TypeError(f"items: expected a list, got {type(items).__name__}")
        if modality is not None and modality not in {*self.checkpoints, LANGUAGE}:
            there = ", ".join([*self.checkpoints, LANGUAGE])
            raise ValueError(f"modality: expected one that there is a model for ({there}), got {modality!r}")
        batch = columns.columns_of(items, modality)
        return self._embedded(self._rows(batch, len(items)), None, "items")["embedding"]

    def decode(self, batch: Mapping[str, Any]) -> Columns:
        """The first half of a call, without a model: decodes files and data, on any machine that has them.

        Returns:
            The columns of the batch but data and bytes, and these: `pixels`: arrays as the models take them, in the
            dtype that was asked for (float32 for "auto"; bfloat16 as its bits in int16), None where there is nothing to
            decode. `modality`. `error`.
        """
        given, count = columns.checked(batch)
        work = self._work(torch.float32 if self._dtype == "auto" else getattr(torch, self._dtype))
        rows = self._rows(given, count)
        found = [_decoded(row, work) for row in rows]
        errors = [error for _, error in found]
        _refuse(errors, range(count), self._strictly)
        kept = {name: values for name, values in given.items() if name not in columns.HEAVY}
        added: dict[str, list[Any]]
        added = {"modality": [row.modality for row in rows], "pixels": [pixels for pixels, _ in found], "error": errors}
        return {**kept, **{name: columns.column(values) for name, values in added.items()}}

    def embed(self, decoded: Mapping[str, Any]) -> Columns:
        """The second half of a call: what `decode` gave, on the machine with the device -> what the call returns.

        Rows of several results of `decode`, joined or parted, are rows as any.
        """
        if not isinstance(decoded, Mapping) or not {"modality", "pixels", "error"} <= {*decoded}:
            raise ValueError("decoded: expected columns that `decode` has made, modality, pixels and error among them")
        given = dict(decoded)
        pixels = list(given.pop("pixels"))
        read = {name: columns.present(given.get(name, [None] * len(pixels))) for name in ("modality", "text", "error")}
        rows = [Row(modality, text=text, error=error) for modality, text, error in zip(*read.values())]
        return {**given, **self._embedded(rows, pixels, self._strictly)}

    def open(self, modality: str, alone: bool = False) -> None:
        """Loads the model of a modality now. `alone`: lets go of the others first, for they may not fit together."""
        key = self.checkpoint_of(modality).modality
        with self._lock:
            if alone:
                self._models = {name: model for name, model in self._models.items() if name == key}
            if key not in self._models:
                self._models[key] = self.checkpoints[key].load(self.dtype, self.device, self.batch_size, self.precision)

    def close(self) -> None:
        """Lets go of the models; the next call opens them again."""
        with self._lock:
            self._models = {}

    def embed_values(self, modality: str, values: Sequence[Any]) -> torch.Tensor:
        """(n, size) float32 of unit length, on the device, of at most `batch_size` texts or arrays of one modality.

        On a GPU it may not be computed when this returns: keep the arrays until it is. Rows that `usable` refuses may
        be among them. RuntimeError: they do not fit into the memory of the device.
        """
        with self._lock:
            self.open(modality)
            model = self._models[self.checkpoint_of(modality).modality]
            try:
                if modality == LANGUAGE:
                    if self._tokenizer is None:
                        self._tokenizer = self.text_checkpoint.tokenizer()
                    return unit(text_features(model, self._tokenizer, values), self.dim)
                sent = {_SENT.get(getattr(value, "dtype", None)) for value in values}
                if len(sent) > 1 or None in sent:
                    kinds = ", ".join(sorted({str(getattr(value, "dtype", type(value).__name__)) for value in values}))
                    raise ValueError(f"pixels: expected arrays as decode gives them, of one dtype, got {kinds}")
                features = media_features(model, values, sent.pop() or self.dtype, self.device, self.dtype)
                return unit(features, self.dim)
            except torch.OutOfMemoryError as error:
                raise RuntimeError(
                    f"batch_size: {self.batch_size} {modality} items do not fit into the memory of {self.device}; "
                    "call again with fewer: what is finished is kept"
                ) from error

    def processors(self, dtype: torch.dtype | None = None) -> Processors:
        """What decodes files for the models, here or in workers; None: in the dtype of the weights."""
        vision = {name: plain_fields(each.config.vision_config) for name, each in self.checkpoints.items()}
        return Processors(vision, self.reading, dtype or self.dtype)

    def not_finite(self) -> str:
        """Why a row that `usable` refuses has no embedding."""
        return f"its embedding is not finite in {self.dtype}"

    def _work(self, dtype: torch.dtype) -> Processors:
        if dtype not in self._processors:
            self._processors[dtype] = self.processors(dtype)
        return self._processors[dtype]

    def _rows(self, batch: Columns, count: int) -> list[Row]:
        return columns.rows_of(batch, count, self.checkpoints)

    def _embedded(self, rows: list[Row], pixels: list[Any] | None, strict: str | None) -> Columns:
        """The columns that a call adds. `pixels`: of what is decoded already; `strict`: what to call a row that fails.

        No more than a batch is held decoded at a time, of which the rows that failed are left out.
        """
        out = np.full((len(rows), self.size), np.nan, dtype=np.float32)
        errors = [row.error for row in rows]
        _refuse(errors, range(len(rows)), strict)
        for modality, numbers in self._batches(rows):
            values: dict[int, Any] = {}
            for number in numbers:
                if errors[number] is None:
                    if modality == LANGUAGE:
                        values[number] = rows[number].text
                    elif pixels is not None:
                        values[number] = pixels[number]
                    else:
                        values[number], errors[number] = _decoded(rows[number], self._work(self.dtype))
            _refuse(errors, numbers, strict)
            good = [number for number in numbers if errors[number] is None]
            if not good:
                continue
            embeds = self.embed_values(modality, [values[number] for number in good]).cpu()
            for number, row, fine in zip(good, embeds, usable(embeds).tolist()):
                if fine:
                    out[number] = row.numpy()
                else:
                    errors[number] = self.not_finite()
            _refuse(errors, numbers, strict)
        known = {*self.checkpoints, LANGUAGE}
        names = [self.checkpoint_of(row.modality).name if row.modality in known else None for row in rows]
        added = {"modality": [row.modality for row in rows], "model": names, "error": errors}
        return {"embedding": out, **{name: columns.column(values) for name, values in added.items()}}

    def _batches(self, rows: Sequence[Row]) -> Iterator[tuple[str, list[int]]]:
        """The numbers of the rows of each modality, `batch_size` at a time, those included that will fail."""
        for modality in (*self.checkpoints, LANGUAGE):
            numbers = [number for number, row in enumerate(rows) if row.modality == modality]
            for first in range(0, len(numbers), self.batch_size):
                yield modality, numbers[first : first + self.batch_size]


def _decoded(row: Row, work: Processors) -> tuple[np.ndarray | None, str | None]:
    """What a row's file or data holds, or why it cannot be told."""
    if row.task is None:
        return None, row.error
    with one_thread():
        result = work.decode(row.task)
    return (None, result.reason) if isinstance(result, Undecodable) else (result, None)


def _refuse(errors: Sequence[str | None], numbers: Iterable[int], strict: str | None) -> None:
    """Raises BadFileError for the first of the rows that has an error, where that is to stop everything."""
    if strict is not None:
        for number in numbers:
            if errors[number] is not None:
                raise BadFileError(f"{strict}[{number}]: {errors[number]}")


def check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or not least <= value <= MOST:
        raise ValueError(f"{name}: expected a whole number from {least} to {MOST}, got {value!r}")
