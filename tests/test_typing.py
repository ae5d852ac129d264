"""Names that are imported at first use have types all the same."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_a_users_script_passes_and_wrong_calls_are_seen(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from lbfast.embedding import embed_files\n"
        "from lbfast.evaluation import retrieve\n"
        "from lbfast import optimize_for_inference\n"
        "embed_files(1, bogus=2)\n"
        "retrieve('a', 'b')\n"
        "optimize_for_inference(1)\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--ignore-missing-imports", "--follow-imports=silent"]
    done = subprocess.run(
        [*command, "tests/user_script.py", str(wrong)], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    where = {Path(line.split(": error:")[0]).name for line in errors}  # the cache may know another folder
    assert where == {"wrong.py:4", "wrong.py:5", "wrong.py:6"}, done.stdout
