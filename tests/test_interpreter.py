"""bfloat16 in Triton's interpreter (tests/interpreter.py) is torch's, bit by bit."""

import importlib
import os
import pkgutil

import pytest
import torch

from lbfast import kernels

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of overflow and division by zero
]

EVERY = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


@triton.jit
def _cast_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o_x, mask=o_x < size, other=0)
    tl.store(y_ptr + o_x, x.to(y_ptr.dtype.element_ty), mask=o_x < size)


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, true_ptr, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + o_x), tl.load(y_ptr + o_x)
    p_out = out_ptr + o_x
    tl.store(p_out, x + y)
    tl.store(p_out + BLOCK, x - y)
    tl.store(p_out + 2 * BLOCK, x * y)
    tl.store(p_out + 3 * BLOCK, x / y)
    tl.store(p_out + 4 * BLOCK, tl.maximum(x, y))
    tl.store(p_out + 5 * BLOCK, tl.minimum(x, y))
    tl.store(p_out + 6 * BLOCK, tl.where(x < y, x, y * 0.3))
    tl.store(p_out + 7 * BLOCK, -tl.abs(x))
    tl.store(p_out + 8 * BLOCK, tl.exp2(x.to(tl.float32)).to(tl.bfloat16))
    tl.store(p_out + 9 * BLOCK, tl.full([BLOCK], 0.3, tl.bfloat16) + tl.zeros([BLOCK], tl.bfloat16))
    tl.store(p_out + 10 * BLOCK, ((x > 0) & (y > 0)).to(tl.bfloat16))
    tl.store(true_ptr + o_x, x <= y)


@triton.jit
def _sums_kernel(x_ptr, wide_ptr, sum_ptr, all_ptr, max_ptr, M: tl.constexpr, N: tl.constexpr):
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + o_m[:, None] * N + o_n[None, :])
    tl.store(wide_ptr + o_m, tl.sum(x.to(tl.float32), 1))
    tl.store(sum_ptr + o_m[:, None], tl.sum(x, 1, keep_dims=True))
    tl.store(all_ptr, tl.sum(x))
    tl.store(max_ptr + o_m, tl.max(x, 1))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + o_m[:, None] * K + o_k[None, :])
    b = tl.load(b_ptr + o_k[:, None] * N + o_n[None, :])
    p_c = c_ptr + o_m[:, None] * N + o_n[None, :]
    tl.store(p_c, tl.dot(a, b, tl.load(p_c), out_dtype=tl.float32))


@triton.jit
def _addresses_kernel(x_ptr, out_ptr, wanted_ptr, stride, M: tl.constexpr, N: tl.constexpr):
    """Rows that lie apart, some of their numbers; what is not wanted is neither read nor written."""
    o_m, o_n = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    wanted = tl.load(wanted_ptr + o_m * N + o_n) != 0
    x = tl.load(x_ptr + o_m.to(tl.int64) * stride + o_n, mask=wanted, other=-1)
    tl.store(out_ptr + o_n * M + o_m, x, mask=wanted)
    tl.store(out_ptr + M * N + o_m * N + o_n, tl.where(wanted & (o_n > 0) | (x == -1), 2 - x, x * stride))


def cast(x, dtype):
    out = torch.empty(x.shape, dtype=dtype)
    _cast_kernel[(1,)](x, out, x.numel(), triton.next_power_of_2(x.numel()))
    return out


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same(actual, expected):
    """Bits, and NaN where there is one, whichever."""
    assert actual.dtype == expected.dtype
    nan = expected.isnan() if expected.is_floating_point() else torch.zeros_like(expected, dtype=torch.bool)
    assert not nan.any() or bool(actual[nan].isnan().all())
    assert torch.equal(bits(actual)[~nan], bits(expected)[~nan])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16))
def test_every_bfloat16_to_float_and_back(dtype):
    assert_same(cast(EVERY, dtype), EVERY.to(dtype))
    assert_same(cast(EVERY.to(dtype), torch.bfloat16), EVERY.to(dtype).bfloat16())
    assert_same(cast(EVERY, torch.bfloat16), EVERY)


def random_floats():
    """Every exponent and sign; and around every tie: the middle between neighbours, a little below and above."""
    random = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    ties = (torch.arange(2**16, dtype=torch.int64) << 16) - 2**31 + 2**15
    return [x.to(torch.int32).view(torch.float32) for x in (random, ties, ties - 1, ties + 1)]


def test_float32_rounds_as_in_torch():
    for x in random_floats():
        assert_same(cast(x, torch.bfloat16), x.bfloat16())


def test_ties_go_to_even():
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 3.4e38, -3.4e38, 2**-134, 3 * 2**-134])
    expected = torch.tensor([1.0, 1 + 2**-6, -1.0, torch.inf, -torch.inf, 0.0, 2**-132])
    assert_same(cast(x, torch.bfloat16).float(), expected)


