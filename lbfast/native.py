"""Builds and loads the native kernels of csrc: by setup.py, or once at first use into a cache folder.

Every csrc/cpu/X.cpp registers its own ops with TORCH_LIBRARY_FRAGMENT(lbfast, m); after `load()` they are
torch.ops.lbfast.X. Where no compiler exists, `why_not()` says so and the torch implementations serve.
LBFAST_CACHE names the cache folder (default: $XDG_CACHE_HOME/lbfast, ~/.cache/lbfast). LBFAST_CXXFLAGS are more of the
compiler's options, for sanitizers; a library is compiled for each.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch

from lbfast import files

# at::vec picks its width from these; AMX is reached through at::native's brgemm, which looks at the machine itself.
_FLAGS = {
    "AVX512": [
        "-DCPU_CAPABILITY=AVX512",
        "-DCPU_CAPABILITY_AVX512",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mfma",
        "-mf16c",
    ],
    "AVX2": ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"],
    "DEFAULT": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"],
}
_BUILD_TIMEOUT_S = 600
_SEAL = b"lbfast sha256 "
"""At the end of a library, where loaders do not look, with the hash of what is before it."""


class BuildError(RuntimeError):
    """The native kernels could not be compiled; the message says why."""


def _capability() -> str:
    name = torch.backends.cpu.get_cpu_capability()
    return name if name in _FLAGS else "DEFAULT"


def _more_flags() -> list[str]:
    return os.environ.get("LBFAST_CXXFLAGS", "").split()


def _sources() -> list[Path]:
    here = Path(__file__).resolve().parent
    for folder in (here / "csrc", here.parent / "csrc"):
        if folder.is_dir():
            return sorted(folder.glob("cpu/*.cpp"))
    return []


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++") or shutil.which("clang++")


@functools.lru_cache(maxsize=1)
def library_name() -> str:
    """File name of the library: it changes with the sources, the torch build, the flags and the CPU's vector width."""
    key = hashlib.sha256()
    for path in sorted({*_sources(), *(h for s in _sources() for h in s.parent.glob("*.h"))}):
        key.update(path.read_bytes())
    key.update(f"{torch.__version__} {platform.machine()} {[*_FLAGS[_capability()], *_more_flags()]}".encode())
    return f"_native-{_capability().lower()}-{key.hexdigest()[:16]}.so"


def compile_library(target: Path) -> None:
    """Compiles csrc/cpu into `target`, whole or as it was. Raises BuildError with the compiler's last words."""
    compiler = _compiler()
    if compiler is None:
        raise BuildError("no C++ compiler was found (install g++, or set CXX)")
    sources = _sources()
    if not sources:
        raise BuildError("the csrc folder is missing")
    from torch.utils import cpp_extension

    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    common = [
        "-O3",
        "-std=c++20",
        "-fPIC",
        "-fopenmp",
        "-ffp-contract=fast",
        "-DNDEBUG",
        *_FLAGS[_capability()],
        *_more_flags(),
        *include,
    ]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        sources.sort(key=lambda source: -source.stat().st_size)  # no core waits for a long one at the end
        objects = [Path(folder, f"{source.stem}.o") for source in sources]
        _run_all([[compiler, *common, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects)])
        library = Path(folder, target.name)
        _run_all(
            [
                [
                    compiler,
                    "-shared",
                    "-fopenmp",
                    *_more_flags(),
                    *map(str, objects),
                    *libraries,
                    "-lc10",
                    "-ltorch_cpu",
                    "-ltorch",
                    "-o",
                    str(library),
                ]
            ]
        )
        if not library.is_file() or not library.stat().st_size:
            raise BuildError(f"{compiler} made no library, and said nothing")
        with open(library, "ab") as file:
            file.write(_SEAL + hashlib.sha256(library.read_bytes()).digest())
        files.flush(library)
        os.replace(library, target)
        files.flush(target.parent)


def is_whole(library: Path) -> bool:
    """Whether a compiled library is as it was written. Loading one that a crash cut short is a SIGBUS."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    code, seal = content[: -len(_SEAL) - 32], content[-len(_SEAL) - 32 :]
    return seal == _SEAL + hashlib.sha256(code).digest()


def _run_all(commands: list[list[str]]) -> None:
    """Runs compiler commands, as many at once as there are cores.

    Where one fails, hangs or is interrupted, the others end with it, and what these have started.
    """
    waiting, running = list(reversed(commands)), list[_Compiling]()
    with contextlib.ExitStack() as files_open:
        try:
            while waiting or running:
                while waiting and len(running) < (os.cpu_count() or 1):
                    running.append(_Compiling(waiting.pop(), files_open.enter_context(tempfile.TemporaryFile())))
                running = [one for one in running if not one.ended()]
                time.sleep(0.01)
        finally:
            for one in running:
                one.give_up()


class _Compiling:
    """A compiler's process, in a group of its own with its children. What they say goes to a file, never waited for."""

    def __init__(self, command: list[str], output: IO[bytes]):
        self.name, self.output, self.end = command[0], output, time.monotonic() + _BUILD_TIMEOUT_S
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def ended(self) -> bool:
        if self.process.poll() is None:
            if time.monotonic() > self.end:
                raise BuildError(f"the compiler did not end within {_BUILD_TIMEOUT_S} s")
            return False
        if self.process.returncode:
            self.output.seek(max(0, self.output.seek(0, os.SEEK_END) - 2000))
            raise BuildError(f"{self.name} failed: {self.output.read().decode(errors='replace')}")
        return True

    def give_up(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Lets one process at a time compile; the others wait and find the library there."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def cache_folder() -> Path:
    """Where libraries compiled at first use are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LBFAST_CACHE") or Path(base, "lbfast"))


def _library() -> tuple[Path, bool]:
    """Where the library is, or will be, and whether it is: beside this file where it was shipped, else in the cache."""
    shipped, cached = Path(__file__).resolve().parent / library_name(), cache_folder() / library_name()
    return (shipped, True) if shipped.exists() else (cached, is_whole(cached))


def will_compile() -> bool:
    """Whether the first use is going to compile the kernels, which takes a minute."""
    return bool(_sources()) and _compiler() is not None and not _library()[1]


def build() -> Path:
    """The library's path, compiled into the cache folder where it is not there, or damaged. Raises BuildError."""
    path, ready = _library()
    if not ready:
        with _only_one(path.with_suffix(".lock")):
            if not is_whole(path):
                compile_library(path)
    return path


@functools.lru_cache(maxsize=1)
def _load() -> str:
    """Loads the library, compiling it where needed. Where it could not: a warning, once, and the reason comes back."""
    try:
        torch.ops.load_library(str(build()))
    except (BuildError, OSError) as error:
        reason = f"the native kernels could not be built: {error}"
        warnings.warn(f"lbfast: {reason}; on the CPU, PyTorch's own operators serve instead, slower", stacklevel=2)
        return reason
    return ""


def why_not() -> list[str]:
    """Reasons why the native kernels are not available; empty when they are loaded. Compiles them at the first call."""
    reason = _load()
    return [reason] if reason else []
