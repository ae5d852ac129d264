"""What can be told of a pickle before it is read: it stays as small as its file, and its keys can be hashed."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lbfast.model.hub import CheckpointError

_DEEPEST = 32
_PARTS = 5  # pickles that a file has of the time before zip: of those, the fourth is the state dict


def is_zip(file: Path) -> bool:
    """Whether torch.save made a zip file, as it does since 2020."""
    with open(file, "rb") as handle:
        return handle.read(4) == b"PK\x03\x04"


def check_pickle(file: Path) -> None:
    """Raises CheckpointError where a file of torch.save would grow when it is read, or would take for ever.

    torch.save compresses nothing, and has tuples within tuples a few deep. A tuple of two of the tuple before
    it, forty times, is a line of pickle, and its hash the work of hours.
    """
    if not is_zip(file):
        with open(file, "rb") as handle:
            _check_depth(handle, file, _PARTS)
        return
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > file.stat().st_size:
            raise CheckpointError(f"{file}: expected a state dict as torch.save writes it, got a compressed archive")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                _check_depth(io.BytesIO(archive.read(entry)), file, 1)


def _check_depth(handle: IO[bytes], file: Path, parts: int) -> None:
    for _ in range(parts):
        try:
            deepest = max(_depths(handle), default=0)
        except (ValueError, IndexError, KeyError, OverflowError):
            return  # no pickle, or a broken one: its reader says so
        if deepest > _DEEPEST:
            raise CheckpointError(f"{file}: expected a state dict of tensors, got tuples more than {_DEEPEST} deep")


def _depths(handle: IO[bytes]) -> Iterator[int]:
    """The depth of each tuple that a pickle makes, by its opcodes; nothing is made."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(handle):
        name = opcode.name
        if name == "MARK":
            stack.append(None)
        elif "GET" in name:
            stack.append(memo[int(argument or 0)])
        elif "PUT" in name or name == "MEMOIZE":
            memo[len(memo) if argument is None else int(argument)] = stack[-1]
        elif name == "DUP":
            stack.append(stack[-1])
        elif name.startswith("TUPLE"):
            count = int(name[5:] or _since_mark(stack))
            parts = [stack.pop() for _ in range(count)]
            if name == "TUPLE":
                stack.pop()
            stack.append(1 + max(parts, default=0))
            yield stack[-1]
        else:
            before = [kind.name for kind in opcode.stack_before]
            if "mark" in before:
                del stack[len(stack) - _since_mark(stack) - 1 :]
                before = before[: before.index("mark")]
            for _kind in before:
                stack.pop()
            stack += [0] * len(opcode.stack_after)


def _since_mark(stack: list[Any]) -> int:
    return stack[::-1].index(None)
