"""Tables, tars, datasets, URLs and lists: the rows of files given one by one; and that none of them is trusted."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lbfast.data.sample import Member
from lbfast.embedding import embed_files, find_items, pipeline
from lbfast.embedding.fused import stem_of
from lbfast.embedding.places import listed
from tests import tiny
from tests.test_processing_video import make_video


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [str(tiny.checkpoint(folder, name)) for name in ("image", "video")]


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "in").mkdir()
    return [tiny.picture(tmp_path / "in" / f"{i}.jpg", seed=i) for i in range(3)]


@pytest.fixture
def plain(models, pictures, tmp_path):
    """Embeddings of the pictures as files, in order."""
    return embed(models, pictures, tmp_path / "plain.parquet")[1]


def embed(models, inputs, out, **options):
    found = embed_files(inputs, models, out, dtype="float32", **options)
    rows = pq.read_table(out).to_pylist() if found.out else []
    return [row["id"] for row in rows], np.array([row["embedding"] for row in rows], np.float32), found


def names(inputs, **options):
    found = find_items(inputs, ["image"], None, **options)
    return [item.id for item in found.items], [f"{failure.path}: {failure.reason}" for failure in found.failures]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_of_paths(models, pictures, plain, tmp_path, suffix):
    """Relative to the table's folder, or absolute; the rows are those of the files."""
    table, paths = tmp_path / f"table.{suffix}", ["in/0.jpg", str(pictures[1]), "in/2.jpg"]
    if suffix == "jsonl":
        table.write_text("".join(json.dumps({"file": path}) + "\n" for path in paths))
    elif suffix == "parquet":
        pq.write_table(pa.table({"file": paths, "n": [1, 2, 3]}), table)
    else:
        table.write_text(
            "n,file\n".replace(",", "\t" if suffix == "tsv" else ",")
            + "".join(f"{i}{chr(9) if suffix == 'tsv' else ','}{path}\n" for i, path in enumerate(paths))
        )
    ids, vectors, _ = embed(models, [table], tmp_path / "out.parquet", column="file")
    assert ids == [f"image:{tmp_path}/in/{i}.jpg" for i in range(3)] and np.array_equal(vectors, plain)
    assert embed(models, [table], tmp_path / "out.parquet", column="file")[2].finished


