"""Maps the top-level folders into the package, and builds csrc where torch is importable (--no-build-isolation).

Everything else is in pyproject.toml. Without torch at build time, or with LBFAST_BUILD_NATIVE=0, the native kernels are
compiled once, at first use.

An sdist has lbfast-mini's weights in one archive, a third smaller: all but image's have their differences from image's,
where tensors have the same name and size, as the whole text tower, and half floats are compressed by their high and low
bytes. It is unpacked, byte for byte, before anything is built.
"""

import array
import importlib.util
import json
import lzma
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).parent
WEIGHTS = Path("lbfast", "mini", "weights")
PACKED = WEIGHTS.with_suffix(".tar.xz")
HALF_FLOATS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 23, "lc": 0, "lp": 1, "pb": 1}]
NATIVE = importlib.util.find_spec("torch") is not None and os.environ.get("LBFAST_BUILD_NATIVE", "1") != "0"


def tensors(file):
    """name -> (start, end) in a file of safetensors."""
    first = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:first])
    header.pop("__metadata__", None)
    return {
        name: (first + start, first + end) for name, (start, end) in ((n, h["data_offsets"]) for n, h in header.items())
    }


def shift_weights(weights, sign):
    """Adds (1) image's half floats, as integers, to the others', or subtracts them (-1)."""
    base = (weights / "image" / "model.safetensors").read_bytes()
    places = tensors(base)
    for path in weights.glob("*/model.safetensors"):
        file = bytearray(path.read_bytes())
        for name, (start, end) in tensors(file).items() if path.parent.name != "image" else ():
            there = base[slice(*places.get(name, (0, 0)))]
            if len(there) == end - start:
                pairs = zip(array.array("H", file[start:end]), array.array("H", there))
                file[start:end] = array.array("H", [(x + sign * y) & 0xFFFF for x, y in pairs]).tobytes()
        path.unlink()  # it may be a link
        path.write_bytes(file)


def pack_weights(root):
    """WEIGHTS below a folder -> PACKED; the same files make the same archive."""

    def plain(member):
        member.mtime = member.uid = member.gid = 0
        member.uname = member.gname = ""
        member.mode = 0o755 if member.isdir() else 0o644
        return member

    shift_weights(root / WEIGHTS, -1)
    with lzma.open(root / PACKED, "wb", filters=HALF_FLOATS) as file, tarfile.open(fileobj=file, mode="w") as archive:
        archive.add(root / WEIGHTS, WEIGHTS.name, filter=plain)
    shutil.rmtree(root / WEIGHTS)


def unpack_weights(root):
    """PACKED below a folder -> WEIGHTS, where there are none."""
    if (root / WEIGHTS).is_dir() or not (root / PACKED).is_file():
        return
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tempfile.TemporaryDirectory(dir=root / WEIGHTS.parent) as half, tarfile.open(root / PACKED) as archive:
        archive.extractall(half, **safely)
        shift_weights(Path(half, WEIGHTS.name), 1)
        Path(half, WEIGHTS.name).rename(root / WEIGHTS)


class sdist_packed(sdist):
    """With PACKED in the place of WEIGHTS."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        pack_weights(Path(base_dir))


class build_py_native(build_py):
    """Ships csrc as data and, where torch is at hand, the compiled library beside it."""

    def run(self):
        super().run()
        if self.editable_mode:
            return  # a checkout finds csrc where it is and compiles at first use
        package = Path(self.build_lib, "lbfast")
        shutil.copytree(HERE / "csrc", package / "csrc", dirs_exist_ok=True)
        if not NATIVE:
            return
        sys.path.insert(0, str(HERE))
        from lbfast import native

        try:
            native.compile_library(package / native.library_name())
        except native.BuildError as error:
            print(f"lbfast: native kernels not built, the torch implementations will serve: {error}", file=sys.stderr)


class DistributionNative(Distribution):
    """With a compiled library it is a platform's own, and a wheel's files lie where such ones do."""

    def has_ext_modules(self):
        return NATIVE


class bdist_wheel_native(bdist_wheel):
    """Tags a wheel that carries the compiled library with this platform; the library is none of Python's ABI."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


unpack_weights(HERE)
setup(
    packages=sorted({*find_packages(include=["lbfast", "lbfast.*"]), "lbfast.kernels", "lbfast.bench"}),
    package_dir={"lbfast.kernels": "kernels", "lbfast.bench": "bench"},  # an sdist has no signposts
    distclass=DistributionNative,
    cmdclass={"build_py": build_py_native, "bdist_wheel": bdist_wheel_native, "sdist": sdist_packed},
)
