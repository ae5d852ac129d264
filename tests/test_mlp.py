"""ops.mlp against its oracle: values, every gradient, what it keeps for the backward."""

import pytest
import torch
import torch.nn.functional as F

import lbfast
from lbfast import ops
from lbfast.ops.mlp import activate_, activate_float8
from lbfast.reference.mlp import mlp as reference
from lbfast.testing import assert_matches, assert_rounded_to_float8, randn

IMPLS = ["torch", "triton"]
ACTIVATIONS = ["gelu", "quick_gelu"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = pytest.mark.any_device
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(rows, d=12, f=40, e=9, dtype=torch.float32):
    shapes = ((*rows, d), (f, d), (f,), (e, f), (e,))
    scales = (1, d**-0.5, 0.5, f**-0.5, 0.5)
    return [
        randn(*shape, dtype=dtype, device=DEVICE, seed=i, scale=scale)
        for i, (shape, scale) in enumerate(zip(shapes, scales))
    ]


def options(function, **given):
    return lambda *tensors: function(*tensors, **given)


def plain(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation):
    h = F.linear(x, fc1_weight, fc1_bias)
    a = F.gelu(h) if activation == "gelu" else h * torch.sigmoid(1.702 * h)
    return F.linear(a, fc2_weight, fc2_bias)


def check(impl, tensors, activation="gelu", wanted=(), **more):
    op = options(ops.mlp, activation=activation, impl=impl, **more)
    oracle, eager = options(reference, activation=activation), options(plain, activation=activation)
    assert_matches(op, oracle, tensors, wanted, eager)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("n", [1, 2, 16, 17, 77, 257, 258, 593])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(impl, activation, n, dtype):
    check(impl, inputs((n,), dtype=dtype), activation)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float64(impl, activation):
    check(impl, inputs((2, 3, 5), dtype=torch.float64), activation)


def anyhow(x):
    """x in every second number, in the first column of a matrix, and one number of it seen as often as it is long."""
    return torch.stack([x, x + 1], -1)[..., 0], torch.stack([x + 1, x])[1], x[..., :1].expand(x.shape)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_biases_and_weights_of_any_strides(impl, dtype):
    x, w1, b1, w2, b2 = inputs((5,), dtype=dtype)
    for first, second in zip(anyhow(b1), anyhow(b2)):
        check(impl, [x, w1, first, w2, second])
    for first, second in zip(anyhow(w1), anyhow(w2)):
        check(impl, [x, first, b1, second, b2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_between_the_rows_is_not_read(dtype):
    x, w1, b1, w2, b2 = inputs((5, 3), d=3, dtype=dtype)
    apart = torch.stack([x, torch.full_like(x, float("nan"))], 1)[:, 0]
    check("torch", [apart, w1, b1, w2, b2])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("wanted", [tuple(i == j for i in range(5)) for j in range(5)] + [(False,) * 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_gradient_alone(impl, recompute, wanted, dtype):
    check(impl, inputs((3, 5), dtype=dtype), "gelu", wanted, recompute=recompute)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("d, f, e", [(1, 1, 1), (7, 1025, 3), (64, 256, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths(impl, d, f, e, dtype):
    check(impl, inputs((3,), d, f, e, dtype))


@pytest.mark.parametrize("impl", IMPLS)
def test_strides(impl):
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias = inputs((4, 5, 6), d=16, f=32, e=16)
    check(impl, [x.transpose(0, 2), fc1_weight, fc1_bias, fc2_weight, fc2_bias])
    check(impl, [x[..., ::2], fc1_weight[:, 1::2], fc1_bias, fc2_weight.flip(0).T.contiguous().T, fc2_bias])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("recompute", [False, True])
def test_empty(impl, recompute):
    tensors = [t.requires_grad_() for t in inputs((2, 0))]
    out = ops.mlp(*tensors, recompute=recompute, impl=impl)
    grads = torch.autograd.grad(out.sum(), tensors)
    assert out.shape == (2, 0, 9) and grads[0].shape == (2, 0, 12)
    assert all(g.shape == t.shape and g.eq(0).all() for g, t in zip(grads, tensors))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(impl, activation, recompute):
    tensors = [t.requires_grad_() for t in inputs((2, 3), 3, 5, 2, torch.float64)]
    op = options(ops.mlp, activation=activation, recompute=recompute, impl=impl)
    assert torch.autograd.gradcheck(op, tensors, fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:overflow", "ignore:underflow")
def test_tails_of_the_activation(impl, activation, dtype):
    h = torch.cat([torch.linspace(-12, 12, 301), torch.tensor([-1e4, 1e4, 0.0, -0.0])]).to(DEVICE, dtype)[:, None]
    one, zero = torch.ones(1, 1, device=DEVICE, dtype=dtype), torch.zeros(1, device=DEVICE, dtype=dtype)
    check(impl, [h, one, zero, one, zero], activation)
    out = ops.mlp(h, one, zero, one, zero, activation=activation, impl=impl)
    assert out.isfinite().all()
    assert out[h > 11].eq(h[h > 11]).all() and out[h < -11].abs().max() < 1e-6


def every(dtype):
    """All finite numbers of a 16-bit dtype."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    return numbers[numbers.isfinite()].to(DEVICE)


def exact_activation(h, activation):
    """act(h) and act'(h) in float64, exact in its tail too."""
    if activation == "quick_gelu":
        gate = torch.sigmoid(1.702 * h)
        return h * gate, gate * (1 + 1.702 * h * (1 - gate))
    phi = 0.5 * torch.special.erfc(-h * 0.5**0.5)
    return h * phi, phi + h * torch.exp(-0.5 * h * h) * 0.3989422804014327


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:overflow", "ignore:underflow", "ignore:invalid")
def test_the_kernel_rounds_every_number_as_it_should(activation, dtype):
    """Within 0.52 of a unit in the last place (a half is rounding) and 1e-10 of act; within 0.52 and 1e-6 of act'."""
    from lbfast.kernels import mlp as kernel

    h = every(dtype)
    a, slope = exact_activation(h.double(), activation)
    one = torch.ones_like(h)[None]
    dh, again, _ = kernel.activation_bwd(one, h[None], activation, need_a=True, need_bias=False)
    for got, exact, slack in (
        (kernel.activation_fwd(h, activation, in_place=False), a, 1e-10),
        (again[0], a, 1e-10),
        (dh[0], slope, 1e-6),
    ):
        fine = torch.finfo(dtype)
        unit = fine.eps * 2 ** exact.abs().clamp(min=fine.tiny).log2().floor()
        wrong = (got.double() - exact).abs() - 0.52 * unit - slack
        assert got.isfinite().all() and wrong.max() <= 0, (h[wrong.argmax()], wrong.max())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:overflow", "ignore:underflow", "ignore:invalid")
def test_what_is_no_number_stays_none(activation, dtype):
    h = torch.tensor([float("nan"), float("inf"), 3.0], device=DEVICE, dtype=dtype)
    got = activate_(h, activation, "triton")
    assert got.data_ptr() == h.data_ptr()
    assert got[0].isnan() and got[1] == float("inf") and got[2].isfinite()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "none"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (2, 5, 257), (7, 1280), (2, 5120), (0, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float8(impl, activation, shape, dtype):
    h = randn(*shape, dtype=dtype, device=DEVICE, scale=3)
    h[..., :1] *= 0
    values, scales = activate_float8(h, activation, impl)
    exact = h.double() if activation == "none" else exact_activation(h.double(), activation)[0]
    assert_rounded_to_float8(values, scales, exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_float8_of_a_view(impl):
    h = randn(6, 4, 48, device=DEVICE, dtype=torch.bfloat16)
    for view in (h[:, 0], h[..., ::2], h.transpose(0, 1)):
        assert_rounded_to_float8(*activate_float8(view, "none", impl), view.double())


@pytest.mark.parametrize("impl", IMPLS)
def test_deterministic(impl):
    tensors = [t.requires_grad_() for t in inputs((600,))]

    def run():
        out = ops.mlp(*tensors, impl=impl)
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("recompute", [False, True])
def test_keeps_x_and_h(impl, recompute):
    x, *parameters = (t.requires_grad_() for t in inputs((6,), 16, 64, 16, torch.bfloat16))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.mlp(x, *parameters, recompute=recompute, impl=impl)
    kept = [t for t in kept if t.data_ptr() not in {p.data_ptr() for p in parameters}]
    assert sum(t.nbytes for t in kept) == x.nbytes + (0 if recompute else 6 * 64 * 2)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_gradients(impl):
    tensors = inputs((4, 5))
    with torch.no_grad():
        before = [t.clone() for t in tensors]
        out = ops.mlp(*tensors, impl=impl)
    torch.testing.assert_close(out, reference(*tensors))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors))


def test_autocast():
    tensors = [t.requires_grad_() for t in inputs((4, 5))]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = ops.mlp(*tensors)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, ops.mlp(*(t.bfloat16() for t in tensors)))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), tensors))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("recompute", [False, True])
def test_traces(impl, recompute):
    tensors = [t.requires_grad_() for t in inputs((3, 5))]
    torch.library.opcheck(torch.ops.lbfast.mlp.default, (*tensors, "gelu", not recompute, impl))
    step = options(ops.mlp, recompute=recompute, impl=impl)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), step(*tensors))
    grads = [torch.autograd.grad(f(*tensors).square().sum(), tensors) for f in (compiled, step)]
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), step(*tensors))
    module = type("Module", (torch.nn.Module,), {"forward": lambda self, *t: step(*t)})()
    given = tuple(t.detach() for t in tensors)
    torch.testing.assert_close(torch.export.export(module, given).module()(*given), step(*given))


def test_chooses():
    tensors = inputs((2,))
    with lbfast.use_impl("triton"):
        torch.testing.assert_close(ops.mlp(*tensors), reference(*tensors))
    with pytest.raises(ValueError, match="impl: expected one of triton, torch, got 'native'"):
        ops.mlp(*tensors, impl="native")


def test_errors():
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias = inputs((2,))
    with pytest.raises(ValueError, match=r"activation: expected one of gelu, quick_gelu, got 'relu'"):
        ops.mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation="relu")
    with pytest.raises(ValueError, match=r"fc1_weight: expected \(F, D\) with D of x \(2, 12\), got \(9, 40\)"):
        ops.mlp(x, fc2_weight, fc1_bias, fc2_weight, fc2_bias)
    with pytest.raises(ValueError, match=r"fc2_bias: expected \(9,\), got \(40,\)"):
        ops.mlp(x, fc1_weight, fc1_bias, fc2_weight, fc1_bias)
    with pytest.raises(TypeError, match=r"one floating dtype, got \['torch.bfloat16', 'torch.float32'\]"):
        ops.mlp(x.bfloat16(), fc1_weight, fc1_bias, fc2_weight, fc2_bias)


@pytest.mark.gpu
def test_graph_capture():
    tensors = inputs((4, 257), 1024, 4096, 1024, torch.bfloat16)
    ops.mlp(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.mlp(*tensors)
    tensors[0].copy_(tensors[0].flip(0))
    graph.replay()
    torch.testing.assert_close(out, ops.mlp(*tensors))
