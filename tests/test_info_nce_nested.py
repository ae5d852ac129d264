"""info_nce of nested embeddings (`dims`): the mean of plain calls of renormalised prefixes, as exact as they are."""

import pytest
import torch

from lbfast.ops.info_nce import info_nce
from lbfast.reference.info_nce import info_nce as reference
from lbfast.testing import assert_matches, randn
from tests.test_info_nce import DEVICE, HALF, IMPLS, SCALES, impls, run

pytestmark = pytest.mark.any_device
DIMS = ((48, 32, 8), (33, 20, 7), (16,))


def each(x, y, s, dims, weights=None, **options):
    """The mean of plain losses of renormalised prefixes, as anybody would write it."""
    weights = weights or [1.0] * len(dims)
    losses = []
    for d, weight in zip(dims, weights):
        unit_x, unit_y = (torch.nn.functional.normalize(e[:, :d], dim=-1) for e in (x, y))
        losses.append(weight / sum(weights) * reference(unit_x, unit_y, s, **options))
    return sum(losses)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_nested_matches_float64(dtype, scale):
    """Within what plain torch errs by; rows of any length, and of Triton as many calls as dims."""
    for b, dims, weights in ((1, DIMS[2], None), (70, DIMS[1], (1.0, 0.0, 3.0)), (200, DIMS[0], None)):
        lengths = torch.linspace(0.1, 5, b, device=DEVICE, dtype=dtype)[:, None]
        x = randn(b, 48, dtype=dtype).to(DEVICE) * lengths
        tensors = [x, (randn(b, 48, seed=1, dtype=dtype).to(DEVICE) + 0.5 * x), torch.tensor(scale, device=DEVICE)]
        for ids in (None, torch.arange(b, device=DEVICE) % max(2, b // 2)):
            options = {"dims": dims, "ids": ids}

            def plain(x, y, s, options=options, weights=weights):
                return each(x, y, s, weights=weights, **options).to(torch.promote_types(x.dtype, torch.float32))

            for impl in impls(dtype):
                if impl == "triton" and (b > 100 or ids is not None or dtype != torch.float32):
                    continue  # as many plain calls, whose 16-bit prefixes are rounded first

                def nested(x, y, s, impl=impl, options=options, weights=weights):
                    return info_nce(x, y, s, impl=impl, dim_weights=weights, **options)

                assert_matches(nested, plain, tensors)


@pytest.mark.skipif("native" not in IMPLS, reason="the native kernels are not built")
def test_rows_of_any_length():
    """Each row times a power of two of its own, in float32: the same loss, and gradients divided by it, to the bit."""
    x, y, s = randn(200, 72), randn(210, 72, seed=1), torch.tensor(20.0)
    powers = torch.exp2(torch.arange(210) % 41 - 20.0)[:, None]
    loss, dx, dy, ds = run(info_nce, x, y, s, impl="native", dims=(72, 40))
    scaled = run(info_nce, x * powers[:200], y / powers, s, impl="native", dims=(72, 40))
    for a, b in zip(scaled, (loss, dx / powers[:200], dy * powers, ds)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", [name for name in IMPLS if name != "triton"])
def test_nested_is_the_mean_of_plain_calls(impl, monkeypatch):
    """One way, with more texts than images, one gradient alone, in tight memory and the same bits every time."""
    x, y, s = randn(300, 40).to(DEVICE), randn(361, 40, seed=1).to(DEVICE), torch.tensor(20.0, device=DEVICE)
    y[:300] += 0.3 * x

    def plain(x, y, s, direction):
        prefixes = [[torch.nn.functional.normalize(e[:, :d], dim=-1) for e in (x, y)] for d in (30, 16)]
        return sum(info_nce(*pair, s, direction=direction, impl="torch") for pair in prefixes) / 2

    for direction in ("both", "image", "text"):
        options = {"dims": (30, 16), "direction": direction, "impl": impl}
        want, got = run(plain, x, y, s, direction=direction), run(info_nce, x, y, s, **options)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)
        assert not got[1][:, 30:].any()
        assert all(torch.equal(a, b) for a, b in zip(got, run(info_nce, x, y, s, **options)))
        for needs in ((True, False, False), (False, True, False), (False, False, True)):
            for a, b in zip(run(info_nce, x, y, s, needs, **options), got):
                assert a is None or torch.equal(a, b)
        for a, b in zip(run(info_nce, x, y, s, workspace_mib=1, **options), got):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    for far in (-x, -1000 * x):  # opposite pairs, at a scale that no constant shift serves
        for scale in (100.0, 300.0):
            given = torch.cat([far, y[300:]])
            want = run(plain, x.double(), given.double(), s.double() / 20 * scale, direction="both")
            got = run(info_nce, x, given, s / 20 * scale, dims=(30, 16), impl=impl)
            for a, b in zip(got, want):
                torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    x[3, 5] = float("nan")
    assert torch.isnan(info_nce(x, y, s, dims=(30, 16), impl=impl))


@pytest.mark.parametrize("dims", [(3, 2, 1), (16, 1), (16, 4)], ids=str)
def test_nested_of_few_numbers(dims):
    """Whose gradient along the row, all of it for one number, cancels."""
    tensors = [randn(65, max(dims), seed=seed).to(DEVICE) for seed in (0, 1)] + [torch.tensor(5.0, device=DEVICE)]
    for impl in impls(torch.float32):
        assert_matches(
            lambda x, y, s, impl=impl: info_nce(x, y, s, dims=dims, impl=impl),
            lambda x, y, s: each(x, y, s, dims=dims),
            tensors,
        )


def test_nested_gradcheck_and_smoothing():
    x, y = randn(5, 6, dtype=torch.float64).to(DEVICE), randn(7, 6, seed=1, dtype=torch.float64).to(DEVICE)
    inputs = [t.requires_grad_() for t in (x, y, torch.tensor(3.0, dtype=torch.float64, device=DEVICE))]
    assert torch.autograd.gradcheck(lambda *t: info_nce(*t, dims=(2, 6), dim_weights=(1, 3)), inputs)
    given = (x.detach().float(), y[:5].detach().float(), torch.tensor(3.0, device=DEVICE))
    mine = info_nce(*given, dims=(6, 3), label_smoothing=0.2)
    torch.testing.assert_close(mine, each(*given, (6, 3), label_smoothing=0.2))
