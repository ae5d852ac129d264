"""The commands: what they print, how they end, and the doctor on a broken installation."""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import os
import pkgutil
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from typer.testing import CliRunner

import lbfast
import lbfast.__main__
import lbfast.ops
from bench import demo as bench_demo
from lbfast import demo, dispatch, doctor, native
from lbfast.cli import app
from lbfast.cli.app import Lines, between_words
from tests import tiny


def invoke(*arguments: object):
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("models"), "image")


def test_version_and_help():
    assert invoke("--version").output == f"lbfast {lbfast.__version__}\n"
    shown = invoke("--help").output
    assert all(command in shown for command in ("embed", "doctor", "demo"))
    assert "[MODALITY=]DIR_OR_NAME" in invoke("embed", "--help").output
    assert invoke("embed").exit_code == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_break_between_words_on_a_terminal_only():
    path = "/data/" + "long_name/" * 5 + "clip.mp4"
    text = f"error: embeddings: no such file or folder: {path}: or\n  it is [not] 表 "
    shown = {}
    for kind in (Terminal, io.StringIO):
        console = Lines(file=kind(), width=70, soft_wrap=True, color_system=None)
        console.print(escape(text), highlight=False)
        shown[kind] = console.file.getvalue()
    assert shown[io.StringIO] == f"{text}\n"
    first, rest = text.split(path)
    assert shown[Terminal] == f"{first.rstrip()}\n{path}{rest}\n"  # : and or fit beside it
    wide = "x" * 75
    assert between_words(Text(f"a {wide} b c{' c' * 40}"), 70).plain.split("\n")[0] == f"a {wide} b c{' c' * 29}"
    assert between_words(Text("表 " * 30 + "end"), 10).plain == "\n".join(["表 表 表"] * 10) + "\nend"


def test_no_word_of_a_help_breaks():
    """At 80 columns, in the column of types: none is wider than it."""
    for command in ("embed", "train", "export", "search", "serve", "profile", "eval retrieval", "mini make"):
        result = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(app, [*command.split(), "--help"])
        assert "--help" in result.output
        for line in result.output.splitlines():
            types = re.sub("[<>]=", "", line)  # of ranges
            assert types.count("<") == types.count(">") and len(line) <= 80, line


def test_embed_reports_and_goes_on(image_model, tmp_path):
    tiny.picture(tmp_path / "in" / "good.jpg")
    (tmp_path / "in" / "[bold]bad.jpg").write_text("no picture")
    (tmp_path / "in" / "notes.pdf").write_bytes(b"")
    (tmp_path / "in" / "words.txt").write_text("one\ntwo\n")
    out = tmp_path / "out.parquet"
    result = invoke("embed", tmp_path / "in", "--model", image_model, "--out", out, "--workers", 0)
    assert result.exit_code == 0
    assert result.stdout == f"3 embedded (1 image, 2 language), 1 failed -> {out}\n"
    assert "skipped" in result.stderr and "[bold]bad.jpg: expected an image, got text" in result.stderr
    assert "ignored 1 file: unknown type .pdf" in result.stderr
    assert "\nwarning: " in f"\n{result.stderr}" and "no tokenizer there" in result.stderr
    assert "UserWarning" not in result.stderr  # nor the place in our sources

    again = invoke("embed", tmp_path / "in", "--model", image_model, "--out", out)
    said = "3 embedded (1 image, 2 language) by an earlier run of the same inputs and settings, 1 failed"
    assert again.exit_code == 0 and again.stdout == f"nothing left to do: {said} -> {out}\n"
    some = invoke("embed", tmp_path / "in" / "words.txt", "--model", image_model, "--out", out)
    said = "3 embedded (1 image, 2 language) by earlier runs of the same settings, 0 failed"
    assert some.exit_code == 0 and some.stdout == f"nothing left to do: {said} -> {out}\n"
    assert "kept 1 rows of files that are not among these" in some.stderr
    other = invoke("embed", tmp_path / "in" / "words.txt", "--model", image_model, "--out", out, "--dim", 4)
    assert other.exit_code == 1 and f"overwrite replaces it: {out}" in other.stderr
    assert other.stderr.count("\n") == 1


