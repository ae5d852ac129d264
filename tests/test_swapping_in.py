"""Tools that everybody uses, on our models: Trainer, accelerate, peft, exporters, torch.func, saving and loading."""

import pickle
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

import lbfast
from lbfast.model import saving
from tests import tiny
from tests.test_modules import bound, inputs, pixels

IDS = torch.tensor([[1, 5, 6, 49407], [1, 9, 8, 49407]])


class Pairs(torch.utils.data.Dataset):
    """Eight images with captions."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        torch.manual_seed(i)
        ids = torch.tensor([1, 5 + i, 6, 49407])
        return {"pixel_values": torch.randn(3, 64, 64), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Broken(Pairs):
    def __getitem__(self, i):
        raise lbfast.MediaError("a.jpg", "an image", "text")


def collate(items):
    return {key: torch.stack([item[key] for item in items]) for key in items[0]} | {"return_loss": True}


def same(a, b):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, msg=name)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`")
def test_hugging_faces_trainer(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=5,
        save_steps=5,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=True,
        learning_rate=1e-3,
    )
    model = tiny.model("image").train()
    trainer = Trainer(model, arguments, train_dataset=Pairs(), data_collator=collate)
    before = model.visual_projection.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, model.visual_projection.weight)
    trainer.save_model(str(tmp_path / "final"))
    for folder in ("checkpoint-5", "final"):
        same(model, lbfast.LanguageBindImage.from_pretrained(tmp_path / folder))
    Trainer(tiny.model("image", seed=1), arguments, train_dataset=Pairs(), data_collator=collate).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-5")
    )


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = tiny.model("image").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Pairs(), 2, collate_fn=collate))
    losses = []
    for _, batch in zip(range(5), [*loader, *loader]):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert len(set(losses)) == 5
    plain = accelerator.unwrap_model(model)
    state = accelerator.get_state_dict(model)
    plain.save_pretrained(
        tmp_path, is_main_process=accelerator.is_main_process, save_function=accelerator.save, state_dict=state
    )
    same(plain, lbfast.LanguageBindImage.from_pretrained(tmp_path))
    held = accelerate.cpu_offload(tiny.model("image"), execution_device=torch.device("cpu"))  # forward replaced
    with torch.no_grad():
        want = tiny.model("image").get_image_features(pixels("image"))
        torch.testing.assert_close(held.get_image_features(pixels("image")), want, rtol=1e-4, atol=1e-5)


class Clip(torch.nn.Module):
    """A model as open_clip's training calls it."""

    def __init__(self, seed=0):
        super().__init__()
        self.inner = tiny.model("image", seed=seed)

    def forward(self, images, texts):
        features = self.inner.get_image_features(images), self.inner.get_text_features(texts)
        units = [torch.nn.functional.normalize(x, dim=-1) for x in features]
        return {
            "image_features": units[0],
            "text_features": units[1],
            "logit_scale": self.inner.logit_scale.exp(),
        }


def dense(image_features, text_features, logit_scale, output_dict):
    logits = logit_scale * image_features @ text_features.T
    labels = torch.arange(len(logits))
    both = [torch.nn.functional.cross_entropy(x, labels) for x in (logits, logits.T)]
    return {"contrastive_loss": sum(both) / 2}


