"""info_nce: loss and gradients against float64, for every implementation that runs here."""

import contextlib
import importlib
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lbfast import dispatch
from lbfast.ops.info_nce import IMPLEMENTATIONS, info_nce
from lbfast.reference.info_nce import info_nce as reference
from lbfast.testing import ROUNDING, randn

module = importlib.import_module("lbfast.ops.info_nce")
importlib.import_module("lbfast.ops._pairs").INTERPRETER_KNOWS_BFLOAT16 = True  # tests/interpreter.py
pytestmark = pytest.mark.any_device
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (1, 2, 63, 64, 65, 257, 1000)
WIDTHS = (32, 80, 768, 1024)
SCALES = (1.0, 14.3, 100.0)
HALF = (torch.float16, torch.bfloat16)


def impls(dtype=torch.float32):
    """The implementations that run here: Triton too, interpreted where there is no GPU."""
    probe = torch.zeros(1, 1, device=DEVICE, dtype=dtype)
    return [name for name, why_not in IMPLEMENTATIONS.items() if not why_not(probe, probe)]


IMPLS = impls()


def unit(*shape, seed=0, dtype=torch.float32, align=None):
    x = randn(*shape, seed=seed, dtype=torch.float64)
    if align is not None:
        x = x + 0.5 * align.double()
    return torch.nn.functional.normalize(x, dim=-1).to(dtype).to(DEVICE)


class _Float16Products(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default and args[0].dtype == torch.float16:
            return (args[0].float() @ args[1].float()).half()
        return function(*args, **(kwargs or {}))


def float16_products(x):
    """Where x is float16 on a CPU, products of two matrices are what torch makes of them there, in less time.

    Sums in float32, rounded once: the same but for those sums' order. torch's loops for processors without float16's
    instructions take up to a hundred times as long as float32's.
    """
    quicker = x.dtype == torch.float16 and x.device.type == "cpu"
    return _Float16Products() if quicker else contextlib.nullcontext()


def run(function, x, y, s, needs=(True, True, True), **options):
    """Loss and the three gradients (None where not asked for)."""
    x, y, s = (t.detach().clone().requires_grad_(need) for t, need in zip((x, y, s), needs))
    with contextlib.nullcontext() if function is info_nce else float16_products(x):
        loss = function(x, y, s, **options)
        loss.backward()
    return loss.detach(), x.grad, y.grad, s.grad


UNKEPT = "native, no logits kept"
"""As where a workspace has no room for all logits: of the cases here it has."""


def once(name, x, y, s, **options):
    """Loss and gradients of one implementation."""
    if name != UNKEPT:
        return run(info_nce, x, y, s, impl=name, **options)
    stats = module._Native.stats
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Native, "stats", lambda self, *given: stats(self, *given[:-1], False))
        return run(info_nce, x, y, s, impl="native", **options)


def check(draws, s, names, **options):
    """Compares implementations with float64, within what plain torch makes of the same inputs.

    The errors are those of several draws together: of one draw, plain torch may hit a scalar by luck. Of one or two
    pairs one draw's loss is most of all draws', so that plain torch adds those in several orders. Interpreted Triton,
    which takes a hundred times as long, is run on the first, or on six of two pairs.
    """
    reference_options = {k: v for k, v in options.items() if k in ("ids", "label_smoothing")}
    s = torch.tensor(s, device=DEVICE)
    squares = {name: [[] for _ in PARTS] for name in ("exact", "plain", *names)}  # of norms: a list of draws each
    for draw, (x, y) in enumerate(draws):
        every_exact = run(reference, x.double(), y.double(), s.double(), **reference_options)
        few = 6 if len(x) == 2 else 1
        drawn = [name for name in names if name != "triton" or DEVICE == "cuda" or draw < few]
        results = [(name, once(name, x, y, s, **options)) for name in drawn]
        assert all(found[0].dtype == torch.float32 for _, found in results)
        for seed in range(4 if len(x) <= 2 and x.dtype == torch.float32 else 1):
            results.append(("plain", run(in_another_order(x, seed), x, y, s, **reference_options)))
        dtypes = [part.dtype for part in results[-1][1]]
        for i, exact in enumerate(every_exact):
            squares["exact"][i].append(float(exact.norm()) ** 2)
            for name, found in results:
                squares[name][i].append(float((found[i].to(dtypes[i]).double() - exact).norm()) ** 2)
    for i, part in enumerate(PARTS):
        allowed = 2 * root_mean(squares["plain"][i]) + ROUNDING[dtypes[i]] * root_mean(squares["exact"][i])
        for name in names:
            error = root_mean(squares[name][i])
            what = f"{part}: {name} {x.dtype} {tuple(x.shape)} scale {float(s)} {options}"
            assert error <= allowed, f"{what}: error {error:.3e} against float64, allowed {allowed:.3e}"


