"""`python -m lbfast.languagebind script.py args...`, or `-m module args...`: as python runs it, on lbfast."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from lbfast.languagebind import FOLDER, install_as_languagebind

_USAGE = "usage: python -m lbfast.languagebind (SCRIPT | -m MODULE) [ARGUMENTS...]"


def main(arguments: list[str]) -> None:
    """Runs a script or module whose `import languagebind` gives lbfast; what it starts inherits that (PYTHONPATH)."""
    if not arguments or arguments == ["-m"] or arguments[0] in ("-h", "--help"):
        print(_USAGE, file=sys.stderr)
        raise SystemExit(2 * (not arguments or arguments == ["-m"]))
    module = arguments[0] == "-m"
    script = arguments[1 if module else 0]
    if not module and not Path(script).exists():
        print(f"no such file: {script}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = arguments[1:] if module else arguments
    if not module:
        sys.path[0] = str(Path(script).resolve().parent)  # in the place of this module's, as of a script
    install_as_languagebind()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
    if module:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
