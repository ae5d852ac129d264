"""Layers in inference: the same as one after the other, rounded no more often, in as few launches as can be."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from lbfast import dispatch, testing
from lbfast.model import inference
from lbfast.model.frozen import FrozenLinear
from lbfast.model.layers import Encoder
from lbfast.model.packing import Packing, Padded
from tests.counted import launches

FRAMES, WIDTH = 8, 128
KINDS = ("image", "video", "video with temporal MLP", "text")


def encoder(kind="image", layers=6, dtype=torch.bfloat16):
    torch.manual_seed(0)
    about = SimpleNamespace(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_attention_heads=2,
        num_hidden_layers=layers,
        num_frames=FRAMES,
        layer_norm_eps=1e-5,
        hidden_act="gelu",
        add_time_attn="video" in kind,
        attention_dropout=0.0,
    )
    made = Encoder(about, temporal_mlp="MLP" in kind)
    for parameter in made.parameters():
        if parameter.dim() == 1:  # biases count
            torch.nn.init.normal_(parameter, std=0.5)
    return made.to(dtype).requires_grad_(False)


def frozen(made, precision=None, pack=None):
    """As on a GPU; with `pack` "spans" as on a CPU of ours, "oneDNN" as on others."""
    reasons = {} if pack == "spans" else {"return_value": ["not asked for"]}
    with mock.patch.object(inference, "_why_no_spans", wraps=inference._why_no_spans, **reasons):
        made.running = inference._freeze(made, FRAMES, precision, pack is not None)
    assert made.running is not None
    return made


def tokens(kind, dtype, count=20):
    """x, and what `Encoder.pooled` is called with beside it."""
    x = torch.randn(FRAMES, count, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    if kind == "text":
        ids = torch.randint(0, 99, (FRAMES, count), generator=torch.Generator().manual_seed(2))
        return x, {"packing": Padded.of(ids)}
    return x, {"frames": FRAMES if "video" in kind else 1}


@pytest.mark.parametrize("pack", [None, "oneDNN", "spans"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_one_layer_after_the_other(kind, pack):
    """In float64, which no CPU packs, and in float32, which it does."""
    dtype = torch.float32 if pack else torch.float64
    made, (x, about) = encoder(kind, dtype=dtype), tokens(kind, dtype)
    want = made.pooled(x, **about)
    ready = frozen(made, pack=pack)
    got = ready.pooled(x.clone(), **about)
    assert testing.relative_error(got, want) <= (2e-6 if pack else 1e-14)
    gradient = ready.pooled(x.clone().requires_grad_(), **about)  # one layer after the other
    assert testing.relative_error(gradient, want) <= (2e-6 if pack else 1e-14)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_the_same_by_triton(kind):
    made, (x, about) = encoder(kind, layers=2, dtype=torch.float32), tokens(kind, torch.float32, count=5)
    want = made.pooled(x, **about)
    with dispatch.use_impl("triton"):
        got = frozen(made).pooled(x.clone(), **about)
    assert testing.relative_error(got, want) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pack", [None, "oneDNN", "spans"])
@pytest.mark.parametrize("kind", KINDS)
def test_within_the_budget_of_one_after_the_other(kind, pack, dtype):
    plain, exact = encoder(kind, dtype=dtype), encoder(kind, dtype=dtype).double()
    x, about = tokens(kind, dtype)
    want, rounded = exact.pooled(x.double(), **about), plain.pooled(x, **about)
    testing.assert_within_budget(frozen(plain, pack=pack).pooled(x.clone(), **about), want, rounded)


@pytest.mark.parametrize("kind", KINDS)
def test_float8_is_the_same_as_one_layer_after_the_other(kind):
    """But for where bfloat16 is rounded. The last layer is not in float8."""
    made, (x, about) = encoder(kind), tokens(kind, torch.bfloat16)
    ready = frozen(made, "fp8")
    assert all(type(m) is FrozenLinear for m in ready.layers[-1].modules() if isinstance(m, FrozenLinear))
    got = ready.pooled(x.clone(), **about)
    ready.running = None
    assert testing.relative_error(got, ready.pooled(x, **about)) <= 2e-2


def test_captions_packed_and_padded_are_the_same():
    """Lengths of 1 and of all columns among them; what comes after an end is of no account."""
    ids = torch.tensor([[9, 0, 0, 0, 0], [1, 2, 3, 4, 9], [1, 9, 9, 3, 9], [2, 9, 0, 0, 1]])
    x = torch.randn(4, 5, WIDTH, dtype=torch.float64)
    lengths = torch.tensor([1, 5, 2, 2])
    made = encoder("text", dtype=torch.float64)
    packing, padded = Packing.of(lengths), Padded.of(ids)
    want = made.pooled(packing.pack(x), packing=packing)
    changed = x.masked_fill(padded.padding[..., None], 7)
    for ready in (made, frozen(made)):
        for given in (x, changed):
            torch.testing.assert_close(ready.pooled(given.clone(), packing=padded), want)
        torch.testing.assert_close(ready.pooled(packing.pack(x), packing=packing), want)


def test_autocast_takes_the_layers_as_they_are():
    made, (x, about) = encoder(dtype=torch.float32), tokens("image", torch.float32)
    want = made.pooled(x, **about)
    with torch.autocast("cpu", torch.bfloat16):
        got = frozen(made).pooled(x.bfloat16(), **about)
    assert testing.relative_error(got, want) <= 2e-2


def of_a_layer(monkeypatch, kind, count=257, precision=None):
    """What one layer more, but the last, launches; printed."""
    x, about = tokens(kind, torch.bfloat16, count)
    counted = []
    for layers in (7, 6):
        made, given = frozen(encoder(kind, layers), precision), x.clone()
        with launches(monkeypatch) as names:
            made.pooled(given, **about)
        counted.append(names)
    more = len(counted[0]) - len(counted[1])
    second = counted[0][more : 2 * more]
    print(kind, more, *second)
    assert counted[0] == counted[0][:more] + second + counted[1][more:]
    return second


@pytest.mark.parametrize(("kind", "most"), [("image", 8), ("video", 12), ("text", 8)])
def test_launches_of_a_layer(monkeypatch, kind, most):
    assert len(of_a_layer(monkeypatch, kind, 77 if kind == "text" else 257)) <= most


def test_float8_is_rounded_to_inside_norms_and_activations(monkeypatch):
    """What only attention hands on is rounded by a kernel of its own. The products are emulated here, by operators."""
    kernels = [name for name in of_a_layer(monkeypatch, "image", precision="fp8") if name.endswith("_kernel")]
    assert len(kernels) == 5, kernels
