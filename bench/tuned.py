"""A bench with launch tables as tuning found them, which kernels/configs.py has not yet:

python -m bench.tuned bench/results/nvidia-h200.json bench.bench_mlp --dtype bfloat16
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import tune


def main(argv: Sequence[str] | None = None) -> int:
    file, module, *rest = sys.argv[1:] if argv is None else argv
    tune.use(json.loads(Path(file).read_text()))
    return importlib.import_module(module).main(rest)


if __name__ == "__main__":
    sys.exit(main())
