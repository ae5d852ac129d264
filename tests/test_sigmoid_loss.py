"""sigmoid_loss: loss and gradients against float64, for every implementation that runs here."""

import importlib
import itertools

import pytest
import torch

from lbfast import dispatch
from lbfast.ops import sigmoid_loss
from lbfast.reference.sigmoid_loss import sigmoid_loss as reference
from lbfast.testing import ROUNDING, assert_matches, randn

importlib.import_module("lbfast.ops._pairs").INTERPRETER_KNOWS_BFLOAT16 = True  # tests/interpreter.py
IMPLEMENTATIONS = importlib.import_module("lbfast.ops.sigmoid_loss").IMPLEMENTATIONS
pytestmark = pytest.mark.any_device
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.float16, torch.bfloat16)
START = (10.0, -10.0)
NUMBERS = (START, (100.0, -3.0), (0.0, -10.0))
"""Scale and bias; of the last all losses of negatives are alike, and would be rounded alike."""


def impls(dtype=torch.float32):
    """The implementations that run here: Triton too, interpreted where there is no GPU."""
    probe = torch.zeros(1, 1, device=DEVICE, dtype=dtype)
    return [name for name, why_not in IMPLEMENTATIONS.items() if not why_not(probe, probe)]


IMPLS = impls()


def unit(*shape, seed=0, dtype=torch.float32):
    x = randn(*shape, seed=seed, dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1).to(dtype).to(DEVICE)


def inputs(b, d, dtype=torch.float32, extra=0, numbers=START, draw=0):
    """x, y, scale and bias."""
    return [
        *(unit(b, d, seed=2 * draw, dtype=dtype), unit(b + extra, d, seed=2 * draw + 1, dtype=dtype)),
        *(torch.tensor(value, device=DEVICE) for value in numbers),
    ]


def of(function, **options):
    return lambda *tensors: function(*tensors, **options)


def run(tensors, needs=(True,) * 4, function=sigmoid_loss, **options):
    """Loss and the four gradients (None where not asked for)."""
    given = [t.detach().clone().requires_grad_(need) for t, need in zip(tensors, needs)]
    loss = function(*given, **options)
    loss.backward()
    return loss.detach(), *(t.grad for t in given)


def plain(x, y, scale, bias, **options):
    """In the inputs' dtype; its loss is float32, as ours is."""
    return reference(x, y, scale, bias, **options).to(torch.promote_types(x.dtype, torch.float32))


