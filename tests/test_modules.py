"""Modules are called where they are more than their parameters: hooks, adapters, wrappers, replacements, transforms."""

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import PreTrainedModel

import lbfast
from lbfast.model.frozen import FrozenLinear
from lbfast.model.layers import MLP
from lbfast.model.plain import plain, wholly_plain
from tests import tiny

IDS = torch.tensor([[1, 5, 6, 49407, 0], [1, 9, 49407, 0, 0]])
VISION = ["", "embeddings", "embeddings.patch_embedding", "embeddings.position_embedding", "patch_dropout"]
VISION += ["pre_layrnorm", "encoder", "post_layernorm"]
TEXT = ["", "embeddings", "embeddings.token_embedding", "embeddings.position_embedding", "encoder", "final_layer_norm"]
LAYER = ["", ".layer_norm1", ".self_attn", ".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj"]
LAYER += [".self_attn.out_proj", ".layer_norm2", ".mlp", ".mlp.fc1", ".mlp.fc2"]
TEMPORAL = [".temporal_layer_norm1", ".temporal_attn", ".temporal_attn.q_proj", ".temporal_attn.out_proj"]
LAYERS = [f"encoder.layers.{i}{name}" for i in (0, 1) for name in LAYER]
TIMES = [f"encoder.layers.{i}{name}" for i in (0, 1) for name in TEMPORAL]


def pixels(modality, batch=2):
    torch.manual_seed(1)
    return torch.randn({"video": (batch, 3, 2, 64, 64)}.get(modality, (batch, 3, 64, 64)))


def bound(*modalities):
    return lbfast.LanguageBind.from_models({name: tiny.model(name) for name in modalities})


def inputs(modality):
    value = {"pixel_values": pixels(modality)}
    return {modality: value, "language": {"input_ids": IDS, "attention_mask": (IDS != 0).long()}}


def counted(root, names, call):
    """How often the forward hooks and pre-hooks of each module run in a call, and whether with tensors alone."""
    runs = {name: [0, 0] for name in names}

    def before(name):
        def hook(module, args, kwargs):
            runs[name][0] += 1
            assert all(x is None or isinstance(x, (torch.Tensor, int, bool, torch.device)) for x in args), (name, args)

        return hook

    def after(name):
        def hook(module, args, out):
            runs[name][1] += 1
            first = out if name.endswith("patch_dropout") else out[0] if isinstance(out, tuple) else out
            assert first is None or isinstance(first, torch.Tensor) or hasattr(first, "pooler_output"), (name, out)

        return hook

    handles = []
    for name in names:
        module = root.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        return call(), runs
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("how", ["trained", "checkpointed", "inference", "optimized"])
@pytest.mark.parametrize("modality", ["image", "video", "language"])
def test_hooks_run_once_a_call(modality, how):
    """In every path: pooled tokens, packed captions, checkpoints, products laid out for inference."""
    kind = "video" if modality == "video" else "image"
    model = bound(kind)
    given = {modality: inputs(kind)[modality]}
    names = [*(TEXT if modality == "language" else VISION), *LAYERS, *(TIMES if modality == "video" else ())]
    if how == "optimized":  # which makes one product of three
        lbfast.optimize_for_inference(model, dtype=None)
        names = [name for name in names if not name.endswith(("0.self_attn.q_proj", "k_proj", "v_proj", "attn.q_proj"))]
    encoder = model.modality_encoder[modality]
    if how == "checkpointed":
        encoder.encoder.gradient_checkpointing = True
        encoder.train()
    with torch.set_grad_enabled(how in ("trained", "checkpointed")):
        want = model(given)[modality]
        alone = [name for name in names if modality != "video" or "temporal" in name]
        for some in [names, *([name] for name in alone)]:
            got, runs = counted(encoder, some, lambda: model(given)[modality])
            assert runs == {name: [1, 1] for name in some}
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(given)[modality], want, rtol=0, atol=0)


def test_hooks_on_all_modules_run_too():
    model, seen = bound("image"), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    with torch.no_grad():
        model(inputs("image"))
    handle.remove()
    for name, module in model.named_modules():
        called = not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and name != "modality_scale"
        assert seen.count(module) == called, name


def test_hooks_see_what_upstreams_modules_are_given():
    """Whole batches, before they are pooled or packed, and a hook's own output goes on."""
    model, shapes = bound("image"), {}
    vision, text = model.modality_encoder["image"], model.modality_encoder["language"]
    for tower, name in ((vision, "image"), (text, "text")):
        for part in ("layer_norm1", "self_attn", "mlp"):
            module = tower.encoder.layers[-1].get_submodule(part)

            def keep(module, args, out, key=(name, part)):
                shapes[key] = (tuple(args[0].shape), tuple((out[0] if isinstance(out, tuple) else out).shape))

            module.register_forward_hook(keep)
    with torch.no_grad():
        want = model(inputs("image"))
    assert shapes == {
        (name, part): (shape, shape)
        for name, shape in (("image", (2, 17, 32)), ("text", (2, 5, 32)))
        for part in ("layer_norm1", "self_attn", "mlp")
    }
    vision.encoder.layers[0].mlp.register_forward_hook(lambda module, args, out: out * 0)
    assert (model(inputs("image"))["image"] - want["image"]).abs().max() > 1e-3


