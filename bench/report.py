"""The tables of README.md and docs, and bench/results/README.md with its pictures, out of git's results:

    python -m bench.report            writes them
    python -m bench.report --check    exit status 1 where what is there differs

Tables go between the pages' markers <!-- bench:NAME --> and <!-- bench:end -->; a test runs the check. Results count
once git knows them (git add); outside a checkout all in bench/results do. A CPU's results are a file each, a GPU's are
in one file a device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lbfast import files

from . import harness, headline, phases, plot, resources, run as cpu

ROOT = harness.HERE.parent
AHEAD = "kernels-ahead-of-time.json"
NO_GPU = "**GPU numbers: not measured yet.** `make gpu` measures them on any machine with an NVIDIA GPU."
ENCODERS = ("image", "video", "audio", "text")
SHOWN = {"image": "image (depth, thermal)", "video": "video, 8 frames", "audio": "audio", "text": "text, 5-20 tokens"}
OPS = ("attention", "temporal-attention", "patch-embed", "layer-norm", "mlp")
PAGES = ("README.md", "docs/numbers.md", "docs/files.md")
HIDDEN = ("rejected", "sources")  # of what rows say
_MARKER = re.compile(r"(<!-- bench:(?!end)([a-z-]+) -->\n).*?(<!-- bench:end -->)", re.DOTALL)

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured ("attention", "languagebind-video", ...), on what, and the rows."""

    what: str
    header: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def on_gpu(self) -> bool:
        return "cuda" in self.header


Machine = Mapping[str, Result]


def load(folder: Path) -> dict[str, dict[str, Result]]:
    """slug of the device -> what -> result."""
    found: dict[str, dict[str, Result]] = {}
    for path in _files(folder):
        if path.name == AHEAD:
            continue
        content = json.loads(path.read_text())
        if "header" in content:
            slug = content["header"]["slug"]
            content = {path.stem.removeprefix(slug + "-"): content}
        for what, result in content.items():
            slug = result["header"]["slug"]
            found.setdefault(slug, {})[what] = Result(what, result["header"], result["rows"])
    return found


def ahead(folder: Path) -> str:
    """What `bench.resources --arch sm_90 --out` said of the kernels, or nothing."""
    if not (folder / AHEAD).exists():
        return ""
    content = json.loads((folder / AHEAD).read_text())
    header, rows = content["header"], content["rows"]
    text = f"""
## Kernels, compiled ahead of time

Counted, not measured: what `python -m bench.resources` reads out of each kernel's binary for an H100 or H200 (Triton
{header["triton"]}), without a GPU. "issue us" is the time in which all schedulers issue a launch's warp-instructions,
"floor us" that of the slower of memory and tensor cores on an H200: bounds that no kernel reaches.

"""
    shown = [dict(zip(resources.HEADINGS, resources.cells(row))) for row in rows if row["arch"] == "sm_90"]
    columns = [name for name in resources.HEADINGS if name != "arch"]
    return text + harness.table(columns, [[row[name] for name in columns] for row in shown]) + "\n"


def _files(folder: Path) -> list[Path]:
    try:
        command = ["git", "-C", str(folder), "ls-files", "--", "*.json"]
        known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return sorted(path for name in known if (path := folder / name).exists())
    except (OSError, subprocess.CalledProcessError):
        return sorted(folder.glob("*.json"))


def _best(rows: Iterable[Row], name: str, case: str) -> Row | None:
    return next((r for r in rows if r["name"] == name and r["case"] == case and "median_ms" in r), None)


def _ms(row: Row | None) -> str:
    """Median, 20th and 80th percentile."""
    if row is None:
        return "-"
    digits = 0 if row["median_ms"] >= 100 else 1 if row["median_ms"] >= 10 else 2
    return f"{row['median_ms']:.{digits}f} ({row['p20_ms']:.{digits}f}-{row['p80_ms']:.{digits}f})"


def _over(slow: Row | None, fast: Row | None) -> str:
    return f"{slow['median_ms'] / fast['median_ms']:.2f} x" if slow and fast else "-"


