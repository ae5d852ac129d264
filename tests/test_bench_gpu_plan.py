"""`make gpu` in parts: its plan, what it makes of pytest's lines and of the tools there are, and its page."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from _pytest.mark.expression import Expression

from bench import forked, gpu, ledger, phases, story, tune

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]


def test_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1 and "no CUDA device" in capsys.readouterr().err


def test_the_plan(capsys):
    assert gpu.main(["--list"]) == 0 and "470 s to the end of profile" in capsys.readouterr().out
    assert sum(phase.seconds for phase in phases.FIRST) <= 480 >= sum(phase.seconds for phase in phases.SECOND)
    jobs = [job for phase in phases.PHASES for job in phase.jobs(phases.NOTHING)]
    assert len({job.name for job in jobs}) == len(jobs)
    for phase in phases.PHASES:
        mine = phase.jobs(phases.NOTHING)
        if mine and not phase.together:
            assert sum(job.seconds for job in mine) == pytest.approx(phase.seconds, rel=0.05), phase.name
    for job in jobs:
        if job.kind in ("bench", "compile") or job.module == "bench.tuned":
            with pytest.raises(SystemExit) as ended:
                importlib.import_module(job.module).main([*job.arguments, "--help"])
            assert ended.value.code == 0, job
    seen = {op: [job for job in jobs if job.kind == "tests" and job.op == op] for op in phases.OPS}
    assert all(len(mine) == len(phases.DTYPES) for mine in seen.values())


def test_every_gpu_test_belongs_to_a_job(request):
    """Each test here that is marked "gpu" is in one job, and in no other."""
    marked = [item.nodeid.removeprefix("tests/").lower() for item in request.session.items if "gpu" in item.keywords]
    if not any(test.startswith("test_gpu.py") for test in marked):
        pytest.skip("runs with tests/test_gpu.py")
    jobs = [*phases.tests(phases.NOTHING), *phases.tests_alone(phases.NOTHING)]
    for test in marked:
        assert sum(_runs(job, test) for job in jobs) == 1, test


def _runs(job, test):
    files = [Path(argument).name for argument in job.arguments if argument.endswith(".py")]
    chosen = Expression.compile(job.arguments[-1]).evaluate(functools.partial(_within, test))
    return chosen and test.startswith(tuple(files))


def _within(test, word, **more):
    return word.lower() in test


def test_tests_are_judged_by_pytests_own_lines(tmp_path):
    path = tmp_path / "test_some.py"
    path.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "@pytest.mark.parametrize('x', ['a b', 2])\ndef test_bad(x): assert x == 2\n"
        "def test_short(): raise RuntimeError('CUDA out of memory. Tried')\n"
        "@pytest.mark.skip\ndef test_not(): pass\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-v",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        str(path),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    job = phases.Job("tests x", "pytest", kind="tests")
    state, ending = ledger.judge(job, done.returncode, done.stdout, 9)
    assert state == "red" and ending == "tests: failed: test_bad[a b] (2 passed, 2 failed, 1 skipped)"
    until = done.stdout[: done.stdout.index("test_bad[a b]")]
    assert ledger.judge(job, None, until, 9) == ("open", "not finished: stopped after 9 s (1 passed)")
    assert ledger.judge(job, 5, "", 9) == ("done", "no such test")
    assert ledger.judge(job, 2, "ImportError: x", 9)[0] == "red"


def test_jobs_at_once_share_the_gpus_memory():
    memory = gpu.Memory(10)
    with memory.taken(99), contextlib.suppress(RuntimeError), memory.taken(0):
        assert memory.free == 0
        raise RuntimeError
    assert memory.free == 10


def test_finds_the_sanitizer(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    tool = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert phases.sanitizer() == str(tool)
    job = phases.sanitized(phases.NOTHING)[0]
    assert job.command[0] == str(tool) and job.command[-3:-1] == ["-m", "bench.memcheck"]


def test_a_long_story_is_cut_where_it_is_longest():
    job = {"phase": "ops", "op": "", "state": "open", "seconds": 1.0}
    jobs = [{**job, "name": f"job {i}", "ending": "because " * 20} for i in range(300)]
    jobs.append({**jobs[0], "name": "bad", "state": "red", "ending": "FAILED"})
    assert len(story.short({}, jobs)) <= 12_000 < len(story.whole({}, jobs))
    assert "lines more in the summary" in story.short({}, jobs) and "bad: FAILED" in story.short({}, jobs)


def test_the_page_is_short_and_its_options_are_there(capsys):
    page = (ROOT / "bench" / "GPU.md").read_text()
    assert len(page.splitlines()) <= 60
    for main in (gpu.main, tune.main):
        with pytest.raises(SystemExit):
            main(["--help"])
    known = capsys.readouterr().out
    others = {"--no-deps", "--only-binary", "--short"}  # pip's and git's
    assert all(f"{option} " in known for option in set(re.findall(r"--[a-z-]+", page)) - others)


def test_memcheck_jobs_name_ops_that_have_cases():
    from bench import memcheck

    names = {name.split()[0].strip(",") for name in memcheck.cases("cpu", torch.float32)}
    assert set(phases.OPS) <= names


def test_jobs_that_are_forked(tmp_path, monkeypatch):
    """They end as commands do, and one that hangs is stopped with its children."""
    monkeypatch.setattr(forked, "_server", lambda: multiprocessing.get_context("forkserver"))
    assert all(importlib.util.find_spec(name) for name in forked.BEHIND)
    module = tmp_path / "job_for_a_fork.py"
    module.write_text(
        "import os, subprocess, sys, time\n"
        "print(os.environ['SAID'], sys.argv[1:], flush=True)\n"
        "if sys.argv[1] == 'hang': print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    env, log = {**os.environ, "PYTHONPATH": str(tmp_path), "SAID": "hello", "OMP_NUM_THREADS": "1"}, tmp_path / "log"
    command = [sys.executable, "-m", module.stem]
    for code in (0, 3):
        assert forked.run([*command, str(code)], 60, env, log) == code
        assert log.read_text() == f"hello ['{code}']\n"
    assert forked.run([*command, "hang"], 2, env, log) is None
    child = int(log.read_text().splitlines()[-1])
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "Z":  # killed; who is to wait for it is gone, too
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the child of a job that was stopped lives on")
    assert forked.run([sys.executable, "-c", "raise SystemExit(4)"], 60, env, log) == 4
