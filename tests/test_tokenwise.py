"""What a token goes through between two attentions, by each kernel that this CPU has, in each precision."""

import pytest
import torch
import torch.nn.functional as F

from lbfast import testing, tokenwise

DTYPES = (torch.float32, torch.bfloat16, torch.int8)
KERNELS = [(dtype, name) for dtype in DTYPES for name in tokenwise.kernels(dtype)]
SIZES = [(1, 16, 32, 1), (33, 48, 96, 2), (257, 144, 1056, 3), (70, 80, 2080, 1)]  # tokens, D, F, frames

pytestmark = pytest.mark.skipif(not KERNELS, reason="no native kernels here")
each_kernel = pytest.mark.parametrize("dtype, kernel", KERNELS, ids=lambda v: str(v).removeprefix("torch."))


class Case:
    """A whole span: its parts in float64, and what they make in any dtype by plain torch."""

    def __init__(self, tokens, width, inner, frames=1, spread=1.0):
        torch.manual_seed(0)
        self.frames, self.per_frame = frames, 5

        def linear(outputs, inputs):
            weight = torch.randn(outputs, inputs, dtype=torch.float64) * spread * inputs**-0.5
            return weight, torch.randn(outputs, dtype=torch.float64)

        self.total, self.attended = (torch.randn(tokens, width, dtype=torch.float64) for _ in range(2))
        self.out, self.fc1, self.fc2 = linear(width, width), linear(inner, width), linear(width, inner)
        self.reader = linear(3 * width, width)
        self.norms = [torch.randn(width, dtype=torch.float64) for _ in range(4)]
        self.constant = torch.randn(frames, width, dtype=torch.float64)

    def plain(self, dtype, activation="gelu"):
        def linear(x, layer):
            return F.linear(x, layer[0].to(dtype), layer[1].to(dtype))

        def norm(x, weight, bias):
            return F.layer_norm(x, x.shape[-1:], weight.to(dtype), bias.to(dtype))

        total = self.total.to(dtype) + linear(self.attended.to(dtype), self.out)
        h = linear(norm(total, *self.norms[:2]), self.fc1)
        h = F.gelu(h) if activation == "gelu" else h * torch.sigmoid(1.702 * h)
        frames = torch.arange(len(total)) // self.per_frame % self.frames
        total = total + linear(h, self.fc2) + self.constant.to(dtype)[frames]
        return total, linear(norm(total, *self.norms[2:]), self.reader)

    def run(self, dtype, kernel, outside=torch.float32, activation="gelu", rows=slice(None)):
        products = [tokenwise.product(*layer, dtype, kernel=kernel) for layer in (self.out, self.fc1, self.reader)]
        fc2 = tokenwise.product(*self.fc2, dtype, tokenwise.CHUNK, kernel=kernel)
        norms = [norm.float() for norm in self.norms]
        total = self.total[rows].float().contiguous()
        result = torch.full((len(total), len(self.reader[1])), torch.nan, dtype=outside)
        tokenwise.run(
            total,
            attended=self.attended[rows].to(outside),
            out=products[0],
            mlp=[*norms[:2], *products[1], *fc2],
            constant=self.constant.float(),
            per_frame=self.per_frame,
            reader=[*norms[2:], *products[2]],
            result=result,
            activation=activation,
            kernel=kernel,
        )
        return total, result


@pytest.mark.parametrize("size", SIZES)
@each_kernel
def test_a_span_within_its_budget(dtype, kernel, size):
    """int8: steps of 1/127 of the largest weight and 1/255 of a token's range err by 0.8 % rms each, where normal."""
    case = Case(*size)
    for activation in ("gelu", "quick_gelu"):
        exact, outside = case.plain(torch.float64, activation), torch.float32
        if dtype == torch.bfloat16:
            outside = dtype
        got = case.run(dtype, kernel, outside, activation)
        assert got[0].dtype == torch.float32 and got[1].dtype == outside
        for value, want, plain in zip(got, exact, case.plain(outside, activation)):
            if dtype == torch.int8:
                assert testing.relative_error(value, want) <= 0.025
            elif value.dtype == plain.dtype:
                testing.assert_within_budget(value, want, plain)
            else:
                testing.assert_within_budget(value.bfloat16(), want, plain)


