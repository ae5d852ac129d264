"""A server: every request gets its own embeddings, whoever comes with it, slow, broken off, hostile or too much."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import logging
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lbfast.cli import app as cli
from lbfast.data.decode import Helper, Task, Undecodable, helpers_context
from lbfast.embedding import Embedder
from lbfast.model.languagebind import model_dict
from lbfast.processing.text import write_clip_vocabulary
from lbfast.signals import Signals
from tests import tiny

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("python_multipart")

from lbfast.serving import server as serving  # noqa: E402
from lbfast.serving.app import make_app  # noqa: E402
from lbfast.serving.limits import Limits  # noqa: E402
from lbfast.serving.server import serve  # noqa: E402

REQUESTS = int(os.environ.get("LBFAST_SERVE_REQUESTS", "96"))
"""Of the mixed run; 1000 is what the server is shown with."""
CLIENTS = 16
HEAD = b"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
LIMITS = Limits(items=4, body_bytes=1 << 20, waiting=80, text_characters=500, body_seconds=1, head_seconds=0.7)


class Gated(Embedder):
    """It computes nothing while a file of the name `gate` is there."""

    gate = Path("no gate")

    def embed_values(self, modality, values):
        while self.gate.exists():
            time.sleep(0.01)
        return super().embed_values(modality, values)


def served(made: Embedder, ready, options: dict) -> None:
    torch.set_num_threads(1)
    with Signals():
        serve(made, port=0, on_ready=ready.send, **options)


class Server:
    """A server in a process of its own."""

    def __init__(self, processes, made: Embedder, **options):
        ours, theirs = processes.Pipe()
        self.process = processes.Process(target=served, args=(made, theirs, options))
        self.process.start()
        assert ours.poll(120)
        self.url = ours.recv()
        self.port = int(self.url.rpartition(":")[2])
        self.client = httpx.Client(base_url=self.url, timeout=60, verify=False)

    def post(self, client=None, **options):
        return (client or self.client).post("/embed", **options)

    def embed(self, *items, **options):
        return self.post(json={"items": items}, **options)

    def raw(self, content: bytes, then=lambda connection: None) -> bytes:
        """What comes back for these bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(content)
            then(connection)
            parts = []
            while part := connection.recv(1 << 16):
                parts.append(part)
            return b"".join(parts)

    def waiting(self) -> int:
        return self.client.get("/health").json()["waiting"]

    def stop(self) -> int | None:
        self.client.close()
        os.kill(self.process.pid, signal.SIGTERM)
        self.process.join(60)
        return self.process.exitcode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    for name in ("image", "audio"):
        write_clip_vocabulary(tiny.checkpoint(folder, name))
    for i in range(4):
        tiny.picture(folder / "files" / f"{i}.jpg", seed=i)
        tiny.sound(folder / "files" / f"{i}.wav", seed=i)
    (folder / "files" / "torn.jpg").write_bytes((folder / "files" / "0.jpg").read_bytes()[:900])
    (folder / "secret.jpg").write_bytes((folder / "files" / "0.jpg").read_bytes())
    (folder / "files" / "link.jpg").symlink_to(folder / "secret.jpg")
    return folder


@pytest.fixture(scope="module")
def embedder(folder):
    return Embedder([folder / "audio", folder / "image"], batch_size=8, dtype="float32")


@pytest.fixture(scope="module")
def server(processes, embedder):
    made = Server(processes, embedder, limits=LIMITS)
    yield made
    assert made.stop() == 0


def encoded(file: Path) -> dict:
    return {"base64": base64.b64encode(file.read_bytes()).decode(), "name": file.name}


