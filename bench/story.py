"""A run on a GPU in a page of text: what was measured, what is red, what is missing and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import harness, headline

SHORT = 11_000  # characters that are printed at the end: of a lent machine's output the last 12,000 come back

Row = Mapping[str, Any]
Results = Mapping[str, Mapping[str, Any]]
Section = tuple[str, list[str]]  # a title and lines


def whole(results: Results, jobs: Sequence[Row]) -> str:
    return _text(_sections(results, jobs))


def short(results: Results, jobs: Sequence[Row]) -> str:
    """The same within SHORT: the longest sections lose their last lines."""
    sections = [(title, [line[:240] for line in lines]) for title, lines in _sections(results, jobs)]
    cut: dict[str, int] = {}
    while len(_text(sections)) + 60 * len(cut) > SHORT:
        title, lines = max(sections, key=lambda section: sum(map(len, section[1])))
        lines.pop()
        cut[title] = cut.get(title, 0) + 1
    for title, lines in sections:
        if title in cut:
            lines.append(f"... and {cut[title]} lines more in the summary")
    return _text(sections)


def _text(sections: Sequence[Section]) -> str:
    return "\n\n".join("\n".join((title, *lines)) for title, lines in sections if lines) + "\n"


def _sections(results: Results, jobs: Sequence[Row]) -> list[Section]:
    """The least telling first, for the end of what is printed is what is surely seen."""
    device = results.get("run", {}).get("header")
    return [
        ("DEVICE", [harness.describe(device)] if device else []),
        ("PRODUCTS AND COPIES", _device(results)),
        ("LAUNCH TABLES", _tune(results)),
        ("WHERE THE TIME GOES", _profile(results)),
        ("TRAINING", _training(results)),
        ("OPS, forward and backward: our fastest and theirs", _ops(results)),
        ("ENCODERS, ms", _encoders(results)),
        ("NOT MEASURED, of what others have", _absent(results)),
        ("PHASES", _phases(jobs)),
        ("MISSING", [_line(row) for row in jobs if row["state"] == "open" or _lost(row)]),
        ("RED", [_line(row) for row in jobs if row["state"] == "red"] or ["nothing"] * bool(jobs)),
    ]


def _line(row: Row) -> str:
    return f"{row['name']}: {row['ending']}"


def _lost(row: Row) -> bool:
    """Done, as far as it can be, and yet without all that was wanted."""
    words = ("absent", "memory short", "refused", "exit status")
    return row["state"] == "done" and row["ending"].startswith(words)


def _phases(jobs: Sequence[Row]) -> list[str]:
    rows = []
    for phase in dict.fromkeys(row["phase"] for row in jobs):
        mine = [row for row in jobs if row["phase"] == phase]
        done = sum(row["state"] == "done" for row in mine)
        rows.append((phase, f"{done} of {len(mine)}", f"{sum(row['seconds'] for row in mine):.0f}"))
    return harness.table(("phase", "jobs done", "seconds of all"), rows).splitlines() if rows else []


def _rows(results: Results, what: str) -> list[Row]:
    return [row for row in results.get(what, {}).get("rows", ()) if "note" not in row]


def _device(results: Results) -> list[str]:
    return [
        f"{row['case']}, {row['dtype']}: " + (f"{row['tflops']} TFLOP/s" if row["tflops"] else f"{row['gbytes']} GB/s")
        for row in _rows(results, "device")
    ]


def _tune(results: Results) -> list[str]:
    return [
        f"{row['name']}[{row['key']}]: {row['before_ms']} -> {row['after_ms']} ms: "
        + (f"{row['tile']}, {row['num_warps']} warps, {row['num_stages']} stages" if row["changed"] else "as it was")
        for row in _rows(results, "tune")
    ]


def _profile(results: Results) -> list[str]:
    lines = []
    rows = _rows(results, "profile")
    for case in dict.fromkeys(row["case"] for row in rows):
        every, *parts = [row for row in rows if row["case"] == case]
        power = ", ".join(f"{every[key]} {key}" for key in ("watts", "sm_mhz", "joules_per_item") if key in every)
        shown = "; ".join(f"{row['name']} {row['part_of']:.0%}" for row in parts[:6])
        lines.append(f"{case}: {every['ms']} ms, {power or 'power not sampled'}: {shown}")
    return lines


def _training(results: Results) -> list[str]:
    lines = []
    for row in results.get("training", {}).get("rows", ()):
        about = f"{row['trained']}, {row['step']}, batch {row['batch']}"
        figure = row.get("note") or (f"{row['ms']:.1f} ms" if row["what"] == "time" else f"{row['MiB']:.0f} MiB")
        lines.append(f"{about}, {row['what']}: {figure}")
    return lines


def _mark(result: Mapping[str, Any]) -> str:
    tests = result["header"].get("tests", "not run")
    return "" if tests == "passed" else f" (tests: {tests.split(':')[0]})"


def _ops(results: Results) -> list[str]:
    rows = []
    for what, result in results.items():
        if "part" in {key for row in result["rows"] for key in row}:
            rows += [line.cells(what + _mark(result)) for line in headline.lines(result["rows"])]
    return harness.table(headline.COLUMNS, rows, left=3).splitlines() if rows else []


def _encoders(results: Results) -> list[str]:
    found: dict[str, dict[str, Row]] = {}
    for what, result in results.items():
        if what.startswith("languagebind-"):
            for row in result["rows"]:
                found.setdefault(row["case"] + _mark(result), {})[row["name"]] = row
    if not found:
        return []
    names = list(dict.fromkeys(name for rows in found.values() for name in rows))

    def cell(row: Row | None) -> str:
        return "" if row is None else "-" if "note" in row else f"{row['median_ms']:.2f} ({row['mfu']:.0%})"

    lines = [(case, *(cell(rows.get(name)) for name in names)) for case, rows in found.items()]
    short = [name.replace("reference", "upstream").replace("torch.compile", "compiled") for name in names]
    return [*harness.table(("case", *short), lines).splitlines(), "in brackets: of the library's rate of products"]


def _absent(results: Results) -> list[str]:
    """What rows say of why they have no figure, each once, with the benches that say it."""
    said: dict[str, list[str]] = {}
    for what, result in results.items():
        for row in result["rows"]:
            if "note" in row:
                said.setdefault(f"{row['name']}: {row['note']}"[:200], []).append(what)
    return [f"{note} ({', '.join(dict.fromkeys(benches))})" for note, benches in said.items()]
