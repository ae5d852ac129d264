"""ops.attention: every implementation against the float64 oracle, values and each gradient alone, masks."""

import contextlib
import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lbfast import dispatch, ops, use_impl
from lbfast.reference.attention import attention as reference
from lbfast.testing import ROUNDING, assert_within_budget, order_of_sums, randn, relative_error

pytestmark = pytest.mark.any_device
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = (1, 2, 16, 17, 77, 129, 180, 256, 257, 258, 534, 593)
HEAD_DIMS = (32, 64, 80, 128)
DTYPES = {
    "torch": (torch.float32, torch.float16, torch.bfloat16),
    "triton": (torch.float32, torch.float16, torch.bfloat16),
    "native": (torch.float32, torch.bfloat16),
}
IMPLS = tuple(name for name in DTYPES if name != "native" or DEVICE == "cpu")
FLOAT64 = ("torch", "triton") if DEVICE == "cpu" else ("torch",)  # which impls take it
MASKED = torch.finfo(torch.float32).min


def additive_mask(n, m, causal, key_padding_mask):
    mask = torch.zeros(1, 1, n, m, device=DEVICE)
    if causal:
        mask = mask + torch.full((n, m), MASKED, device=DEVICE).triu(1)
    if key_padding_mask is not None:
        mask = mask + key_padding_mask[:, None, None, :] * MASKED
    return mask


def plain(q, k, v, causal=False, key_padding_mask=None, scale=None):
    """The same in plain torch and the inputs' dtype, masks added in float32."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.transpose(-1, -2)).float()
    scores = scores + additive_mask(*scores.shape[-2:], causal, key_padding_mask)
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def recomputing(q, k, v, do, causal=False, key_padding_mask=None, scale=None):
    """Results and gradients as every kernel that keeps O and log(sum(exp)) gets them, in plain torch."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o = plain(q, k, v, causal, key_padding_mask, scale)
    scores = torch.einsum("bnhd,bmhd->bhnm", q * scale, k).float()
    scores = scores + additive_mask(*scores.shape[-2:], causal, key_padding_mask)
    lse = scores.logsumexp(-1, keepdim=True)
    p = torch.where(lse > MASKED / 2, (scores - lse).exp(), scores.softmax(-1))
    dp = torch.einsum("bnhd,bmhd->bhnm", do, v).float()
    ds = (p * (dp - (do * o).sum(-1).transpose(1, 2)[..., None])).to(q.dtype)
    dq = torch.einsum("bhnm,bmhd->bnhd", ds, k) * scale
    dk = torch.einsum("bhnm,bnhd->bmhd", ds, q) * scale
    return o, dq, dk, torch.einsum("bhnm,bnhd->bmhd", p.to(q.dtype), do)


def sdpa(q, k, v, causal=False, scale=None):
    tensors = (x.transpose(1, 2) for x in (q, k, v))
    narrow = q.dtype in (torch.float16, torch.bfloat16) and torch.backends.cpu.get_cpu_capability() in (
        "DEFAULT",
        "AVX2",
    )
    with sdpa_kernel(SDPBackend.MATH) if narrow else contextlib.nullcontext():  # the other may pack for AVX-512
        return F.scaled_dot_product_attention(*tensors, is_causal=causal, scale=scale).transpose(1, 2)


def separate(b, n, m, h, d, dtype=torch.float32):
    return [randn(b, size, h, d, dtype=dtype, device=DEVICE, seed=i) for i, size in enumerate((n, m, m))]


def fused(b, n, h, d, dtype=torch.float32):
    """Views of one projection (B, N, 3 H D)."""
    return list(randn(b, n, 3, h, d, dtype=dtype, device=DEVICE).unbind(2))


def padding(m, *masked):
    """(B, M) bool, True at the slices given for each sample."""
    mask = torch.zeros(len(masked), m, dtype=torch.bool, device=DEVICE)
    for row, where in zip(mask, masked):
        row[where] = True
    return mask


def grads(function, tensors, do, wanted=(True, True, True)):
    """The result, and the gradients of those tensors that `wanted` names."""
    tensors = [x.detach().requires_grad_(want) for x, want in zip(tensors, wanted)]
    out = function(*tensors)
    needed = [x for x in tensors if x.requires_grad]
    return out.detach(), torch.autograd.grad(out, needed, do.to(out.dtype))