def test_nothing_is_lost_or_mixed_up(folder, embedder, server):
    """Mixed requests of texts, pictures and sounds, bad ones among them: each its own rows, in its order."""
    files = [folder / "files" / f"{i}.{end}" for i in range(4) for end in ("jpg", "wav")]
    known = dict(zip(files, embedder.encode(files)))
    torn = folder / "files" / "torn.jpg"

    def ask(number: int, client) -> None:
        draw = np.random.default_rng(number)
        items = [
            files[i] if (i := draw.integers(12)) < 8 else f"{number} " + "word " * i for _ in range(draw.integers(1, 5))
        ]
        bad = number % 10 == 7
        asked = [*items[:3], torn] if bad else items
        accept = {"accept": "application/x-npy"} if number % 3 == 0 else {}
        while True:
            if number % 2:
                sent = [encoded(item) if isinstance(item, Path) else item for item in asked]
                answer = server.post(client, json={"items": sent}, headers=accept)
            else:
                form = [
                    ("file", (item.name, item.read_bytes())) if isinstance(item, Path) else ("text", (None, item))
                    for item in asked
                ]
                answer = server.post(client, files=form, headers=accept)
            if answer.status_code != 503:
                break
            assert int(answer.headers["retry-after"]) >= 1
            time.sleep(0.1)
        if bad:
            assert answer.status_code == 422 and answer.json()["item"] == len(asked) - 1, answer.text
            assert "torn.jpg" in answer.json()["error"]
            return
        assert answer.status_code == 200, answer.text
        if accept:
            rows = np.load(io.BytesIO(answer.content))
        else:
            rows = np.array(answer.json()["embeddings"], dtype=np.float32)
            kinds = {".jpg": "image", ".wav": "audio"}
            expected = [kinds[item.suffix] if isinstance(item, Path) else "language" for item in asked]
            assert answer.json()["modalities"] == expected
        alone = [known[item] if isinstance(item, Path) else embedder.encode([item])[0] for item in asked]
        np.testing.assert_allclose(rows, alone, atol=2e-6)

    def client(start: int) -> int:
        with httpx.Client(base_url=server.url, timeout=60, verify=False) as one:
            numbers = range(start, REQUESTS, CLIENTS)
            for number in numbers:
                ask(number, one)
        return len(numbers)

    with ThreadPoolExecutor(CLIENTS) as pool:
        assert sum(pool.map(client, range(CLIENTS))) == REQUESTS
    metrics = server.client.get("/metrics").text
    answered = float(re.search(r'lbfast_requests_total\{status="200"\} (\S+)', metrics)[1])
    assert answered >= REQUESTS - (REQUESTS + 2) // 10
    batches = float(re.search(r'lbfast_batch_items_count\{modality="language"\} (\S+)', metrics)[1])
    items = float(re.search(r'lbfast_items_total\{modality="language"\} (\S+)', metrics)[1])
    assert items > 1.2 * batches, "they shared batches"
    assert server.waiting() == 0


PICTURE = {"base64": base64.b64encode(b"no picture").decode()}


OF_JSON, OF_FORM = {"content-type": "application/json"}, {"content-type": "multipart/form-data; boundary=a"}