def test_embed_strict_stops(image_model, tmp_path):
    (tmp_path / "bad.jpg").write_text("no picture")
    tiny.picture(tmp_path / "good.jpg")
    out = tmp_path / "out.parquet"
    result = invoke("embed", tmp_path, "--model", image_model, "--out", out, "--workers", 0, "--strict")
    assert result.exit_code == 1 and result.stdout == ""
    assert re.fullmatch(r"error: .*bad\.jpg: expected an image, got text\n", result.stderr)
    assert not out.exists()


def test_embed_nothing(image_model, tmp_path):
    result = invoke("embed", tmp_path / "none.jpg", "--model", image_model, "--out", tmp_path / "out.parquet")
    assert result.exit_code == 1
    assert result.stdout == "0 embedded, 1 failed; nothing was written\n"
    assert "none.jpg: No such file or directory" in result.stderr


def test_embed_a_name_offline(tmp_path):
    tiny.picture(tmp_path / "a.jpg")
    out = tmp_path / "out.parquet"
    result = invoke("embed", tmp_path, "--model", "LanguageBind_Image", "--out", out, "--cache-dir", tmp_path / "cache")
    assert result.exit_code == 1 and result.stderr.startswith("error: LanguageBind/LanguageBind_Image: not a local")


def test_the_script_and_the_module_run_it():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="lbfast") or [None]
    assert script is None or script.load() is lbfast.__main__.main  # None: run from a plain checkout
    shown = subprocess.run([sys.executable, "-m", "lbfast", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"lbfast {lbfast.__version__}\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        shown = subprocess.run(
            [sys.executable, "-m", "lbfast", "--version"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (shown.returncode, shown.stderr) == (1, "error: cannot write to stdout: No space left on device\n")


def test_what_libraries_print_goes_into_no_file_of_ours():
    """Where the caller has closed stderr, a file that is opened would be it."""
    program = "import sys; from lbfast.__main__ import main; sys.argv = ['lbfast', '--help']\ntry: main()\n"
    program += "finally: print(open('/dev/zero').fileno())"
    shown = subprocess.run(["sh", "-c", '"$0" -c "$1" 2>&-', sys.executable, program], capture_output=True, text=True)
    assert int(shown.stdout.split()[-1]) > 2


def op_names() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(lbfast.ops.__path__) if not m.name.startswith("_")]


def test_doctor_asks_every_op():
    implementations = {name: importlib.import_module(f"lbfast.ops.{name}").IMPLEMENTATIONS for name in op_names()}
    assert {op for op, _ in doctor.SAMPLES.values()} == set(implementations)
    for choice in doctor.choices("cpu"):
        names = implementations[doctor.SAMPLES[choice.label][0]]
        for dtype in doctor.DTYPES:
            assert choice.chosen[dtype] in names, choice
            others = {name for name, why in choice.against.items() if any(dtype in d for d in why.values())}
            assert others == names.keys() - {choice.chosen[dtype]}, choice


def test_doctor_says_why():
    with dispatch.use_impl("torch"):
        chosen = {choice.label: choice for choice in doctor.choices("cpu")}
    assert set(chosen["temporal_attention"].chosen.values()) == {"torch"}
    assert not any("could, and comes after" in why for why in chosen["temporal_attention"].against["native"])


def printed(width: int = 200, why: bool = False) -> str:
    console = Console(width=width, file=io.StringIO())
    doctor.examine(console, why)
    return console.file.getvalue()


def test_doctor_on_this_machine():
    shown = printed()
    assert torch.__version__ in shown and doctor.cpu_name() in shown
    assert all(name in shown for name in op_names())
    assert "cannot" not in shown
    assert "the tensors are not on a GPU" not in shown and "the tensors are not on a GPU" in printed(why=True)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"vendor_id": "AuthenticAMD", "cpu family": "25", "flags": "fma avx512f"}, "AMD EPYC, Zen 4"),
        ({"vendor_id": "AuthenticAMD", "cpu family": "25", "flags": "fma avx2"}, "AMD EPYC, Zen 3"),
        ({"vendor_id": "AuthenticAMD", "cpu family": "26", "flags": "avx512f"}, "AMD EPYC, Zen 5"),
        ({"vendor_id": "AuthenticAMD", "cpu family": "23"}, "AMD EPYC"),
        ({"vendor_id": "GenuineIntel", "cpu family": "25"}, "AMD EPYC"),
    ],
)
def test_the_generation_is_part_of_a_cpus_name(monkeypatch, fields, name):
    monkeypatch.setattr(doctor, "_cpu_fields", lambda: {"model name": "AMD EPYC", **fields})
    assert doctor.cpu_name() == name