def _cases(machine: Machine) -> Iterable[tuple[str, Sequence[Row], str]]:
    """(name to show, rows, case) of the whole encoders: of languagebind-image, languagebind-image-8 and so on."""
    named = [(m, w) for m in ENCODERS for w in sorted(machine) if re.fullmatch(rf"languagebind-{m}(-\d+)?", w)]
    for modality, what in named:
        result = machine[what]
        for case in dict.fromkeys(row["case"] for row in result.rows):
            yield f"{SHOWN[modality]}, batch {case.rsplit(' ', 1)[1]}", result.rows, case


def encoders(machines: Mapping[str, Machine]) -> str:
    """What a user gains: in each precision our fastest, and how much sooner than the fastest other of that precision.

    A case of each modality: the largest batch on a GPU, the smallest on a CPU. The others, and float8, which is less
    exact, are among `details`.
    """
    said, table = [], []
    for slug in sorted(machines, key=lambda s: (not _gpu(machines[s]), s)):
        machine, chosen = machines[slug], max if _gpu(machines[slug]) else min
        short = next(iter(machine.values())).header["device"].removeprefix("NVIDIA ") if _gpu(machine) else "CPU"
        cases = list(_cases(machine))
        for modality in ENCODERS:
            mine = [case for case in cases if case[2].startswith(modality)]
            if mine:
                name, rows, case = chosen(mine, key=lambda found: int(found[2].rsplit(" ", 1)[1]))
                timed = [row for row in rows if row["case"] == case and "median_ms" in row]
                cells = [_beside(timed, dtypes) for dtypes in (("float32",), ("bfloat16", "float16"), ("int8",))]
                table.append((name, short, _ms(_best(rows, "reference float32", case)), *cells))
        if cases:
            said.append(f"{short}: {_on(machine, commits=False)}.")
    columns = ("encoder, ms", "on", "upstream, float32", "lbfast, float32", "bfloat16", "int8")
    return "\n".join(said) + "\n\n" + harness.table(columns, table, left=2) if table else "Not measured yet."


def _beside(timed: Sequence[Row], dtypes: Sequence[str]) -> str:
    """Our fastest row of some dtypes, and its speed-up over the fastest other's."""
    group = [row for row in timed if row["dtype"] in dtypes]
    ours = min((row for row in group if row["name"].startswith("lbfast")), key=_time, default=None)
    other = min((row for row in group if not row["name"].startswith("lbfast")), key=_time, default=None)
    if ours is None or other is None:
        return _ms(ours)
    return f"{_ms(ours)}, {_over(other, ours)} {_called(other)}"


def _time(row: Row) -> float:
    return row["median_ms"]


def _called(row: Row | None) -> str:
    """What a candidate is, in the words of a short table."""
    return "" if row is None else row["name"].removesuffix(f" {row['dtype']}").replace("reference", "upstream")


def details(machine: Machine) -> str:
    """Every candidate that was timed: latency and rate, memory, exactness, use of the machine."""
    table = []
    for name, rows, case in _cases(machine):
        for row in rows:
            if row["case"] == case and "median_ms" in row:
                memory = f"{row['peak_MiB']}" if "peak_MiB" in row else "-"
                numbers = (_ms(row), f"{row['items_s']:.2f}", f"{row['mfu']:.0%}", memory, f"{row['cosine']:.5f}")
                table.append((name, row["name"], *numbers))
    columns = ("encoder", "candidate", "ms", "items/s", "MFU", "peak MiB", "cosine to float32")
    return harness.table(columns, table, left=2)


def shared(machine: Machine) -> str:
    """Calls beside processes that never rest: how much longer they take than on a quiet machine."""
    table = []
    for name, rows, case in _cases(machine):
        for row in rows:
            if row["case"] == case and "busy_ms" in row:
                longer = f"{row['busy_ms'] / row['median_ms']:.2f} x"
                table.append((name, row["busy"], row["name"], _ms(row), f"{row['busy_ms']:.0f}", longer))
    return harness.table(("encoder", "others", "candidate", "quiet ms", "busy ms", "longer"), table, left=3)