def test_tables_of_captions(models, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text('id,caption\n1,a cat\n2,"a dog, wet"\n3,\n')
    (tmp_path / "words.txt").write_text("a cat\na dog, wet\n")
    ids, vectors, _ = embed(models, [f"language={table}"], tmp_path / "out.parquet", column="caption")
    assert ids == [f"language:{table}#1", f"language:{table}#2"]
    assert np.array_equal(vectors, embed(models, [tmp_path / "words.txt"], tmp_path / "words.parquet")[1])


def test_tables_of_bytes(models, pictures, plain, tmp_path):
    data = [path.read_bytes() for path in pictures]
    one, other = tmp_path / "struct.parquet", tmp_path / "plain.parquet.parquet"
    files = pa.array([{"bytes": each, "path": f"x{i}.jpg"} for i, each in enumerate(data)])
    pq.write_table(pa.table({"label": [1, 2, 3], "picture": files}), one, row_group_size=2)
    pq.write_table(pa.table({"raw": pa.array(data, pa.binary())}), other, row_group_size=1)
    ids, vectors, _ = embed(models, [one], tmp_path / "one", workers=1)
    assert ids == [f"image:{one}#{i}" for i in (1, 2, 3)] and np.array_equal(vectors, plain)
    ids, vectors, _ = embed(models, [f"image={other}"], tmp_path / "other")
    assert ids == [f"image:{other}#{i}" for i in (1, 2, 3)] and np.array_equal(vectors, plain)
    assert "bytes that do not say what they are" in embed(models, [other], tmp_path / "no")[2].failures[0].reason
    pq.write_table(pa.table({"picture": pa.array([{"bytes": b"no picture", "path": "a.jpg"}])}), one)
    found = embed(models, [one], tmp_path / "bad")[2]
    assert [f.reason.split(": expected")[0] for f in found.failures] == [f"{one}#1"]


def saved(folder: Path, column: pa.Array, name="data-0.arrow", kind="Image") -> Path:
    """As datasets' save_to_disk writes it."""
    folder.mkdir()
    features = {"info": {"features": {"file": {"_type": kind}}}}
    table = pa.table({"file": column}).replace_schema_metadata({"huggingface": json.dumps(features)})
    with pa.OSFile(str(folder / os.path.basename(name)), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    return folder


def test_datasets_of_hugging_face(models, pictures, plain, tmp_path):
    data = [{"bytes": pictures[0].read_bytes(), "path": None}, {"bytes": pictures[1].read_bytes(), "path": "b.jpg"}]
    data.append({"bytes": None, "path": str(pictures[2])})
    folder = saved(tmp_path / "set", pa.array(data))
    ids, vectors, _ = embed(models, [folder], tmp_path / "out.parquet")
    assert ids == [f"image:{folder}/data-0.arrow#{i}" for i in (1, 2, 3)] and np.array_equal(vectors, plain)
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "dataset_dict.json").write_text('{"splits": ["train"]}')
    folder.rename(splits / "train")
    assert len(embed(models, [splits], tmp_path / "splits.parquet")[0]) == 3


@pytest.mark.parametrize("bad", ["../set/data-0.arrow", "/etc/passwd", "..", ""])
def test_a_dataset_names_no_files_elsewhere(tmp_path, bad):
    folder = saved(tmp_path / "set", pa.array([{"bytes": b"", "path": None}]), name="data-0.arrow")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": bad}]}))
    ids, failures = names([folder])
    assert not ids and "expected a name in the folder" in failures[0]


@pytest.mark.parametrize(
    "name,content,reason",
    [
        ("a.csv", "file\nx.jpg\n", "expected one column path (column names another), got file"),
        ("a.csv", "path,path\nx,y\n", "expected one column path"),
        ("a.csv", "path\n" + "x" * 2_000_000, "expected lines of at most 1,048,576 characters"),
        ("a.jsonl", '{"file": "x"}\n', "expected a field path, got none"),
        ("a.parquet", "PAR1 or not", "a table that cannot be read"),
        ("a.arrow", "no stream", "a table that cannot be read"),
        ("a.tar", b"\x1f\x8b" + bytes(600), "compressed with gzip; decompress it first"),
        ("a.tar", b"x" * 600, "broken from the beginning"),
    ],
)
def test_tables_and_tars_that_are_none(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    ids, failures = names([tmp_path / name])
    assert not ids and failures[0].startswith(f"{tmp_path / name}: ") and reason in failures[0]


def test_columns_of_other_types(tmp_path):
    pq.write_table(pa.table({"path": [1, 2]}), tmp_path / "a.parquet")
    assert (
        "column path: expected text, bytes, or a struct of bytes and path, got int64"
        in names([tmp_path / "a.parquet"])[1][0]
    )


def test_tars(models, pictures, plain, tmp_path):
    tar = tmp_path / "shard.tar"
    video = make_video(tmp_path / "v.mp4")
    with tarfile.open(tar, "w") as file:
        for i, path in enumerate(pictures):
            file.add(path, f"s/{i}.jpg")
        file.add(video, "s/v.mp4")
        words = tarfile.TarInfo("../../s/0.txt")
        words.size = 14
        file.addfile(words, io.BytesIO(b"a cat\n\na dog.\n"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"s/link{kind[0]}.jpg")
            link.type, link.linkname = kind, "/etc/passwd"
            file.addfile(link)
    ids, vectors, _ = embed(models, [tar], tmp_path / "out.parquet", workers=1)
    assert ids[:3] == [f"image:{tar}/s/{i}.jpg" for i in range(3)] and np.array_equal(vectors[:3], plain)
    assert ids[3:] == [f"video:{tar}/s/v.mp4", f"language:{tar}/../../s/0.txt#1", f"language:{tar}/../../s/0.txt#3"]
    clip = embed(models, [video], tmp_path / "video.parquet")[1][0]
    assert np.array_equal(vectors[3], clip)
    parts = embed(models, [f"video={tar}"], tmp_path / "parts.parquet", segment="0.5s")
    assert sum("v.mp4#" in name for name in parts[0]) == 4
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    ids, failures = names([tar])
    assert ids and len(failures) == 1 and "truncated" in failures[0]


def test_a_member_is_a_file_of_its_own(tmp_path):
    file = tmp_path / "a.tar"
    file.write_bytes(bytes(100) + b"0123456789" + bytes(100))
    with Member(str(file), "x", 100, 10).opened() as opened:
        assert (opened.read(), opened.read(), opened.seek(-4, 2), opened.read(2)) == (b"0123456789", b"", 6, b"67")
        assert (opened.seek(50), opened.read(5), opened.name) == (50, b"", f"{file}/x")
    with Member(str(file), "x", 205, 10).opened() as opened, pytest.raises(ValueError, match="has the tar changed"):
        opened.read()


def test_lists_on_the_standard_input(models, pictures, plain, tmp_path, monkeypatch):
    assert list(listed(io.BytesIO(b"a.jpg\r\n\ndepth=b c.png\nlast"))) == ["a.jpg", "depth=b c.png", "last"]
    assert list(listed(io.BytesIO(b"a\nb.jpg\0c.jpg\0"))) == ["a\nb.jpg", "c.jpg"]
    assert list(listed(io.BytesIO(b"\n".join(b"%d.jpg" % i for i in range(50_000))))) == [
        f"{i}.jpg" for i in range(50_000)
    ]
    with pytest.raises(ValueError, match="names of at most 1,048,576 bytes"):
        list(listed(io.BytesIO(bytes([65]) * 3_000_000)))
    monkeypatch.setattr(pipeline, "listed", lambda: listed(io.BytesIO("\n".join(map(str, pictures)).encode())))
    ids, vectors, _ = embed(models, ["-"], tmp_path / "out.parquet")
    assert ids == [f"image:{path}" for path in pictures] and np.array_equal(vectors, plain)


def test_folders_and_wildcards_of_urls(models, pictures, plain, tmp_path):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for path in [*pictures, pictures[0]]:
        memory.pipe_file(f"/bucket/dir/{path.name}", path.read_bytes())
    memory.pipe_file("/bucket/dir/sub/deep.jpg", pictures[0].read_bytes())
    memory.pipe_file("/bucket/dir/.hidden.jpg", b"")
    memory.pipe_file("/bucket/dir/notes.xyz", b"")
    ids, vectors, _ = embed(models, ["memory://bucket/dir/*.jpg"], tmp_path / "out.parquet", allow_urls=True)
    assert ids == [f"image:memory:///bucket/dir/{i}.jpg" for i in range(3)] and np.array_equal(vectors, plain)
    for url in ("memory://bucket/dir/", "memory://bucket/**"):
        ids, failures = names([url], allow_urls=True)
        assert [name.rpartition("/")[2] for name in ids] == ["0.jpg", "1.jpg", "2.jpg", "deep.jpg"] and not failures
    assert names(["memory://bucket/none/"], allow_urls=True)[1] and names(["memory://bucket/dir/"])[1]


@pytest.mark.parametrize(
    "suffix, lines, reason",
    [
        ("jsonl", ['{"path": "in/0.jpg"}', '{"path": "a\\u0000.jpg"}', '{"path": "in/2.jpg"}'], "null byte"),
        ("jsonl", ['{"path": "in/0.jpg"}', '{"path": "\\ud800.jpg"}', '{"path": "in/2.jpg"}'], "not UTF-8"),
        ("jsonl", ['{"path": "in/0.jpg"}', "[" * 100_000, '{"path": "in/2.jpg"}'], "got RecursionError"),
        ("jsonl", ['{"path": "in/0.jpg"}', "{bad", '{"path": "in/2.jpg"}'], "expected a JSON object"),
        ("jsonl", ['{"path": "in/0.jpg"}', '{"path": 3}', '{"path": "in/2.jpg"}'], "expected an object with text"),
        ("jsonl", ['{"path": "in/0.jpg"}', "[1]", '{"path": "in/2.jpg"}'], "expected an object with text"),
        ("csv", ["path", "in/0.jpg", b"gr\xfcn.jpg", "in/2.jpg"], "not UTF-8"),
        ("csv", ["path", "in/0.jpg", "in/no.jpg", "in/2.jpg"], "No such file"),
        ("csv", ["path", "in/0.jpg", "in/x", "in/2.jpg"], "No such file"),
    ],
)
def test_a_bad_row_hurts_no_other(pictures, tmp_path, suffix, lines, reason):
    content = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    (tmp_path / f"t.{suffix}").write_bytes(content)
    ids, failures = names([tmp_path / f"t.{suffix}"])
    assert ids == [f"image:{tmp_path}/in/{i}.jpg" for i in (0, 2)]
    assert len(failures) == 1 and reason in failures[0]


def test_rows_without_anything_are_counted(pictures, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"path": null}\n{"path": ""}\n{}\n{"path": "in/0.jpg"}\n')
    (tmp_path / "t.csv").write_text('n,path\n1,in/1.jpg\n2,""\n3\n')
    pq.write_table(pa.table({"path": ["in/2.jpg", None]}), tmp_path / "t.parquet")
    found = find_items([tmp_path / f"t.{suffix}" for suffix in ("jsonl", "csv", "parquet")], ["image"], None)
    assert len(found.items) == 3 and not found.failures
    assert found.ignored == {"an empty row of a table": 6}


def test_members_of_one_name_are_told(pictures, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for picture in pictures[:2]:
            tar.add(picture, "a.jpg")
    ids, failures = names([tmp_path / "x.tar", f"{tmp_path}/../{tmp_path.name}/x.tar"])
    assert ids == [f"image:{tmp_path}/x.tar/a.jpg"]
    assert failures == [f"{tmp_path}/x.tar/a.jpg: the tar has two members of this name; the first is used"]


def test_what_a_file_of_a_table_is_called(pictures, tmp_path):
    """The path beside its bytes is its stem, for what is fused and for shares, and says its modality."""
    content = {"bytes": [path.read_bytes() for path in pictures], "path": ["k/0.jpg", "k/1.mp4", "k/2.wav"]}
    pq.write_table(pa.table(content), tmp_path / "t.parquet")
    found = list(find_items([tmp_path / "t.parquet"], ["image", "video", "audio"], None).items)
    assert {(item.modality, stem_of(item, [])) for item in found} == {
        ("image", "k/0"),
        ("video", "k/1"),
        ("audio", "k/2"),
    }


def test_arrows_own_files(pictures, tmp_path):
    """Of both kinds, whatever the letters of their suffix; categories are text."""
    made = pa.table({"path": pa.array([f"in/{i}.jpg" for i in range(3)]).dictionary_encode()})
    for name, new in (("a.arrow", pa.ipc.new_file), ("b.ARROW", pa.ipc.new_stream)):
        with new(tmp_path / name, made.schema) as writer:
            writer.write_table(made)
        assert names([tmp_path / name])[0] == [f"image:{tmp_path}/in/{i}.jpg" for i in range(3)]


def test_names_that_look_like_something_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.picture(Path("image=z.jpg"))
    Path("end.jpg\r").write_bytes(Path("image=z.jpg").read_bytes())
    assert names(["image=z.jpg"])[0] == ["image:image=z.jpg"]
    assert list(listed(io.BytesIO(b"end.jpg\r\0x.jpg\0"))) == ["end.jpg\r", "x.jpg"]
    assert list(listed(io.BytesIO(b"end.jpg\r\nx.jpg\r\n"))) == ["end.jpg", "x.jpg"]
    assert names(["no-such-folder"])[1] == ["no-such-folder: No such file or directory"]


def test_a_standard_input_that_is_closed_or_empty(models, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match="standard input, which is closed"):
        embed_files(["-"], models, tmp_path / "out.parquet")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert embed_files(["-"], models, tmp_path / "out.parquet").failures[0].reason == "no names on the standard input"


def test_a_wildcard_below_a_hidden_folder(tmp_path):
    pytest.importorskip("fsspec")
    (tmp_path / ".hid").mkdir()
    tiny.picture(tmp_path / ".hid" / "a.jpg")
    tiny.picture(tmp_path / ".hid" / ".b.jpg")
    assert names([f"file://{tmp_path}/.hid/*.jpg"], allow_urls=True)[0] == [f"image:file://{tmp_path}/.hid/a.jpg"]