@each_kernel
def test_gelu_far_from_zero(dtype, kernel):
    """Phi may be approximate, but not below 0: times -1e19 that would be a large number of the wrong sign."""
    x = torch.tensor([-1e38, -1e19, -1e4, -104, -8, -5, -4.2, -3.8, -1, 0, 1, 3.8, 5, 8, 1e4, 1e38])
    for activation in ("gelu", "quick_gelu"):
        layer = tokenwise.product(torch.zeros(16, 16), x, dtype, kernel=kernel)
        got = tokenwise.linear(torch.zeros(3, 16), layer, 16, activation, kernel)
        want = F.gelu(x) if activation == "gelu" else x * torch.sigmoid(1.702 * x)
        assert (got[:, x < 0] <= 0).all()
        assert ((got - want).abs() <= 1e-3 * x.abs()).all()


@pytest.mark.parametrize("shape", [(1, 16, 16), (19, 48, 80), (40, 4096, 48)])  # M, K, N
@each_kernel
def test_whole_numbers_are_exact(dtype, kernel, shape):
    """A range of 255 and weights up to 127 are their own steps; sums stay below 2^24."""
    rows, inputs, outputs = shape
    torch.manual_seed(0)
    reach = 127 if dtype == torch.int8 else 2
    x = torch.randint(-100, 156, (rows, inputs)).float()
    x[:, 0], x[:, 1] = -100, 155
    weight = torch.randint(-reach, reach + 1, (outputs, inputs)).double() * (torch.rand(outputs, inputs) < 0.1)
    weight[:, 0] = reach
    bias = torch.randint(-9, 9, (outputs,)).double()
    chunk = tokenwise.CHUNK if inputs > tokenwise.CHUNK else None
    layer = tokenwise.product(weight, bias, dtype, chunk, kernel=kernel)
    want = F.linear(x.double(), weight, bias)
    assert torch.equal(tokenwise.linear(x, layer, outputs, kernel=kernel).double(), want)
    assert torch.equal(tokenwise.weight_of(layer, outputs, inputs).double(), weight)


@each_kernel
def test_a_token_depends_on_no_other_and_on_no_thread(dtype, kernel, threads=(1, 2, 3)):
    case, before = Case(300, 48, 96, spread=3.0), torch.get_num_threads()
    try:
        made = []
        for count in threads:
            torch.set_num_threads(count)
            made.append(case.run(dtype, kernel))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other))
    some = slice(0, 300, 7)  # frames do not matter: there is one
    assert all(torch.equal(a[some], b) for a, b in zip(made[0], case.run(dtype, kernel, rows=some)))


@each_kernel
def test_threads_share_the_columns_of_few_tokens(dtype, kernel, threads=(1, 2, 8)):
    """Of more panels than threads and of fewer, the last one not whole."""
    before, x = torch.get_num_threads(), torch.randn(3, 80)
    try:
        for outputs in (16, 48, 304):
            weight, bias = torch.randn(outputs, 80), torch.randn(outputs)
            layer, made = tokenwise.product(weight, bias, dtype, kernel=kernel), []
            for count in threads:
                torch.set_num_threads(count)
                made += [
                    tokenwise.linear(x, layer, outputs, "gelu", kernel),
                    tokenwise.linear(x[:1], layer, outputs, "gelu", kernel),
                ]
            assert all(torch.equal(other, made[0][: len(other)]) for other in made)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@each_kernel
def test_what_is_no_number_stays_where_it_is(dtype, kernel, value):
    case = Case(40, 48, 96)
    want = case.run(dtype, kernel)
    case.total[7, 3] = value
    got = case.run(dtype, kernel)
    others = torch.arange(40) != 7
    assert not got[0][7].isfinite().all() and not got[1][7].isfinite().any()
    assert all(torch.equal(a[others], b[others]) for a, b in zip(got, want))


@each_kernel
def test_rows_of_a_wider_tensor_and_parts_left_out(dtype, kernel):
    case = Case(20, 48, 96)
    layer, wide = tokenwise.product(*case.out, dtype, kernel=kernel), torch.randn(20, 200)
    rows = wide[:, 30:78]
    total = torch.zeros(20, 48)
    tokenwise.run(total, attended=rows, out=layer, kernel=kernel)
    assert torch.equal(total, tokenwise.linear(rows.contiguous(), layer, 48, kernel=kernel))
    same = total.clone()
    norm = [case.norms[0].float(), case.norms[1].float()]
    result = torch.empty(20, 144)
    reader = [*norm, *tokenwise.product(*case.reader, dtype, kernel=kernel)]
    tokenwise.run(same, reader=reader, result=result, kernel=kernel)
    assert torch.equal(same, total)
    want = F.linear(F.layer_norm(total.double(), (48,), *case.norms[:2]), *case.reader)
    assert testing.relative_error(result, want) <= {torch.float32: 2e-6, torch.bfloat16: 6e-3}.get(dtype, 0.02)
    empty = torch.empty(0, 48)
    tokenwise.run(empty, attended=empty, out=layer, kernel=kernel)


