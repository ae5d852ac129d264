"""Maps the top-level folders into the package, and builds csrc where torch is importable (--no-build-isolation).

Everything else is in pyproject.toml. Without torch at build time the native kernels are compiled once, at first use.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


class build_py_native(build_py):
    """Ships csrc as data and, where torch is at hand, the compiled library beside it."""

    def run(self):
        super().run()
        if self.editable_mode:
            return  # a checkout finds csrc where it is and compiles at first use
        package = Path(self.build_lib, "lbfast")
        shutil.copytree(HERE / "csrc", package / "csrc", dirs_exist_ok=True)
        if importlib.util.find_spec("torch") is None:
            return
        sys.path.insert(0, str(HERE))
        from lbfast import native

        try:
            native.compile_library(package / native.library_name())
        except native.BuildError as error:
            print(f"lbfast: native kernels not built, the torch implementations will serve: {error}", file=sys.stderr)


setup(
    packages=[*find_packages(include=["lbfast", "lbfast.*"]), "lbfast.kernels"],
    package_dir={"lbfast.kernels": "kernels"},
    cmdclass={"build_py": build_py_native},
)