def test_doctor_fits_a_terminal():
    lines = printed(width=80).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) <= 60
    assert not any("…" in line for line in printed(width=80, why=True).splitlines())
    table = lines[lines.index(next(line for line in lines if line.startswith("Implementations"))) :]
    for label in doctor.SAMPLES:
        assert sum(line.split("│")[1].strip() == label for line in table if line.startswith("│")) >= 1, label


def test_doctor_on_a_broken_machine(monkeypatch):
    def broken(*_):
        raise OSError("libhurt.so: file too short")

    monkeypatch.setattr(native, "why_not", broken)
    monkeypatch.setattr(native, "library_name", broken)
    monkeypatch.setattr(dispatch, "why_not_native", broken)
    monkeypatch.setattr(doctor, "_PACKAGES", {"numpy": ("no_such_module", "x"), "nonesuch": ("nonesuch", "sound")})
    shown = printed()
    assert "but cannot be imported: ModuleNotFoundError" in shown and "not installed; it is for sound" in shown
    assert "not available: OSError: libhurt.so: file too short" in shown
    assert "cannot tell: libhurt.so: file too short" in shown


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A demo of fewer scenes."""
    pytest.importorskip("av")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo, "SCENES", 10)
        yield demo.run(tmp_path_factory.mktemp("demo"), Console(quiet=True))


def test_demo_prints_upstreams_tables(made):
    console = Console(width=250, file=io.StringIO())
    demo.show(console, made)
    shown = console.file.getvalue()
    titles = ["Video x Text", "Image x Text", "Depth x Text", "Audio x Text", "Thermal x Text"]
    titles += ["Video x Audio", "Image x Depth", "Image x Thermal"]
    assert [line.strip() for line in shown.splitlines() if " x " in line] == titles
    modalities = {"image", "video", "depth", "audio", "thermal"}
    for shapes in (made.embeddings, made.language):
        assert {name: tuple(x.shape) for name, x in shapes.items()} == dict.fromkeys(modalities, (10, 64))
    numbers = [float(n) for n in re.findall(r"\b[01]\.\d{4}\b", shown)]
    assert len(numbers) == 4 * len(titles)
    assert all(abs(a + b - 1) < 2e-4 for a, b in zip(numbers[::2], numbers[1::2]))  # softmax over a row


def test_demo_finds_unseen_scenes(made):
    """Text and files of a scene find each other, and so do senses never trained together."""
    console = Console(width=250, file=io.StringIO())
    demo.show(console, made)
    found = re.findall(r"│ (\w+) -> (\w+)[^│]*│ +(\d+) % │ +(\d+) % │", console.file.getvalue())
    assert [(first, second) for first, second, *_ in found] == [
        (first.replace("language", "text"), second) for first, second in demo.FINDS
    ]
    for first, _, one, five in found:
        assert int(one) >= (80 if first == "text" else 30) and int(five) >= int(one)


def test_demo_compares_with_the_reference(made, monkeypatch):
    monkeypatch.setattr(bench_demo, "SECONDS", 0.0)
    configs = {name: tiny.config(name) for name in made.files}
    inputs = bench_demo.inputs(configs, made)
    results = bench_demo.compare(bench_demo.models(configs, torch.float32), inputs, torch.float32)
    assert [result.name for result in results] == ["image", "language", "video", "audio", "depth", "thermal"]
    for result in results:
        assert result.difference <= bench_demo.LIMITS[torch.float32], result
        assert len(result.ours) == len(result.theirs) == bench_demo.LEAST_ROUNDS
        assert result.shape[0] == (5 if result.name == "language" else 1)
    assert len(bench_demo.table(results, torch.float32).rows) == 6
    shallow = bench_demo.configs(("video", "audio"), 2)
    layers = [(c.vision_config.num_hidden_layers, c.text_config.num_hidden_layers) for c in shallow.values()]
    assert layers == [(2, 2)] * 2 and bench_demo.configs(["image"], None)["image"].vision_config.num_hidden_layers == 24