@pytest.mark.parametrize("b, d, extra", [(1, 32, 0), (2, 5, 3), (63, 80, 0), (65, 80, 64), (257, 768, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_matches_float64(dtype, b, d, extra):
    """At small and large logits, with ids that repeat and with more texts than images.

    Of one draw the cosine of a pair, or a sum of many, may cancel, and with it the gradient of the scale.
    """
    ids = torch.arange(b + extra, device=DEVICE) % max(2, b // 3) - 5_000_000_000
    for impl in impls(dtype):
        for numbers in NUMBERS[:1] if impl == "triton" and b > 100 else NUMBERS:
            options = {"ids": ids if numbers == NUMBERS[1] else None}
            draws = 12 if b <= 2 else 4 if b < 100 else 2
            tensors, *others = (inputs(b, d, dtype, extra, numbers, draw) for draw in range(draws))
            assert_matches(of(sigmoid_loss, impl=impl, **options), of(plain, **options), tensors, others=others)


def test_gradcheck():
    x, y, scale, bias = (t.double().requires_grad_() for t in inputs(4, 5, torch.float64, 3, (3.0, -1.0)))
    for ids in (None, torch.tensor([0, 1, 2, 0, 3, 1, 0], device=DEVICE)):
        assert torch.autograd.gradcheck(lambda *t, ids=ids: sigmoid_loss(*t, ids=ids), (x, y, scale, bias))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_gradient_alone(impl, dtype):
    if impl not in impls(dtype):
        pytest.skip(f"{impl} does not take {dtype} here")
    tensors = inputs(70, 40, dtype)
    every = run(tensors, impl=impl)
    with torch.no_grad():
        torch.testing.assert_close(sigmoid_loss(*tensors, impl=impl), every[0])
    for needs in itertools.product((False, True), repeat=4):
        if any(needs):
            some = run(tensors, needs, impl=impl)
            for need, a, b in zip(needs, some[1:], every[1:]):
                assert (a is None) != need
                if need:
                    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_properties(impl, monkeypatch):
    """Symmetric in its sides, blind to the order of the pairs and to the workspace; the same bits every time, and what
    came in multiplies all gradients, twice where the backward runs twice."""
    module = importlib.import_module("lbfast.ops.sigmoid_loss")
    tensors = inputs(600, 40)
    x, y, *numbers = tensors
    first = run(tensors, impl=impl)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    swapped, permuted = run([y, x, *numbers], impl=impl), run([x[order], y[order], *numbers], impl=impl)
    tight, again = run(tensors, impl=impl, workspace_mib=1), run(tensors, impl=impl)
    threefold = run(tensors, impl=impl, function=lambda *t, impl: 3 * sigmoid_loss(*t, impl=impl))
    for i, j in enumerate((0, 2, 1, 3, 4)):
        torch.testing.assert_close(first[i], swapped[j], atol=1e-7, rtol=1e-4)
        torch.testing.assert_close(first[i][order] if i in (1, 2) else first[i], permuted[i], atol=1e-7, rtol=1e-4)
        torch.testing.assert_close(first[i], tight[i], atol=1e-7, rtol=1e-4)
        torch.testing.assert_close(3 * first[i], threefold[i], atol=1e-7, rtol=1e-5) if i else None
        assert torch.equal(first[i], again[i])
    given = [t.clone().requires_grad_() for t in tensors]
    loss = sigmoid_loss(*given, impl=impl)
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(given[0].grad, 2 * first[1])
    if impl in impls(torch.bfloat16):
        narrow = inputs(600, 40, torch.bfloat16)
        once = run(narrow, impl=impl)
        monkeypatch.setattr(module, "_ROWS_AT_ONCE", 70)
        for a, b in zip(once, run(narrow, impl=impl)):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4 if a.dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_extremes(impl, dtype):
    """Finite and right: opposite, equal and one-hot rows; logits of hundreds, on the right and on the wrong side."""
    if impl not in impls(dtype):
        pytest.skip(f"{impl} does not take {dtype} here")
    eye, same = torch.eye(96, device=DEVICE, dtype=dtype), unit(1, 96, dtype=dtype).expand(70, 96)
    for x, y in ((same, same), (same, -same), (eye, eye), (eye, eye.roll(1, 0))):
        for numbers in ((300.0, -150.0), (-300.0, 500.0)):
            exact = run([t.double() for t in (x, y, *inputs(1, 1, numbers=numbers)[2:])], function=reference)
            ours = run([x, y, *inputs(1, 1, numbers=numbers)[2:]], impl=impl)
            for a, e in zip(ours, exact):
                assert torch.isfinite(a).all()
                tolerance = ROUNDING[dtype] * 4 + 500 * 2**-24  # a slope is as good as its logit
                least = tolerance * float(e.abs().max()) / 8 + torch.finfo(torch.float32).tiny
                torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=least)


@pytest.mark.parametrize("impl", [name for name in IMPLS if name != "triton"])
def test_powers_of_two_and_tiny_slopes(impl):
    """Rows times a power of two against others divided by it: the same, to the bit; slopes of 1e-35 as exact as others.

    Products on AMX are sums of bfloat16's, for which rows and slopes are divided by powers of two.
    """
    x, y, scale, bias = inputs(200, 100)
    once = run([x, y, scale, bias], impl=impl)
    for power in (2.0**50, 2.0**-50, 2.0**90):
        loss, dx, dy, *rest = run([x * power, y / power, scale, bias], impl=impl)
        for a, b in zip((loss, dx * power, dy / power, *rest), once):
            if power == 2.0**90:  # too far for these products: others serve
                torch.testing.assert_close(a, b, rtol=1e-5, atol=float(b.abs().max()) * 1e-6)
            else:
                assert torch.equal(a, b)
    far = [x, x, *inputs(1, 1, numbers=(160.0, -80.0))[2:]]
    assert_matches(of(sigmoid_loss, impl=impl), plain, far)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_and_inf_are_seen(impl):
    for bad, where, side in itertools.product((float("nan"), float("inf")), ((0, 0), (69, 39)), (0, 1)):
        tensors = inputs(70, 40)
        tensors[side][where] = bad
        assert not torch.isfinite(sigmoid_loss(*tensors, impl=impl))
    for i in (2, 3):
        tensors = inputs(9, 8)
        tensors[i] = torch.tensor(float("nan"), device=DEVICE)
        assert torch.isnan(sigmoid_loss(*tensors, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_dtypes_and_numbers(impl):
    wide = randn(50, 2, 48, seed=3).to(DEVICE)
    x, y = wide[:, 0, ::2], wide[:, 1].t().contiguous().t()[:, :24]
    numbers = inputs(1, 1, numbers=(0.5, -1.0))[2:]
    given = run([x, y, *numbers], impl=impl)
    for a, b in zip(given, run([x.contiguous(), y.contiguous(), *numbers], impl=impl)):
        assert torch.equal(a, b)
    assert torch.equal(sigmoid_loss(x, y, 0.5, -1.0, impl=impl), given[0])
    mixed = run([x, y.bfloat16(), *numbers], impl=impl)
    assert mixed[2].dtype == torch.bfloat16 and torch.equal(
        mixed[0], run([x, y.bfloat16().float(), *numbers], impl=impl)[0]
    )


def test_autocast_and_float16_scaled():
    x, y, *numbers = inputs(40, 24)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = run([x, y, *numbers])
    assert torch.equal(cast[0], run([x.bfloat16(), y.bfloat16(), *numbers])[0]) and cast[1].dtype == torch.float32
    half = run([x.half(), y.half(), *numbers], function=lambda *t: 2**14 * sigmoid_loss(*t))
    torch.testing.assert_close(half[1].float(), 2**14 * run([x, y, *numbers])[1], rtol=2e-2, atol=2)


def test_dense_under_torch_func():
    tensors = [unit(2, 5, 8), unit(2, 7, 8, seed=1), *inputs(1, 1)[2:]]
    for ids in (None, torch.tensor([0, 1, 0, 2, 3, 1, 1], device=DEVICE)):
        gradient = torch.func.grad(lambda x, y, i=ids: sigmoid_loss(x, y, *tensors[2:], ids=i), (0, 1))
        each = torch.func.vmap(gradient)(*tensors[:2])
        for i in range(2):
            want = run([tensors[0][i], tensors[1][i], *tensors[2:]], ids=ids)[1:3]
            for mine, theirs in zip([g[i] for g in each], want):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif("triton" not in IMPLS, reason="no Triton here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_chunks(dtype, monkeypatch):
    """Scratch for a tile or two at a time: the results of one launch."""
    kernel = importlib.import_module("lbfast.kernels.pairs")
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 2}
    monkeypatch.setitem(kernel.configs.INFO_NCE, "interpreter", kernel.configs.Launch(tile, num_warps=4))
    tensors, ids = inputs(200, 40, dtype, 61), torch.arange(261, device=DEVICE) % 50
    once = run(tensors, impl="triton", ids=ids)
    pairs = importlib.import_module("lbfast.ops._pairs")
    monkeypatch.setattr(pairs, "workspace_bytes", lambda *about, **more: 70_000)
    for a, b in zip(once, run(tensors, impl="triton", ids=ids)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4 if a.dtype == torch.float32 else ROUNDING[dtype])


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"image_embeds": torch.zeros(3)}, ValueError, r"sigmoid_loss: image_embeds: expected \(B, D\)"),
        (
            {"text_embeds": torch.zeros(2, 4)},
            ValueError,
            r"text_embeds: expected image_embeds' shape \(3, 4\), or more",
        ),
        ({"image_embeds": torch.zeros(0, 4), "text_embeds": torch.zeros(0, 4)}, ValueError, "at least one row"),
        ({"logit_scale": torch.ones(2)}, ValueError, "logit_scale: expected one element"),
        ({"logit_bias": torch.ones(2)}, ValueError, "logit_bias: expected one element"),
        ({"logit_bias": torch.tensor(3)}, TypeError, "logit_bias: expected a floating"),
        ({"ids": torch.zeros(4, dtype=torch.int64)}, ValueError, r"ids: expected \(3,\)"),
        ({"gather": "some"}, ValueError, "gather: expected 'all' or 'ring'"),
        ({"workspace_mib": 0}, ValueError, "workspace_mib"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
    ],
)
def test_errors(change, error, says):
    arguments = {"image_embeds": torch.zeros(3, 4), "text_embeds": torch.zeros(3, 4)}
    with pytest.raises(error, match=says):
        sigmoid_loss(**{**arguments, "logit_scale": torch.tensor(1.0), "logit_bias": torch.tensor(0.0), **change})


def test_impl_that_cannot_says_why():
    x = torch.zeros(2, 4, dtype=torch.float64)
    for name in [name for name, reasons in dispatch.explain(IMPLEMENTATIONS, x, x).items() if reasons]:
        with pytest.raises(RuntimeError, match="cannot take these inputs"):
            sigmoid_loss(x, x, 1.0, 0.0, impl=name)