@pytest.mark.parametrize("dtype", (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool))
def test_integers(dtype):
    whole = torch.arange(-(2**15), 2**15, dtype=torch.int32) * (1 if dtype.itemsize < 4 else 509)
    whole = whole.to(dtype)
    assert_same(cast(whole, torch.bfloat16), whole.bfloat16())
    small = EVERY[(EVERY.abs() < (2 if dtype == torch.bool else 127)) & ((EVERY >= 0) | dtype.is_signed)]
    assert_same(cast(small, dtype), small.to(dtype))


def test_arithmetic_rounds_once():
    x = EVERY[torch.randperm(2**16, generator=torch.Generator().manual_seed(1))]
    y = EVERY[torch.randperm(2**16, generator=torch.Generator().manual_seed(2))]
    fine = ~(x.isnan() | y.isnan())
    x, y = (torch.where(fine, value, 1) for value in (x, y))
    out, true = torch.empty(11, x.numel(), dtype=torch.bfloat16), torch.empty(x.numel(), dtype=torch.bool)
    _arithmetic_kernel[(1,)](x, y, out, true, x.numel())
    third = torch.full_like(x, 0.3)
    plain = (x + y, x - y, x * y, x / y, x.maximum(y), x.minimum(y), torch.where(x < y, x, y * third), -x.abs())
    for got, expected in zip(out, (*plain, x.float().exp2().bfloat16(), third, ((x > 0) & (y > 0)).bfloat16())):
        zero = (expected == 0) & (got == 0)  # of either sign
        assert_same(torch.where(zero, 0, got), torch.where(zero, 0, expected))
    assert torch.equal(true, x <= y)


def test_sums_and_maxima():
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide, top = torch.empty(16), torch.empty(16)
    total, everything = torch.empty(16, dtype=torch.bfloat16), torch.empty(1, dtype=torch.bfloat16)
    _sums_kernel[(1,)](x, wide, total, everything, top, 16, 64)
    torch.testing.assert_close(wide, x.double().sum(1).float(), rtol=1e-6, atol=1e-6)
    halves = x
    while halves.shape[1] > 1:
        halves = halves[:, : halves.shape[1] // 2] + halves[:, halves.shape[1] // 2 :]
    assert torch.equal(total, halves[:, 0])
    assert abs(everything.item() - x.double().sum().item()) < 10 * 2**-8 * x.double().abs().sum().item()
    assert torch.equal(top, x.float().amax(1))


def test_dot_sums_exact_products_in_float32():
    a, b = (torch.randn(32, 32, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1))
    c = torch.randn(32, 32, generator=torch.Generator().manual_seed(2))
    out = c.clone()
    _dot_kernel[(1,)](a, b, out, 32, 32, 32)
    exact = a.double() @ b.double() + c.double()
    assert (out.double() - exact).abs().max() < 32 * 2**-24 * exact.abs().max()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.int32, torch.int64))
@pytest.mark.parametrize("share", (0, 0.5, 1))
def test_addresses(dtype, share):
    memory = torch.randint(-99, 99, (32, 50), generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = torch.rand(32, 32, generator=torch.Generator().manual_seed(1)) < share
    out = torch.full((2, 32, 32), 77, dtype=dtype)
    _addresses_kernel[(1,)](memory, out, wanted.to(torch.int8), 50, 32, 32)
    x = torch.where(wanted, memory[:, :32], -1)
    assert torch.equal(out[0], torch.where(wanted, x, 77).t())
    assert torch.equal(out[1], torch.where(wanted & (torch.arange(32) > 0) | (x == -1), 2 - x, x * 50))


def test_a_file_is_met_in_anothers_launch_first(tmp_path, monkeypatch):
    """What is patched then is not seen; the file's own launch is patched all the same."""
    lines = "import triton\nimport triton.language as tl\n"
    kernel = "@triton.jit\ndef kernel(x_ptr):\n    tl.store(x_ptr + tl.program_id(0), {})\n"
    inner = f"{lines}core = tl.core\n@triton.jit\ndef one_more(x_ptr):\n    return tl.load(x_ptr) + 1\n"
    (tmp_path / "met_inner.py").write_text(inner + kernel.format("one_more(x_ptr)"))
    (tmp_path / "met_outer.py").write_text(f"{lines}from met_inner import one_more\n{kernel.format('one_more(x_ptr)')}")
    monkeypatch.syspath_prepend(tmp_path)
    x = torch.zeros(1)
    for name in ("met_outer", "met_inner", "met_outer"):
        importlib.import_module(name).kernel[(1,)](x)
    assert x.item() == 3


def test_kernels_are_interpreted_from_their_first_import_on():
    """In every process of a run, whichever test it begins with: some set TRITON_INTERPRET=0."""
    for module in pkgutil.iter_modules(kernels.__path__, "lbfast.kernels."):
        for name, value in vars(importlib.import_module(module.name)).items():
            assert not isinstance(value, triton.JITFunction), f"{module.name}.{name}"