def row_of_batches(machine: Machine) -> str:
    """Image at batch sizes 1 to 64: how much sooner than the reference."""
    rows = machine["languagebind-row"].rows
    cases = dict.fromkeys(row["case"] for row in rows)
    table = []
    for label, theirs, ours in (
        ("float32", "reference float32", "lbfast float32"),
        ("bfloat16 over autocast", "reference autocast", "lbfast bfloat16"),
    ):
        table.append((label, *(_over(_best(rows, theirs, case), _best(rows, ours, case)) for case in cases)))
    return harness.table(("batch", *(case.rsplit(" ", 1)[1] for case in cases)), table)


def ops(machine: Machine) -> str:
    """Forward and backward of each op beside the fastest of the others."""
    table = []
    for op in OPS:
        for what in (w for w in machine if w == op or (w.startswith(f"{op}-") and not w.endswith("-tuned"))):
            table += [line.cells(op.replace("-", " ")) for line in headline.lines(machine[what].rows)]
    columns = ("op", "input", *headline.COLUMNS[2:])
    return harness.table(columns, table, left=4)


def info_nce(machine: Machine) -> str:
    """Forward and backward of every implementation: time and extra memory."""
    table = []
    every = (w for w in machine if w.startswith("info-nce") and not w.endswith("-tuned"))
    for what in sorted(every, key=lambda w: _size(machine[w])):
        rows = [r for r in machine[what].rows if r.get("part") == "both"]
        for case, dtype in dict.fromkeys((r["case"], r["dtype"]) for r in rows):
            group = [r for r in rows if (r["case"], r["dtype"]) == (case, dtype)]
            dense = next((r for r in group if r["name"] == "dense"), None)
            for row in group:
                share = f"{row['extra_MiB'] / dense['extra_MiB']:.1%}" if dense and dense["extra_MiB"] else "-"
                extra = f"{row['extra_MiB']:.0f}"
                table.append((case, dtype, row["name"], _ms(row), _over(dense, row), extra, share))
    columns = ("B x D", "dtype", "implementation", "ms", "over dense", "extra MiB", "of dense's")
    return harness.table(columns, table, left=3)


def _size(result: Result) -> int:
    return max(int(row["case"].split("x")[0]) for row in result.rows)


def _on(machine: Machine, commits: bool = True) -> str:
    """The machine in a sentence, and the commits its results are of."""
    header = next(iter(machine.values())).header
    failed = sorted({r.header["tests"] for r in machine.values() if r.header.get("tests", "").startswith("failed")})
    of = f", commit {', '.join(sorted({r.header['commit'] for r in machine.values()}))}" if commits else ""
    dates = sorted({result.header["date"] for result in machine.values()})
    device = header["device"]
    if "threads" in header:
        device = (
            f"{header['threads']} threads of {device} ({header['capability']}, {'' if header['amx'] else 'no '}AMX)"
        )
    elif "driver" in header:
        device += f" (driver {header['driver']})"
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return "; ".join(
        [
            f"{device}, torch {header['torch']}, {span}{of}",
            *(f"**tests {each}**" for each in failed),
        ]
    )


def decoding(machine: Machine) -> str:
    """Each kind of file: CPU time, beside the fastest other with the same result; cores that feed an H200."""
    table = []
    for line in headline.lines(machine["files-all"].rows):
        ours, theirs = line.ours, line.theirs
        beside = f"{theirs['median_ms']:.1f} ({theirs['name']})" if theirs else "-"
        first = _best(machine["files-all"].rows, "upstream", ours["case"])
        a_core = ours["files_s_core"]
        rate = f"{a_core:.{0 if a_core >= 10 else 1}f}", str(ours["eaten_s"]), f"{ours['cores']:.0f}"
        upstream = f"{first['median_ms']:.1f}" if first else "-"
        table.append((ours["case"], f"{ours['median_ms']:.1f}", upstream, beside, *rate))
    columns = ("file", "CPU ms", "upstream's", "the fastest other", "files/s a core", "an H200 takes", "cores")
    return harness.table(columns, table)


