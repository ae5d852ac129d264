"""Search against brute force; tables of others, hostile ones too; the page; what the docs have of other tools."""

from __future__ import annotations

import html.parser
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from typer.testing import CliRunner

import lbfast
from lbfast.cli import app
from lbfast.embedding import Embedder, embed_files
from lbfast.searching import table as tables
from lbfast.searching.find import Found, Hit, nearest, search
from lbfast.searching.page import caption_of, page, thumbnail
from lbfast.searching.table import Table, models_of
from tests import tiny
from tests.test_docs import OTHERS as NEEDS_OTHERS, blocks

ROOT = Path(__file__).resolve().parent.parent


def write(where: Path, rows, kind=None, group: int = 7, **columns) -> Path:
    """A table of these embeddings; None is null."""
    kind = kind or pa.list_(pa.float32(), len(next(row for row in rows if row is not None)))
    made = {"id": [f"image:{i}.jpg" for i in range(len(rows))], "modality": ["image"] * len(rows), **columns}
    made = {name: values for name, values in made.items() if values is not None}
    pq.write_table(pa.table({**made, "embedding": pa.array(rows, kind)}), where, row_group_size=group)
    return where


def brute(rows, query, top: int) -> list[int]:
    """Sorted as a whole, in float64, equal ones by number."""
    rows = np.array([[np.nan] * len(query) if row is None else row for row in rows], dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1)
    with np.errstate(all="ignore"):
        scores = rows @ np.asarray(query, dtype=np.float64) / lengths
    fine = np.flatnonzero(np.isfinite(scores) & (lengths > 0))
    return sorted(fine.tolist(), key=lambda i: (-round(scores[i], 9), i))[:top]


numbers = st.integers(-3, 3)
some_rows = st.lists(
    st.one_of(st.none(), st.tuples(numbers, numbers), st.just((float("nan"), 1))), min_size=1, max_size=40
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some_rows, st.lists(st.tuples(numbers, numbers).filter(any), min_size=1, max_size=3), st.integers(1, 9))
def test_what_is_found_is_what_sorting_finds(tmp_path, rows, queries, top):
    """Small whole numbers: ties everywhere, zeros, NaN and nulls; blocks and groups of a few rows."""
    where = write(tmp_path / "a.parquet", rows, pa.list_(pa.float32(), 2), group=5)
    found = nearest(Table(where), np.array(queries, dtype=np.float32), top)
    for query, score, number in zip(queries, *found):
        length = np.linalg.norm(query)
        want = brute(rows, np.array(query) / length, top)
        # cosines that are equal may differ in the last bit of float32: they are then in either order
        cosines = [np.dot(rows[i], query) / np.linalg.norm(rows[i]) / length for i in want]
        np.testing.assert_allclose(score, cosines, atol=1e-6)
        assert all(rows[i] is not None and np.any(rows[i]) for i in number)
        assert len(set(number)) == len(number) == len(want)
        exact = [i for i in number if tuple(rows[i]) == tuple(rows[number[0]])]
        assert exact == sorted(exact), "of equal rows the first comes first"


@pytest.mark.parametrize("kind", [pa.list_(pa.float32(), 24), pa.list_(pa.float64()), pa.large_list(pa.float16())])
def test_many_rows_in_several_files(tmp_path, kind, monkeypatch):
    """Blocks smaller than groups of rows, and groups of several blocks; a folder is one table."""
    monkeypatch.setattr(tables, "ROWS", 50)
    monkeypatch.setattr(tables, "_WHOLE", 11_000)  # a whole group of rows is more, the rest of a file less
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((700, 24)).astype(np.float16)
    rows[[3, 333, 699]] = rows[0]
    modality = ["image"] * 300 + ["video"] * 400
    (tmp_path / "parts").mkdir()
    for number, (first, end) in enumerate([(0, 220), (220, 221), (221, 700)]):
        part = [*rows[first:end].astype(np.float32 if kind.value_type != pa.float16() else np.float16)]
        path = tmp_path / "parts" / f"{number}.parquet"
        names = [f"{i}.jpg" for i in range(first, end)]
        write(path, part, kind, group=120, modality=modality[first:end], path=names)
    query = rows[0].astype(np.float32)[None] * 3
    hits = search(tmp_path / "parts", query, top=12)[0].hits
    assert [hit.row for hit in hits] == brute(rows, query[0], 12)
    assert [hit.row for hit in hits[:4]] == [0, 3, 333, 699] and hits[2].path == "333.jpg"
    np.testing.assert_allclose([hit.score for hit in hits[:4]], 1, atol=1e-6)
    clips = search(tmp_path / "parts", query, top=800, modality="video")[0].hits
    assert [hit.row for hit in clips] == [300 + i for i in brute(rows[300:], query[0], 800)]
    assert {hit.modality for hit in clips} == {"video"} and len(clips) == 400
    assert search(tmp_path / "parts", query, modality="audio")[0].hits == []


