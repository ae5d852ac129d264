"""ops.temporal_attention: every implementation against the float64 oracle, values and each gradient alone."""

import importlib
import itertools

import pytest
import torch

from lbfast import dispatch, ops, use_impl
from lbfast.reference.temporal_attention import temporal_attention as reference
from lbfast.testing import ROUNDING, assert_within_budget, order_of_sums, randn

pytestmark = pytest.mark.any_device
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FRAMES = (1, 2, 3, 8, 12, 16, 32)
HEAD_DIMS = (32, 64, 80, 128)
DTYPES = {
    "torch": (torch.float32, torch.float16, torch.bfloat16),
    "native": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.float16, torch.bfloat16),
}
IMPLS = tuple(name for name in DTYPES if name != "native" or DEVICE == "cpu")
FLOAT64 = ("torch", "triton") if DEVICE == "cpu" else ("torch",)  # which impls take it


def plain(q, k, v, scale=None):
    """The same in plain torch and the inputs' dtype."""
    q, k, v = (x.permute(0, 2, 3, 1, 4) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ((q * scale @ k.transpose(-1, -2)).softmax(-1) @ v).permute(0, 3, 1, 2, 4)


def separate(b, t, n, h, d, dtype):
    return [randn(b, t, n, h, d, dtype=dtype, device=DEVICE, seed=i) for i in range(3)]


def fused(b, t, n, h, d, dtype):
    """Views of one projection (B, T, N, 3 H D)."""
    return list(randn(b, t, n, 3, h, d, dtype=dtype, device=DEVICE).unbind(3))


def grads(function, tensors, do, wanted=(True, True, True)):
    """The result, and the gradients of those tensors that `wanted` names."""
    tensors = [x.detach().requires_grad_(want) for x, want in zip(tensors, wanted)]
    out = function(*tensors)
    needed = [x for x in tensors if x.requires_grad]
    return out.detach(), torch.autograd.grad(out, needed, do.to(out.dtype))


def check(impl, tensors, scale=None):
    """Values and gradients of one call within the budget."""
    do = randn(*tensors[0].shape, dtype=tensors[0].dtype, device=DEVICE, seed=7)
    out, got = grads(lambda *x: ops.temporal_attention(*x, scale=scale, impl=impl), tensors, do)
    assert out.is_contiguous()
    exact_out, exact = grads(lambda *x: reference(*x, scale=scale), tensors, do)
    plain_out, rough = grads(lambda *x: plain(*x, scale=scale), tensors, do)
    t, d = tensors[0].shape[1], tensors[0].shape[-1]
    order = order_of_sums(2 * d + 4 * t)  # scores and dP along D; of the softmax, dP P, values and gradients along T
    assert_within_budget(out, exact_out, plain_out, "out", order=order)
    for name, *three in zip(("dq", "dk", "dv"), got, exact, rough):
        if tensors[0].shape[1] == 1 and name != "dv":  # one frame: the weights are 1, and nothing flows through them
            assert not three[1].any()
            assert three[0].abs().max() <= (8 * ROUNDING[do.dtype] if impl == "triton" else 0) * do.abs().max()
        else:
            assert_within_budget(*three, name, order=order)


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("t", FRAMES)
@pytest.mark.parametrize("impl", IMPLS)
def test_values_and_gradients(impl, t, d):
    for dtype in DTYPES[impl]:
        check(impl, separate(2, t, 3, 2, d, dtype))


@pytest.mark.parametrize("n", (1, 7, 8, 9, 17))
@pytest.mark.parametrize("impl", IMPLS)
def test_fused_projection_and_ragged_positions(impl, n):
    check(impl, fused(2, 8, n, 2, 32, DTYPES[impl][0]), scale=0.3)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides(impl):
    tensors = separate(2, 4, 5, 2, 32, torch.float32)
    base = tensors[0].permute(4, 3, 0, 2, 1).contiguous().permute(2, 4, 3, 1, 0)  # D is not the innermost axis
    check(impl, [base, tensors[1].expand(2, 4, 5, 2, 32), tensors[2][:1].expand(2, 4, 5, 2, 32)])


@pytest.mark.parametrize("d", (16, 24, 72, 112))
@pytest.mark.parametrize("impl", IMPLS)
def test_other_head_dims(impl, d):
    check(impl, separate(1, 5, 3, 1, d, torch.float32))


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3))[1:])
@pytest.mark.parametrize("impl", IMPLS)
def test_each_gradient_alone(impl, wanted):
    tensors = separate(1, 3, 4, 2, 32, torch.float32)
    do = randn(*tensors[0].shape, device=DEVICE, seed=7)
    _, everything = grads(lambda *x: ops.temporal_attention(*x, impl=impl), tensors, do)
    _, some = grads(lambda *x: ops.temporal_attention(*x, impl=impl), tensors, do, wanted)
    for one, other in zip(some, (g for g, want in zip(everything, wanted) if want)):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("shape", ((0, 8, 3, 2, 32), (2, 8, 0, 2, 32)))
@pytest.mark.parametrize("impl", IMPLS)
def test_empty(impl, shape):
    tensors = [torch.empty(shape, device=DEVICE) for _ in range(3)]
    out, got = grads(lambda *x: ops.temporal_attention(*x, impl=impl), tensors, torch.empty(shape, device=DEVICE))
    assert out.shape == shape
    assert all(g.shape == shape for g in got)


