"""python -m tests.fuzz --seconds 300 [--seed N] [--only ops] [--cases N]: its seed, what failed, how to repeat it."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import random
import sys

import tests.fuzz


def modules() -> dict[str, object]:
    """Name -> `run` of every module here that has one."""
    names = [found.name for found in pkgutil.iter_modules(tests.fuzz.__path__) if not found.name.startswith("_")]
    found = {name: importlib.import_module(f"tests.fuzz.{name}") for name in names}
    return {name: module.run for name, module in found.items() if hasattr(module, "run")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for all modules together")
    parser.add_argument("--seed", type=int, help="default: a new one")
    parser.add_argument("--cases", type=int, default=10**9, help="at most, of each module")
    parser.add_argument("--only", nargs="*", help="names of modules")
    options = parser.parse_args()
    runs = {name: run for name, run in modules().items() if not options.only or name in options.only}
    unknown = set(options.only or ()) - set(runs)
    if unknown or not runs:
        parser.error(f"--only: expected some of {', '.join(modules())}, got {', '.join(sorted(unknown))}")
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    failures = []
    for name, run in runs.items():
        print(f"{name}: {options.seconds / len(runs):.0f} s", flush=True)
        failures += [f"{name}: {failure}" for failure in run(options.seconds / len(runs), seed, options.cases)]
    print("\n".join(failures) or "nothing failed", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
