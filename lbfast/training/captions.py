"""Caption embeddings of a text tower that is not trained, kept on disk: a caption is embedded once in its life."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import os
import secrets
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

_FORMAT = 2
_KEY, _CHECK = 16, 8
_AT_ONCE = 4096  # records that are read at a time


def weights_digest(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A name for named weights: changes when any of them does."""
    digest = hashlib.sha256()
    for name, x in parameters:
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        if x.numel():
            digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class TextCache:
    """Embeddings by the tokens of their captions, in a folder that any number of processes share at any time.

    Each process appends to a file that it alone holds, and reads them all. A file is a row of records: 16 bytes of the
    key, the embedding in float32, and 8 bytes of a checksum of both: what a crash or a disk has spoiled is not found.

    Args:
        folder: made if it does not exist.
        weights: of the text tower, as `weights_digest` names them, with all that the arithmetic depends on besides:
            embeddings of other weights are not seen.
        size: of an embedding, E.
    """

    def __init__(self, folder: str | os.PathLike[str], weights: str, size: int):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._size, self._length = size, _KEY + 4 * size + _CHECK
        self._stem = f"captions-{hashlib.sha256(f'{_FORMAT} {weights} {size}'.encode()).hexdigest()[:24]}"
        self._rows: dict[bytes, tuple[int, int]] = {}  # key -> (file, row)
        self.path, own = self._hold()
        self._files = [own]
        self._end = self._index(0)
        os.ftruncate(own, self._end * self._length)  # a record that was cut short
        for path in sorted(self.folder.glob(f"{self._stem}-*.bin")):
            if path != self.path and path.is_file():
                self._files.append(os.open(path, os.O_RDONLY))
                self._index(len(self._files) - 1)
        weakref.finalize(self, _close, self._files)

    def read(self, ids: torch.Tensor, out: torch.Tensor, together: int | None = None) -> torch.Tensor:
        """Fills the rows of out (b, E) that are known; returns the numbers of the others, (missing,) int64.

        Args:
            together: how many captions were embedded at once: what a product rounds to depends on it, and what was
                embedded otherwise is not found. None: b.
        """
        missing = []
        for row, key in enumerate(_keys(ids, together or len(ids))):
            embedding = self._read(key)
            if embedding is None:
                missing.append(row)
            else:
                out[row] = torch.from_numpy(embedding).to(out)
        return torch.tensor(missing, dtype=torch.int64)

    def write(self, ids: torch.Tensor, embeddings: torch.Tensor, together: int | None = None) -> None:
        """Appends embeddings (b, E) of captions (b, L). OSError where the disk is full."""
        rows = embeddings.detach().float().cpu().contiguous().numpy()
        found = dict(zip(_keys(ids, together or len(ids)), rows))
        new = {key: row.tobytes() for key, row in found.items() if key not in self._rows}
        left = memoryview(b"".join(_record(key, row) for key, row in new.items()))
        at = self._end * self._length
        try:
            while left:
                count = os.pwrite(self._files[0], left, at)
                left, at = left[count:], at + count
        except OSError as error:  # which does not say where
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        for key in new:
            self._rows[key] = (0, self._end)
            self._end += 1

    def __len__(self) -> int:
        return len(self._rows)

    def _hold(self) -> tuple[Path, int]:
        """The first file that no other process holds, made where there is none, and its descriptor."""
        for number in itertools.count():
            path = self.folder / f"{self._stem}-{number}.bin"
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return path, file
            except BlockingIOError:
                os.close(file)
            except OSError:  # a file system without locks: a file that nobody else can know of
                os.close(file)
                path = self.folder / f"{self._stem}-{secrets.token_hex(8)}.bin"
                return path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        raise AssertionError

    def _index(self, number: int) -> int:
        """Puts down the keys of the whole records of a file, and returns how many these are."""
        file, count = self._files[number], os.fstat(self._files[number]).st_size // self._length
        for first in range(0, count, _AT_ONCE):
            part = os.pread(file, _AT_ONCE * self._length, first * self._length)
            for row in range(min(len(part) // self._length, count - first)):
                self._rows[part[row * self._length : row * self._length + _KEY]] = (number, first + row)
        return count

    def _read(self, key: bytes) -> np.ndarray | None:
        """The embedding of a key, (E,) float32; None where there is none, or no longer a sound one."""
        if key not in self._rows:
            return None
        number, row = self._rows[key]
        record = os.pread(self._files[number], self._length, row * self._length)
        if record != _record(key, record[_KEY:-_CHECK]) or len(record) != self._length:
            del self._rows[key]
            return None
        return np.frombuffer(record[_KEY:-_CHECK], np.float32).copy()


def _record(key: bytes, embedding: bytes) -> bytes:
    return key + embedding + hashlib.blake2b(embedding, key=key, digest_size=_CHECK).digest()


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)


def _keys(ids: torch.Tensor, together: int) -> list[bytes]:
    """A hash of each caption's tokens up to its end of text, the first of its largest ids; padding has no part."""
    lengths = (ids.argmax(dim=-1) + 1).tolist() if len(ids) else []
    rows, salt = ids.cpu().to(torch.int32).numpy(), together.to_bytes(8, "little")
    return [
        hashlib.blake2b(row[:length].tobytes(), digest_size=_KEY, salt=salt).digest()
        for row, length in zip(rows, lengths)
    ]