def test_no_rows(tmp_path):
    where = write(tmp_path / "none.parquet", [], pa.list_(pa.float32(), 3))
    assert search(where, np.ones((2, 3)))[1].hits == []
    where = write(tmp_path / "nulls.parquet", [None, None], pa.list_(pa.float32(), 3))
    assert search(where, np.ones((1, 3)))[0].hits == []


@pytest.mark.parametrize("kind", [pa.list_(pa.float32(), 2), pa.list_(pa.float16()), pa.large_list(pa.float64())])
def test_columns_of_others(tmp_path, kind):
    """Nulls in rows and of rows, ids that are no strings, modalities in a dictionary, numbers beyond float32."""
    rows = [[None, 1.0], None, [0.0, 1.0], [np.inf, 1.0], [1.0, 1.0]]
    rows += [[1e39, 1.0]] if kind.value_type == pa.float64() else []
    modality = pa.array([None, "image", "image", "image", "video", "image"][: len(rows)]).dictionary_encode()
    where = write(
        tmp_path / "a.parquet", rows, kind, id=[*range(len(rows))], modality=modality, path=[b"\xff"] * len(rows)
    )
    hits = search(where, np.array([[0.0, 2.0]]))[0].hits
    assert [(hit.row, hit.id) for hit in hits] == [(2, "2"), (4, "4")]
    assert [hit.row for hit in search(where, np.array([[0.0, 2.0]]), modality="video")[0].hits] == [4]
    assert "not to be seen here" in page([Found("x", hits)], "a")


