"""How the project writes files: beside, flushed to the disk, renamed. Whatever ends a writer, what was there is whole.

`write` and `replacing` are for one file, `filling` is for several that belong together. What a killed writer leaves is
hidden, begins with ".lbfast-", and is removed by the next that writes there. `claimed` keeps a command that fills a
folder away from what is not its own, and from another run that fills it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

MARK = ".lbfast"
"""In a folder that a command has filled: what it is, a line for each kind. Locked while one is writing there."""

_STAGED = ".lbfast-"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)


class WriteError(OSError):
    """Something that could not be written: a full disk, say. What was there before is still there."""


def flush(path: Path) -> None:
    """Waits until a file, or a directory's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Makes a file of this content (text as UTF-8), or replaces one's; as `replacing` does."""
    with replacing(path) as staged:
        staged.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], new: bool = False) -> Iterator[Path]:
    """A file to write, which then takes the place of `path`; on an error `path` stays as it was.

    It has the suffix of `path`. A link stays one: what it names is replaced. A device or a pipe is written to itself.

    Args:
        new: nothing is replaced: FileExistsError where there is something by then.

    Raises IsADirectoryError where `path` is a folder, and OSError, with the name of `path`.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        yield path
        return
    try:
        with _staged(path.parent, path.name, path.suffix) as staged:
            yield staged
            if path.exists():
                os.chmod(staged, stat.S_IMODE(path.stat().st_mode))
            flush(staged)
            if new:
                _name(staged, path)
            else:
                os.replace(staged, path)
            flush(path.parent)
    except OSError as error:  # of a write, without a name; of another file, with a name that nobody gave
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def filling(folder: str | os.PathLike[str], last: str, stale: Collection[str] = ()) -> Iterator[Path]:
    """An empty folder for files that belong together, which then take their places in `folder`, all or none.

    Files of the same names and `stale` ones go, others stay. A process that is killed while they move leaves a folder
    without `last`, which goes first and comes last: never one with files of both.

    Args:
        folder: made if it does not exist.
        last: the file without which the others are not read, such as config.json.

    Raises WriteError, and what writing raises where that is a ValueError or TypeError; then the folder is as it was.
    """
    folder = Path(folder)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _staged(folder, last) as staged:
            new, old = staged / "new", staged / "old"
            new.mkdir()
            old.mkdir()
            yield new
            names = sorted((path.name for path in new.iterdir()), key=lambda name: name == last)
            for name in names:
                flush(new / name)
            flush(new)
            _take_places(folder, new, old, names, sorted({*names, *stale}, key=lambda name: name != last))
            _sweep(folder, last, spare_old=False)
        made = False
    except (ValueError, TypeError):  # of what was to be written
        raise
    except Exception as error:  # safetensors and torch have errors of their own for a full disk
        raise WriteError(f"{folder}: cannot write it: {reason(folder.parent, error)}") from error
    finally:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def reason(folder: Path, error: Exception) -> str:
    """Why something could not be written in a folder, with the room that is left there."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    with contextlib.suppress(OSError):
        said += f" ({shutil.disk_usage(folder).free / 2**20:.0f} MiB are free there)"
    return said


def check_claim(folder: Path, kind: str, names: Collection[str] | None) -> None:
    """Raises FileExistsError where `claimed` would, and makes nothing."""
    if kind in _kinds(folder / MARK):
        return
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "expected a folder, or none", str(folder))
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    taken = [name for name in there if not name.startswith(MARK) and (names is None or name in names)]
    if taken:
        what = f"it has {', '.join(taken[:4])}{' and more' if len(taken) > 4 else ''}"
        wanted = "a new or empty folder" if names is None else "a folder without such files"
        raise FileExistsError(errno.EEXIST, f"{what}, which no {kind} of lbfast made; expected {wanted}", str(folder))


@contextlib.contextmanager
def claimed(folder: Path, kind: str, names: Collection[str] | None = None) -> Iterator[None]:
    """Holds a folder, made if it does not exist, for one writer at a time.

    Args:
        folder: one that was claimed for the same before, or has none of `names`.
        kind: what is written: "run", "export".
        names: what is going to be written; None: the folder must be empty.

    Raises:
        FileExistsError: it has something that a writer of this kind has not made. BlockingIOError: another is writing.
    """
    check_claim(folder, kind, names)
    folder.mkdir(parents=True, exist_ok=True)
    mark = os.open(folder / MARK, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another run is writing here", str(folder)) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(f"{folder}: this file system has no locks: let one run write here at a time", stacklevel=3)
        if kind not in _kinds(folder / MARK):
            os.write(mark, f"{kind}\n".encode())
            os.fsync(mark)
        yield
    finally:
        os.close(mark)


def _name(staged: Path, path: Path) -> None:
    """Gives a file a name that nothing has."""
    try:
        os.link(staged, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(staged, path)


def _kinds(mark: Path) -> list[str]:
    try:
        return mark.read_text(errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []


def _take_places(folder: Path, new: Path, old: Path, names: list[str], leaving: list[str]) -> None:
    """Moves what is there to `old` and what is new into the folder; back again where one of them cannot be moved."""
    there = [name for name in leaving if os.path.lexists(folder / name)]
    folders = [name for name in there if (folder / name).is_dir()]
    if folders:
        raise IsADirectoryError(errno.EISDIR, f"expected no folder of the name {folders[0]} there")
    moves = [(folder / name, old / name) for name in there] + [(new / name, folder / name) for name in names]
    done = []
    try:
        for source, to in moves:
            os.rename(source, to)
            done.append((to, source))
        flush(folder)
    except BaseException:
        for source, to in reversed(done):
            os.rename(source, to)
        raise


@contextlib.contextmanager
def _staged(folder: Path, name: str, suffix: str | None = None) -> Iterator[Path]:
    """A hidden file, or without a suffix a hidden folder, for what is to be `name` in a folder; removed at the end.

    It is locked as long as its writer lives, so that those of killed writers are known.
    """
    _sweep(folder, name, spare_old=True)
    path, handle = _new(folder, name, suffix)
    try:
        yield path
    finally:
        _remove(path)
        os.close(handle)


def _new(folder: Path, name: str, suffix: str | None) -> tuple[Path, int]:
    """The path, and a handle that holds its lock."""
    while True:
        path = folder / f"{_prefix(name)}{secrets.token_hex(4)}{suffix or ''}"
        if suffix is None:
            path.mkdir()
            handle = os.open(path, os.O_RDONLY)
        else:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody sweeps either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if path.exists():
            return path, handle
        os.close(handle)  # another writer swept it, before it was locked


def _sweep(folder: Path, name: str, spare_old: bool) -> None:
    """Removes what killed writers of `name` left in a folder; with `spare_old` not what they had moved away already."""
    for path in folder.glob(f"{_prefix(name)}*"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not (spare_old and (path / "old").is_dir() and any((path / "old").iterdir())):
                    _remove(path)
            finally:
                os.close(handle)


def _prefix(name: str) -> str:
    return f"{_STAGED}{hashlib.blake2b(os.fsencode(name), digest_size=4).hexdigest()}-"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
