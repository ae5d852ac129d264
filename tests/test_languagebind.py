"""Code that imports `languagebind` and is not edited: its names, submodules, functions; the golden cases through it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import lbfast
from lbfast import languagebind, paths
from lbfast.languagebind import functions
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "data" / "golden"
UPSTREAM = {  # what upstream's modules hold and public code imports
    "modeling": ["{own}", "CLIPVisionTransformer", "CLIPTextTransformer", "CLIPEncoderLayer", "PatchDropout"],
    "configuration": ["{own}Config", "CLIPTextConfig", "CLIPVisionConfig"],
    "tokenization": ["{own}Tokenizer"],
    "processing": [
        "{own}Processor",
        "get_{modality}_transform",
        "load_and_transform_{modality}",
        "make_list_of_images",
        "OPENAI_DATASET_MEAN",
        "OPENAI_DATASET_STD",
    ],
}


def run(*arguments: str, cwd: Path, code: int = 0) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lbfast.languagebind", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.mark.parametrize("root", ["lbfast", "lbfast.languagebind"])
@pytest.mark.parametrize("modality", paths.MODALITIES)
def test_the_same_paths_are_here(root, modality):
    own = f"LanguageBind{modality.capitalize()}"
    for kind, names in UPSTREAM.items():
        module = importlib.import_module(f"{root}.{modality}.{kind}_{modality}")
        for name in names:
            name = name.format(own=own, modality=modality)
            value = getattr(module, name)
            assert name in dir(module) and name in module.__all__
            assert not name.startswith(own) or value is getattr(lbfast, name)
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = module.nothing
    for name in (f"{root}.{modality}.nothing", f"{root}.{modality}.modeling_other", f"{root}.nothing"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


SCRIPT = """
import json, multiprocessing, subprocess, sys
import torch
from safetensors.torch import load_file
import languagebind
from languagebind import *
from languagebind import LanguageBind, LanguageBindImageTokenizer, model_dict, to_device, transform_dict
from languagebind.audio.processing_audio import AudioTransform, torchaudio_loader
from languagebind.image import modeling_image
from languagebind.video.modeling_video import LanguageBindVideo
import languagebind.depth.processing_depth as depth

CASES = {"image": "image", "depth": "depth", "audio": "audio", "thermal_lora": "thermal", "video_ft": "video",
         "video_lora": "video", "video_tube": "video"}

def child(queue):
    import languagebind.thermal.tokenization_thermal as module
    queue.put(module.LanguageBindThermalTokenizer.__module__)

if __name__ == "__main__":
    golden, found = sys.argv[1], {"argv": sys.argv, "worst": {}}
    for case, modality in CASES.items():
        model = languagebind.model_dict[modality].from_pretrained(f"{golden}/{case}")
        out = model(**load_file(f"{golden}/{case}/inputs.safetensors"), return_loss=True)
        want = load_file(f"{golden}/{case}/expected.safetensors")
        named = {"image_embeds": out.image_embeds, "text_embeds": out.text_embeds, "loss": out.loss,
                 "logits_per_image": out.logits_per_image}
        errors = [float((x - want[key]).abs().max() / want[key].abs().max()) for key, x in named.items()]
        found["worst"][case] = max(errors)
    bound = LanguageBind({"depth": f"{golden}/depth"})
    found["modules"] = [type(bound).__module__, LanguageBindVideo.__module__, depth.DepthNorm.__module__]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    found["spawned"] = queue.get()
    process.join()
    line = "import languagebind; print(languagebind.LanguageBind.__module__)"
    found["started"] = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True).stdout.strip()
    print(json.dumps(found))
"""


def test_a_script_runs_unedited_and_the_golden_cases_hold(tmp_path):
    """Beside a folder of upstream's name, as in a clone of its repository."""
    (tmp_path / "languagebind").mkdir()
    (tmp_path / "languagebind" / "__init__.py").write_text("raise ImportError('this is upstream')")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    found = json.loads(run(str(script), str(GOLDEN), "--flag", cwd=tmp_path))
    assert found["argv"] == [str(script), str(GOLDEN), "--flag"]
    assert len(found["worst"]) == 7 and max(found["worst"].values()) < 1e-5, found["worst"]
    assert found["modules"] == ["lbfast.model.languagebind"] * 2 + ["lbfast.processing.depth"]
    assert found["spawned"] == "lbfast.processing.text"


def test_modules_run_too_and_what_is_started_inherits(tmp_path):
    (tmp_path / "program.py").write_text(
        "import subprocess, sys, languagebind\n"
        "code = 'import languagebind.video.modeling_video as m; print(m.LanguageBindVideo.__module__)'\n"
        "print(sys.argv[1:], subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout)\n"
        "sys.exit(0 if __name__ == '__main__' else 9)"
    )
    assert run("-m", "program", "x", "-y", cwd=tmp_path).split("\n")[0] == "['x', '-y'] lbfast.model.languagebind"
    assert "no such file: nothing.py" in run("nothing.py", cwd=tmp_path, code=2)
    assert "usage: " in run(cwd=tmp_path, code=2)


