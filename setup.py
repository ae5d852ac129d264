"""Maps the top-level folders into the package, and builds csrc where torch is importable (--no-build-isolation).

Everything else is in pyproject.toml. Without torch at build time, or with LBFAST_BUILD_NATIVE=0, the native kernels are
compiled once, at first use.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
NATIVE = importlib.util.find_spec("torch") is not None and os.environ.get("LBFAST_BUILD_NATIVE", "1") != "0"


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


class bdist_wheel_native(bdist_wheel):
    """Tags a wheel that carries the compiled library with this platform; the library is none of Python's ABI."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = not NATIVE

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


setup(
    packages=sorted({*find_packages(include=["lbfast", "lbfast.*"]), "lbfast.kernels", "lbfast.bench"}),
    package_dir={"lbfast.kernels": "kernels", "lbfast.bench": "bench"},  # an sdist has no signposts
    cmdclass={"build_py": build_py_native, "bdist_wheel": bdist_wheel_native},
)