def test_tables_that_are_none(tmp_path):
    (tmp_path / "text.parquet").write_text("PAR1 and no more")
    (tmp_path / "folder").mkdir()
    whole = write(tmp_path / "whole.parquet", [[1.0, 0.0]] * 4000).read_bytes()
    (tmp_path / "torn.parquet").write_bytes(whole[:-20])
    damaged = bytearray(whole)
    damaged[4:2000] = bytes(1996)
    (tmp_path / "damaged.parquet").write_bytes(damaged)
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"embedding": ["a"]}), tmp_path / "strings.parquet")
    pq.write_table(pa.table({"embedding": [[1, 2]]}), tmp_path / "whole_numbers.parquet")
    pq.write_table(pa.table({"embedding": [[1.0, 2.0], [1.0]]}), tmp_path / "ragged.parquet")
    write(tmp_path / "bare.parquet", [[1.0, 0.0]], modality=None)
    for name, error in [
        ("nothing.parquet", "no such file or folder"),
        ("folder", "expected a folder with Parquet files, got none"),
        ("text.parquet", r"text.parquet: expected a Parquet file, got "),
        ("torn.parquet", r"torn.parquet: expected a Parquet file, got "),
        ("damaged.parquet", r"damaged.parquet: expected a Parquet file that can be read, got "),
        ("other.parquet", "expected one column embedding, got the columns id"),
        ("strings.parquet", "embedding: expected lists of floats, got string"),
        ("whole_numbers.parquet", "embedding: expected lists of floats, got list<"),
        ("ragged.parquet", "embedding: expected lists of 2 numbers, got of "),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            search(tmp_path / name, np.ones((1, 2)))
    with pytest.raises(ValueError, match="expected embeddings of 3 numbers, as the queries', got 2"):
        search(tmp_path / "whole.parquet", np.ones((1, 3)))
    with pytest.raises(ValueError, match="expected a column modality of strings to choose by, got none"):
        search(tmp_path / "bare.parquet", np.ones((1, 2)), modality="video")
    write(tmp_path / "odd.parquet", [[1.0, 0.0]], modality=[3])
    with pytest.raises(ValueError, match="expected a column modality of strings to choose by, got int64"):
        search(tmp_path / "odd.parquet", np.ones((1, 2)), modality="video")
    assert search(tmp_path / "bare.parquet", np.ones((1, 2)))[0].hits[0].modality == ""
    for queries, error in [
        ([], "queries: expected at least one, got none"),
        (np.ones(2), r"queries: expected finite embeddings \(q, E\), got shape \(2,\)"),
        (np.full((1, 2), np.nan), "queries: expected finite embeddings"),
        ("a cat", "models: expected some, for .* does not say which have made it"),
    ]:
        with pytest.raises(ValueError, match=error):
            search(tmp_path / "whole.parquet", queries)
    with pytest.raises(ValueError, match="top: expected a whole number from 1"):
        search(tmp_path / "whole.parquet", np.ones((1, 2)), top=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of two modalities and captions, with names that mean something to a terminal and a browser."""
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("search")
    models = [tiny.checkpoint(folder / "models", name) for name in ("image", "audio", "video")]
    for i in range(3):
        tiny.picture(folder / "files" / f"[red]<img src=x onerror=alert({i})>{i}.jpg", seed=i)
        tiny.sound(folder / "files" / f"{i}.wav", seed=i)
    tiny.clip(folder / "files" / "clip.mp4")
    (folder / "files" / "words.txt").write_text("a cat\n\n<script>alert(1)</script>\n")
    embed_files([folder / "files"], models, folder / "out.parquet", dtype="float32")
    return folder


def test_queries_of_every_kind(folder):
    embedder = Embedder([folder / "models" / name for name in ("image", "audio", "video")], dtype="float32")
    sound, clip = folder / "files" / "1.wav", folder / "files" / "clip.mp4"
    found = lbfast.search(folder / "out.parquet", ["a cat", sound, clip], top=3)
    assert [each.query for each in found] == ["a cat", sound, clip]
    assert found[0].hits[0].id.endswith("words.txt#1") and found[1].hits[0].path == str(sound)
    assert found[2].hits[0].path == str(clip)
    for each in found:
        assert each.hits[0].score == pytest.approx(1, abs=1e-5) and len(each.hits) == 3
    again = lbfast.search(folder / "out.parquet", "a cat", models=embedder, modality="language")
    assert [hit.modality for hit in again[0].hits] == ["language"] * 2
    with pytest.raises(ValueError, match=r"items\[0\]: .*no such file"):
        lbfast.search(folder / "out.parquet", folder / "nothing.wav")


def test_the_models_of_a_table(folder, tmp_path):
    """Its text's last; a file that was made by another model than is there now is a warning."""
    table = Table(folder / "out.parquet")
    assert [Path(name).name for name in models_of(table.settings)] == ["audio", "image", "video"]
    for other in ({}, {"models": 3}, {"models": {"image": 3}}, {"models": {}, "language": []}):
        assert models_of(other) == []
    where = tiny.checkpoint(tmp_path, "image")
    embed_files([tiny.picture(tmp_path / "a.jpg")], [where], tmp_path / "o.parquet")
    tiny.checkpoint(tmp_path, "image", seed=1)
    with pytest.warns(UserWarning, match="its files have another size, time or configuration"):
        search(tmp_path / "o.parquet", "a cat")


class Seen(html.parser.HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_what_it_is_given_and_does_not_obey_it(folder):
    found = search(folder / "out.parquet", ["<b>a</b>", folder / "files" / "0.wav"], top=20)
    odd = [
        Hit(0.5, 7, "image:x", "image", "http://a.b/c.jpg"),
        Hit(0.4, 8, "image:y", "image", "/etc/passwd"),
        Hit(0.3, 9, "video:z", "video", str(folder / "files" / "clip.mp4"), "m", 0.1, 0.3),
        Hit(0.2, 10),
        Hit(0.1, 11, "language:/proc/self/environ#1", "language", "/proc/self/environ"),
    ]
    seen = Seen(page([*found, Found(3, odd), Found("nobody", [])], "<i>table</i>"))
    known = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "section", "span", "q", "ol", "li"}
    assert {tag for tag, _ in seen.tags} <= known | {"figure", "div", "img", "figcaption", "b", "br"}
    images = [attrs["src"] for tag, attrs in seen.tags if tag == "img"]
    assert len(images) == 2 * 7 + 1 + 1 and all(source.startswith("data:image/jpeg;base64,") for source in images)
    assert not any(name.startswith("on") or name == "href" for _, attrs in seen.tags for name in attrs)
    for text in ("<b>a</b>", "<script>alert(1)</script>", "onerror=alert(2)", "<i>table</i>", "0.1-0.3 s", "row 10"):
        assert text in seen.text
    assert seen.text.count("not to be seen here") == 3 and "nothing found" in seen.text


def test_thumbnails(folder, tmp_path):
    files = folder / "files"
    for modality, path in [("video", files / "clip.mp4"), ("audio", files / "0.wav"), ("depth", tmp_path / "d.png")]:
        if modality == "depth":
            tiny.depth_map(path)
        small = thumbnail(modality, str(path))
        assert small is not None and max(small.size) <= 240
    assert thumbnail(None, str(files / "0.wav")) is not None
    (tmp_path / "bad.jpg").write_text("no picture")
    assert thumbnail("image", str(tmp_path / "bad.jpg")) is None and thumbnail("image", str(tmp_path)) is None


def test_captions_are_read_again(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("one\ntwo\n" + "x" * 400 + "\n")
    for line, text in [
        ("1", "one"),
        ("2", "two"),
        ("3", "x" * 300 + "..."),
        ("4", ""),
        ("0", ""),
        ("x", ""),
        ("²", ""),
    ]:
        assert caption_of(Hit(1, 0, f"language:{words}#{line}", "language", str(words))) == text, line


def test_the_command(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    run = CliRunner()
    options = ["search", "out.parquet", "a cat", "--audio", "files/1.wav", "--top", "2"]
    done = run.invoke(app, [*options, "--html", str(tmp_path / "page.html")], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    assert "files/1.wav" in done.output and "a cat" in done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "data:image/jpeg" in (tmp_path / "page.html").read_text()
    wide = {"COLUMNS": "1000"}  # a longer name is folded, wherever that is
    pictures = run.invoke(app, ["search", "out.parquet", "a cat", "--modality", "image"], env=wide)
    assert "[red]" in pictures.output  # a name, no colour
    for arguments, error in [
        (["out.parquet"], "expected something to search for"),
        (["none.parquet", "a cat"], "no such file or folder: none.parquet"),
        (["out.parquet", "a cat", "--modality", "depth"], "no embeddings of modality depth"),
        (["out.parquet", "--depth", "files/1.wav"], "modality: expected one that there is a model for"),
        (["out.parquet", "a cat", "--modality", "nope"], "no embeddings of modality nope"),
        (["out.parquet", "a cat", " "], "text 2: expected a text to search for, got only spaces"),
        (["out.parquet", "a cat", "--html", str(tmp_path)], "html: expected the name of a file, got a folder"),
        (["out.parquet", "a cat", "--html", "nowhere/a.html"], "html: expected a file in a folder that is there"),
    ]:
        done = run.invoke(app, ["search", *arguments])
        assert done.exit_code == 1 and error in " ".join(done.output.split()), done.output
        assert "score" not in done.output, "a table, though there is nothing to show"


def test_a_page_replaces_pages_only(folder, tmp_path, monkeypatch):
    """Whatever else is there stays, and is noticed before a model is opened."""
    table, run = tmp_path / "table.parquet", CliRunner()
    table.write_bytes((folder / "out.parquet").read_bytes())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").write_bytes(table.read_bytes())
    (tmp_path / "notes.html").write_text("<!DOCTYPE html>\nmine")
    (tmp_path / "empty.html").touch()
    (tmp_path / "link.html").symlink_to(table)
    sound = tmp_path / "query.wav"
    sound.write_bytes((folder / "files" / "1.wav").read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    html = ["--html", str(tmp_path / "page.html")]
    for _ in range(2):  # a new page, and one in the place of an earlier one
        done = run.invoke(app, ["search", str(table), "a cat", "--audio", str(sound), *html])
        assert done.exit_code == 0, done.output
    monkeypatch.setattr(Embedder, "encode", lambda *_: pytest.fail("embedded, though the page has no place"))
    for searched, page_at, error in [
        (table, table, "not what is searched, nor in it"),
        (table, tmp_path / "link.html", "not what is searched, nor in it"),
        (tmp_path / "in", tmp_path / "in" / "a.parquet", "not what is searched, nor in it"),
        (tmp_path / "in", tmp_path / "in" / "new.html", "not what is searched, nor in it"),
        (table, sound, "a file that is not searched with"),
        (table, tmp_path / "notes.html", "a page of lbfast search to replace, got another file"),
        (table, tmp_path / "empty.html", "a page of lbfast search to replace, got another file"),
        (table, tmp_path / "in" / "a.parquet", "a page of lbfast search to replace, got another file"),
    ]:
        done = run.invoke(app, ["search", str(searched), "a cat", "--audio", str(sound), "--html", str(page_at)])
        assert done.exit_code == 1 and error in " ".join(done.output.split()), (page_at, done.output)
    assert {path: path.read_bytes() for path in before} == before and not (tmp_path / "in" / "new.html").exists()


def test_queries_are_shown_in_their_order(folder, monkeypatch):
    monkeypatch.chdir(folder)
    first, second = "files/1.wav", "files/0.wav"
    for arguments, want in [
        (["--audio", first, "out.parquet", "a cat", f"--audio={second}", "a dog"], [first, "a cat", second, "a dog"]),
        (["out.parquet", "a cat", "--audio", first, "--", "--top"], ["a cat", first, "--top"]),
        (["--audio", first, "--", "out.parquet", "a cat"], [first, "a cat"]),
    ]:
        done = CliRunner().invoke(app, ["search", "--top", "1", *arguments])
        assert done.exit_code == 0, done.output
        lines = [line.strip() for line in done.stdout.splitlines()]
        assert [line for line in lines if line in want] == want, done.output


def test_rows_of_any_length(tmp_path):
    """Where float32 has no squares of their numbers; those that are not finite, or zero, are never found."""
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((60, 16)).astype(np.float32)
    query = draw.standard_normal((1, 16)).astype(np.float32)
    for scale in (1e-45, 1e-38, 1e-30, 1e-22, 1e-18, 1e18, 1e19, 1e30, 5e37):
        scaled = np.concatenate([rows[:30], (rows[30:].astype(np.float64) * scale).astype(np.float32), [[np.inf] * 16]])
        where = write(tmp_path / "a.parquet", [*scaled, np.zeros(16, np.float32)], pa.list_(pa.float32(), 16))
        wide = scaled[:60].astype(np.float64)
        lengths = np.linalg.norm(wide, axis=1)
        fine = np.flatnonzero(lengths)
        want = wide[fine] @ query[0] / lengths[fine] / np.linalg.norm(query.astype(np.float64))
        for size in (1, 1e-30, 1e30):
            (scores,), (found,) = nearest(Table(where), (query * size).astype(np.float32), 99)
            assert sorted(found) == fine.tolist(), scale
            np.testing.assert_allclose(scores[np.argsort(found)], want, atol=1e-6, err_msg=str(scale))


def test_queries_have_an_order_and_words(tmp_path):
    where = write(tmp_path / "a.parquet", [[1.0, 0.0]])
    for queries in ({"a cat"}, frozenset(["a cat"]), {"a cat": 1}):
        with pytest.raises(TypeError, match="queries: expected a text, a path, or a list, got"):
            search(where, queries)
    with pytest.raises(ValueError, match=r"queries\[1\]: expected a text to search for, got an empty one"):
        search(where, ["a cat", ""])


PAGE = blocks(ROOT / "docs" / "search.md")
OTHERS = [text for _, text, why in PAGE if why == NEEDS_OTHERS]


@pytest.mark.parametrize("text", OTHERS, ids=lambda text: re.match(r"import (\w+)", text)[1])
def test_others_find_the_same(text, tmp_path, monkeypatch):
    """What the documentation shows of other tools, verbatim, where they are installed."""
    pytest.importorskip(re.match(r"import (\w+)", text)[1])
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    vectors = torch.nn.functional.normalize(torch.from_numpy(draw.standard_normal((200, 16))).float(), dim=-1).numpy()
    write(Path("embeddings.parquet"), [*vectors])
    query = vectors[5:6] + 0.1
    table = pq.read_table("embeddings.parquet")
    scope = {"table": table, "vectors": vectors, "query": query}
    exec(compile(text, "docs/search.md", "exec"), scope)
    assert scope["found"] == [hit.id for hit in search("embeddings.parquet", query, top=3)[0].hits]
