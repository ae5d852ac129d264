"""Signpost for plain runs from a checkout: the benches of `lbfast bench` are the files of the top-level folder `bench`.

An installed lbfast has those files here instead (setup.py maps the folder) and no signpost.
"""

from pathlib import Path as _Path

__path__ = [str(_Path(__file__).resolve().parents[2] / "bench")]