def check(impl, tensors, **kwargs):
    """Values and gradients of one call within the budget: that of the least exact of the ways in plain torch."""
    do = randn(*tensors[0].shape, dtype=tensors[0].dtype, device=DEVICE, seed=7)
    (_, n, _, d), m = tensors[0].shape, tensors[1].shape[1]
    sums = 2 * d + 3 * m + n  # scores and dP along D; of the softmax, dP P and values along M; of dK and dV along N
    out, got = grads(lambda *x: ops.attention(*x, impl=impl, **kwargs), tensors, do)
    assert out.is_contiguous()
    exact_out, exact = grads(lambda *x: reference(*x, **kwargs), tensors, do)
    plain_out, rough = grads(lambda *x: plain(*x, **kwargs), tensors, do)
    rough = [(plain_out, *rough), recomputing(*tensors, do, **kwargs)]
    if "key_padding_mask" not in kwargs:
        sdpa_out, sdpa_grads = grads(lambda *x: sdpa(*x, **kwargs), tensors, do)
        rough.append((sdpa_out, *sdpa_grads))
    for name, actual, true, *candidates in zip(("out", "dq", "dk", "dv"), (out, *got), (exact_out, *exact), *rough):
        three = actual, true, max(candidates, key=lambda x, true=true: relative_error(x, true))
        if tensors[1].shape[1] == 1 and name in ("dq", "dk"):  # one key: its weight is 1, and nothing flows through it
            assert not three[1].any()
            assert not three[0].any()
        else:
            assert_within_budget(*three, name, order=order_of_sums(sums))


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("n", TOKENS)
@pytest.mark.parametrize("impl", IMPLS)
def test_values_and_gradients(impl, n, d):
    dtypes = DTYPES[impl]
    if DEVICE == "cpu" and n >= 180 and impl != "native":
        if impl == "triton" and d in (32, 128):
            pytest.skip("the interpreter is slow: large sizes at LanguageBind's head dims only")
        dtypes = dtypes[1:] if impl == "triton" else dtypes[::2]  # what real tiles are for; what a CPU is quick at
    for dtype in dtypes:
        check(impl, separate(1, n, n, 1, d, dtype))


@pytest.mark.parametrize("n", TOKENS[:7])
@pytest.mark.parametrize("impl", IMPLS)
def test_causal(impl, n):
    for dtype in DTYPES[impl]:
        check(impl, separate(1, n, n, 1, 64, dtype), causal=True)


def check_values(impl, tensors, **kwargs):
    """The forward alone, within the budget."""
    out = ops.attention(*tensors, impl=impl, **kwargs)
    order = order_of_sums(tensors[0].shape[-1] + 2 * tensors[1].shape[1])
    assert_within_budget(out, reference(*tensors, **kwargs), plain(*tensors, **kwargs), "out", order=order)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("n", (63, 64, 65, 80, 81, 144, 272, 273))
