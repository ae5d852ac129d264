"""Caption embeddings of a text tower that is not trained, kept on disk: a caption is embedded once in its life."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

_KEY = 16
_LENGTH_TOLERANCE = 1e-3


def weights_digest(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A name for named weights: changes when any of them does."""
    digest = hashlib.sha256()
    for name, x in parameters:
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        if x.numel():
            digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class TextCache:
    """Embeddings by the tokens of their captions, in files that processes append to, each to its own.

    A file is a row of records: 16 bytes of the tokens' hash, then the embedding in float32. A record that a crash cut
    short, at the end, is dropped.

    Args:
        folder: made if it does not exist.
        weights: of the text tower, as `weights_digest` names them, with the arithmetic's dtype where that is not
            float32: embeddings of other weights are not seen.
        size: of an embedding, E.
        rank: of this process.
    """

    def __init__(self, folder: str | os.PathLike[str], weights: str, size: int, rank: int = 0):
        self.record = np.dtype([("key", f"V{_KEY}"), ("embedding", np.float32, (size,))])
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = hashlib.sha256(f"{weights} {size}".encode()).hexdigest()[:24]
        self.path = self.folder / f"captions-{stem}-{rank}.bin"
        self._rows: dict[bytes, tuple[int, int]] = {}  # key -> (file, row)
        self._files = sorted({self.path, *self.folder.glob(f"captions-{stem}-*.bin")})
        for number, file in enumerate(self._files):
            self._index(number, file)
        self._own = self._files.index(self.path)
        self._end = self._count(self.path)
        with open(self.path, "ab") as handle:
            handle.truncate(self._end * self.record.itemsize)

    def read(self, ids: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Fills the rows of out (b, E) that are known; returns the numbers of the others, (missing,) int64."""
        found: dict[int, list[tuple[int, int]]] = {}
        missing = []
        for row, key in enumerate(_keys(ids)):
            if key in self._rows:
                file, place = self._rows[key]
                found.setdefault(file, []).append((row, place))
            else:
                missing.append(row)
        for file, places in found.items():
            records = np.memmap(self._files[file], dtype=self.record, mode="r")
            rows, at = (list(column) for column in zip(*places))
            embeddings = torch.from_numpy(np.array(records["embedding"][at]))
            # blocks that a crash of the machine left empty are no embeddings: those have unit length
            sound = (embeddings.norm(dim=1) - 1).abs() < _LENGTH_TOLERANCE
            kept = torch.tensor(rows)[sound]
            out[kept.to(out.device)] = embeddings[sound].to(out)
            missing += torch.tensor(rows)[~sound].tolist()
        return torch.tensor(sorted(missing), dtype=torch.int64)

    def write(self, ids: torch.Tensor, embeddings: torch.Tensor) -> None:
        """Appends embeddings (b, E) of captions (b, L). OSError where the disk is full."""
        if not len(ids):
            return
        records = np.zeros(len(ids), self.record)
        keys = _keys(ids)
        records["key"] = np.array([np.void(key) for key in keys])
        records["embedding"] = embeddings.detach().float().cpu().numpy()
        try:
            with open(self.path, "r+b") as handle:
                handle.seek(self._end * self.record.itemsize)
                handle.write(records.tobytes())
        except OSError as error:  # which does not say where
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        for key in keys:
            self._rows[key] = (self._own, self._end)
            self._end += 1

    def __len__(self) -> int:
        return len(self._rows)

    def _count(self, file: Path) -> int:
        return file.stat().st_size // self.record.itemsize if file.exists() else 0

    def _index(self, number: int, file: Path) -> None:
        count = self._count(file)
        if not count:
            return
        records = np.memmap(file, dtype=self.record, mode="r", shape=(count,))
        for row, key in enumerate(records["key"]):
            self._rows[key.tobytes()] = (number, row)


def _keys(ids: torch.Tensor) -> list[bytes]:
    """A hash of each caption's tokens up to its end of text, the first of its largest ids; padding has no part."""
    lengths = (ids.argmax(dim=-1) + 1).tolist() if len(ids) else []
    rows = ids.cpu().to(torch.int32).numpy()
    return [hashlib.blake2b(row[:length].tobytes(), digest_size=_KEY).digest() for row, length in zip(rows, lengths)]