def feeding(machine: Machine) -> str:
    """How busy a model is kept by workers that have nothing to decode."""
    rows = [row for row in machine["files-all"].rows if row.get("what") == "pipeline"]
    cells = [(row["case"], row["name"], f"{row['busy']:.0%}", f"{row['main_ms']:.2f}") for row in rows]
    return harness.table(("batches", "", "busy", "main process, ms a file"), cells, left=2)


SECTIONS: dict[str, Callable[[Machine], str]] = {
    "details": details,
    "shared": shared,
    "batches": row_of_batches,
    "ops": ops,
    "info-nce": info_nce,
    "files": decoding,
    "pipeline": feeding,
}
NAMES = ("encoders", *SECTIONS)
NEEDS = {"batches": "languagebind-row", "files": "files-all", "pipeline": "files-all"}


def section(name: str, machines: Mapping[str, Machine]) -> str:
    """What goes between the markers of this name: a table for each machine, GPUs first; of no GPU, a line.

    What a user gains, "encoders", is one table, of GPUs and of one CPU, the last that was measured; of a day's, that
    with the most candidates.
    """
    if name == "encoders":
        last = max(
            (s for s in machines if not _gpu(machines[s]) and _encoded(machines[s])),
            key=lambda s: (
                _encoded(machines[s]),
                sum("median_ms" in row for _, rows, _ in _cases(machines[s]) for row in rows),
            ),
            default="",
        )
        text = encoders({slug: machine for slug, machine in machines.items() if slug == last or _gpu(machine)})
        return text if any(map(_gpu, machines.values())) else f"{text}\n\n{NO_GPU}"
    parts = []
    for slug in sorted(machines, key=lambda s: (not _gpu(machines[s]), s)):
        machine = machines[slug]
        if NEEDS.get(name, "") and NEEDS[name] not in machine:
            continue
        table = SECTIONS[name](machine)
        if table.count("\n") > 1:
            parts.append(f"On {_on(machine)}:\n\n{table}")
    return "\n\n".join(parts or ["Not measured yet."])


def _encoded(machine: Machine) -> str:
    """The last date of a machine's whole encoders, or nothing."""
    return max((r.header["date"] for what, r in machine.items() if what.startswith("languagebind-")), default="")


def coverage(machines: Mapping[str, Machine]) -> str:
    """What was measured on which device, of all that is planned for a CPU or for a GPU; what never was is a dash."""
    slugs = sorted(machines, key=lambda s: (not _gpu(machines[s]), s))
    gpu = [job.name for phase in phases.FIRST if not phase.together for job in phase.jobs(phases.NOTHING)]
    gpu += [job.name for job in phases.tuned(phases.NOTHING)]
    planned = dict.fromkeys((*gpu, *(piece.name for piece in cpu.PIECES)))
    every = dict.fromkeys((*planned, *(what for machine in machines.values() for what in sorted(machine))))
    every.pop("run", None)

    def cell(what: str, slug: str) -> str:
        if what not in machines[slug] or all("note" in row for row in machines[slug][what].rows):
            return "-" if what in (gpu if _gpu(machines[slug]) else [p.name for p in cpu.PIECES]) else ""
        header = machines[slug][what].header
        return f"{header['date']}{' (tests failed)' * header.get('tests', '').startswith('failed')}"

    rows = [(what, *(cell(what, slug) for slug in slugs)) for what in every]
    if any(map(_gpu, machines.values())):
        return harness.table(("result", *slugs), rows, left=1 + len(slugs))
    rows = [(*row, "-" if row[0] in gpu else "") for row in rows]
    return harness.table(("result", *slugs, "a GPU"), rows, left=2 + len(slugs))


