"""What is installed: the wheel's files, the Triton kernels as lbfast.kernels, and no importable package `kernels`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("lbfast", "kernels", "bench", "csrc", "docs", "examples", "tests", "mkdocs.yml")
PARTS += ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md")


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def build(kind: str, source: Path, dist: Path) -> Path:
    """Builds an sdist or a wheel without network and without compiling csrc."""
    program = f"from setuptools import build_meta; build_meta.build_{kind}({str(dist)!r})"
    python("-c", program, cwd=source, LBFAST_BUILD_NATIVE="0")
    return next(dist.glob({"sdist": "*.tar.gz", "wheel": "*.whl"}[kind]))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """An sdist built from a copy of the sources."""
    source = tmp_path_factory.mktemp("source")
    for part in map(ROOT.joinpath, PARTS):
        if part.is_dir():
            shutil.copytree(part, source / part.name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(part, source)
    return build("sdist", source, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """A wheel built from the sdist, as package managers do."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        tiny.unpack(archive, unpacked)
    (source,) = unpacked.iterdir()
    return build("wheel", source, sdist.parent)


def sources(folder: str, pattern: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)}


def test_the_wheel_has_every_file(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = sources("lbfast", "*.py") - {"lbfast/kernels/__init__.py"}  # a signpost for checkouts only
    wanted |= {f"lbfast/{name}" for name in (*sources("kernels", "*.py"), *sources("bench", "*.py"))}
    wanted |= {f"lbfast/{name}" for name in sources("csrc", "*.*")}
    wanted |= {"lbfast/py.typed", "lbfast/processing/clip_vocabulary/merges.txt.gz"}
    wanted |= sources("lbfast/mini/weights", "*.*") | sources("lbfast/mini/recipes", "*.yaml")
    assert wanted <= names
    assert {name.split("/")[0] for name in names} == {"lbfast"}


def test_an_sdist_is_small_and_its_weights_are_the_same(sdist, wheel):
    """Packed in the sdist, without what a checkout alone needs; a wheel of it has them to the byte."""
    assert sdist.stat().st_size < 5e6
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert "lbfast/mini/weights.tar.xz" in names
    assert not [name for name in names if name.startswith(("tests", "docs", "bench/results", "lbfast/mini/weights/"))]
    with zipfile.ZipFile(wheel) as built:
        assert "lbfast/mini/weights.tar.xz" not in built.namelist()
        for name in sources("lbfast/mini/weights", "*.*"):
            assert built.read(name) == (ROOT / name).read_bytes(), name


def test_an_installed_wheel_runs(wheel, tmp_path):
    """The kernels are lbfast.kernels, csrc and the vocabulary are found, and `kernels` is nobody's name."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = """
import importlib.util
import lbfast.bench.bench_attention
import lbfast.kernels.primitives
from lbfast import native
from lbfast.processing.text import clip_vocabulary
print(lbfast.kernels.primitives.__file__, len(native._sources()), len(clip_vocabulary()[0]))
print(importlib.util.find_spec("kernels") is None or importlib.util.find_spec("kernels").origin)
print(lbfast.bench.bench_attention.__file__)
"""
    place, kernels, bench = python("-c", program, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).splitlines()
    file, found, tokens = place.split()
    assert file == str(tmp_path / "site" / "lbfast" / "kernels" / "primitives.py")
    assert int(found) == len(list((ROOT / "csrc" / "cpu").glob("*.cpp"))) and tokens == "49408"
    assert bench == str(tmp_path / "site" / "lbfast" / "bench" / "bench_attention.py")
    assert kernels == "True" or "site-packages" in kernels  # Hugging Face's own, where it is installed


def test_a_checkout_has_the_kernels_too():
    """From the repository's root the folder is a namespace at most, which transformers does not take for its own."""
    program = """
import lbfast.kernels.primitives
from transformers.utils import import_utils
print(lbfast.kernels.primitives.__file__)
print(getattr(import_utils, "is_kernels_available", lambda: False)())
"""
    file, available = python("-c", program, cwd=ROOT).splitlines()
    assert Path(file) == ROOT / "kernels" / "primitives.py" and not (ROOT / "kernels" / "__init__.py").exists()
    try:
        import importlib.metadata

        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        assert available == "False"
