"""Embedding on a Ray cluster: the rows of one machine, and a row for what fails. Where Ray is installed."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import lbfast
from lbfast.embedding import embed_files
from lbfast.mini.files import write_world
from tests import tiny
from tests.test_docs import OTHERS, ROOT, blocks

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

from lbfast.embedding import ray as on_ray, remote  # noqa: E402

SMALL = {"object_store_memory": 200 * 2**20, "include_dashboard": False, "log_to_driver": False}


class Deadly(lbfast.Embedder):
    """A codec that ends the process over one of the files."""

    def decode(self, batch):
        if any("deadly" in path for path in batch["path"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().decode(batch)


def rows(path):
    """id or path -> embedding."""
    table = pq.read_table(path)
    key = "id" if "id" in table.column_names else "path"
    found = dict(zip(table[key].to_pylist(), map(np.asarray, table["embedding"].to_numpy())))
    assert len(found) == table.num_rows
    return found


def assert_same_rows(got, expected):
    assert set(got) == set(expected)
    assert all((got[name] == expected[name]).all() for name in expected)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Ray on this machine, with room for two tasks, started in the folder that comes back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        patch.setenv("PYTHONPATH", str(ROOT))
        ray.init(num_cpus=2, **SMALL)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield Path.cwd()
        ray.shutdown()


def test_a_clusters_rows_are_those_of_one_machine(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # not where the cluster was started
    models = [tiny.checkpoint(Path("models"), name) for name in ("image", "depth")]
    for i in range(7):
        tiny.picture(tmp_path / "photos" / f"{i}.png", seed=i)
        tiny.depth_map(tmp_path / "maps" / f"{i}.png", seed=i)
    (tmp_path / "photos" / "3.png").write_bytes(b"no picture")
    (tmp_path / "captions.txt").write_text("a cat\n\na dog in the rain\n")
    inputs = ["photos", "depth=maps", "captions.txt", "none.png"]
    alone = embed_files(inputs, models, tmp_path / "alone.parquet", batch_size=4)
    heard = []
    many = on_ray.embed_files(inputs, models, tmp_path / "many", batch_size=4, on_failure=heard.append)
    assert many.embedded == alone.embedded == {"image": 6, "depth": 7, "language": 2}
    assert sorted(map(str, many.failures)) == sorted(map(str, alone.failures)) == sorted(map(str, heard))
    table = pq.read_table(tmp_path / "many")
    failed = [row for row in table.to_pylist() if row["error"]]
    assert [row["id"] for row in failed] == ["image:photos/3.png"] and np.isnan(failed[0]["embedding"]).all()
    assert_same_rows({k: v for k, v in rows(tmp_path / "many").items() if not np.isnan(v).any()}, rows(alone.out))
    again = on_ray.embed_files(inputs, models, tmp_path / "many", batch_size=4)
    assert again.finished and again.embedded == many.embedded and again.failed == 2


def test_a_dataset_of_bytes_with_files_that_fail_and_kill(here, tmp_path):
    model = tiny.checkpoint(tmp_path, "image")
    for i in range(6):
        tiny.picture(tmp_path / "photos" / f"{i}.png", seed=i)
    shutil.copy(tmp_path / "photos" / "1.png", tmp_path / "photos" / "deadly.png")
    (tmp_path / "photos" / "bad.png").write_bytes(b"no picture")
    dataset = ray.data.read_binary_files(str(tmp_path / "photos"), include_paths=True)
    summary = on_ray.embed_dataset(dataset, Deadly(model), tmp_path / "out")
    assert summary.embedded == {"image": 6}
    reasons = {Path(failure.path).name: failure.reason for failure in summary.failures}
    assert set(reasons) == {"bad.png", "deadly.png"} and "ended by SIGKILL while decoding it" in reasons["deadly.png"]
    table = pq.read_table(tmp_path / "out")
    assert table.num_rows == 8 and table.column_names == ["path", "embedding", "modality", "model", "error"]
    expected = embed_files([tmp_path / "photos"], [model], tmp_path / "alone.parquet")
    assert expected.embedded == {"image": 7}
    theirs = {path.removeprefix("image:"): row for path, row in rows(expected.out).items()}
    for path, row in rows(tmp_path / "out").items():
        if Path(path).name not in reasons:
            np.testing.assert_allclose(row, theirs[path], atol=1e-6)


def test_a_short_sound_is_sent_as_one_plane():
    plane = np.arange(12, dtype=np.int16).reshape(1, 3, 4)
    short, long = np.repeat(plane, 3, axis=0), np.concatenate([plane, plane, plane + 1])
    for pixels, planes in ((short, 1), (long, 3), (plane, 1), (long.astype(np.float32), 3)):
        sent = remote._sent(pixels)
        assert sent[0].shape[0] == planes and np.array_equal(remote._received(sent), pixels)
    assert remote._received(remote._sent(None)) is None


def test_the_page_on_ray_runs(here, capsys):
    write_world("scenes", 3, senses=["image"])
    (code,) = (text for _, text, why in blocks(ROOT / "docs" / "embed.md") if why == OTHERS and "import ray" in text)
    exec(compile(code, "embed.md", "exec"), {"__name__": "page"})
    assert "{'image': 3} ['path', 'embedding', 'modality', 'model', 'error']" in capsys.readouterr().out


def test_what_is_asked_for_wrongly_is_said(here, tmp_path):
    model = tiny.checkpoint(tmp_path, "image")
    dataset = ray.data.from_items([{"data": 1}])
    with pytest.raises(TypeError, match=r"expected a lbfast\.Embedder, which is sent without its models"):
        on_ray.with_embeddings(dataset, lbfast.optimize_for_inference(tiny.model("image")))
    with pytest.raises(ValueError, match="id: expected a column that tells rows apart, got a dataset of data"):
        on_ray.embed_dataset(dataset, lbfast.Embedder(model), tmp_path / "out")
    with pytest.raises(ValueError, match="cuda:1"):
        on_ray.with_embeddings(dataset, lbfast.Embedder(model, device="cuda:1"))
    with pytest.raises(ValueError, match="fuse: expected none with the engine ray"):
        on_ray.embed_files([tmp_path], [model], tmp_path / "out", fuse="video+audio")
    with (
        pytest.raises(ConnectionError, match=r"address: expected a Ray cluster at 127\.0\.0\.1:9"),
        on_ray.cluster("127.0.0.1:9"),
    ):
        pass