@pytest.mark.parametrize("accumulated", [1, 3])
def test_open_clips_training_arithmetic(accumulated, tmp_path):
    """Its steps: features of other micro-batches cached, gains without decay, gradients clipped, the scale clamped."""

    def optimized(model):
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        groups = [{"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
        groups.append({"params": decayed, "weight_decay": 0.2})
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)

    def step(model, optimizer, loss, batches):
        optimizer.zero_grad()
        with torch.no_grad():
            cached = [model(*batch) for batch in batches]
        for j, batch in enumerate(batches):
            live = model(*batch)
            scale = live.pop("logit_scale")
            inputs = {
                key: torch.cat([*(c[key] for c in cached[:j]), x, *(c[key] for c in cached[j + 1 :])])
                for key, x in live.items()
            }
            total = sum(loss(**inputs, logit_scale=scale, output_dict=True).values())
            total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type=2.0)
        optimizer.step()
        with torch.no_grad():
            model.inner.logit_scale.clamp_(0, 4.6052)
        return total.item()

    batches = []
    for i in range(6 * accumulated):
        batch = collate([Pairs()[(2 * i + k) % 8] for k in range(2)])
        batches.append((batch["pixel_values"], batch["input_ids"]))
    steps = [batches[i : i + accumulated] for i in range(0, len(batches), accumulated)]
    trained = {}
    for name, loss in {"ours": lbfast.InfoNCELoss(cache_labels=True), "dense": dense}.items():
        model = Clip().train()
        optimizer = optimized(model)
        losses = [step(model, optimizer, loss, some) for some in steps[:5]]
        assert losses[-1] < losses[0]
        trained[name] = model, optimizer, loss
    model, optimizer, loss = trained["ours"]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, trained["dense"][0].state_dict()[key], rtol=1e-4, atol=2e-5, msg=key)
    saved = {"epoch": 1, "name": "x", "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "epoch_1.pt")
    found = torch.load(tmp_path / "epoch_1.pt", weights_only=True)
    again = Clip(seed=1).train()
    again.load_state_dict(found["state_dict"])
    resumed = optimized(again)
    resumed.load_state_dict(found["optimizer"])
    assert step(model, optimizer, loss, steps[5]) == step(again, resumed, loss, steps[5])
    same(model, again)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["fc1", "fc2"], ["patch_embedding", "position_embedding"]])
