"""optimize_for_inference: the same embeddings from weights laid out for the machine, in any precision."""

import contextlib
import copy

import pytest
import torch
from torch.torch_version import TorchVersion

import lbfast
from lbfast import testing, tokenwise
from lbfast.model import inference
from lbfast.model.frozen import Float8Linear, FrozenLinear, PackedLinear, PanelLinear, check_float8, check_int8
from lbfast.ops.layer_norm import layer_norm_float8
from lbfast.reference import languagebind as reference
from tests.test_model import CASES, inputs, load

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def features(model, tensors):
    """Both towers' embeddings, by name."""
    masks = {k: v for k, v in tensors.items() if k not in ("pixel_values", "input_ids")}
    with torch.no_grad():
        return {
            "image": model.get_image_features(tensors["pixel_values"]),
            "text": model.get_text_features(tensors["input_ids"], **masks),
        }


def widths(model):
    config = model.config.vision_config
    return config.hidden_size, config.intermediate_size


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_same_embeddings_in_float32(case, pack):
    tensors = inputs(case)
    model = load(case, merge_lora=False)
    want = features(model, tensors)
    got = features(lbfast.optimize_for_inference(model, dtype=None, pack_weights=pack), tensors)
    for name, value in want.items():
        assert testing.relative_error(got[name], value) <= 2e-6, name
    kinds = {type(m) for m in model.modules() if isinstance(m, FrozenLinear)}
    spanned = tokenwise.kernels(torch.float32) and not tokenwise.why_not(*widths(model), torch.float32)
    assert kinds == {FrozenLinear if not pack else PanelLinear if spanned else PackedLinear}
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config.vision_config.lora_r == 0


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_within_budget(case):
    tensors = inputs(case)  # float32 pixels, cast on the way in
    model = load(case)
    exact = reference.like(copy.deepcopy(model).double())
    plain = reference.like(copy.deepcopy(model).bfloat16())
    want, rounded = features(exact, inputs(case, torch.float64)), features(plain, inputs(case, torch.bfloat16))
    got = features(lbfast.optimize_for_inference(model, dtype="bfloat16"), tensors)
    for name in want:
        assert got[name].dtype == torch.bfloat16
        testing.assert_within_budget(got[name], want[name], rounded[name], name)


def test_the_whole_forward_and_hidden_states():
    model = load("video_ft")
    with torch.no_grad():
        exact, plain, got = (
            of(**inputs("video_ft", dtype), output_hidden_states=True)
            for of, dtype in [
                (copy.deepcopy(model).double(), torch.float64),
                (copy.deepcopy(model), torch.float32),
                (lbfast.optimize_for_inference(model, dtype=None), torch.float32),
            ]
        )
    states = (made.vision_model_output.hidden_states for made in (got, exact, plain))
    for i, results in enumerate(zip(*states)):
        testing.assert_within_budget(*results, f"hidden state {i}")
    testing.assert_within_budget(got.logits_per_text, exact.logits_per_text, plain.logits_per_text)


def test_quick_gelu():
    torch.manual_seed(0)
    model = load("image")
    for module in model.modules():
        if hasattr(module, "fc1"):
            module.config.hidden_act = "quick_gelu"
    tensors = inputs("image")
    want = features(model, tensors)
    got = features(lbfast.optimize_for_inference(model, dtype=None), tensors)
    assert testing.relative_error(got["image"], want["image"]) <= 2e-6


def test_all_modalities_at_once():
    models = {"image": load("image"), "video": load("video_ft")}
    bound = lbfast.LanguageBind.from_models(models)
    batch = {
        "image": {"pixel_values": inputs("image")["pixel_values"]},
        "video": {"pixel_values": inputs("video_ft")["pixel_values"]},
        "language": {"input_ids": inputs("video_ft")["input_ids"]},  # the last model's text tower
    }
    with torch.no_grad():
        want = bound(batch)
        got = lbfast.optimize_for_inference(bound, dtype=None)(batch)
    for name, value in want.items():
        assert testing.relative_error(got[name], value) <= 2e-6, name


