"""What a call under torch.inference_mode leaves behind, in a cache or an attribute, serves a training later on."""

import gc
import importlib.util
import tempfile
from pathlib import Path

import torch

import lbfast
from lbfast.data.sample import Sample
from lbfast.evaluation.encoder import Encoder
from lbfast.losses import InfoNCELoss
from lbfast.model.languagebind import LanguageBind
from lbfast.processing.audio import resample
from lbfast.processing.processor import transform_dict
from tests import runs, tiny

MEDIA = {
    "image": (tiny.picture, "png"),
    "thermal": (tiny.picture, "png"),
    "depth": (tiny.depth_map, "png"),
    "video": (tiny.clip, "mp4"),
    "audio": (tiny.sound, "wav"),
}


class Letters(tiny.Tokenizer):
    def __call__(self, texts, max_length, padding, truncation, return_tensors):
        return super().__call__(list(texts), max_length, "max_length", truncation, return_tensors)


def models():
    """Of every modality, a video's by tubes too; patches are dropped in training, layers of some computed twice."""
    made = {name: lbfast.model_dict[name](tiny.config(name, force_patch_dropout=0.5)) for name in MEDIA}
    tubes = {"clip_type": "vl_new", "tube_size": 1}
    made["tubes"] = lbfast.model_dict["video"](tiny.config("video", force_patch_dropout=0.5, **tubes))
    made["adapters"] = lbfast.model_dict["depth"](tiny.config("depth", lora_r=2))
    made["depth"].vision_model.encoder.gradient_checkpointing = True
    return made


def passes(made, files):
    """Calls of every op in Triton's interpreter, of every model by its other implementations, of processors and the
    losses; each gives tensors that a gradient can be taken of."""
    from bench import memcheck

    for op, tensors in memcheck.cases("cpu", torch.float32).values():
        yield op(*tensors)
    ids = torch.tensor([[320, 1125, 49407, 49407], [320, 539, 1125, 49407]])
    text = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
    for impl in ("torch", "native"):
        with lbfast.use_impl(impl):
            for model in made.values():
                modality = type(model).config_class.modality.name
                processor = transform_dict[modality](model.config)
                batches = [processor([files[modality]] * 2)["pixel_values"]]
                batches += [processor([files[modality]] * 2, raw=True)["pixel_values"]] if modality != "audio" else []
                for pixels in batches:
                    for training in (False, True):
                        out = model.train(training)(pixel_values=pixels, **text)
                        scale = out.logits_per_text.new_tensor(14.3)
                        yield out.logits_per_text, InfoNCELoss()(out.image_embeds, out.text_embeds, scale)
                    yield model.get_image_features(pixels), model.get_text_features(**text)
    resample(torch.randn(1, 900), 44100, 16000)
    bound = LanguageBind.from_models({"image": made["image"], "audio": made["audio"]})
    raw = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    yield tuple(bound({"image": {"pixel_values": raw}, "language": text}).values())


def evaluate(made, files):
    """As between two epochs."""
    encoder = Encoder(made["image"], transform_dict["image"](made["image"].config), Letters(), batch_size=2)
    assert encoder.media([Sample(files["image"], files["image"])])[1] == [0]
    encoder.texts(["a cat", "two cats"])


def first_inference_then_training():
    torch.set_num_threads(1)
    if importlib.util.find_spec("triton"):
        from tests import interpreter

        interpreter.install()
    made = models()
    with tempfile.TemporaryDirectory() as name:
        files = {modality: str(make(Path(name, f"{modality}.{end}"))) for modality, (make, end) in MEDIA.items()}
        evaluate(made, files)
        with torch.inference_mode():
            for _ in passes(made, files):
                pass
        del _
        gc.collect()
        left = [t.shape for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.is_inference()]
        assert not left, f"kept somewhere, for a training to stumble over: tensors of inference_mode, {left}"
        for outs in passes(made, files):
            outs = [outs] if isinstance(outs, torch.Tensor) else outs
            sum(out.float().square().sum() for out in outs if out.requires_grad).backward()
    for name, model in made.items():
        missing = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing in ([], ["logit_scale"]), f"{name}: {missing}"


def test_training_after_inference_mode(processes, tmp_path):
    """In a process of its own, whose caches are empty."""
    function = f"{__name__}:{first_inference_then_training.__name__}"
    done = runs.ended(processes, tmp_path, runs.called, {"TRITON_INTERPRET": "1"}, function)
    assert done.returncode == 0, done.stderr[-3000:]
