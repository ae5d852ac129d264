"""lbfast-mini: the world is what it says, its files hold what was drawn, the shipped weights find what they should."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import sys
import threading
import time
import wave
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import lbfast
from lbfast import mini
from lbfast.cli import app
from lbfast.mini import nested, recipe, world
from lbfast.mini.files import write_world
from lbfast.mini.table import TARGETS, measure, show
from lbfast.mini.vocabulary import learn_merges
from lbfast.mini.world import ATTRIBUTES, CAPTIONS, SEES, Scene, caption, held_out, scenes
from lbfast.model.checkpoint import full_name
from lbfast.processing.text import LanguageBindImageTokenizer, write_vocabulary
from lbfast.signals import Signals, Stopped
from lbfast.training.recipes import recipe as read_recipe

WEIGHTS = sorted(mini.WEIGHTS.iterdir())
ONE = Scene("star", "red", "small", "on the left", "close by", "hot", "up", "quickly", seed=7)


def files_of(manifest: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def test_scenes_are_the_same_again():
    first = scenes("train", 50, seed=3)
    assert first == scenes("train", 80, seed=3)[:50] != scenes("train", 50, seed=4)
    for draw in (world.picture, world.clip, world.depth_map, world.thermal_picture, world.sound):
        assert np.array_equal(draw(first[0]), draw(first[0])) and not np.array_equal(draw(first[0]), draw(first[1]))
    assert [caption(s, "image") for s in first] == [caption(s, "image") for s in scenes("train", 50, seed=3)]


def test_every_value_occurs_and_no_view_is_in_both_splits():
    train, test = scenes("train", 3000), scenes("test", 300)
    for name, values in ATTRIBUTES.items():
        for made, least in ((train, 0.6), (test, 0.3)):
            counts = Counter(getattr(scene, name) for scene in made)
            assert set(counts) == set(values) and min(counts.values()) > least * len(made) / len(values), (name, counts)
    for sense in SEES:
        assert not {s.view(sense) for s in train} & {s.view(sense) for s in test}
        assert all(held_out(s, sense) for s in test) and not any(held_out(s, sense) for s in train)
        for block in (test[:100], test[100:200], test[200:]):
            assert len({caption(s, sense, wording=0) for s in block}) == 100
    for arguments, said in ((("valid", 1), "split: expected train or test"), (("test", 0), "count: expected at least")):
        with pytest.raises(ValueError, match=said):
            scenes(*arguments)


@pytest.mark.parametrize("sense", SEES)
def test_captions_name_what_a_sense_sees_and_nothing_else(sense):
    for wording in (0, 1):
        said = caption(ONE, sense, wording)
        assert {name for name in ATTRIBUTES if getattr(ONE, name) in said} == set(SEES[sense])


def test_what_is_drawn():
    here = Scene("square", "green", "large", "in the middle", "close by", "hot", "right", "quickly")
    picture = world.picture(here).astype(int)
    assert picture[48, 48, 1] > 180 > picture[48, 48, 0] + picture[48, 48, 2] and picture[2, 90].max() < 90
    first, last = (frame[..., 1].astype(int) > 120 for frame in world.clip(here)[[0, -1]])
    assert np.nonzero(last)[1].mean() - np.nonzero(first)[1].mean() > 20  # it went to the right
    depth = world.depth_map(here)
    assert 900 < depth[48, 48] < 1100 and depth[2, 2] > 4000 and depth.dtype == np.uint16
    assert world.thermal_picture(here)[48, 48].min() > 150  # white hot
    loud, quiet = (world.sound(Scene(**{**vars(here), "size": size})) for size in ("large", "small"))
    assert loud.shape == (world.SAMPLES,) and 0.2 < abs(loud).max() <= 1 and loud.std() > 5 * quiet.std()
    for shape in ATTRIBUTES["shape"]:  # each is another outline
        others = [s for s in ATTRIBUTES["shape"] if s != shape]
        mine = world.depth_map(Scene(**{**vars(here), "shape": shape})) < 2000
        assert all((mine != (world.depth_map(Scene(**{**vars(here), "shape": o})) < 2000)).sum() > 150 for o in others)


def test_files_hold_what_was_drawn(tmp_path):
    pytest.importorskip("av")
    from lbfast.processing.video import read_frames

    manifest = write_world(tmp_path / "w", 3, "train", seed=5)
    rows, made = files_of(manifest), scenes("train", 3, seed=5)
    assert len(rows) == 3 and set(rows[0]) == {*SEES, *(f"{view}_caption" for view in CAPTIONS)}
    for row, scene in zip(rows, made):
        where = {sense: manifest.parent / row[sense] for sense in SEES}
        assert {sense: row[f"{sense}_caption"] for sense in SEES} == {sense: caption(scene, sense) for sense in SEES}
        assert np.array_equal(np.asarray(Image.open(where["depth"])), world.depth_map(scene))
        for sense, drawn in (("image", world.picture(scene)), ("thermal", world.thermal_picture(scene))):
            assert abs(np.asarray(Image.open(where[sense])).astype(int) - drawn).mean() < 4
        frames = read_frames(where["video"], world.FRAMES).numpy()
        assert abs(frames.astype(int) - world.clip(scene)).mean() < 6
        with wave.open(str(where["audio"])) as file:
            heard = np.frombuffer(file.readframes(world.SAMPLES), "<i2") / 32767
            assert file.getframerate() == world.RATE and abs(heard - world.sound(scene)).max() < 1e-4
    again = write_world(tmp_path / "again", 3, "train", seed=5, senses=("image",), processes=2)
    assert files_of(again)[0].keys() == {"image", *(f"{view}_caption" for view in CAPTIONS)}
    assert (again.parent / "image" / "000002.jpg").read_bytes() == (
        manifest.parent / "image" / "000002.jpg"
    ).read_bytes()
    with pytest.raises(ValueError, match=r"senses: expected some of image, .*, got smell"):
        write_world(tmp_path, 1, senses=("smell",))


def test_merges_make_every_word_a_token(tmp_path):
    captions = ["A small star is hot.", "a small stare, hot art"]
    merges = learn_merges(captions)
    assert merges == learn_merges(reversed(captions))
    write_vocabulary(tmp_path, merges)
    tokenizer = LanguageBindImageTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer.tokenize("small star stare, art is hot")
    assert [token.removesuffix("</w>") for token in tokens] == ["small", "star", "stare", ",", "art", "is", "hot"]
    assert len(tokenizer) == 512 + len(merges) + 2


def test_shipped_tokenizers():
    """Any text goes through and comes back; the end of text is the largest id, where captions are pooled."""
    assert len({(folder / "merges.txt").read_text() for folder in WEIGHTS}) == 1
    for folder in WEIGHTS:
        cls = getattr(lbfast, f"LanguageBind{folder.name.capitalize()}Tokenizer")
        tokenizer = cls.from_pretrained(folder)
        for text in (*(caption(ONE, sense) for sense in SEES), "zebra éclair 42 日"):
            ids = tokenizer(text)["input_ids"]
            assert ids[-1] == max(ids) == len(tokenizer) - 1 and ids.count(ids[-1]) == 1
            assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
        assert len(tokenizer(caption(ONE, "image"))["input_ids"]) <= 24


def test_shipped_weights_are_small():
    assert [folder.name for folder in WEIGHTS] == sorted(SEES)
    sizes, texts = 0, []
    for folder in WEIGHTS:
        sizes += sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        model = lbfast.model_dict[folder.name].from_pretrained(folder, torch_dtype="auto")
        assert model.dtype == torch.float16
        for tower in (model.vision_model, model.text_model):
            assert sum(p.numel() for p in tower.parameters()) <= 3_000_000
        texts.append({key: value for key, value in model.state_dict().items() if key.startswith("text_")})
    assert sizes <= 8_000_000
    assert all(torch.equal(texts[0][key], text[key]) for text in texts for key in texts[0])  # language stayed


def test_names():
    assert mini.checkpoint("depth") == Path(full_name("lbfast-mini/depth")) == mini.WEIGHTS / "depth"
    with pytest.raises(ValueError, match="expected one of audio, depth, image, thermal, video, got 'smell'"):
        mini.checkpoint("smell")
    with pytest.raises(ValueError, match="lbfast-mini/smell: expected one of lbfast-mini/audio, "):
        full_name("lbfast-mini/smell")


def test_shipped_weights_reach_the_targets():
    """Means of three draws of 100 scenes that training did not see."""
    pytest.importorskip("av")
    rows = measure({folder.name: folder for folder in WEIGHTS}, draws=3)
    assert list(rows) == list(TARGETS)
    for pair, row in rows.items():
        assert len(row.there) == len(row.back) == 3
        assert all(one <= five <= 1 for one, five in zip(row.there, row.five))
        assert statistics.mean(row.there) >= TARGETS[pair], (pair, row)
        if pair[0] == "text":  # language was trained for it; what the others share is less
            assert statistics.mean(row.there) - statistics.mean(row.quarter) <= 0.03, (pair, row)
    assert len(show(rows, 3).rows) == len(TARGETS)


def test_float8_finds_what_float32_finds():
    """Within two in a hundred scenes; to the letter it would not be float8."""
    where = {name: mini.checkpoint(name) for name in ("image", "depth")}
    rows, beside = measure(where, draws=1), measure(where, draws=1, precision="fp8")
    assert list(rows) == list(beside) == [("text", "image"), ("text", "depth")]
    for pair, row in rows.items():
        assert round(100 * (row.there[0] - beside[pair].there[0])) <= 2, pair  # scenes: 0.99 - 0.97 is over 0.02
    table = show(rows, 1, {"fp8": beside})
    assert [column.header for column in table.columns][1:3] == ["R@1 %", "fp8 R@1 %"]


def test_nested_projections(tmp_path):
    """Turning leaves every cosine as it was; training leaves the towers, and one language for all."""

    def states(folders):
        return {name: lbfast.model_dict[name].from_pretrained(folder).state_dict() for name, folder in folders.items()}

    names = ("depth", "image")
    folders = {name: Path(shutil.copytree(mini.checkpoint(name), tmp_path / name)) for name in names}
    world_file = write_world(tmp_path / "world", 12, "train", 5, names)
    found = nested.towers("depth", folders["depth"], world_file, 10)
    assert found.media.shape == (10, 128) and found.texts.shape == (10, 64) and found.ids.shape == (10,)
    before = states(folders)
    turned = nested.axes(found.texts, before["depth"]["text_projection.weight"])
    torch.testing.assert_close(turned @ turned.T, torch.eye(64), rtol=0, atol=1e-5)
    nested.nest(folders, dict.fromkeys(names, world_file), epochs=1)
    after = states(folders)
    for name in names:
        changed = {key for key, value in after[name].items() if not torch.equal(value, before[name][key])}
        assert changed == {"text_projection.weight", "visual_projection.weight"}
    assert torch.equal(after["depth"]["text_projection.weight"], after["image"]["text_projection.weight"])


def test_untrained_weights_do_not(tmp_path):
    """The measure can fail: the checkpoint that training starts from finds next to nothing."""
    where = recipe.start(tmp_path / "start")
    rows = measure({"image": where}, draws=1)
    assert list(rows) == [("text", "image")] and rows["text", "image"].there[0] < 0.1
    with pytest.raises(ValueError, match="draws: expected at least 1, got 0"):
        measure({}, draws=0)


def test_recipes_are_the_papers_order(tmp_path):
    """Language with pictures first; then each of the others to that language, which stays."""
    plans = {name: read_recipe(recipe.recipe_file(name)) for name in recipe.STAGES}
    assert list(plans)[:2] == ["sight", "language"] and {plan.modality for plan in plans.values()} == set(SEES)
    assert [name for name, plan in plans.items() if plan.train_text] == ["language"]
    assert {path.stem for path in recipe.recipe_file("sight").parent.iterdir()} == set(plans)
    for name, (modality, after) in recipe.STAGES.items():
        assert plans[name].modality == modality and not plans[name].lora_r
        line = recipe.command(name, tmp_path)
        where = {"sight": "start", "language": "runs/sight/model"}.get(name, "runs/language/model")
        assert line[line.index("--model") + 1] == str(tmp_path / where) and (after or "start") in where


def test_commands(tmp_path):
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
    made = runner.invoke(
        app, ["mini", "make", str(tmp_path / "w"), "--samples", "2", "--modality", "depth", "--modality", "image"]
    )
    assert made.exit_code == 0 and made.output.strip() == str(tmp_path / "w" / "manifest.jsonl")
    assert len([path for path in (tmp_path / "w").rglob("*.*") if not path.name.startswith(".")]) == 5
    bad = runner.invoke(app, ["mini", "make", str(tmp_path), "--split", "valid"])
    assert bad.exit_code == 1 and "split: expected train or test, got 'valid'" in bad.stderr
    empty = runner.invoke(app, ["eval", "mini", "--weights", str(tmp_path)])
    assert empty.exit_code == 1 and "expected folders of checkpoints, found none" in empty.stderr


def test_a_stage_has_the_time_to_save(tmp_path):
    """It hears of the end once, and is waited for."""
    code = """
import pathlib, signal, sys, time
def save(number, frame):
    signal.signal(number, signal.SIG_DFL)
    time.sleep(0.5)
    out.joinpath("saved").touch()
    sys.exit(7)
out = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGINT, save)
out.joinpath("runs").touch()
time.sleep(60)
"""

    def interrupt():
        while not (tmp_path / "runs").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped), Signals():
        threading.Thread(target=interrupt, daemon=True).start()
        recipe._run([sys.executable, "-c", code, str(tmp_path)])
    assert (tmp_path / "saved").exists()
