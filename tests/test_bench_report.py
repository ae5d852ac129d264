"""What is made of the benches' results: tables, pictures, headlines, comparisons and floors."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import compare, headline, plot, report

ROOT = Path(__file__).resolve().parents[1]


def test_readme_and_results_are_made_of_the_results():
    assert report.main(["--check"]) == 0, "run: python -m bench.report"


def test_no_speed_in_the_readme_is_written_by_hand():
    text = report.outside((ROOT / "README.md").read_text())
    claim = r"\d\s?(x|times) (faster|sooner|as fast|less|smaller|slower)|\d\s?(ms|TFLOP/s|GB/s|clips/s|items/s)\b"
    assert re.findall(claim, text) == []


def test_report_of_results(tmp_path):
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    header = {
        "slug": "a-cpu",
        "title": "Encoders",
        "device": "A CPU",
        "threads": 2,
        "capability": "AVX512",
        "amx": True,
    }
    header |= {"torch": "2.13", "commit": "abc", "date": "2026-01-01"}
    row = {"case": "video L/14, batch 1", "modality": "video", "p20_ms": 90.0, "p80_ms": 110.0, "cosine": 0.9999}
    row |= {"items_s": 10.0, "mfu": 0.5, "peak_MiB": 700}
    times = {"reference float32": 600.0, "reference autocast": 300.0, "lbfast float32": 400.0, "lbfast bfloat16": 100.0}
    rows = [
        {**row, "name": n, "median_ms": t, "dtype": "float32" if "32" in n else "bfloat16"} for n, t in times.items()
    ]
    result = {
        "header": header,
        "rows": [*rows, {"case": row["case"], "name": "peer", "dtype": "bfloat16", "note": "absent"}],
    }
    (folder / "a-cpu-languagebind-video.json").write_text(json.dumps(result))
    step = {"what": "step", "modality": "video", "trained": "full", "step": "dense", "note": "out of memory"}
    (folder / "a-cpu-training-l14-video.json").write_text(json.dumps({"header": header, "rows": [step]}))
    (tmp_path / "README.md").write_text("# x\n<!-- bench:encoders -->\nold\n<!-- bench:end -->\n1.00 x\n")
    outputs = report.outputs(tmp_path)
    every = outputs.pop(folder / "README.md")
    made = {path.name: content for path, content in outputs.items()}
    assert "old" not in made["README.md"] and made["README.md"].endswith("1.00 x\n")
    line = next(line for line in made["README.md"].splitlines() if line.startswith("| video"))
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2] == "CPU" and cells[4].endswith(", 1.50 x upstream")
    assert cells[5].endswith(", 3.00 x upstream autocast")
    assert "CPU: 2 threads of A CPU (AVX512, AMX), torch 2.13, 2026-01-01.\n" in made["README.md"]
    assert report.NO_GPU in made["README.md"]
    assert "- video, full, dense: not timed: out of memory" in every
    for line in (r"training-l14-video +\| - ", r"languagebind-video +\| 2026-01-01 "):
        assert re.search(rf"\| {line}", every), line
    assert "- peer: not timed: absent" in every and "![languagebind-video](a-cpu-languagebind-video.svg)" in every
    assert made["a-cpu-languagebind-video.svg"].count("<rect") == 1 + 4
    with pytest.raises(ValueError, match="bench:speed: expected one of"):
        report.page("<!-- bench:speed -->\n<!-- bench:end -->", {})


def test_pictures_are_the_same_each_time():
    groups = [("a & b", [("ours", 2.0, True), ("theirs", 4.0, False)])]
    assert plot.bars("t", groups, "ms") == plot.bars("t", groups, "ms")
    assert "a &amp; b" in plot.bars("t", groups, "ms")


def test_headlines():
    rows = [{"case": "c", "dtype": "d", "part": p, "name": n, "median_ms": t, "of_floor": 0.5} for p, n, t in (
        ("fwd", "lbfast torch", 1.0), ("both", "lbfast torch", 3.0), ("both", "lbfast native", 2.0), ("both", "x", 4.0),
    )]  # fmt: skip
    (line,) = headline.lines(rows)
    assert line.speedup == 2 and line.cells("b") == ("b", "c", "d", "native", "2.00", "x", "4.00", "2.00 x", "50%")
    (alone,) = headline.lines(rows[1:2])
    assert alone.cells("b")[5:8] == ("-", "", "")


def result_of(tmp_path, name, **times):
    rows = [
        {"case": "c", "dtype": "d", "part": "fwd", "name": key, "median_ms": t, "p20_ms": t * 0.95, "p80_ms": t * 1.05}
        for key, t in times.items()
    ]
    path = tmp_path / name
    path.write_text(json.dumps({"header": {"device": "A CPU"}, "rows": rows}))
    return str(path)


def test_compare(tmp_path, capsys):
    before = result_of(tmp_path, "before.json", a=10.0, b=10.0, gone=1.0)
    after = result_of(tmp_path, "after.json", a=5.0, b=10.5, new=1.0)
    assert compare.main([before, after]) == 0
    shown = capsys.readouterr().out
    assert "2.00 x" in shown and "faster" in shown and "gone" in shown and "0 slower" in shown
    assert compare.main([after, before]) == 1 and "1 slower" in capsys.readouterr().out
    (tmp_path / "bad.json").write_text("[]")
    assert compare.main([before, str(tmp_path / "bad.json")]) == 1
    assert "expected a result" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main([before])


def test_floors(monkeypatch, capsys):
    assert json.loads(compare.FLOORS.read_text()).keys() == compare.PAIRS.keys()
    slept = []

    def pair(theirs, ours):
        return lambda: (lambda: time.sleep(theirs), lambda: (slept.append(1), time.sleep(ours)))

    monkeypatch.setattr(compare, "PAIRS", {"good": pair(0.02, 0.002), "bad": pair(0.002, 0.02)})
    assert compare.Ratio("x", 2.0, 1.0, spread=1.1).verdict == "MISSED"
    assert "disturbed" in compare.Ratio("x", 2.0, 1.0, spread=3.0).verdict
    monkeypatch.setattr(compare, "DISTURBED", 1e9)  # the test may run on a busy machine itself
    found = {r.name: r for r in compare.check_floors({"good": 2.0, "bad": 2.0}, seconds=0.01)}
    assert found["good"].verdict == "" and found["bad"].verdict == "MISSED" and found["bad"].measured < 1
    monkeypatch.setattr(compare, "FLOORS", SimpleNamespace(read_text=lambda: '{"good": 2, "bad": 2}', name="f"))
    assert compare.main(["--floors", "--seconds", "0.01"]) == 1 and "MISSED" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a floor for each ratio; different: other"):
        compare.check_floors({"good": 1, "bad": 1, "other": 1}, 0)