def test_install_as_languagebind(tmp_path):
    """In a process of its own, as it is for good; and never in the place of what is there already."""
    program = """
import sys, lbfast
before = list(sys.path)
lbfast.install_as_languagebind()
lbfast.install_as_languagebind()
import languagebind, languagebind.image.tokenization_image
lbfast.install_as_languagebind()
assert languagebind.LanguageBind is lbfast.LanguageBind and languagebind.config_dict is lbfast.config_dict
assert sys.path[1:] == before
try:
    languagebind.nothing
except AttributeError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "module 'languagebind' has no attribute 'nothing'", done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "languagebind", SimpleNamespace(__file__="theirs.py"))
        with pytest.raises(RuntimeError, match=r"languagebind: expected .* before it is imported, got theirs\.py"):
            languagebind.install_as_languagebind()
        with pytest.raises(ImportError):
            importlib.import_module("languagebind.image")
        patch.setitem(sys.modules, "languagebind", lbfast)  # another way to put it there
        module = importlib.import_module("languagebind.image.processing_image")
        patch.delitem(sys.modules, "languagebind.image.processing_image")
        patch.delitem(sys.modules, "languagebind.image")
        assert module.LanguageBindImageProcessor is lbfast.LanguageBindImageProcessor


@pytest.mark.parametrize("modality", ["image", "thermal", "depth", "audio", "video"])
def test_functions_give_what_the_processors_give(modality, tmp_path):
    pytest.importorskip("av")
    write = {"image": tiny.picture, "thermal": tiny.picture, "depth": tiny.depth_map, "audio": tiny.sound}
    suffix = {"audio": ".wav", "video": ".mp4"}.get(modality, ".png")
    file = write.get(modality, tiny.clip)(tmp_path / f"a{suffix}")
    made = tiny.config(modality)
    transform = getattr(functions, f"get_{modality}_transform")(made)
    options = {"num_frames": 2} if modality == "video" else {}
    loaded = getattr(functions, f"load_and_transform_{modality}")(str(file), transform, **options)
    assert torch.equal(loaded, lbfast.transform_dict[modality](made)(str(file))["pixel_values"][0])


def test_video_backends(tmp_path):
    pytest.importorskip("av")
    file = str(tiny.clip(tmp_path / "a.mp4"))  # four frames
    load = functions.load_and_transform_video
    frames = {backend: load(file, lambda x: x, backend) for backend in ("opencv", "decord", "pytorchvideo")}
    assert frames["opencv"].shape == (3, 8, 80, 96) and frames["opencv"].dtype == torch.uint8
    assert torch.equal(frames["opencv"], frames["decord"])
    every = load(file, lambda x: x, num_frames=None)
    assert every.shape == (3, 4, 80, 96) and torch.equal(frames["decord"][:, ::7], every[:, ::3])
    assert frames["pytorchvideo"].keys() == {"video", "audio"} and frames["pytorchvideo"]["audio"] is None
    assert torch.equal(frames["pytorchvideo"]["video"], every.float())
    half = load(file, lambda x: x, "pytorchvideo", clip_start_sec=0.1, clip_end_sec=0.3)["video"]
    assert torch.equal(half, every[:, 1:3].float())
    given = tiny.config("video", video_decode_backend="pytorchvideo")
    transformed = load(file, functions.get_video_transform(given), "pytorchvideo")
    plain = load(file, functions.get_video_transform(tiny.config("video")), "decord", num_frames=2)
    assert transformed.keys() == {"video", "audio"}
    torch.testing.assert_close(transformed["video"], plain, rtol=0, atol=1e-5)  # resized before, not after, it is cut
    for call in (
        lambda: load(file, None, "cv"),
        lambda: functions.get_video_transform(tiny.config("video", video_decode_backend="x")),
    ):
        with pytest.raises(ValueError, match="video_decode_backend: expected one of decord, opencv, pytorchvideo"):
            call()


def test_audio_and_depth_functions(tmp_path):
    pytest.importorskip("av")
    vision = tiny.config("audio").vision_config
    waveform, rate = functions.torchaudio_loader(tiny.sound(tmp_path / "a.wav"))
    assert waveform.shape == (1, 8000) and waveform.dtype == torch.float32 and rate == 16000
    mel = functions.AudioTransform(vision)((waveform, rate))
    assert torch.equal(mel, functions.get_audio_transform(SimpleNamespace(vision_config=vision))((waveform, rate)))
    x = torch.tensor([-1.5, -1.0, 0.0, 0.5, 1.0])
    assert functions.float32_to_int16_torch(x).tolist() == [-32767, -32767, 0, 16383, 32767]
    assert functions.int16_to_float32_torch(torch.tensor([32767, 0], dtype=torch.int16)).tolist() == [1.0, 0.0]
    depth = functions.opencv_loader(tiny.depth_map(tmp_path / "d.png"))
    assert depth.shape == (80, 96) and depth.dtype == np.float32 and depth.max() > 8000
    picture = functions.opencv_loader(tiny.picture(tmp_path / "p.png"))
    assert np.array_equal(picture[..., ::-1], np.asarray(Image.open(tmp_path / "p.png")))
    scaled = functions.DepthNorm(max_depth=10)(depth)
    assert scaled.shape == (3, 80, 96) and torch.allclose(scaled[0], torch.tensor(depth).clamp(10, 10000) / 10000)
    assert functions.make_list_of_images("a") == ["a"] and functions.make_list_of_images(["a"]) == ["a"]