@pytest.mark.parametrize(
    "sent, status, error, item",
    [
        ({"content": b"{", "headers": OF_JSON}, 400, "body: expected JSON, got ", None),
        ({"content": b"\xff\xfe", "headers": OF_JSON}, 400, "body: expected JSON", None),
        ({"content": b"[" * 9999, "headers": OF_JSON}, 400, "body: expected JSON", None),
        ({"json": []}, 422, "body: expected an object with texts or items", None),
        ({"content": b"null", "headers": OF_JSON}, 422, "body: expected an object with texts or items", None),
        ({"content": b"x", "headers": {**OF_JSON, "content-encoding": "gzip"}}, 415, "content-encoding: .*gzip", None),
        ({"json": {}}, 422, "texts, items: expected one of them", None),
        ({"json": {"texts": ["a"], "items": ["a"]}}, 422, "texts, items: expected one of them", None),
        ({"json": {"words": ["a"]}}, 422, "words: Extra inputs are not permitted", None),
        ({"json": {"texts": []}}, 422, "items: expected at least one, got none", None),
        ({"json": {"texts": "a dog"}}, 422, "texts: Input should be a valid", None),
        ({"json": {"texts": ["a", 3]}}, 422, r"texts\[1\]: Input should be a valid string", 1),
        ({"json": {"texts": ["a"] * 5}}, 413, "items: expected at most 4, got 5", None),
        ({"json": {"texts": ["a", "b" * 501]}}, 413, r"items\[1\]: text: expected at most 500 characters, got 501", 1),
        ({"json": {"items": [3]}}, 422, r"items\[0\]: expected a text, or an object with text, base64 or path", 0),
        ({"json": {"items": ["a", {"file": "b"}]}}, 422, r"items\[1\].file: Extra inputs", 1),
        ({"json": {"items": [{}]}}, 422, r"items\[0\]: expected one of text, base64, path, got none", 0),
        ({"json": {"items": [{"text": "a", "path": "b"}]}}, 422, "got text and path", 0),
        ({"json": {"items": [{"base64": "??"}]}}, 422, r"items\[0\].base64: expected base64, got ", 0),
        ({"json": {"items": [{"base64": "é"}]}}, 422, r"items\[0\].base64: expected base64, got ", 0),
        ({"json": {"items": [PICTURE]}}, 422, r"items\[0\]: modality: expected one of audio, image", 0),
        ({"json": {"items": ["a", {**PICTURE, "modality": "image"}]}}, 422, r"items\[1\]: bytes .* got text", 1),
        ({"json": {"items": [{**PICTURE, "name": "\u202ea.jpg"}]}}, 422, r"\]: \\u202ea.jpg: expected an image", 0),
        ({"json": {"items": [{**PICTURE, "modality": "video"}]}}, 422, "modality: expected one that there", 0),
        ({"json": {"items": [{**PICTURE, "modality": "smell"}]}}, 422, r"items\[0\].modality: Input should be", 0),
        ({"json": {"items": [{"path": "/etc/passwd"}]}}, 403, "files of this machine are not opened here", 0),
        ({"json": {"items": [{"path": "http://a.b/c.jpg"}]}}, 403, "URLs are not opened here", 0),
        ({"json": {"items": [{"path": "file:///etc/passwd"}]}}, 403, "URLs are not opened here", 0),
        ({"data": {"text": "a", "smell": "b"}, "files": {}}, 415, "content-type: expected application/json or", None),
        ({"files": {"smell": b"a"}}, 422, "smell: expected a field of a file named file, image", None),
        ({"files": {"image": (None, "a.jpg")}}, 422, "image: expected a file, got a text", None),
        ({"files": {"note": (None, "a.jpg")}}, 422, "note: expected a field named file, text", None),
        ({"files": [("text", (None, "a"))] * 5}, 413, "items: expected at most 4, got more", None),
        ({"files": [("file", b"a")] * 9}, 413, "items: expected at most 4, got more", None),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "body: ", None),
        ({"content": b"x" * (1 << 20), "headers": OF_FORM}, 400, "body", None),
        ({"content": b" " * (1 << 20 | 1), "headers": OF_JSON}, 413, "body: expected at", None),
        ({"content": iter([b" " * 90_000] * 30), "headers": OF_JSON}, 413, "got more", None),
    ],
)  # fmt: skip
def test_refusals(server, sent, status, error, item):
    answer = server.post(**sent)
    assert answer.status_code == status, answer.text
    assert re.search(error, answer.json()["error"]), answer.text
    assert answer.json().get("item") == item
    assert server.embed("a cat").status_code == 200


def test_a_mark_before_json_is_no_fault(server):
    assert server.post(content=b'\xef\xbb\xbf{"texts": ["a cat"]}', headers=OF_JSON).status_code == 200


def test_large_forms_are_too_large_and_not_wrong(embedder):
    """With the limits that a server has by default."""

    async def ask(**sent):
        transport = httpx.ASGITransport(make_app(embedder))
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            return await client.post("/embed", **sent)

    long = asyncio.run(ask(files=[("text", (None, "a")), ("text", (None, "a" * (2 << 20)))]))
    assert long.status_code == 413 and long.json()["item"] == 1, long.text
    assert re.search(r"items\[1\]: text: expected at most 10,000 characters, got 2,097,152", long.json()["error"])
    many = asyncio.run(ask(files=[("image", b"a")] * 66))
    assert many.status_code == 413 and "items: expected at most 64, got more" in many.text