def test_float8_keeps_the_direction():
    """Emulated on a CPU. Rows of e4m3 have a rounding error of about 2^-4.5 rms; 2^-3 an element at most."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 384).bfloat16()
    x = torch.randn(3, 33, 256).bfloat16()
    x[0, 0] = 0
    got = Float8Linear(layer)(x)
    want = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert got.shape == want.shape and got.dtype == torch.bfloat16
    assert 1e-3 < testing.relative_error(got, want) < 2**-4
    torch.testing.assert_close(got[0, 0], layer.bias)
    tensors = inputs("image")
    want = features(load("image"), tensors)
    got = features(lbfast.optimize_for_inference(load("image"), precision="fp8"), tensors)
    for name in want:
        assert torch.cosine_similarity(got[name].float(), want[name], dim=-1).min() > 0.99


needs_int8 = pytest.mark.skipif(not tokenwise.kernels(torch.int8), reason="no int8 products here")


@needs_int8
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_keeps_the_direction(case, dtype):
    """Pooled tokens and hidden states; the last layer, the embeddings and the projections keep the dtype."""
    tensors, want = inputs(case), features(load(case), inputs(case))
    model = lbfast.optimize_for_inference(load(case), dtype=dtype, precision="int8")
    got = features(model, tensors)
    for name in want:
        assert torch.cosine_similarity(got[name].float(), want[name], dim=-1).min() > 0.999, name
        assert not torch.equal(got[name].float(), want[name])
    *layers, last = model.vision_model.encoder.layers
    kinds = {m.parts[0].dtype for layer in layers for m in layer.modules() if isinstance(m, PanelLinear)}
    assert kinds <= {torch.int8}
    wide = torch.bfloat16 if tokenwise.in_thirds(getattr(torch, dtype)) else getattr(torch, dtype)
    assert {m.parts[0].dtype for m in last.modules() if isinstance(m, PanelLinear)} <= {wide}
    with torch.no_grad():
        whole = model.get_image_features(tensors["pixel_values"], output_hidden_states=True, return_dict=True)
    assert torch.cosine_similarity(whole.pooler_output.float(), want["image"], dim=-1).min() > 0.999


def with_outliers(case):
    """Four channels of the running sum 60 to 100 times the rest, in every token."""
    model = load(case)
    tower = model.vision_model
    torch.manual_seed(0)
    channels = torch.randperm(tower.config.hidden_size)[:4]
    with torch.no_grad():
        tower.pre_layrnorm.bias[channels] += torch.tensor([60.0, -90.0, 75.0, 100.0])
        tower.post_layernorm.weight[channels] = 0.01
    return model


@needs_int8
@pytest.mark.parametrize("case", ["image", "video_ft", "audio"])
def test_outlier_channels_are_evened_out(case):
    tensors = inputs(case)
    model = with_outliers(case)
    want = features(model, tensors)["image"]
    lbfast.calibrate(model, [{"pixel_values": tensors["pixel_values"]}])
    assert testing.relative_error(features(model, tensors)["image"], want) <= 1e-5  # nothing changed
    assert model.vision_model.calibrated and not model.vision_model.training

    def error(made):
        got = features(lbfast.optimize_for_inference(made, dtype="float32", precision="int8"), tensors)["image"]
        assert torch.cosine_similarity(got, want, dim=-1).min() > 0.99
        return testing.relative_error(got, want)

    left = with_outliers(case)
    left.vision_model.calibrated = left.text_model.calibrated = True
    assert max(error(model), error(with_outliers(case))) < 0.7 * error(left)  # by inputs, and by made up ones


def test_calibration_asks_for_batches_and_a_model():
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        lbfast.calibrate(load("image"), [])
    with pytest.raises(TypeError, match="expected a LanguageBind model or one of its towers, got Linear"):
        lbfast.calibrate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected one that is not optimized yet"):
        lbfast.calibrate(lbfast.optimize_for_inference(load("image"), dtype=None))
    bound = lbfast.LanguageBind.from_models({"image": load("image")})
    tensors = inputs("image")
    batch = {"image": {"pixel_values": tensors["pixel_values"]}, "language": {"input_ids": tensors["input_ids"]}}
    with torch.no_grad():
        want = bound(batch)
        lbfast.calibrate(bound, [batch])
        got = bound(batch)
    for name in want:
        assert testing.relative_error(got[name], want[name]) <= 1e-5


@needs_int8
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.int8, 0.02)])
def test_gradients_of_the_inputs_pass_through_panels(dtype, bound):
    layer = torch.nn.Linear(48, 64)
    panel, gelu = PanelLinear(layer, weights=dtype), torch.nn.functional.gelu
    for function, plain in ((panel, layer), (lambda x: panel.activated(x, "gelu"), lambda x: gelu(layer(x)))):
        x = torch.randn(5, 48, requires_grad=True)
        (got,) = torch.autograd.grad(function(x).sin().sum(), x)
        (want,) = torch.autograd.grad(plain(x).sin().sum(), x)
        assert testing.relative_error(got, want) <= bound


@needs_int8
def test_int8_is_refused_where_it_cannot_be():
    with pytest.raises(ValueError, match="pack_weights: expected True with precision int8"):
        lbfast.optimize_for_inference(load("image"), precision="int8", pack_weights=False)
    with pytest.raises(RuntimeError, match="int8 is for CPUs, got a model on cuda:0"):
        check_int8(torch.device("cuda:0"), True)
    model = load("image")
    model.config.vision_config.intermediate_size = 40
    with pytest.raises(RuntimeError, match=r"precision: int8 can't run here: .*intermediate_size of 32, got"):
        lbfast.optimize_for_inference(model, precision="int8")


@pytest.mark.parametrize("kind", [FrozenLinear, PackedLinear, Float8Linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (1,)])
def test_frozen_linear_layers_and_their_sums(kind, dtype, shape):
    if kind is PackedLinear and not PackedLinear.takes(dtype):
        pytest.skip("oneDNN has no products of this dtype here")
    torch.manual_seed(0)
    layer = torch.nn.Linear(32, 16).to(dtype)
    frozen = kind(layer)
    x, total = torch.randn(*shape, 32, dtype=dtype), torch.randn(*shape, 16, dtype=dtype)
    gelu, quick_gelu = torch.nn.functional.gelu, lambda h: h * torch.sigmoid(1.702 * h)

    def check(got, function):
        exact = function(layer.double(), x.double(), total.double())
        near = function(layer.to(dtype), x, total)
        if kind is Float8Linear:
            assert got.dtype == dtype and testing.relative_error(got, exact) < 2**-4
        else:
            testing.assert_within_budget(got, exact, near)

    with torch.no_grad():
        check(frozen(x), lambda layer, x, total: layer(x))
        check(frozen.product(x), lambda layer, x, total: x @ layer.weight.T)
        for name, function in (("gelu", gelu), ("quick_gelu", quick_gelu)):
            got = frozen.activated(x, name)
            if kind is Float8Linear:  # as the next one takes it
                values, scales = got
                got = (values.float() * scales).to(dtype)
            check(got, lambda layer, x, total, function=function: function(layer(x)))
        got, rest = frozen.add_to(total.clone(), x)
        check(got if rest is None else got + rest, lambda layer, x, total: total + layer(x))


def test_float8_layers_take_what_norms_and_activations_leave():
    torch.manual_seed(0)
    fc1, fc2, norm = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32), torch.nn.LayerNorm(32)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        h, total = layer_norm_float8(x, norm.weight, norm.bias, norm.eps)
        assert total is x
        got, rest = Float8Linear(fc2).add_to(total, Float8Linear(fc1).activated(h, "gelu"))
        want = fc2(torch.nn.functional.gelu(fc1(norm(x))))
    assert got is x and rest.shape == x.shape
    assert 1e-3 < testing.relative_error(rest, want) < 2**-4


@pytest.mark.parametrize(
    ("capability", "version", "hip", "message"),
    [
        ((8, 0), "2.13.0+cu128", None, "compute capability 8.9 or later"),
        ((8, 9), "2.11.1+cu128", None, r"needs PyTorch 2.12 or later, got 2.11.1\+cu128, .*177651"),
        ((9, 4), "2.13.0", "6.4", "needs an NVIDIA GPU"),
        ((8, 9), "2.12.0+cu128", None, None),
        ((9, 0), "2.8.0+cu128", None, None),
    ],
)
def test_float8_says_where_it_can_not_be(monkeypatch, capability, version, hip, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(torch.version, "hip", hip)
    with pytest.raises(RuntimeError, match=message) if message else contextlib.nullcontext():
        check_float8(torch.device("cuda", 0))
    check_float8(torch.device("cpu"))


def test_best_dtype_follows_the_cpu(monkeypatch):
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: False, raising=False)
    assert inference.best_dtype("cpu") == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert inference.best_dtype("cpu") == torch.bfloat16
    assert inference.best_dtype("meta") == torch.float32


def test_what_can_not_be_done_any_more_says_so(tmp_path):
    model = lbfast.optimize_for_inference(load("image"), dtype="float32")
    with pytest.raises(RuntimeError, match="save before optimize_for_inference"):
        model.state_dict()
    with pytest.raises(RuntimeError, match="save before optimize_for_inference"):
        model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"expected to stay torch.float32 on cpu.*move it first"):
        model.double()
    assert model.to("cpu", torch.float32).eval() is model
    with pytest.raises(ValueError, match="not optimized yet"):
        lbfast.optimize_for_inference(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int4"}, "precision: expected None or one of fp8, int8, got 'int4'"),
        ({"dtype": "int8"}, "floating"),
        ({"batch_sizes": ()}, "batch_sizes: expected positive numbers"),
        ({"batch_sizes": (0, 1)}, "batch_sizes: expected positive numbers"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lbfast.optimize_for_inference(load("image"), **arguments)


def test_another_kind_of_model():
    with pytest.raises(TypeError, match=r"model: expected a LanguageBind model.*lbfast.accelerate"):
        lbfast.optimize_for_inference(torch.nn.Linear(2, 2))


def test_unpacked_weights_compile_without_a_break():
    model = lbfast.optimize_for_inference(load("image"), dtype=None, pack_weights=False)
    pixels = inputs("image")["pixel_values"]
    with torch.no_grad():
        want = model.vision_model.pooled(pixels)
        got = torch.compile(model.vision_model.pooled, fullgraph=True, backend="eager")(pixels)
    torch.testing.assert_close(got, want)


@pytest.mark.gpu
def test_float8_on_the_device():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 products")
    tensors = {key: value.cuda() for key, value in inputs("image").items()}
    want = features(load("image").cuda(), tensors)
    got = features(lbfast.optimize_for_inference(load("image").cuda(), precision="fp8"), tensors)
    for name in want:
        assert torch.cosine_similarity(got[name].float(), want[name], dim=-1).min() > 0.99