@pytest.mark.parametrize("kernel", tokenwise.kernels(torch.float32))
def test_float32_of_any_size_as_exact_as_its_own_sums(kernel):
    """Tokens and outputs far from 1, and numbers far below their largest: as near to float64 as PyTorch's products."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 512), torch.randn(64, 512)
    x[:, :64] *= 1e-6
    weight[:, 64:128] *= 1e-9
    one = torch.ones(64)
    for of_token, of_output in [
        (one, one),
        (torch.logspace(-30, 30, 64), one),
        (one, torch.logspace(-35, 36, 64)),
        (2e37 * one, 1e-37 * one),
        (1e-37 * one, 2e37 * one),
    ]:
        rows, values = x * of_token[:, None], weight * of_output[:, None]
        layer = tokenwise.product(values, torch.zeros(64), torch.float32, kernel=kernel)
        assert torch.equal(tokenwise.weight_of(layer, 64, 512), values)
        want = F.linear(rows.double(), values.double())
        size = of_token.double()[:, None] * of_output.double()
        got, plain = (
            ((y - want) / size).norm()
            for y in (tokenwise.linear(rows, layer, 64, kernel=kernel), F.linear(rows, values))
        )
        assert got <= 1.25 * plain


@pytest.mark.parametrize("kernel", tokenwise.kernels(torch.float32))
def test_float32_sums_of_many_numbers_of_one_sign(kernel):
    torch.manual_seed(0)
    x, weight = torch.rand(17, 8192), torch.rand(64, 8192)
    layer = tokenwise.product(weight, torch.zeros(64), torch.float32, kernel=kernel)
    want = F.linear(x.double(), weight.double())
    testing.assert_within_budget(tokenwise.linear(x, layer, 64, kernel=kernel), want, F.linear(x, weight))


def test_outliers_leave_the_other_tokens_alone_and_the_rest_of_theirs():
    """A value 100 times the rest costs its own token its steps, no other."""
    if not tokenwise.kernels(torch.int8):
        pytest.skip("no int8 here")
    torch.manual_seed(0)
    x, weight, bias = torch.randn(8, 256), torch.randn(64, 256), torch.zeros(64)
    layer = tokenwise.product(weight, bias, torch.int8)
    before = tokenwise.linear(x, layer, 64)
    x[2, 9] = 300
    after = tokenwise.linear(x, layer, 64)
    assert torch.equal(torch.cat([before[:2], before[3:]]), torch.cat([after[:2], after[3:]]))
    assert testing.relative_error(after[2], F.linear(x[2].double(), weight.double())) <= 0.02


def test_wrong_parts_are_refused():
    layer = tokenwise.product(torch.randn(48, 48), torch.randn(48), torch.float32, kernel="plain")
    total = torch.zeros(4, 48)
    for change, message in [
        ({"total": torch.zeros(4, 48).double()}, "total: expected contiguous float32"),
        ({"total": torch.zeros(4, 50)}, "D a multiple of 16"),
        ({"total": torch.zeros(48, 8).T}, "total"),
        ({"attended": torch.zeros(3, 48)}, "attended: expected rows of total's shape"),
        ({"attended": torch.zeros(4, 48).half()}, "expected attended and result of float32 or bfloat16"),
        ({"attended": None}, "attended and out together"),
        ({"out": layer[:1]}, "out: expected 2 tensors"),
        ({"out": [layer[0][:, :1], layer[1]]}, "out: expected panels of 48 x 48"),
        ({"out": [layer[0], layer[1][:-1]]}, "out: expected 64 contiguous float32"),
        ({"result": torch.zeros(4, 48)}, "reader and result together"),
        ({"activation": "relu"}, "activation: expected gelu or quick_gelu, got relu"),
        ({"kernel": "sse"}, "kernel: this CPU has none of this dtype named sse"),
        ({"constant": torch.zeros(0, 48)}, "constant: expected"),
    ]:
        given = {"attended": torch.zeros(4, 48), "out": layer, **change}
        with pytest.raises(RuntimeError, match=message):
            tokenwise.run(given.pop("total", total), **given)
    with pytest.raises(ValueError, match="expected at most 64 bytes more, got 65"):
        tokenwise.Room(64).take((65,), torch.uint8)
    assert "multiple of 16" in " ".join(tokenwise.why_not(40, 64, torch.float32))