def in_another_order(x, seed):
    """The reference, whose products along rows like x's are added in that order; 0: as they are."""
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed)).to(x.device)
    return (lambda x, y, s, **options: reference(x[:, order], y[:, order], s, **options)) if seed else reference


PARTS = ("loss", "d image", "d text", "d scale")


def root_mean(squares):
    return (sum(squares) / len(squares)) ** 0.5


def pairs(b, d, dtype, align=False):
    """Draws of (b, d) unit rows; the smaller b the more of them, but of one pair, whose loss is 0 in all."""
    draws = 4 if b == 1 else 48 if b == 2 else 12 if b <= 80 else 8 if b <= 300 else 4
    for seed in range(draws if dtype == torch.float32 else draws // 4):  # 16 bits: far within the budget
        x = unit(b, d, seed=2 * seed, dtype=dtype)
        yield x, unit(b, d, seed=2 * seed + 1, dtype=dtype, align=x.cpu() if align else None)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_matches_float64(dtype, d):
    """In bfloat16 Triton keeps its exponentials for the backward.

    Interpreted, it takes one scale a size: of any two of size, width and scale it has every pair.
    """
    for i, b in enumerate(SIZES):
        draws = list(pairs(b, d, dtype, align=d == 80))
        for j, s in enumerate(SCALES):
            turn = (i + WIDTHS.index(d)) % len(SCALES) == j
            names = [name for name in impls(dtype) if name != "triton" or turn or DEVICE == "cuda"]
            names += [UNKEPT] if "native" in names and d in (80, 768) else []
            check(draws, s, names)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_groups_and_smoothing(dtype):
    for b, classes in ((1, 1), (2, 2), (65, 7), (257, 200)):
        ids = torch.arange(b, device=DEVICE) % classes - 5_000_000_000
        check(pairs(b, 80, dtype), 14.3, impls(dtype), ids=ids)
        check(pairs(b, 80, dtype), 14.3, impls(dtype), label_smoothing=0.1)
        for smoothing in (0.1, 0.9):  # at 0.9 most of the two gradients cancels
            check(pairs(b, 80, dtype), 14.3, impls(dtype), ids=ids, label_smoothing=smoothing)


def oneway(x, y, s, direction, ids=None):
    """Cross-entropies of the first len(x) texts' pairs, in the inputs' dtype."""
    z, b = s * x @ y.T, len(x)
    if ids is not None:
        z = z.masked_fill((ids[:b, None] == ids) & ~torch.eye(b, len(y), dtype=torch.bool, device=z.device), -1e30)
    target = torch.arange(b, device=z.device)
    halves = {
        "image": torch.nn.functional.cross_entropy(z, target),
        "text": torch.nn.functional.cross_entropy(z.T[:b], target),
    }
    return halves.get(direction, sum(halves.values()) / 2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("direction", ["both", "image", "text"])
@pytest.mark.parametrize("b, extra", [(5, 0), (5, 3), (70, 61), (1, 4)])
def test_one_direction_and_more_texts_than_images(b, extra, direction, impl):
    """What follows the b-th text is everyone's negative and nobody's positive; each half is a loss by itself."""
    x, y = unit(b, 32), unit(b + extra, 32, seed=1)
    for ids in (None, torch.arange(b + extra, device=DEVICE) % max(2, b // 2)):
        given = [t.double() for t in (x, y, torch.tensor(14.3, device=DEVICE))]
        want = run(oneway, *given, direction=direction, ids=ids)
        got = run(info_nce, x, y, torch.tensor(14.3, device=DEVICE), impl=impl, direction=direction, ids=ids)
        for mine, exact in zip(got, want):
            torch.testing.assert_close(mine.double(), exact, rtol=2e-5, atol=2e-6)
        alone = run(
            info_nce, x, y, torch.tensor(14.3, device=DEVICE), (False, True, False), impl=impl, direction=direction
        )
        if ids is None:
            torch.testing.assert_close(alone[2], got[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", [name for name in IMPLS if name != "torch"])
@pytest.mark.parametrize("room", [0, 1 << 30])
@pytest.mark.parametrize("direction", ["both", "image", "text"])
def test_one_direction_in_bfloat16(direction, room, impl, monkeypatch):
    """The same where exp(logits) are kept, and where one weight of a row and one of a column make the tile."""
    monkeypatch.setattr(module, "_memory", lambda *about: (1 << 20, room))
    x, y = unit(70, 40, dtype=torch.bfloat16), unit(131, 40, seed=1, dtype=torch.bfloat16)
    want = run(oneway, x.double(), y.double(), torch.tensor(14.3, device=DEVICE).double(), direction=direction)
    got = run(info_nce, x, y, torch.tensor(14.3, device=DEVICE), impl=impl, direction=direction)
    for mine, exact in zip(got, want):
        assert float((mine.double() - exact).norm() / exact.norm()) < 4 * ROUNDING[torch.bfloat16]


def test_one_direction_gradcheck():
    x, y, s = unit(3, 4, dtype=torch.float64), unit(5, 4, seed=1, dtype=torch.float64), torch.tensor(3.0).double()
    given = [t.requires_grad_() for t in (x, y, s.to(DEVICE))]
    for direction in ("both", "image", "text"):
        assert torch.autograd.gradcheck(lambda x, y, s, d=direction: info_nce(x, y, s, direction=d), given)


def test_dense_under_torch_func():
    """grad and vmap of grad are those of the tiles, masks and smoothing included."""
    x, y, s = unit(2, 5, 8), unit(2, 5, 8, seed=1), torch.tensor(5.0, device=DEVICE)
    ids = torch.tensor([0, 1, 0, 2, 3], device=DEVICE)
    for options in ({}, {"ids": ids}, {"label_smoothing": 0.3}, {"ids": ids, "label_smoothing": 0.3}):
        gradient = torch.func.grad(lambda x, y, o=options: info_nce(x, y, s, **o), (0, 1))
        each = torch.func.vmap(gradient)(x, y)
        for i in range(2):
            want = run(info_nce, x[i], y[i], s, **options)[1:3]
            for found in (gradient(x[i], y[i]), [g[i] for g in each]):
                for mine, theirs in zip(found, want):
                    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_gradcheck():
    x, y = unit(7, 5, dtype=torch.float64), unit(7, 5, seed=1, dtype=torch.float64)
    s = torch.tensor(3.0, dtype=torch.float64, device=DEVICE)
    ids = torch.tensor([0, 1, 2, 0, 3, 1, 0], device=DEVICE)
    inputs = [t.requires_grad_() for t in (x, y, s)]
    for options in ({}, {"ids": ids}, {"ids": ids, "label_smoothing": 0.2}):
        assert torch.autograd.gradcheck(lambda a, b, c, o=options: info_nce(a, b, c, **o), inputs)


@pytest.mark.parametrize("impl", IMPLS)
def test_each_gradient_alone(impl):
    x, y, s = unit(70, 40), unit(70, 40, seed=1), torch.tensor(20.0, device=DEVICE)
    every = run(info_nce, x, y, s, impl=impl)
    for needs in itertools.product((False, True), repeat=3):
        if not any(needs):
            continue
        some = run(info_nce, x, y, s, needs, impl=impl)
        for need, a, b in zip(needs, some[1:], every[1:]):
            assert (a is None) != need
            if need:
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_extreme_rows(impl, dtype):
    """Finite and right: identical rows, opposite rows, one-hot rows, whole tiles of them or parts, at scale 100."""
    if impl not in impls(dtype):
        pytest.skip(f"{impl} does not take {dtype} here")
    eye = torch.eye(96, device=DEVICE, dtype=dtype)
    same = unit(1, 96, dtype=dtype).expand(70, 96)
    s = torch.tensor(100.0, device=DEVICE)
    mixed = torch.cat([same[:20], -same[:20], eye[:30]])
    others = unit(400, 96, seed=5, dtype=dtype)
    others[:270] = same[:1]
    cases = {
        "identical": (same, same),
        "opposite": (same, -same),
        "one-hot": (eye, eye),
        "one-hot, wrong pairs": (eye, eye.roll(1, 0)),
        "cosines of -1 and 1": (mixed, -mixed),
        "opposite, and others": (others, torch.cat([-others[:270], others[270:].flip(0)])),
    }
    for name, (x, y) in cases.items():
        exact = run(reference, x.double(), y.double(), s.double())
        ours = run(info_nce, x, y, s, impl=impl)
        plain = run(reference, x, y, s)
        for what, a, e, p in zip(("loss", "d image", "d text", "d scale"), ours, exact, plain):
            assert torch.isfinite(a).all(), f"{name}: {what}"
            # a probability is as good as its logit, which is as large as s; terms that cancel leave their rounding
            rounding = ROUNDING[p.dtype] + float(s) * ROUNDING[torch.float32] / 2
            terms = max(float(e.norm()), 0.0 if what == "loss" else float(s) / len(x) ** 0.5)
            error, plain_error = ((t.double() - e).norm() for t in (a.to(p.dtype), p))
            assert error <= 2 * plain_error + rounding * terms, f"{name}: {what}"


@pytest.mark.parametrize("impl", IMPLS)
def test_range_of_logits_beyond_exp(impl):
    """Rows and columns whose largest logits differ by hundreds, within one tile."""
    up = torch.linspace(0.01, 30, 130, device=DEVICE)[:, None]
    check([(x * up - 0.3, y * up.flip(0) + 0.3) for x, y in pairs(130, 64, torch.float32)], 5.0, [impl])


@pytest.mark.parametrize("impl", IMPLS)
def test_one_group_has_no_negatives(impl):
    for b in (9, 90, 250):
        x, y, s = unit(b, 40), unit(b, 40, seed=1), torch.tensor(10.0, device=DEVICE)
        for result in run(info_nce, x, y, s, impl=impl, ids=torch.zeros_like(x[:, 0], dtype=torch.int64)):
            assert not result.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_give_nan(impl, bad):
    for where in ((0, 0), (69, 39), (33, 7)):
        for side in (0, 1):
            pair = [unit(70, 40), unit(70, 40, seed=1)]
            pair[side][where] = bad
            assert torch.isnan(info_nce(*pair, torch.tensor(10.0, device=DEVICE), impl=impl))
    assert torch.isnan(info_nce(unit(9, 8), unit(9, 8), torch.tensor(bad, device=DEVICE), impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_an_image_infinitely_far_from_every_text(impl):
    """All its logits are -inf."""
    x, y, s = (torch.tensor(v, device=DEVICE) for v in ([[torch.inf, 0.5], [0.5, 0.5]], [[-0.5, 0.5]] * 2, 10.0))
    loss, dx, dy, _ = run(info_nce, x, y, s, impl=impl)
    assert loss.isnan() and dx[0].isnan().all() and dy.isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_properties(impl):
    """Symmetric in its sides, blind to the order of the pairs and to the workspace; the same bits every time."""
    x, y, s = unit(600, 72), unit(600, 72, seed=1), torch.tensor(30.0, device=DEVICE)
    first = run(info_nce, x, y, s, impl=impl)
    swapped = run(info_nce, y, x, s, impl=impl)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    permuted = run(info_nce, x[order], y[order], s, impl=impl)
    tight = run(info_nce, x, y, s, impl=impl, workspace_mib=1)
    again = run(info_nce, x, y, s, impl=impl)
    for a, b in zip(first, (swapped[0], swapped[2], swapped[1], swapped[3])):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)
    for a, b in zip((first[0], first[1][order], first[2][order], first[3]), permuted):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)
    for a, b in zip(first, tight):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)
    for a, b in zip(first, again):
        assert torch.equal(a, b)


@pytest.mark.skipif("triton" not in IMPLS, reason="no Triton here")
@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("dtype, room", [(torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, 1 << 30)])
def test_triton_chunks_and_parts(dtype, room, scale, monkeypatch):
    """Scratch for a tile or two at a time, and parts joined in groups: the results of one launch, kept or not."""
    kernel = importlib.import_module("lbfast.kernels.info_nce")
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 2}
    monkeypatch.setitem(kernel.configs.INFO_NCE, "interpreter", kernel.configs.Launch(tile, num_warps=4))
    x, y, s = unit(330, 40, dtype=dtype), unit(330, 40, seed=1, dtype=dtype), torch.tensor(scale, device=DEVICE)
    y[:70], x[:70] = -x[:1], x[:1].clone()  # some tiles with shifts of their own
    monkeypatch.setattr(module, "_memory", lambda *about: (1 << 28, room))
    once = run(info_nce, x, y, s, impl="triton")
    monkeypatch.setattr(module, "_memory", lambda *about: (70_000, room))
    monkeypatch.setattr(kernel, "_MOST_PARTS", 2)  # of the six there are
    for a, b in zip(once, run(info_nce, x, y, s, impl="triton")):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4 if a.dtype == torch.float32 else ROUNDING[dtype])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(impl, dtype):
    if impl not in impls(dtype):
        pytest.skip(f"{impl} does not take {dtype} here")
    wide = randn(50, 2, 48, dtype=dtype, seed=3).to(DEVICE)
    x, y = wide[:, 0, ::2], wide[:, 1].t().contiguous().t()[:, :24]
    assert not x.is_contiguous() and not y.is_contiguous()
    s = torch.tensor([0.5], device=DEVICE)
    for a, b in zip(run(info_nce, x, y, s, impl=impl), run(info_nce, x.contiguous(), y.contiguous(), s, impl=impl)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_scale_zero_negative_and_float(impl):
    for s in (0.0, -7.0):
        check(pairs(40, 24, torch.float32), s, [impl])
    x, y = unit(40, 24), unit(40, 24, seed=1)
    assert torch.equal(info_nce(x, y, 12.5, impl=impl), info_nce(x, y, torch.tensor(12.5, device=DEVICE), impl=impl))


def test_mixed_dtypes_and_autocast():
    x, y, s = unit(40, 24), unit(40, 24, seed=1).bfloat16(), torch.tensor(10.0, device=DEVICE)
    mixed = run(info_nce, x, y, s)
    wide = run(info_nce, x, y.float(), s)
    assert mixed[2].dtype == torch.bfloat16
    assert torch.equal(mixed[0], wide[0]) and torch.equal(mixed[1], wide[1])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = run(info_nce, x, y, s)
    narrow = run(info_nce, x.bfloat16(), y, s)
    assert torch.equal(cast[0], narrow[0]) and cast[1].dtype == torch.float32


def test_same_embeds_on_both_sides():
    x, s = unit(30, 16).requires_grad_(), torch.tensor(9.0, device=DEVICE)
    info_nce(x, x, s).backward()
    other = x.detach().clone().requires_grad_()
    reference(other, other, s).backward()
    torch.testing.assert_close(x.grad, other.grad, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"image_embeds": torch.zeros(3)}, ValueError, r"image_embeds: expected \(B, D\)"),
        ({"text_embeds": torch.zeros(3, 5)}, ValueError, "text_embeds: expected image_embeds' shape"),
        (
            {"text_embeds": torch.zeros(2, 4)},
            ValueError,
            r"text_embeds: expected image_embeds' shape \(3, 4\), or more",
        ),
        ({"direction": "left"}, ValueError, "direction: expected one of both, image, text, got 'left'"),
        ({"direction": "text", "label_smoothing": 0.1}, ValueError, "label_smoothing: expected 0 with one direction"),
        (
            {"text_embeds": torch.zeros(4, 4), "label_smoothing": 0.1},
            ValueError,
            "label_smoothing: expected 0 where there are more texts",
        ),
        ({"image_embeds": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "image_embeds: expected a floating"),
        ({"image_embeds": torch.zeros(0, 4), "text_embeds": torch.zeros(0, 4)}, ValueError, "at least one row"),
        ({"logit_scale": torch.ones(2)}, ValueError, "logit_scale: expected one element"),
        ({"logit_scale": torch.tensor(3)}, TypeError, "logit_scale: expected a floating"),
        ({"ids": torch.zeros(4, dtype=torch.int64)}, ValueError, r"ids: expected \(3,\)"),
        ({"ids": torch.zeros(3)}, TypeError, "ids: expected integers"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing"),
        ({"dims": (4, 5)}, ValueError, r"dims: expected numbers from 1 to D = 4, got \(4, 5\)"),
        ({"dims": (2, 2)}, ValueError, "dims: expected integers that differ"),
        ({"dims": ()}, ValueError, "dims: expected integers that differ"),
        ({"dims": (4, 2), "dim_weights": (1.0,)}, ValueError, "dim_weights: expected a number .* each of dims"),
        ({"dims": (4, 2), "dim_weights": (0.0, 0.0)}, ValueError, "dim_weights: expected .* not all 0"),
        ({"dim_weights": (1.0,)}, ValueError, "dim_weights: expected dims with them"),
        ({"gather": "some"}, ValueError, "gather: expected 'all' or 'ring'"),
        ({"workspace_mib": 0}, ValueError, "workspace_mib"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
    ],
)
def test_errors(change, error, says):
    arguments = {"image_embeds": torch.zeros(3, 4), "text_embeds": torch.zeros(3, 4), "logit_scale": torch.tensor(1.0)}
    arguments.update(change)
    with pytest.raises(error, match=says):
        info_nce(**arguments)


def test_impl_that_cannot_says_why():
    x = torch.zeros(2, 4, dtype=torch.float64)
    for name in IMPLEMENTATIONS:
        reasons = dispatch.explain(IMPLEMENTATIONS, x, x)[name]
        if reasons:
            with pytest.raises(RuntimeError, match="cannot take these inputs"):
                info_nce(x, x, 1.0, impl=name)
    assert dispatch.explain(IMPLEMENTATIONS, x, x)["torch"] == []


@pytest.mark.parametrize("e", [40, 58])
def test_a_long_row_among_short_ones(e):
    """Its gradients are 0 here, and take no digits from the others'."""
    x, y = unit(64, 64), unit(64, 64, seed=1)
    x[0], x[:, 0] = 0, 0
    x *= 2.0**-e
    x[0, 0] = 2.0**e
    y[:, 0] = -y[:, 0].abs() - 0.1
    y[0, 0] = 1
    for left, right, others in ((x, y, 2), (y, x, 1)):
        s = torch.tensor(1.0, device=DEVICE)
        exact = run(reference, left.double(), right.double(), s.double())[others][1:]
        size = exact.norm()
        plain = (run(reference, left, right, s)[others][1:].double() - exact).norm() / size
        for impl in IMPLS:
            got = run(info_nce, left, right, s, impl=impl)[others][1:].double()
            assert (got - exact).norm() / size <= 4 * plain + 1e-7, impl
