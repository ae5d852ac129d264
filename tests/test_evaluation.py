"""Evaluation against an oracle that sorts the whole matrix, exactly; and from files, through a model."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from lbfast.cli import app
from lbfast.evaluation import (
    Encoder,
    class_embeddings,
    classify,
    classify_files,
    pair_files,
    ranks,
    retrieve,
    retrieve_files,
    templates_for,
)
from lbfast.evaluation.prompts import PROMPTS
from lbfast.evaluation.ranking import summarise
from lbfast.processing import transform_dict
from lbfast.processing.text import default_tokenizer
from tests import tiny
from tests.tiny import shard, table


def cosine(a: tuple[int, ...], b: tuple[int, ...]) -> Fraction:
    """An exact number that orders as the cosine does: its square with its sign."""
    dot = sum(x * y for x, y in zip(a, b))
    return Fraction(dot * abs(dot), sum(x * x for x in a) * sum(y * y for y in b))


def oracle(queries, gallery, matches) -> list[int]:
    """Each query's gallery sorted as a whole, non-matches before matches of the same similarity."""
    found = []
    for i, query in enumerate(queries):
        mine = {j for q, j in matches if q == i}
        order = sorted(range(len(gallery)), key=lambda j: (-cosine(query, gallery[j]), j in mine))
        found.append(next((place for place, j in enumerate(order, start=1) if j in mine), 0))
    return found


vectors = st.lists(st.tuples(*[st.integers(-3, 3)] * 3).filter(any), min_size=1, max_size=9)