def test_a_broken_form_is_its_clients_to_hear_of(embedder, monkeypatch):
    """The parser's own lines are not for the terminal of the server."""
    monkeypatch.setattr(serving._Server, "run", lambda *_: None)
    monkeypatch.setattr(logging.getLogger("python_multipart"), "level", logging.NOTSET)
    serve(embedder, port=0)
    assert not logging.getLogger("python_multipart.multipart").isEnabledFor(logging.WARNING)


def test_the_files_of_the_page_are_there(tmp_path):
    """What docs/serve.md sends is what the command that it shows has made."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "serve.md").read_text()
    (command,) = re.findall(r"^lbfast (mini make) scenes (.*)$", text, re.MULTILINE)
    done = CliRunner().invoke(cli, [*command[0].split(), str(tmp_path / "scenes"), *command[1].split()])
    assert done.exit_code == 0, done.output
    sent = re.findall(r"@(\S+)", text)
    assert len(sent) == 3 and all((tmp_path / name).is_file() for name in sent), sent


def test_slow_and_broken_off_requests(server):
    """Clear words where somebody listens, and nothing is left of those that are gone."""
    assert b"HTTP/1.1 408 " in server.raw(HEAD)  # headers that never end
    assert b"HTTP/1.1 408 " in server.raw(b"")  # nothing at all
    late = server.raw(HEAD + b"content-length: 90\r\n\r\n{")
    assert b"HTTP/1.1 408 " in late and b"body: expected all of it within 1 s" in late

    def hang_up(connection):
        connection.shutdown(socket.SHUT_WR)

    assert b"HTTP/1.1 400 " in server.raw(HEAD + b"content-length: 90\r\n\r\n{", hang_up)
    assert b"HTTP/1.1 400 " in server.raw(HEAD, hang_up)
    assert b"HTTP/1.1 400 " in server.raw(b"\x16\x03\x01 no HTTP\r\n\r\n")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(HEAD + b"content-length: 90\r\n\r\n{")
    start = time.monotonic()
    with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(HEAD.replace(b"json", b"x") + b"transfer-encoding: chunked\r\n\r\n")
        while time.monotonic() < start + 20:
            connection.sendall(b"4\r\nmore\r\n")
            time.sleep(0.05)
    assert time.monotonic() < start + 20
    assert server.embed("a cat").status_code == 200 and server.waiting() == 0


def test_what_it_says_of_itself(server, folder):
    health = server.client.get("/health").json()
    assert health["status"] == "ok" and health["size"] == tiny.SIZE and [*health["models"]] == ["audio", "image"]
    paths = server.client.get("/openapi.json").json()["paths"]
    content = paths["/embed"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"} and "$ref" not in json.dumps(content)
    assert {"200", "413", "422", "503"} <= set(paths["/embed"]["post"]["responses"])
    assert server.client.get("/docs").status_code == 200
    assert server.client.get("/embed").status_code == 405 and server.client.get("/x").status_code == 404


def test_too_much_is_refused_and_what_was_taken_is_answered(processes, folder, tmp_path):
    """A full queue says when to come again; a client that leaves makes room; SIGTERM ends nobody's request."""
    gated = Gated([folder / "image"], batch_size=2, dtype="float32")
    texts = [f"text {i}" for i in range(8)]
    want = gated.encode(texts)
    gated.gate = tmp_path / "gate"
    server = Server(processes, gated, limits=Limits(items=4, waiting=8, allow_paths=str(folder / "files")))

    def ask(text):
        with httpx.Client(base_url=server.url, timeout=60, verify=False) as client:
            return server.post(client, json={"texts": [text]})

    def wait_for(count):
        end = time.monotonic() + 30
        while server.waiting() != count:
            assert time.monotonic() < end
            time.sleep(0.02)

    def check(answers):
        for answer, row in zip(answers, want):
            assert answer.result().status_code == 200, answer.result().text
            np.testing.assert_allclose(answer.result().json()["embeddings"][0], row, atol=2e-6)

    with ThreadPoolExecutor(9) as pool:
        gated.gate.touch()
        answers = [pool.submit(ask, text) for text in texts]
        wait_for(8)
        refused = server.embed("one more")
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1, refused.text
        gated.gate.unlink()
        check(answers)

        for path, status in [("0.jpg", 200), ("../secret.jpg", 403), ("link.jpg", 403), ("9.jpg", 422), ("a\0", 422)]:
            assert server.embed({"path": path}).status_code == status, path

        gated.gate.touch()
        body = json.dumps({"texts": texts[:4]}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body)
            wait_for(4)
        wait_for(0)

        answers = [pool.submit(ask, text) for text in texts]
        wait_for(8)
        opened = pool.submit(lambda: (time.sleep(0.5), gated.gate.unlink()))
        assert server.stop() == 0
        opened.result()
        check(answers)
    with pytest.raises(httpx.ConnectError):
        ask("too late")


