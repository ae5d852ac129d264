"""What README and docs show, runs: every block of Python and of commands, in order, a folder for each page."""

import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import lbfast.cli  # noqa: F401  registers the commands
from lbfast.cli.app import app
from lbfast.processing.text import write_clip_vocabulary
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<kind>python|bash)\n(?P<text>.*?)```", re.DOTALL)
DOWNLOADS = "needs a download"
OTHERS = "needs a package that is not lbfast's"
REASONS = (DOWNLOADS, OTHERS, "needs a GPU", "takes minutes", "it is what runs this", "it runs until it is stopped")


def blocks(page):
    """(kind, text, why it is not run or None) of each block of a page."""
    text = page.read_text(encoding="utf-8")
    found = [(match["kind"], match["text"], match["why"]) for match in BLOCK.finditer(text)]
    assert len(found) == len(re.findall(r"^```(?:python|bash)\n", text, re.MULTILINE)), page
    return found


def commands(text):
    """The words of each command of a block of bash."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_options(words):
    """Fails where `lbfast` has no such command, or the command no such option."""
    command, rest = typer.main.get_command(app), words[1:]
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"{shlex.join(words)}: no such command"
        command, rest = command.commands[rest[0]], rest[1:]
    if command.context_settings.get("ignore_unknown_options"):
        return  # a bench's own
    known = {option for parameter in command.params for option in parameter.opts}
    odd = [word for word in rest if word.startswith("--") and word not in known]
    assert not odd, f"{shlex.join(words)}: no option {', '.join(odd)}"


def run_command(words):
    if words[0] == "cp":
        (source,) = Path().glob(words[1])
        Path(words[2]).write_bytes(source.read_bytes())
        return
    assert words[0] == "lbfast", f"a page runs lbfast and cp, not {words[0]}"
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, f"{shlex.join(words)}\n{done.output}\n{done.exception!r}"


@pytest.fixture
def published(tmp_path):
    """Tiny checkpoints and files of the names that pages use, in a folder of their own."""
    folder = tmp_path / "published"
    names = {name: f"LanguageBind_{name.capitalize()}" for name in ("thermal", "image", "depth")}
    names |= {"video": "LanguageBind_Video_FT", "audio": "LanguageBind_Audio_FT"}
    for modality, name in names.items():
        tiny.model(modality).save_pretrained(folder / "LanguageBind" / name)
        write_clip_vocabulary(folder / "LanguageBind" / name)
    for stem in ("a", "b"):
        tiny.clip(folder / f"{stem}.mp4")
        tiny.sound(folder / f"{stem}.wav")
        tiny.depth_map(folder / f"{stem}.png")
    return folder


@pytest.mark.parametrize("page", [p for p in PAGES if DOWNLOADS in p.read_text(encoding="utf-8")], ids=lambda p: p.stem)
def test_downloads_run_on_local_directories(page, published, monkeypatch):
    """Verbatim: a name of the hub may be a directory."""
    pytest.importorskip("av")
    monkeypatch.chdir(published)
    for kind, text, why in blocks(page):
        if kind == "python" and why == DOWNLOADS:
            scope: dict = {}
            exec(compile(text, str(page), "exec"), scope)
            assert scope["embeddings"]["video"].shape == (2, tiny.SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page, tmp_path, monkeypatch):
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "page"}
    for kind, text, why in blocks(page):
        assert why is None or why in REASONS, why
        if kind == "python":
            code = compile(text, str(page), "exec")
            if why is None:
                exec(code, scope)
            continue
        for words in commands(text):
            if why is None:
                run_command(words)
            elif words[0] == "lbfast":
                check_options(words)


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(script, tmp_path, monkeypatch, capsys):
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "__main__", "__file__": str(script)}
    exec(compile(script.read_text(encoding="utf-8"), str(script), "exec"), scope)
    assert capsys.readouterr().out.strip(), "an example shows something"


def test_an_unknown_option_is_seen():
    check_options(shlex.split("lbfast eval retrieval --model a --data b"))
    with pytest.raises(AssertionError, match="--bogus"):
        check_options(shlex.split("lbfast eval retrieval --bogus 1"))
    with pytest.raises(AssertionError, match="no such command"):
        check_options(shlex.split("lbfast evaluate"))


def every_command(command=None, path=("lbfast",)):
    """(words that name it, the command) of all."""
    command = command or typer.main.get_command(app)
    if not hasattr(command, "commands"):
        yield path, command
    for name, part in getattr(command, "commands", {}).items():
        yield from every_command(part, (*path, name))


def test_every_command_says_what_it_prints_and_gives_an_example():
    for path, command in every_command():
        first = command.help.splitlines()[0]
        assert all("\n" not in part.strip() for part in command.help.split("\n\n")), (
            f"{path}: a terminal wraps its lines"
        )
        verb, where = first.split()[0], r"\b(prints?|table|folder|file|it|them)\b"
        assert verb == "Prints" or (verb in ("Writes", "Makes", "Binds") and re.search(where, first)), path
        example = re.search(r"Example: (lbfast [^\n]+)", command.help)
        assert example and tuple(shlex.split(example[1])[: len(path)]) == path, path
        check_options(shlex.split(example[1]))


def test_links_lead_somewhere():
    """Links of README and docs to files of the project; mkdocs checks those among its pages."""
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


def public():
    """(name, object) of all that is public."""
    for module in ("lbfast", "lbfast.ops", "lbfast.training", "lbfast.evaluation", "lbfast.embedding", "lbfast.mini"):
        loaded = importlib.import_module(module)
        for name in getattr(loaded, "__all__", ["checkpoint"]):
            value = getattr(loaded, name)
            if callable(value):
                yield f"{module}.{name}", value


def test_public_names_are_documented():
    bare = [name for name, value in public() if not (inspect.getdoc(value) or "").strip()]
    assert not bare, bare
    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^::: ([\w.]+)$", api, re.MULTILINE))
    homes = {f"{value.__module__}.{value.__qualname__}" for _, value in public()}
    families = re.compile(r"LanguageBind(Image|Video|Audio|Depth|Thermal)(Config|Processor|Tokenizer)?$")
    missing = sorted(home for home in homes if home not in shown and not families.search(home))
    assert not missing, missing
