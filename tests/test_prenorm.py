"""The norm that its readers compute again: the same values and gradients as the ops one after the other."""

import pytest
import torch
import torch.nn.functional as F

from lbfast import ops, testing
from lbfast.model.prenorm import norm_linears, norm_mlp
from lbfast.products import product, trained_linear

EPS = 1e-5
NAMES = ("x", "residual", "norm weight", "norm bias", "w1", "b1", "w2", "b2")


def tensors(shape=(2, 3, 5, 16), residual=(1, 3, 1, 16), dtype=torch.float64, inner=24, outer=16):
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    width = shape[-1]
    rest = None if residual is None else draw(*residual)
    return [
        draw(*shape),
        rest,
        draw(width),
        draw(width),
        draw(inner, width),
        draw(inner),
        draw(outer, inner),
        draw(outer),
    ]


def linears(x, residual, weight, bias, w1, b1, w2, b2):
    outs, total = norm_linears(x, (weight, bias, EPS), [(w1, b1), (w1 * 2, b1 * 3)], residual)
    return *outs, total


def plain_linears(x, residual, weight, bias, w1, b1, w2, b2):
    total = x if residual is None else x + residual
    y = F.layer_norm(total, weight.shape, weight, bias, EPS)
    return F.linear(y, w1, b1), F.linear(y, w1 * 2, b1 * 3), total


def mlp(x, residual, weight, bias, w1, b1, w2, b2, activation="gelu"):
    return norm_mlp(x, (weight, bias, EPS), (w1, b1), (w2, b2), activation, residual)


def plain_mlp(x, residual, weight, bias, w1, b1, w2, b2):
    total = x if residual is None else x + residual
    y = F.layer_norm(total, weight.shape, weight, bias, EPS)
    return F.linear(F.gelu(F.linear(y, w1, b1)), w2, b2), total


PAIRS = pytest.mark.parametrize(("function", "plain"), [(linears, plain_linears), (mlp, plain_mlp)])


@PAIRS
@pytest.mark.parametrize("residual", [None, (1, 3, 1, 8), (2, 3, 2, 8)])
def test_gradcheck(function, plain, residual):
    given = tensors((2, 3, 2, 8), residual, inner=6, outer=7)
    for a, b in zip(function(*given), plain(*given)):
        torch.testing.assert_close(a, b)
    wanted = given if function is mlp else given[:6]
    assert torch.autograd.gradcheck(lambda *some: function(*some, *given[len(some) :]), wanted)


@PAIRS
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("used", ["all", "outputs", "total"])
def test_each_gradient_alone(function, plain, name, used):
    """One input in training at a time, and a loss of the products, of the sum, or of both."""
    given = [t.detach() for t in tensors()]
    wanted = given[NAMES.index(name)].requires_grad_()
    grads = []
    for run in (function, plain):
        outs = run(*given)
        outs = {"all": outs, "outputs": outs[:-1], "total": outs[-1:]}[used]
        outs = [out for out in outs if out.requires_grad]
        got = torch.autograd.grad(sum(out.sin().sum() for out in outs), wanted, allow_unused=True)[0] if outs else None
        grads.append(torch.zeros_like(wanted) if got is None else got)
    torch.testing.assert_close(*grads)


@PAIRS
def test_bfloat16_within_budget(function, plain):
    given = tensors(dtype=torch.bfloat16)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in given]
    wanted = range(8) if function is mlp else range(6)
    results = []
    for run, inputs in ((function, given), (plain, given), (plain, exact)):
        outs = run(*inputs)
        grads = torch.autograd.grad(sum(out.double().sum() for out in outs), [inputs[i] for i in wanted])
        results.append([*outs, *grads])
    for ours, theirs, right in zip(*results):
        testing.assert_within_budget(ours, right, theirs)


@PAIRS
def test_autocast_casts_as_the_ops_do(function, plain):
    given = tensors(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = function(*given)
        y, total = ops.layer_norm(given[0], *given[2:4], EPS, residual=given[1])
        want = F.linear(y, given[4], given[5]) if function is linears else ops.mlp(y, *given[4:])
    assert outs[0].dtype == want.dtype == torch.bfloat16 and outs[-1].dtype == total.dtype
    torch.testing.assert_close(outs[0], want)
    grads = torch.autograd.grad(outs[0].float().sum() + outs[-1].sum(), given[:6])
    expected = torch.autograd.grad(want.float().sum() + total.sum(), given[:6])
    for got, right in zip(grads, expected):
        torch.testing.assert_close(got, right, rtol=2e-2, atol=2e-2)


@PAIRS
def test_compiles_without_a_break(function, plain):
    given = tensors(dtype=torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, want = compiled(*given), plain(*given)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    wanted = given if function is mlp else given[:6]
    grads = [torch.autograd.grad(sum(out.sum() for out in outs), wanted) for outs in (got, want)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("size", [3, 200])
def test_a_linear_layer_of_the_same_products(trained, size):
    """Each gradient alone; inputs of a size that is worth copies for a faster product, and not."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator) for shape in ((2, size, 256), (192, 256), (192,))]
    wanted = [given[i].requires_grad_() for i in trained]
    results = [function(*given) for function in (trained_linear, F.linear)]
    grads = [torch.autograd.grad(out.sin().sum(), wanted) for out in results]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-3)
    a, b = torch.randn(64, 512), torch.randn(512, 300)
    torch.testing.assert_close(product(a, b), a @ b, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(product(a, b[:, :3]), a @ b[:, :3], rtol=1e-5, atol=1e-4)


def test_a_frozen_linear_layer_does_not_keep_its_input():
    x, weight, bias = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8), torch.randn(6)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        trained_linear(x, weight, bias)
    assert x.data_ptr() not in kept