def _gpu(machine: Machine) -> bool:
    return any(result.on_gpu for result in machine.values())


def page(text: str, machines: Mapping[str, Machine]) -> str:
    """A page with its tables made anew. ValueError for a marker of another name."""

    def fill(match: re.Match[str]) -> str:
        if match[2] not in NAMES:
            raise ValueError(f"bench:{match[2]}: expected one of {', '.join(NAMES)}")
        return f"{match[1]}{section(match[2], machines)}\n{match[3]}"

    return _MARKER.sub(fill, text)


def outside(text: str) -> str:
    """A page without what is made here: numbers of speed must not be there."""
    return _MARKER.sub("", text)


def index(machines: Mapping[str, Machine]) -> tuple[str, dict[str, str]]:
    """bench/results/README.md, and its pictures: file name -> content."""
    pictures: dict[str, str] = {}
    text = ["# Results", "", "Made by `python -m bench.report` from the JSON files beside it; measured by `make bench`"]
    text += ["and `make gpu`. Times are medians, with the 20th and 80th percentile; candidates took turns in one run."]
    if not any(map(_gpu, machines.values())):
        text += ["", NO_GPU]
    text += ["", "When what was measured; a dash: never, though it is planned.", "", coverage(machines)]
    for slug, machine in sorted(machines.items()):
        for what, result in sorted(machine.items()):
            text += ["", f"## {slug}: {what}", "", f"{harness.describe(result.header)}", ""]
            groups = _bars(result.rows)
            if groups:
                name = f"{slug}-{what}.svg"
                pictures[name] = plot.bars(f"{result.header['title']}: shorter is sooner", groups, "ms")
                text += [f"![{what}]({name})", ""]
            text.append(_every(result.rows))
            notes = dict.fromkeys(f"- {_named(r)}: not timed: {r['note']}" for r in result.rows if "note" in r)
            text += ["", *notes] if notes else []
    return "\n".join(text) + "\n", pictures


def _bars(rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, float, bool]]]]:
    groups: dict[str, list[tuple[str, float, bool]]] = {}
    for row in rows:
        if "median_ms" in row and row.get("part", "both") == "both":
            bar = (f"{row['name']}, {row['dtype']}", row["median_ms"], row["name"].startswith("lbfast"))
            groups.setdefault(row["case"], []).append(bar)
    return list(groups.items())


def _named(row: Row) -> str:
    """What a row is of: a contender, or a way to take a training step."""
    return row["name"] if "name" in row else ", ".join(row[key] for key in ("modality", "trained", "step"))


def _every(rows: Sequence[Row]) -> str:
    """All rows that have numbers, with all that any of them says."""
    timed = [row for row in rows if "note" not in row]
    left = [key for key in ("what", "case", "trained", "step", "dtype", "part", "name") if any(key in r for r in timed)]
    rest = dict.fromkeys(key for row in timed for key in row if key not in (*left, *HIDDEN))
    columns = [*left, *rest]
    return harness.table(columns, [[row.get(key, "") for key in columns] for row in timed], left=len(left))


def outputs(root: Path = ROOT) -> dict[Path, str]:
    """Every file that is made: path -> content."""
    folder = root / "bench" / "results"
    machines = load(folder)
    text, pictures = index(machines)
    text += ahead(folder)
    made = {folder / name: content for name, content in pictures.items()}
    pages = [path for name in PAGES if (path := root / name).exists()]
    return {**{path: page(path.read_text(), machines) for path in pages}, folder / "README.md": text, **made}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args(argv)
    made = outputs()
    different = [path for path, content in made.items() if not path.exists() or path.read_text() != content]
    stale = [path for path in harness.RESULTS.glob("*.svg") if path not in made]
    for path in (*different, *stale):
        print(f"{path.relative_to(ROOT)}{' differs' if given.check else ''}")
        if not given.check:
            files.write(path, made[path]) if path in made else path.unlink()
    return int(given.check and bool(different or stale))


if __name__ == "__main__":
    sys.exit(main())
