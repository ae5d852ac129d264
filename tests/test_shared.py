"""Arrays that come from workers by shared memory: right, in one piece, never overwritten, and nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import gc
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lbfast.data import shared
from lbfast.data.decode import Decoder, Processors, Task, Undecodable
from lbfast.data.shared import Desk, Hand, Pool, as_array, stacked
from lbfast.embedding import embed_files, run
from lbfast.embedding.journal import partial_path

from . import runs, tiny

VISION = {"image": {"image_size": 64}, "depth": {"image_size": 32}}
CPU = torch.device("cpu")
SIZES = [6] * 5 + [5, 5]
KILLS = int(os.environ.get("LBFAST_KILLS", "3"))
"""Of workers and parents, at random moments."""
pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memory without a name")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """30 pictures, one of which is none, and 10 depth maps of another size."""
    folder = tmp_path_factory.mktemp("files")
    pictures = [tiny.picture(folder / f"{i:02}.png", i) for i in range(30)]
    pictures[17].write_text("no picture")
    maps = [tiny.depth_map(folder / f"map{i}.png", i) for i in range(10)]
    return [Task("image", str(path)) for path in pictures] + [Task("depth", str(path)) for path in maps]


@pytest.fixture(scope="module")
def plain(tasks):
    """What comes of them without workers."""
    return list(Decoder(Processors(VISION), tasks, workers=0, ahead=1))


def batched(results):
    results = iter(results)
    return ([next(results) for _ in range(size)] for size in SIZES)


def seen_memory():
    """Names of mapped files and descriptors of this process that are ours."""
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _there(fd)]
    return [name for name in [*links, *Path("/proc/self/maps").read_text().split("\n")] if "memfd:lbfast" in name]


def _there(fd):
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_a_batch_is_one_memory_and_stays_as_it_is_while_workers_are_killed(tasks, plain):
    views = []
    with Decoder(Processors(VISION), tasks, 2, ahead=9, batches=SIZES) as decoder:
        for number, batch in enumerate(batched(decoder)):  # all of them held to the end: none is overwritten
            good = [each for each in batch if not isinstance(each, Undecodable)]
            views.append(stacked(good, torch.float32))
            if number in (1, 3, 4, 6):  # not the first of a kind, nor the one with a hole
                assert views[-1].data_ptr() == good[0].ctypes.data
            if number in (1, 4):  # their rows are done again, in the same memory
                for process in tuple(decoder._crew.running):
                    process.kill()
    for batch, view in zip(batched(plain), views, strict=True):
        good = [each for each in batch if not isinstance(each, Undecodable)]
        assert torch.equal(view, torch.from_numpy(np.stack(good)))
    assert [len(view) for view in views] == [6, 6, 5, 6, 6, 5, 5] and seen_memory()
    del views, good, batch, view
    gc.collect()
    assert not seen_memory()


def test_without_such_memory_arrays_come_by_the_pipe(tasks, plain, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENFILE, "no more files")

    monkeypatch.setattr(os, "memfd_create", refused)
    with Decoder(Processors(VISION), tasks, 1, ahead=9, batches=SIZES) as decoder:
        for ours, theirs in zip(decoder, plain, strict=True):
            assert ours == theirs if isinstance(theirs, Undecodable) else np.array_equal(ours, theirs)


@pytest.mark.parametrize("full", [False, True])
def test_a_row_goes_there_and_back(monkeypatch, full):
    """In one process, both ends; where there is no memory to write to, by the pipe."""

    def no_room(*_):
        raise OSError(errno.ENOSPC, "full")

    ours, theirs = multiprocessing.Pipe()
    hand, desk, pool = Hand(ours, os.getpid()), Desk(theirs), Pool(CPU)
    if full:
        monkeypatch.setattr(shared, "_write", no_room)
    for rows, values in ((2, torch.arange(6.0)), (2, torch.arange(6.0) + 1), (9, torch.arange(6.0))):
        lease = pool.lease(rows, 12)  # the third does not fit: the worker closes what it had
        hand.give("task", lease, 1, pool.alive)
        assert desk.task() == "task" and len(desk._files) == 1
        desk.answer(as_array(values.bfloat16()))
        array, size = hand.take(lease, 1)
        assert size == 12 and torch.equal(stacked([array], torch.bfloat16)[0], values.bfloat16())
        assert (array.ctypes.data == lease.row(1).ctypes.data) != full
        del lease, array
    for file in desk._files.values():
        os.close(file)


def test_buffers_are_used_again_when_nobody_sees_them():
    pool = Pool(CPU)
    lease = pool.lease(4, 12)
    first, number = lease.row(1), lease.buffer.number
    del lease
    second = pool.lease(4, 12)
    assert second.buffer.number != number  # a row of the first is still seen
    del first
    gc.collect()
    assert pool.lease(4, 12).buffer.number == number
    large = pool.lease(400, 12)
    assert large.buffer.size == 4800 and large.buffer.number in pool.alive


def test_stacked_follows_the_memory_it_is_given():
    pool = Pool(CPU)
    lease = pool.lease(3, 8)
    rows = [lease.row(i).view(np.float32) for i in range(3)]
    for i, row in enumerate(rows):
        row[:] = i
    whole = stacked(rows, torch.float32)
    rows[2][:] = 7
    assert whole.tolist() == [[0, 0], [1, 1], [7, 7]]
    assert stacked(rows[1:], torch.float32).data_ptr() == whole[1].data_ptr()
    other = pool.lease(3, 8).row(0).view(np.float32)
    other[:] = 9
    for some in ([rows[0], rows[2]], rows[::-1], [*rows, other], [other, *rows], [np.ones(2, np.float32)] * 2):
        assert torch.equal(stacked(some, torch.float32), torch.from_numpy(np.stack(some)))


def test_memory_for_a_gpu_is_pinned_until_it_is_gone(monkeypatch):
    pinned: dict[int, int] = {}
    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: pinned.update({address: size}) or 0,
        cudaHostUnregister=lambda address: pinned.pop(address) and 0,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    pool = Pool(torch.device("cuda"))
    row = pool.lease(2, 8).row(1)
    assert pinned == {row.ctypes.data - 8: 16}
    pool.close()
    gc.collect()
    assert pinned  # a row is still seen
    del row
    gc.collect()
    assert not pinned
    runtime.cudaHostRegister = lambda *_: 2  # the driver pins no more
    assert Pool(torch.device("cuda")).lease(2, 8).row(0).nbytes == 8


def test_the_end_of_a_batch_comes_with_the_next_one_or_with_an_error():
    done = []
    with pytest.raises(ZeroDivisionError), run.Late() as late:
        for number in range(3):
            late.put(lambda number=number: done.append(number))
            assert done == list(range(number))
        raise ZeroDivisionError
    assert done == [0, 1, 2]
    late.do()
    assert done == [0, 1, 2]


def descendants(pid: int) -> list[int]:
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                parents.setdefault(int(parent), []).append(int(folder.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found[1:]


def test_killed_at_random_moments(tmp_path, processes):
    """Workers and parents: nothing is lost or mixed up, and neither a process nor memory is left."""
    kinds, count = 20, 200 + 50 * KILLS
    sources = [tiny.picture(tmp_path / "sources" / f"{i}.png", i) for i in range(kinds)]
    (tmp_path / "in").mkdir()
    for i in range(count):
        os.link(sources[i % kinds], tmp_path / "in" / f"{i:05}.png")
    model, out = tiny.checkpoint(tmp_path, "image"), tmp_path / "out.parquet"
    named = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    command = [tmp_path, "embed", tmp_path / "in", "--model", model, "--out", out, "--batch-size", 2, "--workers", 2]
    moments, kills = random.Random(0), 0
    while kills < KILLS and not out.exists():
        process = processes.Process(target=runs.lbfast_command, args=command)
        process.start()
        runs.wait_for(partial_path(out))
        for victim in ["worker"] * (2 - kills % 3) + ["parent"]:
            size = partial_path(out).stat().st_size if partial_path(out).exists() else 0
            while process.is_alive() and partial_path(out).exists() and partial_path(out).stat().st_size <= size:
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.05))
            family = descendants(process.pid)
            workers = [pid for one in family for pid in descendants(one)]  # of the process that they are forked from
            if process.is_alive() and (workers or victim == "parent"):
                with contextlib.suppress(ProcessLookupError):  # it ended just now
                    os.kill(process.pid if victim == "parent" else moments.choice(workers), signal.SIGKILL)
                    kills += 1
        process.join(30)
        gone = time.monotonic() + 20
        while (left := [pid for pid in family if os.path.exists(f"/proc/{pid}")]) and time.monotonic() < gone:
            time.sleep(0.01)
        assert not left
    if named:
        new = set(os.listdir("/dev/shm")) - named
        assert not {name for name in new if name.startswith(("psm", "lbfast", "torch"))}
    print(f"{kills} kills")
    summary = embed_files([tmp_path / "in"], [model], out, batch_size=2)
    assert kills >= KILLS and summary.resumed and summary.embedded == {"image": count} and not summary.failures
    embed_files(sources, [model], tmp_path / "straight.parquet", batch_size=2)
    got, straight = (
        np.array(pq.read_table(file)["embedding"].to_pylist()) for file in (out, tmp_path / "straight.parquet")
    )
    assert np.abs(got - straight[np.arange(count) % kinds]).max() < 2e-6
