"""Runs of embed and train that are ended at random moments, and go on: bitwise as if nothing had disturbed them.

    python -m tests.fuzz --only interrupted                 for some seconds, with a seed
    python -m tests.fuzz.interrupted 600 1 --only embed     a campaign of one kind; prints how many kills there were

What ends a run is SIGKILL, SIGTERM, SIGHUP or SIGINT, to the process or all of its group. Ended by the last three it
says one line and has the status that shells expect; no process of a run lives on for more than a second.

Runs are forked from a process that has imported everything and computed nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINES = {
    "embed": "interrupted; what is finished is kept: the same command goes on from here",
    "train": ": the same command goes on -> ",
}
ENDINGS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
LONGEST = 300.0
_TICK = 0.002


def run(seconds: float, seed: int, count: int = 10**9) -> list[str]:
    """What failed in so many random ends, or seconds; in a process of its own, for this one may have computed."""
    command = [sys.executable, "-m", "tests.fuzz.interrupted", str(seconds), str(seed), "--count", str(count)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return [f"the campaign itself ended with {done.returncode}: {done.stderr[-2000:]}"]
    return json.loads(lines[-1])


class Child:
    """A call in a forked process, which leads a session of its own; what it says goes to `said`."""

    def __init__(self, call: Callable[[], None], said: Path):
        self.said = said
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                os.setsid()
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
                for descriptor in (1, 2):
                    os.dup2(os.open(f"{said}.{descriptor}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
                call()
                code = 0
            except SystemExit as ended:
                code = int(ended.code or 0)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def wait(self, seconds: float) -> int | None:
        """Its status, negative for a signal; None where it goes on after so many seconds.

        Seconds are of what this process saw: all may be stopped from outside for a while.
        """
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if seconds <= 0:
                return None
            begun = time.monotonic()
            time.sleep(min(_TICK, seconds))
            seconds -= min(time.monotonic() - begun, 5 * _TICK)

    def errors(self) -> str:
        return Path(f"{self.said}.2").read_text()

    def lines(self) -> list[str]:
        """All that it said."""
        return [*Path(f"{self.said}.1").read_text().splitlines(), *self.errors().splitlines()]

    def left(self) -> list[str]:
        """Processes of its session, a second after its end."""
        for _ in range(50):
            if not (found := _of_session(self.pid)):
                break
            time.sleep(0.02)
        return found


def _of_session(session: int) -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            state, _, _, theirs = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if folder.name.isdigit() and int(theirs) == session and state not in "ZX":
                found.append(f"{folder.name} {(folder / 'cmdline').read_bytes()[:120]!r}")
    return found


class Campaign:
    """Random ends until the time is over; `kills` counts those that met a run alive."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.draw = folder, random.Random(seed)
        self.kills = {"embed": 0, "train": 0, "cache": 0}
        self.failures: list[str] = []
        self._number = 0

    def undisturbed(self, call: Callable[[], None]) -> float:
        """Runs to the end; returns how long it took."""
        begun = time.monotonic()
        child = Child(call, self.folder / "said")
        if status := child.wait(LONGEST):
            raise RuntimeError(f"an undisturbed run ended with {status}: {child.errors()[-2000:]}")
        return time.monotonic() - begun

    def disturbed(self, kind: str, call: Callable[[], None], longest: float) -> None:
        """Ends a run once to three times at random moments, then lets it go on to its end."""
        for _ in range(self.draw.randint(1, 3)):
            child = Child(call, self.folder / "said")
            if child.wait(self.draw.uniform(0, longest)) is None:
                number, group = self.draw.choice(ENDINGS), self.draw.random() < 0.5
                (os.killpg if group else os.kill)(child.pid, number)
                self._ended(kind, child, number, f"{number.name} to {'its group' if group else 'it'}")
        child = Child(call, self.folder / "said")
        if status := child.wait(LONGEST):
            self.failures.append(f"{kind}: going on ended with {status}: {child.errors()[-500:]}")

    def _ended(self, kind: str, child: Child, number: int, how: str) -> None:
        status, said = child.wait(60), child.errors()
        self.kills[kind] += 1
        if status is None:
            os.kill(child.pid, signal.SIGKILL)
            self.failures.append(f"{kind}: {how}: it did not end: {said[-500:]}")
        if left := child.left():
            self.failures.append(f"{kind}: {how}: processes live on: {left}")
        if "Traceback" in said:
            self.failures.append(f"{kind}: {how}: {said[-1500:]}")
        if number == signal.SIGKILL or status == 0 or kind not in LINES:
            return
        # before the command has begun, and after its summary, a signal does what it does to any process
        lines = [line for line in child.lines() if "interrupted" in line or "the same command goes on" in line]
        early = (-number, []), (128 + number, ["interrupted"])
        told = status == 128 + number and len(lines) == 1 and LINES[kind] in lines[0]
        if not told and (status, lines) not in early:
            self.failures.append(f"{kind}: {how}: status {status}: {child.lines()}")

    def place(self) -> Path:
        self._number += 1
        return self.folder / f"run-{self._number}"


def command(*arguments: object) -> Callable[[], None]:
    def call() -> None:
        import lbfast.__main__

        sys.argv = ["lbfast", *map(str, arguments)]
        lbfast.__main__.main()

    return call