def test_values_where_tiles_end(n, dtype):
    """Keys in one part or two, on chip or not; queries with and without some that fill no tile; masks over them."""
    check_values("triton", separate(1, n, n, 1, 64, dtype))
    mask = padding(n, slice(n // 2, n), slice(0, n - 3), slice(0, n))
    tensors = separate(3, n, n, 1, 32, dtype)
    for causal in (False, True):
        check_values("triton", tensors, causal=causal, key_padding_mask=mask)


@pytest.mark.parametrize("scale", (-0.3, 0.0, 1e-30))
@pytest.mark.parametrize("impl", IMPLS)
def test_any_scale(impl, scale):
    """Also where the largest score is not the largest when scaled."""
    mask = padding(30, slice(21, 30), slice(0, 4))
    for dtype in DTYPES[impl]:
        tensors = separate(2, 30, 30, 1, 32, dtype)
        check_values(impl, tensors, scale=scale)
        check_values(impl, tensors, causal=True, scale=scale)
        check_values(impl, tensors, causal=True, key_padding_mask=mask, scale=scale)


@pytest.mark.parametrize("n", (257, 130))
def test_programs_a_head_make_no_difference(n):
    """Where heads are few, several programs share one."""
    tensors = separate(2, n, n, 3, 64, torch.float16)
    together = ops.attention(*tensors, impl="triton")
    alone = ops.attention(*(x[:1, :, :1] for x in tensors), impl="triton")
    assert torch.equal(alone, together[:1, :, :1])


def test_tokens_far_apart():
    """Further than offsets of 32 bits reach within a tile."""
    memory = randn(4, 1 << 22, dtype=torch.float16, device=DEVICE)
    tensors = [memory[:, i * 64 : i * 64 + 64].view(1, 4, 1, 64) for i in range(3)]
    check_values("triton", tensors)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("n", (2, 17, 77))
@pytest.mark.parametrize("impl", IMPLS)
def test_padding(impl, n, causal):
    """Padding at the end, at the start (causal: queries with no key left), and everywhere; several hd."""
    mask = padding(n, slice(n // 2, n), slice(0, n // 2), slice(0, n))
    for dtype, d in zip(DTYPES[impl], (32, 80, 64)):
        check(impl, separate(3, n, n, 1, d, dtype), causal=causal, key_padding_mask=mask)


@pytest.mark.parametrize("lowest", (float("-inf"), torch.finfo(torch.float32).min, torch.finfo(torch.float16).min))
@pytest.mark.parametrize("impl", IMPLS)
def test_additive_padding(impl, lowest):
    """A float mask, 0 or any lowest value, says what a bool mask says."""
    tensors = separate(2, 9, 9, 1, 32)
    mask = padding(9, slice(4, 9), slice(0, 9))
    additive = torch.zeros(2, 9, device=DEVICE).masked_fill(mask, lowest)
    for causal in (False, True):
        expected = ops.attention(*tensors, causal=causal, key_padding_mask=mask, impl=impl)
        out = ops.attention(*tensors, causal=causal, key_padding_mask=additive, impl=impl)
        assert torch.equal(out, expected)
        assert torch.isfinite(out).all()


@pytest.mark.parametrize(("n", "m"), ((1, 257), (1, 1), (3, 40), (40, 3), (18, 17)))
@pytest.mark.parametrize("impl", IMPLS)
def test_fewer_or_more_queries_than_keys(impl, n, m):
    """As in the last vision layer, where only the class token asks."""
    check(impl, separate(2, n, m, 1, 32))
    check(impl, separate(2, n, m, 1, 32), key_padding_mask=padding(m, slice(m // 2, m), slice(0, 1)))


@pytest.mark.parametrize("impl, dtype", [(impl, dtype) for impl in IMPLS for dtype in DTYPES[impl]])
@pytest.mark.parametrize("n, d", [(1, 64), (40, 64), (1, 80), (40, 80)])
def test_one_key_gets_no_gradient(n, d, impl, dtype):
    """Its weight is 1 whatever the scores are, and however the backward rounds them: dq and dk are exactly 0."""
    q, k, v = (30 * x for x in separate(2, n, 1, 2, d, dtype))
    do = randn(*q.shape, dtype=dtype, device=DEVICE, seed=7)
    for mask in (None, padding(1, slice(0, 1), slice(0, 0))):
        _, (dq, dk, dv) = grads(lambda *x, m=mask: ops.attention(*x, key_padding_mask=m, impl=impl), (q, k, v), do)
        assert not dq.any() and not dk.any()
        assert relative_error(dv, do.double().sum(1, keepdim=True)) <= ROUNDING[dtype] + order_of_sums(n)


@pytest.mark.parametrize("impl", IMPLS)
def test_fused_projection(impl):
    for dtype in DTYPES[impl]:
        check(impl, fused(2, 33, 2, 64, dtype), scale=0.3)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides(impl):
    q, k, v = separate(2, 17, 17, 2, 32)
    q = q.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)  # D is not the innermost axis
    check(impl, [q, k[:1].expand(2, 17, 2, 32), v[:, :, :1].expand(2, 17, 2, 32)])


@pytest.mark.parametrize("d", (16, 24, 72, 112))
@pytest.mark.parametrize("impl", IMPLS)
def test_other_head_dims(impl, d):
    check(impl, separate(1, 20, 20, 1, d))


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3))[1:])
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("impl", IMPLS)
def test_each_gradient_alone(impl, masked, wanted):
    tensors = separate(2, 18, 18, 1, 32)
    do = randn(*tensors[0].shape, device=DEVICE, seed=7)
    kwargs = {"causal": True, "key_padding_mask": padding(18, slice(9, 18), slice(0, 3))} if masked else {}
    _, everything = grads(lambda *x: ops.attention(*x, impl=impl, **kwargs), tensors, do)
    _, some = grads(lambda *x: ops.attention(*x, impl=impl, **kwargs), tensors, do, wanted)
    for one, other in zip(some, (g for g, want in zip(everything, wanted) if want)):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize(("b", "n"), ((0, 17), (2, 0)))
@pytest.mark.parametrize("impl", IMPLS)
def test_empty(impl, b, n, masked):
    tensors = [torch.empty(b, size, 2, 32, device=DEVICE) for size in (n, 17, 17)]
    mask = torch.zeros(b, 17, dtype=torch.bool, device=DEVICE) if masked else None
    do = torch.empty_like(tensors[0])
    out, got = grads(lambda *x: ops.attention(*x, key_padding_mask=mask, impl=impl), tensors, do)
    assert out.shape == (b, n, 2, 32)
    assert [g.shape for g in got] == [x.shape for x in tensors]
    assert all(not g.any() for g in got)


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("impl", FLOAT64)
def test_gradcheck(impl, causal, masked):
    tensors = [x.requires_grad_() for x in separate(2, 19, 19, 1, 16, torch.float64)]
    mask = padding(19, slice(12, 19), slice(15, 19)) if masked else None
    assert torch.autograd.gradcheck(
        lambda *x: ops.attention(*x, causal=causal, key_padding_mask=mask, impl=impl), tensors, fast_mode=True
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_keys_permute_and_heads_do_not_mix(impl):
    q, k, v = separate(2, 33, 33, 2, 32)
    out = ops.attention(q, k, v, impl=impl)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    torch.testing.assert_close(ops.attention(q, k[:, order], v[:, order], impl=impl), out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ops.attention(q[:, order], k, v, impl=impl), out[:, order], rtol=1e-5, atol=1e-6)
    alone = ops.attention(*(x[1:, :, 1:] for x in (q, k, v)), impl=impl)
    torch.testing.assert_close(alone, out[1:, :, 1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_equals_leaving_out(impl):
    """Keys that are padding might as well not be there; later tokens never reach earlier ones when causal."""
    q, k, v = separate(1, 30, 30, 1, 32)
    mask = padding(30, slice(21, 30))
    shorter = ops.attention(q, k[:, :21], v[:, :21], impl=impl)
    torch.testing.assert_close(ops.attention(q, k, v, key_padding_mask=mask, impl=impl), shorter, rtol=1e-5, atol=1e-6)
    causal = ops.attention(q, k, v, causal=True, impl=impl)
    trimmed = ops.attention(q[:, :21], k[:, :21], v[:, :21], causal=True, impl=impl)
    torch.testing.assert_close(causal[:, :21], trimmed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_scores(impl):
    """exp(500) would overflow: the maximum is taken out first."""
    q, k, v = separate(1, 40, 40, 1, 32)
    check(impl, [q * 30, k * 30, v])


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if torch.float16 in DTYPES[impl]])
def test_scores_that_float16_does_not_hold(impl):
    """A score of 10^6 is nothing to a softmax in float32, with gradients and masks too."""
    mask = padding(40, slice(21, 40), slice(0, 4))
    q, k, v = (x.half() for x in separate(2, 40, 40, 1, 32))
    q, k = q * 200, k * 200
    for options in ({}, {"causal": True}, {"key_padding_mask": mask}, {"causal": True, "key_padding_mask": mask}):
        exact = reference(q, k, v, scale=1.0, **options)
        for wanted in (False, True):
            out = ops.attention(q, k, v.clone().requires_grad_(wanted), scale=1.0, impl=impl, **options)
            torch.testing.assert_close(out.detach().double(), exact, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_deterministic(impl):
    tensors = separate(2, 40, 40, 2, 32)
    do = randn(*tensors[0].shape, device=DEVICE, seed=7)
    first, second = (grads(lambda *x: ops.attention(*x, impl=impl), tensors, do) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1]))


@pytest.mark.parametrize("impl", [name for name in IMPLS if name != "torch"])
def test_opcheck(impl):
    ops.attention(*separate(1, 3, 3, 1, 16), impl=impl)  # loads the kernels
    op = getattr(torch.ops.lbfast, f"attention_{impl}").default
    bwd = getattr(torch.ops.lbfast, f"attention_{impl}_bwd").default
    mask = padding(3, slice(2, 3), slice(0, 1))
    for tensors, padded in ((separate(2, 3, 3, 1, 16), None), (fused(2, 3, 1, 16), mask)):
        o, lse = op(*tensors, padded, True, 0.25)
        torch.library.opcheck(bwd, (o + 1, *tensors, padded, o, lse, True, 0.25))
        torch.library.opcheck(op, (*(x.requires_grad_() for x in tensors), padded, True, 0.25))


class _Module(torch.nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.causal = causal

    def forward(self, q, k, v, mask=None):
        return ops.attention(q * 2, k, v, causal=self.causal, key_padding_mask=mask) + 1


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_and_exports(impl, causal, masked):
    """torch.compile(fullgraph=True) and torch.export go through without a break, the choice included."""
    tensors = [x.requires_grad_() for x in separate(2, 17, 17, 2, 16)]
    masks = [padding(17, slice(9, 17), slice(0, 0))] if masked else []
    module = _Module(causal)
    with use_impl(impl):
        expected = module(*tensors, *masks)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(*tensors, *masks)
        torch.testing.assert_close(compiled, expected)
        for one, other in zip(
            torch.autograd.grad(compiled.sum(), tensors), torch.autograd.grad(expected.sum(), tensors)
        ):
            torch.testing.assert_close(one, other)
        batch = {0: torch.export.Dim("batch", max=64)}
        shapes = {"q": batch, "k": batch, "v": batch} | ({"mask": batch} if masked else {})
        program = torch.export.export(module, (*tensors, *masks), dynamic_shapes=shapes)
        larger = separate(5, 17, 17, 2, 16) + [padding(17, *[slice(7, 17)] * 5)] * masked
        torch.testing.assert_close(program.module()(*larger), module(*larger))


@pytest.mark.gpu
def test_300_clips():
    """2,400 frames at once: the last one comes out as it does alone."""
    tensors = torch.randn(2400, 257, 3, 16, 64, device="cuda", dtype=torch.bfloat16).unbind(2)
    do = torch.randn(2400, 257, 16, 64, device="cuda", dtype=torch.bfloat16)
    out, got = grads(lambda *x: ops.attention(*x, impl="triton"), tensors, do)
    last_out, last_got = grads(lambda *x: ops.attention(*x, impl="triton"), [x[-1:] for x in tensors], do[-1:])
    assert torch.equal(out[-1:], last_out)
    assert all(torch.equal(many[-1:], one) for many, one in zip(got, last_got))


@pytest.mark.gpu
@pytest.mark.parametrize("causal", (False, True))
def test_cuda_graph(causal):
    q, k, v = separate(2, 77, 77, 2, 64, torch.bfloat16)
    mask = padding(77, slice(40, 77), slice(0, 77)) if causal else None
    expected = ops.attention(q, k, v, causal=causal, key_padding_mask=mask, impl="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attention(q, k, v, causal=causal, key_padding_mask=mask, impl="triton")
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="what a CPU chooses")
def test_chooses():
    """On a CPU the native kernel where it can, else torch; the other libraries' kernels only when asked for."""
    module = importlib.import_module("lbfast.ops.attention")
    for chosen, q in (
        ("native", torch.zeros(1, 17, 2, 64)),
        ("torch", torch.zeros(1, 17, 2, 64, dtype=torch.float16)),
        ("torch", torch.zeros(1, 17, 2, 31)),
        ("torch", torch.zeros(1, 4097, 1, 2)),
    ):
        assert dispatch.choose("attention", None, module.IMPLEMENTATIONS, q, q, q, False, None) == chosen
    assert list(module.IMPLEMENTATIONS)[-3:] == ["torch", "flash_attn", "xformers"]


def test_errors():
    q = torch.zeros(1, 9, 2, 32)
    with pytest.raises(ValueError, match=r"q, k: expected \(B, N, H, D\)"):
        ops.attention(q[0], q[0], q[0])
    with pytest.raises(ValueError, match=r"k: expected \(B, M, H, D\)"):
        ops.attention(q, q[:, :, :1], q[:, :, :1])
    with pytest.raises(ValueError, match="v: expected k's shape"):
        ops.attention(q, q, q[:, :3])
    with pytest.raises(ValueError, match="at least one key"):
        ops.attention(q, q[:, :0], q[:, :0])
    with pytest.raises(ValueError, match="as many queries as keys, got 9 and 5"):
        ops.attention(q, q[:, :5], q[:, :5], causal=True)
    with pytest.raises(ValueError, match=r"key_padding_mask: expected \(B, M\) = \(1, 9\)"):
        ops.attention(q, q, q, key_padding_mask=torch.zeros(1, 8, dtype=torch.bool))
    with pytest.raises(TypeError, match="key_padding_mask: expected bool or float"):
        ops.attention(q, q, q, key_padding_mask=torch.ones(1, 9, dtype=torch.int64))
    with pytest.raises(TypeError, match="one floating dtype"):
        ops.attention(q, q, q.half())
    with pytest.raises(RuntimeError, match=r"impl='flash_attn' cannot take these inputs: .*"):
        ops.attention(q, q, q, impl="flash_attn")
    with pytest.raises(RuntimeError, match=r"impl='native' cannot take these inputs: .*even D, not M=9, D=31"):
        ops.attention(*[q[..., :31]] * 3, impl="native")
    with pytest.raises(RuntimeError, match=r"impl='xformers' cannot take these inputs: .*float32"):
        ops.attention(q, q, q, impl="xformers")


@pytest.mark.skipif(DEVICE != "cpu", reason="a kernel for the CPU")
@pytest.mark.parametrize("dtype", DTYPES["native"])
@pytest.mark.parametrize(("n", "m", "causal"), ((1100, 1100, True), (70, 4096, False)))
def test_native_with_many_keys(n, m, causal, dtype):
    """Strips of fewer queries: their scores against all keys stay in the cache."""
    check("native", separate(1, n, m, 1, 32, dtype), causal=causal)


@pytest.mark.skipif(DEVICE != "cpu", reason="a kernel for the CPU")
@pytest.mark.parametrize("dtype", DTYPES["native"])
def test_native_does_not_depend_on_the_threads(dtype):
    tensors, do = fused(3, 130, 3, 64, dtype), randn(3, 130, 3, 64, dtype=dtype, seed=7)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(grads(lambda *x: ops.attention(*x, impl="native"), tensors, do))
    finally:
        torch.set_num_threads(threads)
    for out, got in found[1:]:
        assert torch.equal(out, found[0][0])
        assert all(torch.equal(a, b) for a, b in zip(got, found[0][1]))


@pytest.mark.skipif(DEVICE != "cpu", reason="a kernel for the CPU")
@pytest.mark.parametrize("dtype", DTYPES["native"])
def test_native_passes_on_what_is_not_finite(dtype):
    q, k, v = separate(1, 20, 20, 2, 32, dtype)
    q[0, 3, 0, 5] = float("nan")
    v[0, :, 1, 7] = float("inf")
    out = ops.attention(q, k, v, impl="native")
    assert out[0, 3, 0].isnan().all() and out[0, :, 1, 7].isinf().all()
    out[0, 3, 0], out[0, :, 1, 7] = 0, 0
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES["triton"])
@pytest.mark.parametrize(("n", "m", "d"), ((593, 593, 64), (321, 512, 80), (77, 330, 32)))
def test_longer_sequences(n, m, d, dtype):
    check("triton", separate(1, n, m, 3, d, dtype))
