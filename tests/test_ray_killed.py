"""200 files of five modalities on a Ray cluster of two workers, whose processes, driver and machines are killed.

LBFAST_RAY=1 runs it, where Ray is installed: some minutes.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lbfast.embedding import embed_files, parts
from lbfast.mini.files import write_world

if not os.environ.get("LBFAST_RAY"):
    pytest.skip("LBFAST_RAY=1 runs it: some minutes", allow_module_level=True)
pytest.importorskip("ray.data")

from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parent.parent
MODALITIES = ("image", "video", "audio", "depth", "thermal")
EACH = 40
BATCH = 4

DRIVER = """
import sys
from lbfast.embedding import parts
from lbfast.embedding.ray import embed_files
parts._SECONDS = 0.2  # parts are small, so that a run can be stopped between two
address, scenes, out = sys.argv[1:]
names = %r
summary = embed_files([f"{name}={scenes}/{name}" for name in names], [f"lbfast-mini/{name}" for name in names], out,
                      address=address, batch_size=%d)
print("summary", sum(summary.embedded.values()), summary.resumed, len(summary.failures))
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """The files, and what one machine writes of them."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder / "scenes", EACH, senses=MODALITIES)
    begin = time.perf_counter()
    given = [f"{name}={folder}/scenes/{name}" for name in MODALITIES]
    models = [f"lbfast-mini/{name}" for name in MODALITIES]
    summary = embed_files(given, models, folder / "alone.parquet", batch_size=BATCH, workers=1)
    assert sum(summary.embedded.values()) == EACH * len(MODALITIES)
    print(f"one machine: {time.perf_counter() - begin:.1f} s")
    return folder / "scenes", rows(folder / "alone.parquet")


@pytest.fixture(scope="module")
def cluster():
    """A head that computes nothing, and two workers of one core."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20})
    for _ in range(2):
        made.add_node(num_cpus=1, object_store_memory=200 * 2**20)
    yield made
    made.shutdown()


def rows(path):
    table = pq.read_table(path)
    found = dict(zip(table["id"].to_pylist(), map(np.asarray, table["embedding"].to_numpy())))
    assert len(found) == table.num_rows
    return found


@contextlib.contextmanager
def running(cluster, scenes, out):
    code = DRIVER % (MODALITIES, BATCH)
    line = [sys.executable, "-c", code, cluster.address, str(scenes), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def finished(process):
    """Rows, rows of earlier runs, and failures, as the driver said at its end."""
    said, _ = process.communicate(timeout=300)
    found = re.search(r"^summary (\d+) (\d+) (\d+)$", said, re.MULTILINE)
    assert process.returncode == 0 and found, said[-5000:]
    return tuple(map(int, found.groups()))


def wait_for_parts(out, count, process):
    deadline = time.monotonic() + 200
    while len(list(parts.partial_folder(out).glob("part-*"))) < count:
        assert process.poll() is None, process.communicate()[0][-5000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers(cluster, title):
    """Processes of the cluster that run a task or an actor of this title."""
    raylets = {node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in raylets and title in (folder / "cmdline").read_text():
                yield int(folder.name)


def kill_one(cluster, title):
    deadline = time.monotonic() + 200
    while not (found := list(workers(cluster, title))):
        assert time.monotonic() < deadline, title
        time.sleep(0.02)
    os.kill(found[0], signal.SIGKILL)


def assert_same(out, expected):
    """Every file once, none lost, bit for bit."""
    got = rows(out)
    assert set(got) == set(expected)
    assert all((got[name] == expected[name]).all() for name in expected)
    assert not parts.partial_folder(out).exists()


@pytest.mark.parametrize("title", ["ray::MapBatches(decode_together)", "MapBatches(Embed)).submit"])
def test_a_worker_that_dies_loses_nothing(cluster, scenes, tmp_path, title):
    with running(cluster, scenes[0], tmp_path / "out") as process:
        kill_one(cluster, title)
        assert finished(process) == (len(scenes[1]), 0, 0)
    assert_same(tmp_path / "out", scenes[1])


def test_a_driver_that_dies_goes_on_where_it_stopped(cluster, scenes, tmp_path):
    with running(cluster, scenes[0], tmp_path / "out") as process:
        wait_for_parts(tmp_path / "out", 1, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out").exists()
    kept = len(rows(parts.partial_folder(tmp_path / "out")))
    with running(cluster, scenes[0], tmp_path / "out") as process:
        assert finished(process) == (len(scenes[1]), kept, 0)
    assert 0 < kept < len(scenes[1])
    assert_same(tmp_path / "out", scenes[1])


def test_a_machine_that_dies_loses_nothing(cluster, scenes, tmp_path):
    with running(cluster, scenes[0], tmp_path / "out") as process:
        wait_for_parts(tmp_path / "out", 2, process)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        assert finished(process) == (len(scenes[1]), 0, 0)
    assert_same(tmp_path / "out", scenes[1])
