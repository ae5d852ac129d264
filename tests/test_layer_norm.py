"""ops.layer_norm against its oracle: values, every gradient, residuals that broadcast, what it keeps."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import lbfast
from lbfast import ops
from lbfast.ops.layer_norm import layer_norm_float8
from lbfast.reference.layer_norm import layer_norm as reference
from lbfast.testing import (
    ROUNDING,
    assert_matches,
    assert_rounded_to_float8,
    assert_within_budget,
    order_of_sums,
    randn,
    relative_error,
)

IMPLS = ["torch", "triton"]
pytestmark = pytest.mark.any_device
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = (1, 2, 16, 17, 77, 129, 180, 256, 257, 258, 534, 593)


def inputs(shape, residual=None, dtype=torch.float32):
    d = shape[-1]
    x = randn(*shape, dtype=dtype, device=DEVICE, seed=1) + 0.5
    weight, bias = (randn(d, dtype=dtype, device=DEVICE, seed=seed) for seed in (2, 3))
    more = [] if residual is None else [randn(*residual, dtype=dtype, device=DEVICE, seed=4)]
    return [x, weight, bias, *more]


def with_residual(function, **options):
    return lambda x, weight, bias, residual=None: function(x, weight, bias, residual=residual, **options)


def plain(x, weight, bias, *, residual=None):
    total = x if residual is None else x + residual
    y = F.layer_norm(total, x.shape[-1:], weight, bias)
    return y if residual is None else (y, total)


def check(impl, tensors, wanted=()):
    op = with_residual(ops.layer_norm, impl=impl)
    assert_matches(op, with_residual(reference), tensors, wanted, with_residual(plain))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(impl, n, dtype):
    check(impl, inputs((n, 40), dtype=dtype))
    check(impl, inputs((n, 40), (n, 40), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", (False, True))
def test_parameters_of_many_rows(dtype, residual):
    """Their gradients are summed in float32, whatever the dtype: right to its rounding, as one row's are."""
    n, d = 30_000, 8
    tensors = inputs((n, d), (n, 1) if residual else None, dtype)
    along = (randn(n, d, device=DEVICE, seed=5) + 1).to(dtype)  # whose sum would stop growing at 256 in bfloat16

    def run(function, cast):
        given = [cast(t).requires_grad_() for t in tensors]
        y = with_residual(function)(*given)
        y = y[0] if residual else y
        return torch.autograd.grad(y, given[1:3], along.to(y.dtype))

    exact = run(reference, lambda t: t.detach().double())
    for got, true in zip(run(ops.layer_norm, lambda t: t.detach().clone()), exact):
        assert got.dtype == dtype
        rounding = ROUNDING[dtype] * (1 if not residual else 2)  # the sum is rounded as well
        assert relative_error(got, true) <= rounding + order_of_sums(n)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("d", [1, 7, 64, 768, 1024, 1280, 2049, 8192])
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths(impl, d, dtype):
    wanted = (True, d > 1 or dtype == torch.float32, True, True)  # the weight's is 0: no error is relative to that
    check(impl, inputs((2, 3, d), (2, 3, d), dtype), wanted)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("residual", [None, (2, 3, 5, 40), (1, 3, 1, 40)])