def test_peft(targets, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny.model("image").train()
    adapted = peft.get_peft_model(model, peft.LoraConfig("FEATURE_EXTRACTION", r=4, target_modules=targets))
    batch = collate([Pairs()[i] for i in range(4)])
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        adapted(**batch).loss.backward()
        trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
        assert trained and all(adapted.get_parameter(name).grad is not None for name in trained)
        optimizer.step()
    adapted.save_pretrained(tmp_path)
    adapted.eval()
    with torch.no_grad():
        want = adapted(**batch)
        loaded = peft.PeftModel.from_pretrained(tiny.model("image"), tmp_path).eval()(**batch)
        merged = adapted.merge_and_unload()(**batch)
    for name in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(loaded[name], want[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(merged[name], want[name], rtol=0, atol=1e-5)
    assert (want.image_embeds - tiny.model("image")(**batch).image_embeds).abs().max() > 1e-3


@pytest.mark.parametrize("workers", [0, 1])
def test_media_errors_come_out_of_loaders(workers):
    with pytest.raises(lbfast.MediaError, match=r"a\.jpg: expected an image, got text"):
        list(DataLoader(Broken(), num_workers=workers))
    again = pickle.loads(pickle.dumps(lbfast.MediaError("a.jpg", "an image", "text")))
    assert (again.source, again.expected, again.got) == ("a.jpg", "an image", "text")


def test_training_with_workers(tmp_path):
    model = tiny.model("image").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in [*DataLoader(Pairs(), 2, num_workers=2, collate_fn=collate)] * 2:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again = tiny.model("image", seed=1)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    same(model, again)


def test_save_pretrained_as_hugging_face_calls_it(tmp_path, monkeypatch):
    model = tiny.model("image")
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    model.save_pretrained(tmp_path / "bin", safe_serialization=False, save_function=torch.save, max_shard_size="20KB")
    assert (tmp_path / "bin" / "pytorch_model.bin.index.json").exists()
    same(model, lbfast.LanguageBindImage.from_pretrained(tmp_path / "bin"))
    state = {key: value + 1 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "given", state_dict=state)
    saved = lbfast.LanguageBindImage.from_pretrained(tmp_path / "given")
    torch.testing.assert_close(saved.logit_scale, model.logit_scale + 1)
    with pytest.raises(ValueError, match=r"state_dict: expected the .* keys of the model, got 1: .* are missing"):
        model.save_pretrained(tmp_path / "none", state_dict={"logit_scale": model.logit_scale})
    with pytest.raises(ValueError, match="variant: expected None"):
        model.save_pretrained(tmp_path / "none", variant="fp16")
    with pytest.raises(ValueError, match=r"save_function: expected None or torch\.save"):
        model.save_pretrained(tmp_path / "none", safe_serialization=False, save_function=print)
    pushed = []
    monkeypatch.setattr(saving, "upload", lambda folder, repo_id=None, **hub: pushed.append((folder, repo_id, hub)))
    model.save_pretrained(tmp_path / "hub", push_to_hub=True, repo_id="me/mine", token="t", private=True)
    assert pushed == [(tmp_path / "hub", "me/mine", {"token": "t", "private": True})]


def test_upload_makes_a_repository_and_one_commit(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(token)

        def create_repo(self, name, private, exist_ok):
            calls.append((name, private, exist_ok))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{name}")

        def upload_folder(self, **options):
            calls.append(options)
            return "done"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert saving.upload(tmp_path, token="t", private=True, commit_message="m") == "done"
    assert calls[:2] == ["t", (tmp_path.name, True, True)]
    assert calls[2] == {"repo_id": f"me/{tmp_path.name}", "folder_path": tmp_path, "commit_message": "m"}


def test_languagebind_is_saved_and_pushed(tmp_path, monkeypatch):
    model = bound("image", "video")
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    model.save_pretrained(tmp_path)
    again = lbfast.LanguageBind({name: tmp_path / name for name in ("image", "video")})
    same(model, again)
    pushed = []

    def upload(folder, repo_id, **hub):
        pushed.append((sorted(path.name for path in folder.iterdir()), repo_id, hub))
        return "address"

    monkeypatch.setattr(saving, "upload", upload)
    assert model.push_to_hub("me/bound", private=True) == "address"
    assert pushed == [(["image", "video"], "me/bound", {"private": True})]


def test_upstreams_saved_weights_load():
    """CLIP's position_ids are persistent there, the scales are no part of it, adapters lie under peft's names."""
    model, scale = bound("image"), None
    scale = model.modality_scale["image"].clone()
    state = {key: value + 0.5 for key, value in model.state_dict().items() if not key.startswith("modality_scale")}
    places = ("modality_encoder.image.embeddings.", "modality_encoder.language.embeddings.")
    report = model.load_state_dict(state | {f"{place}position_ids": torch.arange(17)[None] for place in places})
    assert not report.missing_keys and not report.unexpected_keys
    assert model.modality_scale["image"] == scale
    for key, value in state.items():
        torch.testing.assert_close(model.state_dict()[key], value)
    with pytest.raises(RuntimeError, match="position_ids"):
        model.load_state_dict(state | {"position_ids": torch.arange(17)})
    torch.manual_seed(0)
    adapted = lbfast.LanguageBindImage(tiny.config("image", lora_r=2))
    wrapped, prefix = {}, "vision_model.encoder."
    for key, value in adapted.state_dict().items():
        key = key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
        wrapped[key.replace(prefix, f"{prefix}base_model.model.")] = value
    other = lbfast.LanguageBindImage(tiny.config("image", lora_r=2))
    other.load_state_dict(wrapped)
    same(adapted, other)


TOWERS = ["image", "video", "audio", "text"]


def tower(name):
    """A tower that returns what is pooled, its input, and another of another batch size."""
    if name == "text":

        class Tower(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = tiny.model("image").text_model.requires_grad_(False)

            def forward(self, ids, mask):
                return self.inner(ids, mask)[1]

        other = torch.tensor([[1, 7, 49407, 0], [1, 5, 6, 49407], [1, 49407, 0, 0]])
        return Tower(), (IDS, torch.ones_like(IDS)), (other, (other > 0).long())
    model = tiny.model(name)
    shape = {"video": (3, 2, 64, 64), "audio": (3, 112, 112)}.get(name, (3, 64, 64))

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model.requires_grad_(False)

        def forward(self, x):
            return self.inner.get_image_features(x)

    return Features(), (torch.randn(2, *shape),), (torch.randn(3, *shape),)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TOWERS)
def test_torchscript_traces(name):
    """In place of ours there are PyTorch's own operators, and nothing of the example's data or batch is baked in."""
    module, given, others = tower(name)
    traced = torch.jit.trace(module.eval(), given)
    for inputs_ in (given, others):
        torch.testing.assert_close(traced(*inputs_), module(*inputs_), rtol=1e-4, atol=1e-5)
    assert "lbfast::" not in str(traced.inlined_graph)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", TOWERS)
def test_onnx_exports(name, dynamo, tmp_path):
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    runtime = pytest.importorskip("onnxruntime")
    module, given, _ = tower(name)
    file = tmp_path / "model.onnx"
    torch.onnx.export(module.eval(), given, file, dynamo=dynamo, **({} if dynamo else {"opset_version": 17}))
    session = runtime.InferenceSession(str(file))
    named = {place.name: value.numpy() for place, value in zip(session.get_inputs(), given)}
    got = torch.from_numpy(session.run(None, named)[0])
    torch.testing.assert_close(got, module(*given), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["image", "video"])
def test_torch_func_gives_gradients_of_each_sample(name):
    """grad, and vmap of grad: those of autograd, one sample after the other."""
    model = tiny.model(name)
    parameters = dict(model.named_parameters())
    images, ids = pixels(name), IDS

    def loss(parameters, image, ids):
        out = torch.func.functional_call(model, parameters, (ids[None], image[None]))
        texts = torch.cat([out.text_embeds, -out.text_embeds, out.text_embeds.roll(1, -1)])
        return lbfast.InfoNCELoss()(out.image_embeds, texts, 5.0)

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, images, ids)
    for i in range(2):
        one = torch.func.grad(loss)(parameters, images[i], ids[i])
        wanted = {key: p for key, p in parameters.items() if key != "logit_scale"}
        grads = torch.autograd.grad(loss(parameters, images[i], ids[i]), list(wanted.values()))
        for key, want in zip(wanted, grads):
            for got in (one[key], each[key][i]):
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5, msg=key)


def test_features_as_transformers_5_returns_them():
    model = tiny.model("image")
    batch = inputs("image")
    for call, given, attentions in (
        (model.get_image_features, batch["image"], True),
        (model.get_text_features, batch["language"], False),
    ):
        want = call(**given)
        out = call(**given, return_dict=True, output_hidden_states=True, output_attentions=attentions)
        torch.testing.assert_close(out.pooler_output, want, rtol=1e-4, atol=1e-5)
        assert len(out.hidden_states) == 3 and (out.attentions is not None) == attentions


def test_names_are_lazy_and_dir_is_clean():
    program = """
import sys, lbfast
names = dir(lbfast)
assert "lbfast.embedding" not in sys.modules and "embedding" in names
assert not {"importlib", "Any", "TYPE_CHECKING", "annotations"} & set(names), names
assert not [name for name in names if name.startswith("_") and name != "__version__"], names
print(lbfast.embedding.embed_files.__name__, lbfast.ops.info_nce.__name__)
try:
    lbfast.nothing
except AttributeError as error:
    print(error)
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == ["embed_files info_nce", "module 'lbfast' has no attribute 'nothing'"]


def test_a_missing_compiler_is_one_warning():
    program = """
import os, warnings
os.environ |= {"PATH": "", "CXX": ""}
import torch
from lbfast import native, ops
native.library_name = lambda: "missing.so"
x = torch.randn(2, 3, 2, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        ops.attention(x, x, x)
print([str(w.message)[:80] for w in caught if "lbfast" in str(w.message)])
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown.count("lbfast: the native kernels could not be built") == 1