def embeddings(campaign: Campaign) -> Iterator[None]:
    """Each step: a run of `lbfast embed` that is ended, goes on, and is compared."""
    source = campaign.folder / "in"

    def make() -> None:
        from tests import tiny

        for i in range(30):
            tiny.picture(source / f"{i:02}.jpg", seed=i)
        for i in (3, 11, 12):
            (source / f"{i:02}.jpg").write_text("no picture")
        (source / "words.txt").write_text("".join(f"caption number {i}\n" for i in range(30)))
        tiny.checkpoint(campaign.folder, "image")

    campaign.undisturbed(make)

    def embed(out: Path, workers: int) -> Callable[[], None]:
        options = ("--model", campaign.folder / "image", "--out", out, "--batch-size", 4, "--workers", workers)
        return command("embed", source, *options)

    wanted = campaign.folder / "wanted.parquet"
    times = dict.fromkeys((0, 2), 0.0)
    for workers in times:
        wanted.unlink(missing_ok=True)
        times[workers] = campaign.undisturbed(embed(wanted, workers))
    while True:
        place = campaign.place()
        place.mkdir()
        workers = campaign.draw.choice([*times])
        campaign.disturbed("embed", embed(place / "out.parquet", workers), times[workers])
        found = sorted(path.name for path in place.iterdir())
        if found != ["out.parquet"]:
            campaign.failures.append(f"embed: left {found}")
        elif (place / "out.parquet").read_bytes() != wanted.read_bytes():
            campaign.failures.append(f"embed: {place}: the rows are others")
        yield


def training(out: Path, cache: Path | None, seed: int = 0) -> Callable[[], None]:
    def call() -> None:
        from lbfast.training.trainer import train
        from tests import trainees

        plan, data = trainees.plan(epochs=6, patch_dropout=0.5, seed=seed), trainees.Data()
        summary = train(plan, trainees.trainee(plan), data, out, save_every=3, text_cache=cache)
        sys.exit(0 if summary.stopped is None else 128 + summary.stopped)

    return call


def same_run(found: Path, wanted: Path) -> bool:
    """Weights and losses, to the last bit."""
    if any(not (place / "model" / "model.safetensors").is_file() for place in (found, wanted)):
        return False
    losses = [
        [(row["step"], row["loss"]) for row in map(json.loads, (place / "metrics.jsonl").read_text().splitlines())]
        for place in (found, wanted)
    ]
    weights = [(place / "model" / "model.safetensors").read_bytes() for place in (found, wanted)]
    return losses[0] == losses[1] and weights[0] == weights[1]


def trainings(campaign: Campaign) -> Iterator[None]:
    """Each step: a run of `lbfast train` that is ended, goes on, and is compared."""
    folder = campaign.folder / "train"
    folder.mkdir()

    def make() -> None:
        from tests import tiny, trainees

        trainees.manifest(folder)
        tiny.checkpoint(folder, "image")

    campaign.undisturbed(make)
    fields = ("batch_size=6", "epochs=6", "warmup=2", "micro_batch=3", "lr=0.01", "coef_lr=0.1", "patch_dropout=0.5")

    def train(out: Path, workers: int) -> Callable[[], None]:
        settings = [part for field in fields for part in ("--set", field)]
        options = ("--save-every", 3, "--workers", workers, "--device", "cpu", "--out", out)
        data = ("--recipe", "depth", "--model", folder / "image", "--data", folder / "data.csv")
        return command("train", *data, *options, *settings)

    wanted = folder / "wanted-train"
    longest = campaign.undisturbed(train(wanted, 0))
    while True:
        place = campaign.place()
        campaign.disturbed("train", train(place, campaign.draw.choice((0, 2))), longest)
        left = [
            path.name for path in (*place.glob("checkpoints/.*"), *place.glob(".lbfast-*"), *place.glob("*/.lbfast-*"))
        ]
        if left or not same_run(place, wanted):
            campaign.failures.append(f"train: {place}: {left or 'weights or losses are others'}")
        yield


def caches(campaign: Campaign) -> Iterator[None]:
    """Each step: four runs at once on one text cache, one of them killed; a fifth after them finds what they left."""
    seeds = range(2)
    wanted = [campaign.folder / f"wanted-cache-{seed}" for seed in seeds]
    longest = max(campaign.undisturbed(training(place, None, seed)) for seed, place in zip(seeds, wanted))
    while True:
        cache, places = campaign.place(), [campaign.place() for _ in range(5)]
        children = [
            Child(training(place, cache, i % 2), campaign.folder / f"said-{i}") for i, place in enumerate(places[:4])
        ]
        victim = campaign.draw.randrange(4)
        if children[victim].wait(campaign.draw.uniform(0, 2 * longest)) is None:
            os.kill(children[victim].pid, signal.SIGKILL)
            children[victim].wait(LONGEST)
            campaign.kills["cache"] += 1
        for i, child in enumerate(children):
            if i != victim and (status := child.wait(LONGEST)):
                campaign.failures.append(f"cache: a run ended with {status}: {child.errors()[-500:]}")
        for i in (victim, 4):
            campaign.undisturbed(training(places[i], cache, i % 2))
        for i, place in enumerate(places):
            if not same_run(place, wanted[i % 2]):
                campaign.failures.append(f"cache: {place}: weights or losses are others than without a cache")
        yield


KINDS = {"embed": embeddings, "train": trainings, "cache": caches}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float)
    parser.add_argument("seed", type=int)
    parser.add_argument("--count", type=int, default=10**9)
    parser.add_argument("--only", nargs="*", choices=[*KINDS], default=[*KINDS])
    given = parser.parse_args()
    import torch

    import lbfast.embedding
    import tests.runs  # noqa: F401  (with all that a run imports)

    torch.set_num_threads(1)
    lbfast.embedding.embed_files  # noqa: B018  (imported at first use)
    end = time.monotonic() + given.seconds
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), given.seed)
        steps = {name: KINDS[name](campaign) for name in given.only}
        for step in itertools.islice(itertools.cycle(steps.values()), given.count):
            if time.monotonic() > end:
                break
            next(step)
    print(f"kills: {campaign.kills}", file=sys.stderr)
    print(json.dumps(campaign.failures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
