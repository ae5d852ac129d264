"""Data at URLs: the same batches as from files, whatever the store does; or one clear line."""

from __future__ import annotations

import logging
import os
import time

import pyarrow.parquet as pq
import pytest
import torch

from lbfast.data import store
from lbfast.data.manifest import Manifest
from lbfast.data.reader import find_files
from lbfast.data.shards import Shard
from lbfast.data.store import Cache, StoreError, beside, look
from lbfast.data.tar import members
from lbfast.embedding import embed_files
from lbfast.evaluation.retrieval import retrieve_files
from lbfast.processing import transform_dict
from lbfast.training.batches import Batches
from lbfast.training.watch import task_of
from tests import stores, tiny
from tests.tiny import shard, table

pytest.importorskip("aiohttp")
COUNT = 12


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv(store.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv(store.PATIENCE, "4")
    monkeypatch.setattr(store, "_PAUSE", 0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("served")
    (where / "pictures").mkdir()
    files = [tiny.picture(where / "pictures" / f"{i:02}.png", seed=i) for i in range(COUNT)]
    table(where / "all.csv", ["path", "caption"], [[f"pictures/{f.name}", f"caption {f.stem}"] for f in files])
    for part in range(2):
        content = {}
        for file in files[part::2]:
            content |= {f"{file.stem}.png": file.read_bytes(), f"{file.stem}.txt": f"caption {file.stem}".encode()}
        shard(where / f"part-{part}.tar", content)
    return where


@pytest.fixture
def served(folder):
    with stores.served(folder) as opened:
        yield opened


def batches(data, **options):
    config = tiny.config("image")
    processor = transform_dict["image"](config)
    return Batches(data, processor, tiny.Tokenizer(), batch_size=5, context_length=8, seed=7, **options)


def epoch(data, **options):
    """Pixels, tokens and groups of an epoch."""
    made = batches(data, **options)
    found = list(made.epoch(0))
    assert not made.skipped
    return [torch.cat([getattr(b, name) for b in found]) for name in ("pixel_values", "input_ids", "groups")]


def same(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["all.csv", "part-{0..1}.tar"])
def test_the_same_batches_as_from_files(name, folder, served):
    wanted = epoch(folder / name)
    for workers in (0, 1) if name.endswith("tar") else (0,):
        same(epoch(f"{served.url}/{name}", workers=workers), wanted)
    assert batches(f"{served.url}/{name}").fingerprint() == batches(folder / name).fingerprint()


def test_what_was_read_is_not_asked_for_again(folder, served):
    data = f"{served.url}/part-{{0..1}}.tar"
    epoch(data)
    served.asked.clear()
    epoch(data)
    assert {asked for _, asked in served.asked} == {""}  # whether there is a newer one
    os.utime(folder / "part-0.tar")


@pytest.mark.parametrize("fault", ["busy", "cut"])
@pytest.mark.parametrize("name", ["all.csv", "part-{0..1}.tar"])
def test_a_store_that_fails_a_third_of_the_time(name, fault, folder, served):
    wanted = epoch(folder / name)
    served.fault = fault
    same(epoch(f"{served.url}/{name}"), wanted)


def test_a_store_that_is_down_for_a_while(folder, served, monkeypatch, caplog):
    monkeypatch.setattr(store, "_QUIET", 0.2)
    made = batches(f"{served.url}/part-{{0..1}}.tar")
    served.down(1.5)
    with caplog.at_level(logging.WARNING):
        list(made.epoch(0))
    assert not made.skipped
    assert f"waiting for {served.url}/part-" in caplog.text


def test_a_store_that_is_down_for_good_ends_the_run(served, monkeypatch):
    monkeypatch.setenv(store.PATIENCE, "1")
    made = batches(f"{served.url}/all.csv")
    served.down(60)
    with pytest.raises(StoreError, match=rf"{served.url}/pictures/\d\d.png: the store has failed \d+ times in \d s"):
        list(made.epoch(0))


def test_a_store_that_does_not_answer(served, monkeypatch):
    monkeypatch.setenv(store.PATIENCE, "1")
    monkeypatch.setattr(store, "_ANSWER", 0.5)
    served.fault = "deaf"
    begun = time.monotonic()
    with pytest.raises(StoreError, match=r"all\.csv: the store has failed"):
        Manifest(f"{served.url}/all.csv")
    assert time.monotonic() - begun < 10


def test_what_a_store_says_for_good(served):
    begun = time.monotonic()
    with pytest.raises(FileNotFoundError, match="no such file in the store"):
        Shard(f"{served.url}/none.tar", [".png"])
    with pytest.raises(PermissionError, match=r"refuses it \(HTTP 403\)"):
        look(f"{served.url}/secret.tar").read(0, 8)
    served.fault = "whole"
    with pytest.raises(StoreError, match="gives whole files only"):
        Shard(f"{served.url}/part-0.tar", [".png"])
    assert time.monotonic() - begun < 2


def test_a_folder_is_listed(served):
    assert find_files(f"{served.url}/") == [f"{served.url}/part-{i}.tar" for i in range(2)]


def test_rows_that_lead_elsewhere_are_none(folder, served):
    bad = ["/etc/passwd", "../x.png", "http://127.0.0.1/x.png", "a/../../x.png"]
    table(folder / "bad.csv", ["path", "caption"], [[path, "x"] for path in [*bad, "pictures/00.png"]])
    opened = Manifest(f"{served.url}/bad.csv")
    assert len(opened) == 1 and len(opened.skipped) == 4
    assert all("expected a path below" in why for why in opened.skipped.values())
    assert beside("s3://bucket/a/all.csv", "./b/c.png") == "s3://bucket/a/b/c.png"


def test_a_tar_that_breaks_off(folder, served):
    whole = (folder / "part-0.tar").read_bytes()
    at = list(members(folder / "part-0.tar"))[5][1]
    (folder / "broken").mkdir(exist_ok=True)
    (folder / "broken" / "x.tar").write_bytes(whole[: at + 3])
    here, there = (Shard(f"{where}/broken/x.tar", [".png"]) for where in (folder, served.url))
    assert [there[i].path.rpartition("/")[2] for i in range(len(there))] == ["00", "02"]
    assert [*here.skipped.values()] == [*there.skipped.values()]


def test_headers_are_read_without_what_lies_between(tmp_path):
    size = 3 << 20
    shard(tmp_path / "big.tar", {name: os.urandom(size) for name in ("a.mp4", "b.mp4", "c.mp4", "d.mp4")})
    with stores.served(tmp_path) as opened:
        found = Shard(f"{opened.url}/big.tar", [".mp4"], captions=False)
        spans = [asked.removeprefix("bytes=").split("-") for _, asked in opened.asked if asked]
        assert sum(int(last) - int(first) + 1 for first, last in spans) < size
        assert found[2].media.read() == Shard(tmp_path / "big.tar", [".mp4"], captions=False)[2].media.read()


def test_evaluation_reads_them_too(folder, served):
    from lbfast.evaluation.encoder import Encoder

    encoder = Encoder(tiny.model("image"), transform_dict["image"](tiny.config("image")), Words(), batch_size=4)
    reports = [retrieve_files(encoder, f"{where}/all.csv") for where in (folder, served.url)]
    assert reports[0].rankings == reports[1].rankings
    assert task_of([f"{served.url}/all.csv"], None) == "retrieval"


class Words:
    """A token for each letter, as an encoder asks for them."""

    def __call__(self, texts, **options):
        return tiny.Tokenizer()(texts, 12, "max_length", True, "pt")


def test_the_cache_is_bounded_and_believes_only_what_was_written(tmp_path):
    limit = 100_000
    cache = Cache(tmp_path / "c", limit)
    for i in range(60):
        cache.put(str(i), bytes([i]) * 5000)
    files = [path for path in (tmp_path / "c").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= limit
    assert cache.get("59") == bytes([59]) * 5000 and cache.get("0") is None
    cache.put("large", bytes(limit))
    assert cache.get("large") is None
    for path in files:
        path.write_bytes(path.read_bytes()[:-1])
    assert all(cache.get(str(i)) is None for i in range(60))


@pytest.mark.parametrize("given", ["x", "-1", "nan", "inf"])
def test_settings_that_are_no_numbers(given, monkeypatch):
    monkeypatch.setenv(store.PATIENCE, given)
    with pytest.raises(ValueError, match=f"{store.PATIENCE}: expected a number of at least 0, got '{given}'"):
        store.patience()


def test_from_s3(folder, tmp_path, monkeypatch):
    """moto's server, where it is installed."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="data")
        for file in folder.rglob("*"):
            if file.is_file():
                client.upload_file(str(file), "data", f"deep/{file.relative_to(folder)}")
        for name in ("all.csv", "part-{0..1}.tar"):
            same(epoch(f"s3://data/deep/{name}"), epoch(folder / name))
        assert find_files("s3://data/deep/") == [f"s3://data/deep/part-{i}.tar" for i in range(2)]
        with pytest.raises(FileNotFoundError):
            look("s3://data/none.tar")
    finally:
        server.stop()


def test_embedding_takes_a_tar_from_there(folder, served, tmp_path):
    models, outs = [tiny.checkpoint(tmp_path / "image", "image")], [tmp_path / f"{i}.parquet" for i in range(2)]
    for where, out in zip((folder, served.url), outs):
        inputs = [f"image={where}/part-{i}.tar" for i in range(2)]
        assert embed_files(inputs, models, out, allow_urls=True).embedded == {"image": COUNT}
    here, there = (pq.read_table(out) for out in outs)
    assert here["embedding"] == there["embedding"]
    assert there["path"][0].as_py() == f"{served.url}/part-0.tar/00.png"
    refused = embed_files([f"{served.url}/part-0.tar"], models, tmp_path / "no.parquet")
    assert refused.out is None and "allow_urls" in refused.failures[0].reason


def test_embedding_ends_where_the_store_does(served, tmp_path, monkeypatch):
    monkeypatch.setenv(store.PATIENCE, "0.5")
    monkeypatch.setenv(store.CACHE_GIB, "0")
    models, data = [tiny.checkpoint(tmp_path / "image", "image")], [f"{served.url}/part-0.tar"]
    down = lambda *_: served.down(60)  # noqa: E731
    with pytest.raises(StoreError, match=r"part-0.tar: the store has failed"):
        embed_files(
            data, models, tmp_path / "x.parquet", allow_urls=True, batch_size=2, modality="image", progress=down
        )
    served.until = 0.0
    again = embed_files(data, models, tmp_path / "x.parquet", allow_urls=True, batch_size=2, modality="image")
    assert again.embedded == {"image": COUNT // 2} and not again.failures