def test_float64(impl, residual):
    check(impl, inputs((2, 3, 5, 40), residual, torch.float64))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "residual",
    [(2, 3, 4, 5, 8), (1, 3, 1, 1, 8), (8,), (2, 1, 4, 1, 8), (1, 3, 1, 5, 8), (4, 1, 1), (1,), (2, 1, 1, 1, 8)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_residuals_that_broadcast(impl, residual, dtype):
    check(impl, inputs((2, 3, 4, 5, 8), residual, dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("residual", [(8,), (3, 1, 8), (4, 8), (1, 3, 1, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize("wide", [False, True])
def test_the_sum_is_not_kept(impl, dtype, residual, wide):
    x, weight, bias, more = inputs((2, 3, 4, 8), residual, dtype)
    more = more.float() if wide else more
    op = partial(ops.layer_norm, keep_total=False, impl=impl)
    with torch.no_grad():
        y = op(x, weight, bias, residual=more)
    exact = reference(*(t.double() for t in (x, weight, bias)), residual=more.double())[0]
    assert_within_budget(y, exact, plain(x, weight, bias, residual=more.to(dtype))[0])
    check_one = [lambda *t, f=f: f(*t[:3], residual=t[3])[0] for f in (reference, plain)]
    if not wide:
        assert_matches(lambda *t: op(*t[:3], residual=t[3]), check_one[0], (x, weight, bias, more), (), check_one[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 40, 257, 1280])
@pytest.mark.parametrize("residual", [None, (3, 1, 1), (2, 3, 5, 1)])
@pytest.mark.parametrize("keep_total", [False, True])
def test_float8(impl, dtype, d, residual, keep_total):
    shape = (2, 3, 5, d)
    x, weight, bias, *more = inputs(shape, residual and (*residual[:-1], d), dtype)
    residual = more[0] if more else None
    (values, scales), total = layer_norm_float8(x, weight, bias, residual=residual, keep_total=keep_total, impl=impl)
    if residual is None or not keep_total:
        assert total is x
    else:
        assert torch.equal(total, x + residual)
    before = x if residual is None else total if keep_total else x.double() + residual.double()
    exact = reference(*(t.double() for t in (before, weight, bias)))
    assert_rounded_to_float8(values, scales, exact)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wanted", [tuple(i == j for i in range(4)) for j in range(4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_gradient_alone(impl, wanted, dtype):
    check(impl, inputs((3, 5, 8), (1, 5, 8), dtype), wanted)
    if any(wanted[:3]):
        check(impl, inputs((3, 5, 8), dtype=dtype), wanted)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("alone", [0, 1])
def test_one_output_used(impl, alone):
    check_one = [with_residual(f, **o) for f, o in ((ops.layer_norm, {"impl": impl}), (reference, {}))]
    op, oracle = (lambda *t, f=f: f(*t)[alone] for f in check_one)
    wanted = (True, False, False, True) if alone else ()  # the sum knows nothing of weight and bias
    assert_matches(op, oracle, inputs((3, 5, 8), (5, 8)), wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides(impl):
    x, weight, bias, residual = inputs((6, 9, 5, 16), (6, 9, 5, 16))
    check(impl, [x.transpose(1, 2), weight, bias, residual.permute(0, 2, 1, 3)])
    check(impl, [x[:, :, 0], weight, bias])  # class tokens
    check(impl, [x.transpose(-1, 1), *inputs((1, 9))[1:]])
    check(impl, [x[..., ::2], weight[::2], bias[::2]])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty(impl, shape):
    x, weight, bias = (t.requires_grad_() for t in inputs(shape))
    y, total = ops.layer_norm(x, weight, bias, residual=x.detach(), impl=impl)
    (y.sum() + total.sum() + ops.layer_norm(x, weight, bias, impl=impl).sum()).backward()
    assert y.shape == total.shape == x.grad.shape == shape
    assert weight.grad.eq(0).all() and bias.grad.eq(0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl):
    tensors = [t.requires_grad_() for t in inputs((2, 3, 2, 5), (1, 3, 1, 5), torch.float64)]
    assert torch.autograd.gradcheck(with_residual(ops.layer_norm, impl=impl), tensors, fast_mode=True)
    assert torch.autograd.gradcheck(with_residual(ops.layer_norm, impl=impl), tensors[:3], fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_properties(impl):
    x, weight, bias, residual = inputs((4, 6, 64), (4, 6, 64))
    y, total = ops.layer_norm(x, weight, bias, residual=residual, impl=impl)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(
        ops.layer_norm(3 * x + 2, weight, bias, 1e-12, impl=impl), ops.layer_norm(x, weight, bias, 1e-12)
    )
    ones, zeros = torch.ones_like(weight), torch.zeros_like(bias)
    plain = ops.layer_norm(total, ones, zeros, impl=impl)
    torch.testing.assert_close(plain * weight + bias, y)
    torch.testing.assert_close(plain.square().mean(-1), torch.ones_like(plain[..., 0]))


@pytest.mark.parametrize("impl", IMPLS)
def test_large_offset(impl):
    x, weight, bias = inputs((4, 1024))
    check(impl, [x + 1000, weight, bias], (False, False, False))


@pytest.mark.parametrize("impl", IMPLS)
def test_deterministic(impl):
    tensors = [t.requires_grad_() for t in inputs((50, 16), (50, 16))]

    def run():
        y, total = ops.layer_norm(*tensors[:3], residual=tensors[3], impl=impl)
        return [y, *torch.autograd.grad((y * total).sum(), tensors)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


@pytest.mark.parametrize("impl", IMPLS)
def test_keeps_the_sum_and_statistics(impl):
    x, weight, bias, residual = (t.requires_grad_() for t in inputs((4, 6, 64), (4, 6, 64), torch.bfloat16))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, total = ops.layer_norm(x, weight, bias, residual=residual, impl=impl)
    kept = {t.data_ptr(): t for t in kept if t is not weight and t is not bias}
    assert total.data_ptr() in kept
    assert sum(t.nbytes for t in kept.values()) == total.nbytes + 2 * 24 * 4


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_dtypes(impl):
    x, weight, bias, residual = inputs((4, 64), (4, 64))
    half = x.bfloat16()
    y, total = ops.layer_norm(half, weight, bias, residual=residual, impl=impl)
    assert y.dtype == total.dtype == torch.float32
    torch.testing.assert_close(y, reference(half.float() + residual, weight, bias))
    y = ops.layer_norm(half, weight, bias, impl=impl)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), reference(half.float(), weight, bias), rtol=2**-7, atol=2**-7)
    parameters = [t.requires_grad_() for t in (half.clone(), weight, bias)]
    grads = torch.autograd.grad(ops.layer_norm(*parameters, impl=impl).float().sum(), parameters)
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("impl", IMPLS)
def test_traces(impl):
    tensors = inputs((3, 5, 16), (1, 5, 16))
    entries = [(torch.ops.lbfast.layer_norm.default, tensors[:3])]
    entries.append((torch.ops.lbfast.add_layer_norm.default, [tensors[0], tensors[3], *tensors[1:3]]))
    for op, given in entries:
        given = [t.clone().requires_grad_() for t in given]
        torch.library.opcheck(op, (*given, 1e-5, impl))

    def step(x, weight, bias, residual):
        y, total = ops.layer_norm(x, weight, bias, residual=residual, impl=impl)
        return ops.layer_norm(y, weight, bias, impl=impl) + total

    ready = [t.requires_grad_() for t in tensors]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*ready), step(*ready))
    grads = [torch.autograd.grad(f(*ready).square().sum(), ready) for f in (compiled, step)]
    torch.testing.assert_close(*grads)
    module = type("Module", (torch.nn.Module,), {"forward": lambda self, *t: step(*t)})()
    exported = torch.export.export(module, tuple(tensors))
    torch.testing.assert_close(exported.module()(*tensors), step(*tensors))


def test_chooses():
    x, weight, bias = inputs((2, 8))
    with lbfast.use_impl("triton"):
        torch.testing.assert_close(ops.layer_norm(x, weight, bias), reference(x, weight, bias))
    with pytest.raises(ValueError, match="impl: expected one of triton, torch, got 'native'"):
        ops.layer_norm(x, weight, bias, impl="native")


def test_errors():
    x, weight, bias = inputs((2, 8))
    with pytest.raises(ValueError, match=r"weight: expected \(8,\) .* got \(7,\)"):
        ops.layer_norm(x, weight[:7], bias)
    with pytest.raises(ValueError, match=r"residual: expected a shape that broadcasts to x \(2, 8\), got \(3, 8\)"):
        ops.layer_norm(x, weight, bias, residual=x[:1].expand(3, 8))
    with pytest.raises(ValueError, match="residual"):
        ops.layer_norm(x, weight, bias, residual=x[None])
    with pytest.raises(TypeError, match=r"x: expected a floating dtype, got torch.int64"):
        ops.layer_norm(x.long(), weight, bias)


@pytest.mark.gpu
def test_graph_capture():
    x, weight, bias, residual = inputs((4, 257, 1024), (4, 257, 1024), torch.bfloat16)
    ops.layer_norm(x, weight, bias, residual=residual)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = ops.layer_norm(x, weight, bias, residual=residual)
    x.copy_(x.flip(0))
    graph.replay()
    torch.testing.assert_close(y, ops.layer_norm(x, weight, bias, residual=residual)[0])
