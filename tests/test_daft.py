"""The documented way with Daft. Where it is installed."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import lbfast
from lbfast.mini.files import write_world
from tests.test_docs import OTHERS, ROOT, blocks

pytest.importorskip("daft")


def test_the_page_on_daft_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_world("scenes", 3, senses=["image"])
    Path("scenes/image/bad.jpg").write_bytes(b"no picture")
    (code,) = (text for _, text, why in blocks(ROOT / "docs" / "embed.md") if why == OTHERS and "import daft" in text)
    exec(compile(code, "embed.md", "exec"), {"__name__": "page"})
    made = {Path(row["path"]).name: row for row in pq.read_table("embeddings_by_daft").to_pylist()}
    files = sorted(Path("scenes/image").glob("0*.jpg"))
    assert set(made) == {"bad.jpg", *(file.name for file in files)} and "expected an image" in made["bad.jpg"]["error"]
    expected = lbfast.Embedder("lbfast-mini/image").encode(files)
    rows = np.array([made[file.name]["embedding"] for file in files], np.float32)
    np.testing.assert_allclose(rows, expected, atol=1e-6)
