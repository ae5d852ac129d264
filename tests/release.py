"""What is to be released, tried as a stranger has it: `make release-check`.

    python -m tests.release                                       with this interpreter
    python -m tests.release --python python3.10 --python python3.13

Builds dist/*.tar.gz and dist/*.whl of the tracked files, native library included, and looks at their sizes and what
they hold. The library is for this interpreter's build of PyTorch; with another, PyTorch's own operators serve. Then,
for each interpreter, makes a virtual environment, installs the wheel, and runs `lbfast doctor` and `lbfast demo` with
nothing on PATH but that environment: no compiler, no cache, no checkout. The same with the sdist. Needs an index of
packages: PyTorch is installed once for each interpreter.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import torch

from lbfast import native

ROOT = Path(__file__).resolve().parents[1]
MOST_MB = 5.0  # of an sdist


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    """What a command prints; where it fails, SystemExit with the end of that."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment or None,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout[-4000:]}")
    return done.stdout


def build(source: Path, dist: Path) -> tuple[Path, Path]:
    """(sdist, wheel) of the tracked files, as they are in the checkout."""
    for name in run("git", "ls-files").splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    shutil.rmtree(dist, ignore_errors=True)
    dist.mkdir()
    program = "from setuptools import build_meta as b; b.build_sdist({0!r}); b.build_wheel({0!r})"
    run(sys.executable, "-c", program.format(str(dist)), cwd=source)
    return next(dist.glob("*.tar.gz")), next(dist.glob("*.whl"))


def look_at(sdist: Path, wheel: Path) -> None:
    size = sdist.stat().st_size / 1e6
    inside = zipfile.ZipFile(wheel).namelist()
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    print(f"{sdist.name}: {size:.2f} MB, {len(sources)} files")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, {len(inside)} files")
    if size >= MOST_MB:
        raise SystemExit(f"{sdist.name}: expected less than {MOST_MB:.0f} MB, got {size:.2f}")
    if f"lbfast/{native.library_name()}" not in inside:
        raise SystemExit(f"{wheel.name}: expected the compiled library {native.library_name()}")
    if missing := {"lbfast/py.typed", "lbfast/kernels/attention.py", "lbfast/csrc/cpu/attention.cpp"} - {*inside}:
        raise SystemExit(f"{wheel.name}: expected {', '.join(sorted(missing))}")
    if missing := {"csrc/cpu/attention.cpp", "kernels/attention.py", "setup.py", "CHANGELOG.md"} - sources:
        raise SystemExit(f"{sdist.name}: expected {', '.join(sorted(missing))}")


def try_it(python: str, sdist: Path, wheel: Path, place: Path) -> None:
    """Both, one after the other, in an environment of an interpreter's own."""
    here = place / "venv"
    run(python, "-m", "venv", here)
    pip = [here / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    bare = {"PATH": str(here / "bin"), "HOME": str(place), "COLUMNS": "80", "HF_HUB_OFFLINE": "1"}
    version = run(python, "--version").strip()
    run(*pip, "-c", ROOT / "constraints.txt", wheel)
    build = run(here / "bin" / "python", "-c", "import torch; print(torch.__version__)").strip()
    version, without = f"{version}, torch {build}", "no C++ compiler was found"
    loaded = "built and loaded" if build == torch.__version__ else without
    for name, wanted in ((wheel.name, loaded), (sdist.name, without)):
        if name == sdist.name:
            run(*pip, "--no-deps", "--force-reinstall", sdist, **bare)
        told = " ".join(run(here / "bin" / "lbfast", "doctor", cwd=place, **bare).split())
        if wanted not in told:
            raise SystemExit(f"{version}, {name}: lbfast doctor: expected {wanted!r}, got\n{told}")
        out = place / f"demo of {name}"
        shown = run(here / "bin" / "lbfast", "demo", "--out", out, cwd=place, **bare)
        print(f"{version}, {name}: native kernels {wanted}; lbfast demo ran, {len(shown.splitlines())} lines")
    if shutil.which("g++", path=bare["PATH"]) or shutil.which("c++", path=bare["PATH"]):
        raise SystemExit(f"{bare['PATH']}: expected no compiler there")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", help="an interpreter; may be given again (this one)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        source.mkdir()
        sdist, wheel = build(source, ROOT / "dist")
        look_at(sdist, wheel)
        for number, python in enumerate(given.python or [sys.executable]):
            found = shutil.which(python)
            if found is None:
                raise SystemExit(f"--python: expected an interpreter, got {python!r}")
            place = Path(folder, str(number))
            place.mkdir()
            try_it(os.path.abspath(found), sdist, wheel, place)


if __name__ == "__main__":
    main()