@pytest.mark.parametrize("impl", FLOAT64)
def test_gradcheck(impl):
    tensors = [x.requires_grad_() for x in separate(1, 3, 2, 1, 16, torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: ops.temporal_attention(*x, impl=impl), tensors, fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_frames_permute(impl):
    """Attention over the frames knows no order of them; positions and heads never mix."""
    q, k, v = separate(2, 6, 4, 2, 32, torch.float32)
    out = ops.temporal_attention(q, k, v, impl=impl)
    order = torch.tensor([3, 0, 5, 1, 4, 2], device=DEVICE)
    permuted = ops.temporal_attention(q[:, order], k[:, order], v[:, order], impl=impl)
    torch.testing.assert_close(permuted, out[:, order], rtol=1e-5, atol=1e-6)
    alone = ops.temporal_attention(*(x[:, :, 2:3, 1:] for x in (q, k, v)), impl=impl)
    torch.testing.assert_close(alone, out[:, :, 2:3, 1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_deterministic(impl):
    tensors = separate(2, 8, 5, 2, 64, torch.float32)
    do = randn(*tensors[0].shape, device=DEVICE, seed=7)
    first, second = (grads(lambda *x: ops.temporal_attention(*x, impl=impl), tensors, do) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1]))


@pytest.mark.parametrize("impl", [name for name in IMPLS if name != "torch"])
def test_saves_only_its_inputs(impl):
    """Kept for the backward: q, k, v, as views of the projection they came from."""
    projection = torch.randn(1, 8, 3, 3, 2, 32, device=DEVICE, requires_grad=True)
    q, k, v = projection.unbind(3)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ops.temporal_attention(q, k, v, impl=impl)
    assert len(saved) == 3
    assert {x.untyped_storage().data_ptr() for x in saved} == {projection.untyped_storage().data_ptr()}


@pytest.mark.parametrize("impl", [name for name in IMPLS if name != "torch"])
def test_opcheck(impl):
    op = getattr(torch.ops.lbfast, f"temporal_attention_{impl}")
    bwd = getattr(torch.ops.lbfast, f"temporal_attention_{impl}_bwd")
    ops.temporal_attention(*separate(1, 1, 1, 1, 16, torch.float32), impl=impl)  # loads the kernels
    for tensors in (separate(1, 3, 2, 1, 16, torch.float32), fused(1, 3, 2, 1, 16, torch.float32)):
        torch.library.opcheck(bwd.default, (tensors[0] + 1, *tensors, 0.25))
        torch.library.opcheck(op.default, (*(x.requires_grad_() for x in tensors), 0.25))


class _Module(torch.nn.Module):
    def forward(self, q, k, v):
        return ops.temporal_attention(q * 2, k, v) + 1


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_and_exports(impl):
    """torch.compile(fullgraph=True) and torch.export go through without a break, the choice included."""
    tensors = [x.requires_grad_() for x in separate(2, 3, 4, 2, 16, torch.float32)]
    with use_impl(impl):
        expected = _Module()(*tensors)
        compiled = torch.compile(_Module(), fullgraph=True, backend="aot_eager")(*tensors)
        torch.testing.assert_close(compiled, expected)
        for one, other in zip(
            torch.autograd.grad(compiled.sum(), tensors), torch.autograd.grad(expected.sum(), tensors)
        ):
            torch.testing.assert_close(one, other)
        batch = torch.export.Dim("batch", max=64)
        program = torch.export.export(_Module(), tuple(tensors), dynamic_shapes=[{0: batch}] * 3)
    larger = separate(5, 3, 4, 2, 16, torch.float32)
    with use_impl(impl):
        torch.testing.assert_close(program.module()(*larger), _Module()(*larger))


@pytest.mark.gpu
def test_300_clips():
    """More sequences than a grid's short axes hold, offsets past 2^31 bytes: the last clip is as it is alone."""
    projection = torch.randn(300, 8, 257, 3, 16, 64, device="cuda", dtype=torch.bfloat16)
    do = torch.randn(300, 8, 257, 16, 64, device="cuda", dtype=torch.bfloat16)
    tensors = projection.unbind(3)
    out, got = grads(lambda *x: ops.temporal_attention(*x, impl="triton"), tensors, do)
    last = [x[-1:] for x in tensors]
    last_out, last_got = grads(lambda *x: ops.temporal_attention(*x, impl="triton"), last, do[-1:])
    assert torch.equal(out[-1:], last_out)
    assert all(torch.equal(many[-1:], one) for many, one in zip(got, last_got))


@pytest.mark.gpu
def test_cuda_graph():
    q, k, v = separate(2, 8, 17, 2, 64, torch.bfloat16)
    expected = ops.temporal_attention(q, k, v, impl="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.temporal_attention(q, k, v, impl="triton")
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="what a CPU chooses")
def test_chooses_the_native_kernel_on_a_cpu():
    module = importlib.import_module("lbfast.ops.temporal_attention")
    q = torch.zeros(1, 8, 3, 2, 64)
    assert dispatch.choose("temporal_attention", None, module.IMPLEMENTATIONS, q, q, q) == "native"
    half = q.half()
    assert dispatch.choose("temporal_attention", None, module.IMPLEMENTATIONS, half, half, half) == "torch"


def test_errors():
    q = torch.zeros(1, 40, 3, 2, 32)
    with pytest.raises(ValueError, match=r"q: expected \(B, T, N, H, D\)"):
        ops.temporal_attention(q[0], q[0], q[0])
    with pytest.raises(ValueError, match="k, v: expected q's shape"):
        ops.temporal_attention(q, q[:, :3], q)
    with pytest.raises(TypeError, match="one floating dtype"):
        ops.temporal_attention(q, q.half(), q)
    with pytest.raises(RuntimeError, match=r"impl='native' cannot take these inputs: .*T <= 32"):
        ops.temporal_attention(q, q, q, impl="native")
    with pytest.raises(ValueError, match="impl: expected one of"):
        ops.temporal_attention(q, q, q, impl="flash")