def test_gradients_reach_hooks():
    """Grad-CAM: an activation's gradient, and a module's."""
    model, acts, grads, modules = bound("video"), [], [], []
    norm = model.modality_encoder["video"].encoder.layers[-1].layer_norm1

    def keep(module, args, out):
        acts.append(out)
        out.register_hook(grads.append)

    norm.register_forward_hook(keep)
    norm.register_full_backward_hook(lambda module, given, got: modules.append(got[0]))
    model(inputs("video"))["video"].sum().backward()
    assert len(acts) == len(grads) == len(modules) == 1
    assert acts[0].shape == grads[0].shape == modules[0].shape and grads[0].abs().sum() > 0


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Attending(nn.Module):
    """An attention of a user's, which returns a tensor alone and takes no Norm unread."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, *others):
        assert isinstance(x, torch.Tensor) and x.dim() == 3
        return self.inner(x, *others)[0]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "name", ["", "embeddings", "encoder", "encoder.layers.1", "encoder.layers.0.self_attn", "encoder.layers.0.mlp.fc1"]
)
def test_wrapped_modules_are_called(name, grad):
    for modality in ("image", "language"):
        model = bound("image")
        with torch.set_grad_enabled(grad):
            want = model(inputs("image"))[modality]
            where = f"modality_encoder.{modality}.{name}".rstrip(".")
            parent, _, leaf = where.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Wrapped(model.get_submodule(where)))
            torch.testing.assert_close(model(inputs("image"))[modality], want, rtol=1e-4, atol=1e-5)


def test_replaced_modules_are_called():
    model = tiny.model("image")
    want = model.get_image_features(pixels("image"))
    layer = model.vision_model.encoder.layers[0]
    layer.self_attn, layer.layer_norm2 = Attending(layer.self_attn), Wrapped(layer.layer_norm2)
    torch.testing.assert_close(model.get_image_features(pixels("image")), want, rtol=1e-4, atol=1e-5)

    class Scaled(MLP):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.mlp.__class__ = Scaled
    assert (model.get_image_features(pixels("image")) - want).abs().max() > 1e-3
    layer.mlp.__class__ = MLP
    layer.mlp.fc2.forward = lambda x: x.new_zeros(*x.shape[:-1], 32)  # as accelerate's hooks do
    assert (model.get_image_features(pixels("image")) - want).abs().max() > 1e-3


@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize("vision", [{}, {"force_patch_dropout": 0.5}, {"clip_type": "vl_new", "tube_size": 2}])
@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_embeddings_called_are_embeddings_read(modality, vision, uint8):
    """Convolutions and tables by their own calls give what `ops.patch_embed` makes of their weights."""
    if modality == "audio" and uint8:
        return
    torch.manual_seed(0)
    config = tiny.config(modality, **vision)
    tower = lbfast.model_dict[modality](config).vision_model
    tower.patch_dropout.noise = torch.rand(2, tower.num_patches)
    shape = (2, 3, *((2,) if modality == "video" else ()), *tower.pixel_shape[1:])
    given = torch.randint(0, 256, shape, dtype=torch.uint8) if uint8 else torch.randn(shape)
    want = tower(given).last_hidden_state
    seen = []
    for name in ("patch_embedding", "position_embedding"):
        tower.embeddings.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    got = tower(given).last_hidden_state
    assert len(seen) == 2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization", "ignore:torch.quantize_per")
@pytest.mark.parametrize("change", ["prune", "weight_norm", "spectral", "parametrized", "adapter", "quantized"])
def test_changed_layers_train_and_count(change):
    """What is done to one product reaches the embeddings, and gradients reach it, at every step."""
    model, images = tiny.model("image").train(), pixels("image")
    want = model.get_image_features(images).detach()
    attention = model.vision_model.encoder.layers[0].self_attn
    layer = attention.q_proj
    if change == "prune":
        prune.l1_unstructured(layer, "weight", 0.9)
    elif change == "weight_norm":
        parametrizations.weight_norm(layer)
    elif change == "spectral":
        nn.utils.spectral_norm(layer)
    elif change == "parametrized":

        class Half(nn.Module):
            def forward(self, x):
                return x * 0.5

        nn.utils.parametrize.register_parametrization(layer, "weight", Half())
    elif change == "adapter":
        peft = pytest.importorskip("peft")
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), model)
    else:
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
        found = [m for m in quantized.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
        assert len(found) == sum(isinstance(m, nn.Linear) for m in model.modules())
        got = quantized.get_image_features(images)
        assert 0 < (got - want).abs().max() < 0.1 * want.abs().max()
        return
    changed = attention.q_proj
    assert not plain(changed)
    for _ in range(2):
        model.zero_grad()
        got = model.get_image_features(images)
        got.sum().backward()
        trained = [p for p in changed.parameters() if p.requires_grad]
        assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained if p.dim() > 1)
    same = change in ("weight_norm",)  # which only names the weight otherwise
    assert ((got - want).abs().max() < 1e-4) == same


def test_tensors_of_other_kinds_are_not_read():
    """torchao and the like put a tensor subclass into a plain nn.Linear."""

    class Tagged(torch.Tensor):
        used = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.used += func is nn.functional.linear and args[1] is layer.weight
            return super().__torch_function__(func, types, args, kwargs or {})

    model = tiny.model("image")
    layer = model.vision_model.encoder.layers[0].mlp.fc1
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Tagged))
    model.get_image_features(pixels("image"))
    assert Tagged.used == 1


def test_adapted_models_are_optimized_around_their_adapters():
    peft = pytest.importorskip("peft")
    model = tiny.model("image")
    config = peft.LoraConfig(target_modules=["vision_model.encoder.layers.0.self_attn.q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    want = model.get_image_features(pixels("image")).detach()
    lbfast.optimize_for_inference(model, dtype=None)
    first, second = model.vision_model.encoder.layers
    assert first.self_attn.qkv is None and isinstance(first.mlp.fc1, FrozenLinear)
    assert isinstance(second.mlp.fc1, FrozenLinear)
    torch.testing.assert_close(model.get_image_features(pixels("image")), want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_either_kind_give_adapters_gradients(reentrant):
    model = tiny.model("image").train().requires_grad_(False)
    weight = model.vision_model.encoder.layers[0].mlp.fc1.weight.requires_grad_()
    (want,) = torch.autograd.grad(model.get_image_features(pixels("image")).sum(), weight)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.get_image_features(pixels("image")).sum().backward()
    torch.testing.assert_close(weight.grad, want, rtol=1e-4, atol=1e-5)
    if "every_n_layers" in inspect.signature(PreTrainedModel._set_gradient_checkpointing).parameters:
        with pytest.raises(ValueError, match="every_n_layers: expected 1"):
            model.activation_checkpointing_enable(every_n_layers=2)


@pytest.mark.parametrize("name", ["encoder.layers.0", "encoder.layers.0.mlp", "encoder.layers.1.layer_norm2"])
@pytest.mark.parametrize("modality", ["image", "video", "language"])
def test_modules_replaced_in_an_optimized_model_are_seen(modality, name):
    """By others of the same kind, which are as plain as what the model was laid out of."""
    kind = "video" if modality == "video" else "image"
    model, reference = bound(kind), bound(kind)
    given = {modality: inputs(kind)[modality]}
    lbfast.optimize_for_inference(model, dtype=None)
    torch.manual_seed(7)
    old = reference.modality_encoder[modality].get_submodule(name)
    new = copy.deepcopy(old)
    for parameter in new.parameters():
        nn.init.normal_(parameter, std=0.5)
    before = model(given)[modality]
    parent, _, leaf = name.rpartition(".")
    for some in (model, reference):
        setattr(some.modality_encoder[modality].get_submodule(parent), leaf, copy.deepcopy(new).eval())
    with torch.no_grad():
        want = reference(given)[modality]
        with pytest.warns(UserWarning, match="modules were replaced after optimize_for_inference"):
            got = model(given)[modality]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert (got - before).abs().max() > 1e-2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(model(given)[modality], want, rtol=1e-4, atol=1e-5)


def test_plain_models_are_plain():
    for modality in ("image", "video", "audio"):
        model = tiny.model(modality)
        assert wholly_plain(model.vision_model) and wholly_plain(model.text_model)
        lbfast.optimize_for_inference(model, dtype=None)
        assert wholly_plain(model.vision_model) and model.vision_model.encoder.running is not None


@pytest.mark.parametrize(
    "refused, says",
    [
        (lambda m: m.train(), "train: expected a model with its parameters"),
        (lambda m: m.half(), "expected to stay torch.float32"),
        (lambda m: m.to("meta"), "expected to stay torch.float32 on cpu"),
        (copy.deepcopy, "pickle, deepcopy: expected a model with its parameters"),
        (lambda m: torch.save(m, "/dev/null"), "pickle, deepcopy: expected a model with its parameters"),
        (lambda m: m.state_dict(), "state_dict: the weights were laid out"),
    ],
)
@pytest.mark.parametrize("kind", ["bound", "model", "tower"])
def test_optimized_models_refuse_what_they_cannot(kind, refused, says):
    model = bound("image") if kind == "bound" else tiny.model("image")
    model = model.text_model if kind == "tower" else model
    lbfast.optimize_for_inference(model, dtype=None)
    before = {name: (p.dtype, p.device) for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=says):
        refused(model)
    assert not any(module.training for module in model.modules())
    assert before == {name: (p.dtype, p.device) for name, p in model.named_parameters()}
    model.eval().to("cpu")