@settings(max_examples=300, deadline=None)
@given(st.data(), vectors, vectors, st.integers(1, 12), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_ranks_are_those_of_the_sorted_matrix(data, queries, gallery, chunk, dtype):
    """Small whole numbers: ties everywhere, several matches for a query or none, any chunk."""
    pairs = st.tuples(st.integers(0, len(queries) - 1), st.integers(0, len(gallery) - 1))
    matches = data.draw(st.lists(pairs, max_size=12))
    scale = data.draw(st.sampled_from([1.0, 0.37, 1000.0]))
    pair_tensor = torch.tensor(matches, dtype=torch.int64).reshape(-1, 2)
    if dtype == torch.bfloat16:
        scale = 1.0
    q, g = torch.tensor(queries).to(dtype) * scale, torch.tensor(gallery).to(dtype)
    assert ranks(q, g, pair_tensor, chunk=chunk).tolist() == oracle(queries, gallery, matches)


def test_retrieval_of_many_against_the_matrix():
    generator = torch.Generator().manual_seed(0)
    items, captions, per = 150, 600, 4
    first = torch.randn(items, 16, generator=generator)
    second = first.repeat_interleave(per, 0) + 1.5 * torch.randn(captions, 16, generator=generator)
    matches = torch.stack([torch.arange(captions) // per, torch.arange(captions)], dim=1)
    cos = (
        torch.nn.functional.normalize(first.double(), dim=-1) @ torch.nn.functional.normalize(second.double(), dim=-1).T
    )
    order = cos.argsort(1, descending=True).numpy()
    there = np.array([min(np.flatnonzero(row // per == i)) for i, row in enumerate(order)]) + 1
    back = (
        np.array(
            [np.flatnonzero(row == j // per)[0] for j, row in enumerate(cos.T.argsort(1, descending=True).numpy())]
        )
        + 1
    )
    shuffled = matches[torch.randperm(captions, generator=generator)]
    for chunk in (7, 64, 10_000):
        for found, expected, gallery in zip(
            retrieve(first, second, shuffled, chunk=chunk), (there, back), (captions, items)
        ):
            assert found.recall == pytest.approx({k: np.mean(expected <= k) for k in (1, 5, 10)}, abs=1e-12)
            assert found.median_rank == np.median(expected) and found.mean_rank == pytest.approx(np.mean(expected))
            assert (found.queries, found.gallery) == (len(expected), gallery)
    assert 0.1 < np.mean(there == 1) < 0.9  # neither trivial nor hopeless


def test_ties_count_against_the_query():
    same = torch.ones(6, 4)
    assert ranks(same, same).tolist() == [6] * 6
    assert ranks(same[:1], same, torch.tensor([[0, 2], [0, 5]])).tolist() == [5]
    twice = torch.eye(3).repeat(2, 1)
    assert ranks(twice, twice).tolist() == [2] * 6
    both = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    assert ranks(twice, twice, both[both[:, 0] % 3 == both[:, 1] % 3]).tolist() == [1] * 6


def test_summary_of_known_ranks():
    known = summarise(torch.tensor([0, 1, 11, 2, 5, 0]), gallery=20)
    assert known.as_dict() == {
        "queries": 4,
        "gallery": 20,
        "recall": {"1": 0.25, "5": 0.75, "10": 0.75},
        "median_rank": 3.5,
        "mean_rank": 4.75,
    }
    assert summarise(torch.tensor([3, 1, 9]), 9).median_rank == 3
    with pytest.raises(ValueError, match="at least one query with a match"):
        summarise(torch.tensor([0, 0]), 3)


class Largest(TorchDispatchMode):
    """The most elements that any tensor had that was computed."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_memory_is_linear():
    """No tensor is larger than a tile or the inputs, however many rows: the matrix of 6000 would have 36 million."""
    largest = []
    for rows in (1500, 6000):
        a, b = torch.randn(rows, 8), torch.randn(rows, 8)
        with Largest() as seen:
            retrieve(a, b, chunk=256)
        largest.append(seen.elements)
    assert largest == [256 * 256, 256 * 256]


@pytest.mark.parametrize(
    "queries, gallery, matches, error, message",
    [
        (torch.ones(2, 3), torch.ones(3, 3), None, ValueError, "gallery: expected 2 rows"),
        (torch.ones(2, 3), torch.ones(2, 4), None, ValueError, "gallery: expected embeddings of size 3, got 4"),
        (torch.ones(2), torch.ones(2, 4), None, ValueError, r"queries: expected \(rows, E\), got shape \(2,\)"),
        (torch.ones(2, 3).long(), torch.ones(2, 3), None, TypeError, "queries: expected a floating dtype"),
        (torch.tensor([[1.0], [0.0]]), torch.ones(2, 1), None, ValueError, "queries: .*another in row 1"),
        (torch.ones(2, 1), torch.tensor([[float("nan")], [1]]), None, ValueError, "gallery: expected finite.* row 0"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.tensor([[0, 2]]), ValueError, "matches: expected indices below"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 1]), ValueError, r"matches: expected integers \(P, 2\)"),
    ],
)
def test_wrong_tensors(queries, gallery, matches, error, message):
    with pytest.raises(error, match=message):
        ranks(queries, gallery, matches)


def test_class_embeddings_and_accuracy():
    generator = torch.Generator().manual_seed(1)
    texts = torch.randn(7, 3, 12, generator=generator) * torch.tensor([1.0, 10.0, 0.1])[:, None]
    classes = class_embeddings(texts)
    for i, prompts in enumerate(texts.numpy()):
        mean = np.mean([prompt / np.linalg.norm(prompt) for prompt in prompts], axis=0)
        np.testing.assert_allclose(classes[i], mean / np.linalg.norm(mean), atol=1e-6)
    items = torch.randn(200, 12, generator=generator)
    labels = torch.randint(7, (200,), generator=generator)
    best = (torch.nn.functional.normalize(items, dim=-1) @ classes.T).topk(5, dim=1).indices
    expected = {k: (best[:, :k] == labels[:, None]).any(1).double().mean().item() for k in (1, 5)}
    found = classify(items, classes, labels, chunk=33)
    assert found.recall == pytest.approx(expected, abs=1e-12) and (found.queries, found.gallery) == (200, 7)
    with pytest.raises(ValueError, match=r"labels: expected shape \(200,\)"):
        classify(items, classes, labels[:3])
    with pytest.raises(ValueError, match=r"texts: expected floats \(C, T, E\)"):
        class_embeddings(texts[0])


def test_templates(tmp_path):
    assert set(PROMPTS) == {"image", "video", "audio", "depth", "thermal"}
    assert all("{}" in template for modality in PROMPTS for template in templates_for(modality))
    (tmp_path / "t.txt").write_text("\n a {} \n\nthe {}!\n")
    assert templates_for("image", tmp_path / "t.txt") == ("a {}", "the {}!")
    (tmp_path / "bad.txt").write_text("a {}\na thing\n")
    with pytest.raises(ValueError, match="where the class name goes, got 'a thing'"):
        templates_for("image", tmp_path / "bad.txt")
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(ValueError, match="templates: expected at least one"):
        templates_for("image", tmp_path / "none.txt")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """classes/{red_car,cat,dog}/N.jpg, one of them broken, and models of pictures and depth maps."""
    where = tmp_path_factory.mktemp("evaluation")
    for i, name in enumerate(("red_car", "cat", "dog")):
        for j in range(3):
            tiny.picture(where / "classes" / name / f"{j}.jpg", seed=3 * i + j)
    (where / "classes" / "dog" / "2.jpg").write_text("no picture")
    (where / "classes" / "dog" / "notes.txt").write_text("passed over")
    for modality in ("image", "depth"):
        tiny.checkpoint(where, modality, seed=len(modality))
    return where


@pytest.fixture(scope="module")
def encoder(data):
    return Encoder.open(data / "image", device="cpu", dtype="float32", batch_size=3)


def embed(modality: str, files: list[Path], seed: int) -> torch.Tensor:
    model = tiny.model(modality, seed=seed)
    with torch.no_grad():
        return model.get_image_features(transform_dict[modality](model.config)(files)["pixel_values"])


def embed_texts(texts: list[str]) -> torch.Tensor:
    tokens = default_tokenizer()(texts, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        return tiny.model("image", seed=5).get_text_features(**tokens)


def test_zero_shot_of_folders_and_manifests(data, encoder, tmp_path):
    templates = ["a {}", "the {} here"]
    names = ["cat", "dog", "red_car"]
    files = {name: sorted((data / "classes" / name).glob("*.jpg"))[: 2 if name == "dog" else 3] for name in names}
    prompts = [template.replace("{}", name.replace("_", " ")) for name in names for template in templates]
    classes = class_embeddings(embed_texts(prompts).reshape(3, 2, -1))
    items = embed("image", [file for name in names for file in files[name]], seed=5)
    labels = torch.tensor([0] * 3 + [1] * 2 + [2] * 3)
    expected = classify(items, classes, labels)

    report = classify_files(encoder, data / "classes", templates=templates)
    assert report.rankings == {"top": expected}
    assert report.counts == {"items": 8, "classes": 3, "templates": 2}
    (bad,) = report.skipped
    assert bad == str(data / "classes" / "dog" / "2.jpg") and "got text" in report.skipped[bad]

    rows = [[file, name] for name in names for file in files[name]]
    manifest = table(tmp_path / "m.csv", ["path", "label"], [*rows, ["nowhere.jpg", "cat"], [files["cat"][0], ""]])
    again = classify_files(encoder, manifest, templates=templates)
    assert again.rankings == report.rankings and len(again.skipped) == 2
    more = classify_files(encoder, manifest, templates=templates, classes=[*names, "a zebra"])
    assert more.rankings["top"].gallery == 4 and more.rankings["top"].mean_rank >= expected.mean_rank
    with pytest.raises(ValueError, match=r"classes: expected every label of .*m\.csv among them, got none for dog"):
        classify_files(encoder, manifest, classes=["cat", "red_car"])


def test_the_first_numbers_of_embeddings(data, encoder):
    """Of unit length again."""
    few = Encoder.open(data / "image", device="cpu", dtype="float32", dim=5)
    for name in ("one", "two"):
        whole = encoder.texts([name])[:, :5]
        torch.testing.assert_close(few.texts([name]), whole / whole.norm(dim=1, keepdim=True))
    assert few.media([])[0].shape == (0, 5) and few.texts([]).shape == (0, 5)
    for dim in (0, tiny.SIZE + 1):
        with pytest.raises(ValueError, match=f"dim: expected a whole number from 1 to {tiny.SIZE}.*got {dim}"):
            Encoder.open(data / "image", device="cpu", dtype="float32", dim=dim)


def test_zero_shot_without_anything_to_classify(data, encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder or manifest"):
        classify_files(encoder, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected a folder for each class with image files \(\.jpg"):
        classify_files(encoder, tmp_path)
    with pytest.raises(ValueError, match=r"got none; 1 skipped, the last: .*nowhere.jpg: no such file"):
        classify_files(encoder, table(tmp_path / "m.csv", ["path", "label"], [["nowhere.jpg", "cat"]]))
    with pytest.raises(ValueError, match="expected rows with path and label, got none"):
        classify_files(encoder, table(tmp_path / "none.csv", ["path", "label"], [["a.jpg", ""]]))


def test_retrieval_of_files_with_several_captions(data, encoder, tmp_path):
    """Two captions an item, one shared by two items, a row twice, a view, and files that cannot be read."""
    files = [data / "classes" / "cat" / f"{i}.jpg" for i in range(3)]
    rows = [
        [files[0], "one", "first"],
        [files[0], "uno", ""],
        [files[1], "two", ""],
        [files[2], "two", "third"],
        [files[2], "two", "third"],
        ["nowhere.jpg", "never", ""],
        [files[1], " ", ""],
    ]
    manifest = table(tmp_path / "m.csv", ["path", "caption", "title"], rows)
    captions, matches = ["one", "uno", "two"], [[0, 0], [0, 1], [1, 2], [2, 2]]
    images = embed("image", files, seed=5)
    expected = retrieve(images, embed_texts(captions), torch.tensor(matches))
    report = retrieve_files(encoder, manifest)
    assert report.rankings == {"image -> text": expected[0], "text -> image": expected[1]}
    assert report.counts == {"items": 3, "captions": 3, "pairs": 4}
    assert set(report.skipped) == {"nowhere.jpg", f"{manifest}, row 7"}

    expected = retrieve(images, embed_texts([*captions, "first", "third"]), torch.tensor([*matches, [0, 3], [2, 4]]))
    both = retrieve_files(encoder, [manifest], captions={"caption": 1, "title": 1})
    assert tuple(both.rankings.values()) == expected

    content = {f"{i}.jpg": file.read_bytes() for i, file in enumerate(files)}
    content |= {"0.txt": b"one", "1.txt": b"two", "2.txt": b"two"}
    packed = retrieve_files(encoder, shard(tmp_path / "s.tar", content))
    expected = retrieve(images, embed_texts(["one", "two"]), torch.tensor([[0, 0], [1, 1], [2, 1]]))
    assert tuple(packed.rankings.values()) == expected and not packed.skipped
    with pytest.raises(ValueError, match=r"expected samples that can be evaluated, got none; 1 skipped"):
        retrieve_files(encoder, table(tmp_path / "bad.csv", ["path", "caption"], [["nowhere.jpg", "x"]]))


def test_retrieval_between_two_modalities(data, tmp_path):
    maps = [tiny.depth_map(tmp_path / f"{i}.png", seed=i) for i in range(4)]
    pictures = [data / "classes" / "cat" / f"{i}.jpg" for i in range(3)]
    rows = [[pictures[i % 3], maps[i].name] for i in range(4)]
    manifest = table(tmp_path / "pairs.csv", ["image", "depth"], [*rows, [pictures[0], "gone.png"], [pictures[0], ""]])
    matches = torch.tensor([[0, 0], [1, 1], [2, 2], [0, 3]])
    expected = retrieve(embed("image", pictures, seed=5), embed("depth", maps, seed=5), matches)

    def open_encoder(modality):
        return Encoder.open(data / modality, device="cpu", dtype="float32")

    report = pair_files(["image", "depth"], open_encoder, manifest)
    assert report.rankings == {"image -> depth": expected[0], "depth -> image": expected[1]}
    assert report.counts == {"image": 3, "depth": 4, "pairs": 4} and len(report.skipped) == 2
    with pytest.raises(ValueError, match=r"missing: audio"):
        pair_files(["image", "audio"], open_encoder, manifest)
    with pytest.raises(ValueError, match="modalities: expected two, got image"):
        pair_files(["image", "image"], open_encoder, manifest)


def invoke(*arguments: object):
    return CliRunner(env={"COLUMNS": "140", "NO_COLOR": "1"}).invoke(app, ["eval", *map(str, arguments)])


def test_the_commands(data, tmp_path):
    out = tmp_path / "out.json"
    (tmp_path / "t.txt").write_text("a {}\n")
    (tmp_path / "c.txt").write_text("cat\ndog\nred_car\nzebra\n")
    given = ("--model", data / "image", "--dtype", "float32", "--json", out)
    shown = invoke(
        "zero-shot",
        *given,
        "--data",
        data / "classes",
        "--templates",
        tmp_path / "t.txt",
        "--classes",
        tmp_path / "c.txt",
    )
    assert shown.exit_code == 0, shown.stderr
    written = json.loads(out.read_text())
    assert written["counts"] == {"items": 8, "classes": 4, "templates": 1} and len(written["skipped"]) == 1
    assert written["models"] == {"image": str(data / "image")} and written["task"] == "zero-shot"
    top = written["results"]["top"]["recall"]
    assert f"{100 * top['1']:.1f} %" in shown.stdout and "top-5" in shown.stdout and "1 skipped" in shown.stdout
    assert "skipped" in shown.stderr and "expected an image, got text" in shown.stderr

    file = data / "classes" / "cat" / "0.jpg"
    manifest = table(
        tmp_path / "m.csv", ["path", "caption"], [[file, "one"], [data / "classes" / "cat" / "1.jpg", "two"]]
    )
    shown = invoke("retrieval", *given, "--data", manifest, "--caption", "caption")
    assert shown.exit_code == 0 and "image -> text" in shown.stdout and "R@10" in shown.stdout
    assert json.loads(out.read_text())["results"]["text -> image"]["recall"]["5"] == 1
    assert invoke("retrieval", *given, "--data", manifest, "--dim", "3").exit_code == 0

    pairs = table(tmp_path / "p.csv", ["image", "depth"], [[file, tiny.depth_map(tmp_path / "0.png")]])
    two = ("--model", data / "image", "--model", f"depth={data / 'depth'}")
    shown = invoke("retrieval", *two, "--data", pairs)
    assert shown.exit_code == 0 and "depth -> image" in shown.stdout and "100.0 %" in shown.stdout
    for arguments, message in (
        ((*two, "--data", pairs, "--caption", "title"), "expected one manifest and no columns with two models"),
        ((*given, "--data", tmp_path / "nowhere.csv"), "no such file"),
        ((*given, "--data", pairs), r"missing: path, caption"),
    ):
        shown = invoke("retrieval", *arguments)
        assert shown.exit_code == 1 and message in shown.stderr and shown.stderr.count("\n") == 1
