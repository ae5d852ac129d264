"""`lbfast embed`, and others with workers, told to end, or killed: a line, the status that shells expect, no orphan."""

from __future__ import annotations

import multiprocessing.process
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lbfast.embedding.journal import partial_path
from tests import runs, tiny

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
ROOT = Path(__file__).resolve().parents[1]
LINE = "interrupted; what is finished is kept: the same command goes on from here\n"


def heeding():
    """A shell starts what it puts in the background deaf to SIGINT, and its children with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def of_session(session: int) -> list[str]:
    """The processes of a session that are not mere zombies: pid and command line."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            state, _, _, theirs = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if folder.name.isdigit() and int(theirs) == session and state != "Z":
                found.append(f"{folder.name} {(folder / 'cmdline').read_bytes()[:200]!r}")
        except (OSError, ValueError):
            continue
    return found


def left_after(run: multiprocessing.process.BaseProcess, seconds: float = 1) -> list[str]:
    """The processes of its session that live for longer than that."""
    end = time.monotonic() + seconds
    while (left := of_session(run.pid)) and time.monotonic() < end:
        time.sleep(0.01)
    return left


@pytest.fixture
def run(tmp_path, processes):
    """A run in a session of its own that has finished rows with two workers: its process, and what it has said."""
    source, model = tiny.picture(tmp_path / "in" / "000.png"), tiny.checkpoint(tmp_path, "image")
    for i in range(1, 3000):
        os.link(source, tmp_path / "in" / f"{i:04}.png")
    out = tmp_path / "out.parquet"
    command = [tmp_path, "embed", tmp_path / "in", "--model", model, "--out", out, "--batch-size", 2, "--workers", 2]
    process = processes.Process(target=runs.lbfast_of_a_session, args=command)
    process.start()
    for _ in range(6000):  # not by the clock: all may be stopped from outside for a while
        if not process.is_alive() or (partial_path(out).exists() and partial_path(out).stat().st_size > 3000):
            break
        time.sleep(0.01)

    def said() -> list[str]:
        return [(tmp_path / name).read_text() for name in ("stdout", "stderr")]

    assert process.is_alive() and partial_path(out).exists(), said()
    yield process, said
    process.kill()
    process.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "group"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGHUP, True), (signal.SIGINT, True)]
)
def test_a_line_and_the_status(run, number, group):
    """Sent to the process alone, or as a closed terminal and Ctrl-C do to all of its group."""
    process, said = run
    assert len(of_session(process.pid)) >= 4  # itself, what workers are forked from, and those
    (os.killpg if group else os.kill)(process.pid, number)
    process.join(60)
    assert (process.exitcode, said()) == (128 + number, ["", LINE])
    assert not left_after(process)


MOMENTS = ("lbfast.cli", "typer.core", "rich.console", "torch._C", "transformers")


@pytest.mark.parametrize("moment", MOMENTS)
def test_while_it_is_imported(tmp_path, moment):
    """Every command, as soon as there is anything of it: one line and the status."""
    number = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[MOMENTS.index(moment) % 3]
    program = f"""
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {moment!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})
from lbfast.__main__ import main
sys.meta_path.insert(0, Finder())
sys.argv = ["lbfast", "eval", "zero-shot", "--model", "lbfast-mini/image", "--data", {str(tmp_path)!r}]
main()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, preexec_fn=heeding)
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + number, "", "interrupted\n")


def test_a_signal_that_is_lost_comes_again():
    """Raised in a destructor, which no exception leaves."""
    program = """
import os, signal, time
from lbfast.signals import Signals, Stopped
class Lost:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
try:
    with Signals():
        Lost()
        time.sleep(30)
except Stopped as stopped:
    print(stopped.number)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20)
    assert (ended.stdout, ended.stderr) == ("15\n", "")


@pytest.mark.slow
def test_a_storm_of_signals_while_workers_start():
    """To all of the group, which only its first process heeds: what workers are forked from is deaf from the first."""
    program = """
import os, signal, threading, time
from lbfast.data.decode import Decoder, Task
from tests.workers import Named
os.setsid()
seen, done = set(), threading.Event()
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: seen.add(number))
def storm():
    while not done.is_set():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.killpg(0, number)
        time.sleep(0.005)
threading.Thread(target=storm).start()
try:
    with Decoder(Named(), [Task("image", "a"), Task("image", "b")], 2, 4) as decoder:
        print(*decoder, len(seen))
finally:
    done.set()
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "a b 3\n", "")


@pytest.mark.slow
def test_a_programs_own_processes_hear_signals():
    """They come from what workers are forked from, too."""
    program = """
import multiprocessing, time
from lbfast.data.decode import Decoder, Task
from tests.workers import Named
with Decoder(Named(), [Task("image", "a")], 1, 1) as decoder:
    list(decoder)
process = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(60,))
process.start()
process.terminate()
process.join(20)
print(process.exitcode)
process.kill()
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "-15\n", "")


@pytest.mark.slow
def test_nobody_lives_on_after_a_kill(run):
    process, said = run
    process.kill()
    process.join(30)
    assert not left_after(process)
    assert said() == ["", ""]


@pytest.mark.slow
def test_mini_while_its_files_are_made(tmp_path):
    """Ctrl-C reaches the processes that write as well."""
    command = [sys.executable, "-m", "lbfast", "mini", "train", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeding, start_new_session=True)
    for _ in range(6000):
        if process.poll() is not None or any(tmp_path.glob("data/image/image/*.jpg")):
            break
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "interrupted\n"
    assert process.returncode == 130
    time.sleep(1)
    assert not of_session(process.pid)