class Awkward:
    """Work of all sorts."""

    def decode(self, task):
        if task.path == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if task.path == "hangs":
            time.sleep(60)
        return np.full(3, len(task.path))


def test_a_file_that_hangs_or_kills_is_given_up():
    helper = Helper(Awkward(), helpers_context())
    try:
        for path, want in [("good", None), ("hangs", "more than 0.5 s"), ("dies", "SIGKILL"), ("fine", None)]:
            result = helper.decode(Task("image", path), 0.5 if path == "hangs" else 60)
            if want is None:
                np.testing.assert_array_equal(result, np.full(3, 4))
            else:
                assert isinstance(result, Undecodable) and want in result.reason and path in result.reason
    finally:
        helper.close()


def test_limits():
    assert Limits(allow_urls=True).refusal("https://a.b/c.jpg") == ""
    for url in ("file:///etc/passwd", "zip::https://a.b/c.zip", "https::file:///etc/passwd", "memory://a", "local://a"):
        assert "expected a URL of http, https" in Limits(allow_urls=True).refusal(url), url
    with pytest.raises(ValueError, match="waiting: expected more than 0, got 0"):
        Limits(waiting=0)
    with pytest.raises(ValueError, match="items: expected at most waiting, 8, got 9"):
        Limits(items=9, waiting=8)


def test_the_command_says_what_is_wrong(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, error in [
            (["--port", port], "host, port: Address already in use"),
            (["--allow-paths", "nowhere"], "allow-paths: expected a folder, got nowhere"),
            (["--device", "tpu"], "device: expected auto"),
        ]:
            done = CliRunner().invoke(cli, ["serve", "--model", str(folder / "image"), *options])
            assert done.exit_code == 1 and error in " ".join(done.output.split()), done.output


@pytest.mark.skipif(
    "LBFAST_SERVE_REQUESTS" not in os.environ, reason="takes minutes: LBFAST_SERVE_REQUESTS=1000 runs it"
)
def test_batching_pays(processes, tmp_path):
    """The text tower of the published size: requests of one text from 16 clients, beside batches of one."""
    torch.manual_seed(0)
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = tiny.config("image")
    config = type(config)(text_config=text, vision_config=config.vision_config.to_dict(), projection_dim=768)
    model_dict["image"](config).save_pretrained(tmp_path / "model")
    write_clip_vocabulary(tmp_path / "model")
    rates = {}
    for size in (1, 16):
        server = Server(processes, Embedder(tmp_path / "model", batch_size=size, dtype="float32"), limits=Limits())

        def client(number, server=server):
            with httpx.Client(base_url=server.url, timeout=120, verify=False) as one:
                for i in range(12):
                    assert server.post(one, json={"texts": [f"a dog number {number} in rain {i}"]}).status_code == 200

        client(0)
        start = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(client, range(CLIENTS)))
        rates[size] = CLIENTS * 12 / (time.monotonic() - start)
        server.stop()
    print(SimpleNamespace(**{f"texts_a_second_in_batches_of_{size}": round(rate, 1) for size, rate in rates.items()}))
    assert rates[16] > 2 * rates[1]
