"""The native ops called directly: what does not fit is one line of error that names the argument, never a signal."""

import pytest
import torch

from lbfast import native, ops  # noqa: F401  (the schemas)
from lbfast.testing import randn

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason="no native kernels here")


def attention(**given):
    q, k, v = (randn(2, n, 3, 8, seed=n) for n in (4, 5, 5))
    arguments = {"q": q, "k": k, "v": v, "padded": None, "causal": False, "scale": 1.0, **given}
    return torch.ops.lbfast.attention_native(*arguments.values())


def attention_bwd(**given):
    q, k, v = (randn(2, n, 3, 8, seed=n) for n in (4, 5, 5))
    arguments = {"do": q, "q": q, "k": k, "v": v, "padded": None, "o": q, "stats": torch.ones(2, 3, 4, 2)}
    return torch.ops.lbfast.attention_native_bwd(*{**arguments, **given}.values(), False, 1.0)


def temporal(**given):
    q, k, v = (randn(2, 3, 4, 2, 8, seed=i) for i in range(3))
    return torch.ops.lbfast.temporal_attention_native(*{"q": q, "k": k, "v": v, "scale": 1.0, **given}.values())


def temporal_bwd(**given):
    arguments = {name: randn(2, 3, 4, 2, 8, seed=i) for i, name in enumerate(("do", "q", "k", "v"))}
    return torch.ops.lbfast.temporal_attention_native_bwd(*{**arguments, **given}.values(), 1.0)


def stats(**given):
    arguments = {"x": randn(3, 8), "y": randn(5, 8), "scale": 1.0, "diag": 0, "row_labels": None, "col_labels": None}
    return torch.ops.lbfast.info_nce_stats(*{**arguments, "logits": None, **given}.values())


def grads(**given):
    arguments = {"x": randn(3, 8), "y": randn(5, 8), "scale": 1.0, "rows": torch.ones(2, 3), "cols": torch.ones(2, 5)}
    more = {"diag": 0, "row_labels": None, "col_labels": None, "logits": None, "workspace": 1 << 20, "target": 2.0}
    return torch.ops.lbfast.info_nce_grads(
        *{**arguments, **more, "dx": torch.zeros(3, 8), "dy": torch.zeros(5, 8), **given}.values()
    )


def nested_norms(**given):
    return torch.ops.lbfast.info_nce_nested_norms(*{"x": randn(3, 8), "ends": [4, 8], **given}.values())


def nested_sums(**given):
    arguments = {"x": randn(3, 8), "y": randn(5, 8), "scale": 1.0, "shift": 0.0, "x_factors": torch.ones(2, 3)}
    more = {"y_factors": torch.ones(2, 5), "ends": [4, 8], "diag": 0, "row_labels": None, "col_labels": None}
    return torch.ops.lbfast.info_nce_nested_sums(*{**arguments, **more, **given}.values())


def nested_grads(**given):
    arguments = {"x": randn(3, 8), "y": randn(5, 8), "scale": 1.0, "shift": 0.0, "x_factors": torch.ones(2, 3)}
    arguments |= {"y_factors": torch.ones(2, 5), "ends": [4, 8], "row_weights": torch.ones(2, 3)}
    arguments |= {"col_weights": torch.ones(2, 5), "exact": torch.ones(2, 3), "diag": 0, "row_labels": None}
    more = {"col_labels": None, "workspace": 1 << 20, "dx": torch.zeros(3, 8), "dy": torch.zeros(5, 8)}
    return torch.ops.lbfast.info_nce_nested_grads(*{**arguments, **more, **given}.values())


def sigmoid(**given):
    arguments = {"x": randn(3, 8), "y": randn(5, 8), "scale": 1.0, "bias": -1.0, "diag": 0, "row_labels": None}
    more = {"col_labels": None, "workspace": 1 << 20, "dx": torch.zeros(3, 8), "dy": torch.zeros(5, 8)}
    return torch.ops.lbfast.sigmoid_loss_pass(*{**arguments, **more, **given}.values())


def rows(**given):
    arguments = {"pixels": randn(2, 3, 4, 9, 9), "kept": None, "tube": 2, "patch": 3, "dtype": torch.float32}
    return torch.ops.lbfast.patch_rows(*{**arguments, **given}.values())


def fold(**given):
    arguments = {"weight": randn(4, 3, 9), "scale": torch.ones(3), "offset": torch.ones(3)}
    return torch.ops.lbfast.patch_fold(*{**arguments, **given}.values())


def resize(**given):
    image, ones = torch.zeros(2, 1, 6, 9, dtype=torch.uint8), torch.ones(2, 4)
    taps = {"first_row": torch.tensor([0, 1, 2]), "rows": torch.ones(3, 4), "first_col": torch.tensor([0, 5])}
    arguments = {"image": image, **taps, "cols": ones, "scale": [1.0, 2.0], "offset": [0.0, 1.0]}
    return torch.ops.lbfast.resized_crop_native(*{**arguments, "out": torch.empty(2, 1, 3, 2), **given}.values())


def labels(n):
    return torch.zeros(n, dtype=torch.int32)


@pytest.mark.parametrize(
    "op",
    [
        *(attention, attention_bwd, temporal, temporal_bwd, stats, grads, nested_norms, nested_sums),
        *(nested_grads, sigmoid, rows, fold, resize),
    ],
)
def test_what_fits_is_taken(op):
    op()


SAME = torch.zeros(5, 8)
LEVELS = torch.zeros(2, 1, 6, 9, dtype=torch.uint8)
REFUSED = [
    (attention, {"q": randn(2, 4, 3, 8).double()}, "q: expected float32 or bfloat16"),
    (attention, {"q": randn(2, 4, 3, 7)}, "q: expected an even D"),
    (attention, {"q": randn(4, 3, 8)}, "q: expected 4 axes"),
    (attention, {"k": randn(2, 5, 2, 8)}, "k: expected [2, 5, 3, 8], got [2, 5, 2, 8]"),
    (attention, {"k": randn(2, 0, 3, 8), "v": randn(2, 0, 3, 8)}, "k: expected (B, M, H, D), M > 0"),
    (attention, {"v": randn(2, 6, 3, 8)}, "v: expected [2, 5, 3, 8]"),
    (attention, {"v": randn(2, 5, 3, 8).bfloat16()}, "v: expected Float"),
    (attention, {"causal": True}, "as many queries as keys, got 4 and 5"),
    (attention, {"padded": torch.zeros(2, 5)}, "padded: expected Bool"),
    (attention, {"padded": torch.zeros(2, 4, dtype=torch.bool)}, "padded: expected [2, 5]"),
    (attention_bwd, {"do": randn(2, 4, 3, 6)}, "do: expected [2, 4, 3, 8]"),
    (attention_bwd, {"do": randn(2, 4, 3, 8).bfloat16()}, "do: expected Float"),
    (attention_bwd, {"stats": torch.ones(2, 3, 4)}, "stats: expected [2, 3, 4, 2]"),
    (attention_bwd, {"stats": torch.ones(2, 3, 4, 4)[..., ::2]}, "stats: expected a contiguous tensor"),
    (attention_bwd, {"stats": torch.ones(2, 3, 4, 2).double()}, "stats: expected Float"),
    (temporal, {"q": randn(2, 3, 4, 2, 8).double()}, "q: expected float32 or bfloat16"),
    (temporal, {"q": randn(2, 33, 4, 2, 8)}, "q: expected T <= 32"),
    (temporal, {"k": randn(2, 3, 4, 2, 7)}, "k: expected [2, 3, 4, 2, 8]"),
    (temporal, {"v": randn(2, 3, 4, 2, 8).bfloat16()}, "v: expected Float"),
    (temporal_bwd, {"do": randn(2, 3, 4, 1, 8)}, "do: expected [2, 3, 4, 2, 8]"),
    (stats, {"x": randn(3, 0), "y": randn(5, 0)}, "x: expected (m, D), D > 0"),
    (stats, {"x": randn(3, 7).bfloat16(), "y": randn(5, 7).bfloat16()}, "x: expected float32, or an even D"),
    (stats, {"x": randn(8, 3).T}, "x: expected a contiguous tensor"),
    (stats, {"y": randn(5, 7)}, "y: expected [5, 8]"),
    (stats, {"y": randn(5, 8).half()}, "y: expected Float"),
    (stats, {"diag": 3}, "diag: expected at most n - m = 2, got 3"),
    (stats, {"row_labels": labels(3)}, "row_labels, col_labels: expected both or neither"),
    (stats, {"col_labels": labels(5)}, "row_labels, col_labels: expected both or neither"),
    (stats, {"row_labels": labels(2), "col_labels": labels(5)}, "row_labels: expected [3]"),
    (stats, {"row_labels": labels(3), "col_labels": labels(5).long()}, "col_labels: expected Int"),
    (stats, {"logits": torch.zeros(3 * 5)}, "logits: expected [288], got [15]"),
    (stats, {"y": SAME, "x": SAME[:3], "logits": torch.zeros(64, dtype=torch.float64)}, "logits: expected Float"),
    (grads, {"rows": torch.ones(3, 2)}, "rows: expected [2, 3]"),
    (grads, {"cols": torch.ones(2, 5).double()}, "cols: expected Float"),
    (grads, {"logits": torch.zeros(100)}, "logits: expected [288]"),
    (grads, {"dx": torch.zeros(5, 8)}, "dx: expected [3, 8]"),
    (grads, {"dy": torch.zeros(8, 5).T}, "dy: expected a contiguous tensor"),
    (grads, {"y": SAME, "dy": SAME}, "dy: expected memory of its own"),
    (nested_norms, {"x": randn(8, 3).T}, "x: expected a contiguous tensor"),
    (nested_norms, {"ends": [4, 6]}, "ends: expected the last at D = 8"),
    (nested_sums, {"ends": [8, 4]}, "ends: expected to rise"),
    (nested_sums, {"ends": [0, 8]}, "ends: expected to rise"),
    (nested_sums, {"ends": []}, "ends: expected the last at D = 8"),
    (nested_sums, {"ends": [4, 16]}, "ends: expected the last at D = 8"),
    (nested_sums, {"x_factors": torch.ones(3, 2)}, "x_factors: expected [2, 3]"),
    (nested_sums, {"y_factors": torch.ones(2, 5).double()}, "y_factors: expected Float"),
    (nested_grads, {"row_weights": torch.ones(1, 3)}, "row_weights: expected [2, 3]"),
    (nested_grads, {"col_weights": torch.ones(2, 3)}, "col_weights: expected [2, 5]"),
    (nested_grads, {"exact": torch.ones(3)}, "exact: expected [2, 3]"),
    (nested_grads, {"dx": SAME[:3], "dy": SAME}, "dx: expected memory of its own"),
    (sigmoid, {"x": randn(3, 0), "y": randn(5, 0)}, "sigmoid_loss: x: expected (m, D), D > 0"),
    (sigmoid, {"diag": 3}, "sigmoid_loss: diag: expected at most n - m = 2, got 3"),
    (sigmoid, {"col_labels": labels(5)}, "row_labels, col_labels: expected both or neither"),
    (sigmoid, {"dy": torch.zeros(5, 8).double()}, "sigmoid_loss: dy: expected Float"),
    (sigmoid, {"dx": SAME[:3], "dy": SAME}, "dx: expected memory of its own"),
    (grads, {"dx": SAME[:3], "dy": SAME}, "dx: expected memory of its own"),
    (rows, {"pixels": randn(2, 3, 9, 9)}, "pixels: expected (B, C, T, H, W)"),
    (rows, {"pixels": randn(2, 3, 4, 9, 9).half()}, "pixels: expected uint8, float32 or bfloat16"),
    (rows, {"tube": 3}, "tube: expected a divisor of T = 4, got 3"),
    (rows, {"tube": 0}, "tube: expected a divisor"),
    (rows, {"patch": 0}, "patch: expected at least 1"),
    (rows, {"patch": 1 << 62}, "patch: expected C * tube * patch * patch numbers to fit"),
    (rows, {"dtype": torch.float64}, "dtype: expected float32 or bfloat16"),
    (rows, {"kept": torch.zeros(2, 3)}, "kept: expected Long"),
    (rows, {"kept": torch.zeros(1, 3, dtype=torch.int64)}, "kept: expected [2, 3]"),
    (rows, {"kept": torch.full((2, 3), 9)}, "kept: expected 0..8, got 9"),
    (resize, {"image": LEVELS[0]}, "image: expected (C, N, H, W)"),
    (resize, {"image": LEVELS.float()}, "image: expected Byte"),
    (resize, {"image": LEVELS.mT}, "image: expected pixels or colours that lie beside each other"),
    (resize, {"image": torch.zeros(2, 1, 6, 8, dtype=torch.uint8)}, "first_col: expected 0..4, got 0..5"),
    (resize, {"image": torch.zeros(2, 1, 3, 9, dtype=torch.uint8)}, "first_row: expected 0..-1"),
    (resize, {"first_row": torch.tensor([-1, 1, 2])}, "first_row: expected 0..2, got -1..2"),
    (resize, {"first_row": torch.tensor([0, 2, 1])}, "first_row: expected numbers that do not fall"),
    (resize, {"first_row": torch.zeros(3, dtype=torch.int32)}, "first_row: expected Long"),
    (resize, {"first_col": torch.tensor([0, 1, 2])}, "first_col: expected [2]"),
    (resize, {"rows": torch.ones(3, 0)}, "first_row: expected weights (outputs, taps)"),
    (resize, {"cols": torch.ones(2, 4).double()}, "first_col: expected Float"),
    (resize, {"cols": torch.ones(4, 2).T}, "first_col: expected a contiguous tensor"),
    (resize, {"scale": [1.0]}, "scale, offset: expected 2 numbers each, got 1 and 2"),
    (resize, {"offset": [1.0] * 3}, "scale, offset: expected 2 numbers each, got 2 and 3"),
    (resize, {"out": torch.empty(2, 1, 3, 3)}, "out: expected [2, 1, 3, 2]"),
    (resize, {"out": torch.empty(2, 1, 3, 2).double()}, "out: expected Float"),
    (resize, {"out": torch.empty(2, 1, 2, 3).mT}, "out: expected a contiguous tensor"),
    (resize, {"image": LEVELS, "out": LEVELS.view(-1)[:12].view(2, 1, 3, 2)}, "out: expected memory of its own"),
    (fold, {"weight": randn(4, 9, 3).mT}, "weight: expected a contiguous tensor"),
    (fold, {"weight": randn(4, 3, 9).double()}, "weight: expected float32 or bfloat16"),
    (fold, {"scale": torch.ones(2)}, "scale: expected [3]"),
    (fold, {"offset": torch.ones(3).double()}, "offset: expected Float"),
]


@pytest.mark.parametrize("op, wrong, says", REFUSED, ids=[f"{op.__name__} {says[:40]}" for op, _, says in REFUSED])
def test_what_does_not_fit_is_refused(op, wrong, says):
    with pytest.raises((ValueError, TypeError, IndexError)) as caught:
        op(**wrong)
    assert says in str(caught.value)


@pytest.mark.parametrize("op", [temporal, stats, rows, fold])
def test_other_devices_and_layouts_are_refused(op):
    name = {temporal: "k", stats: "y", rows: "kept", fold: "scale"}[op]
    good = {"k": randn(2, 3, 4, 2, 8), "y": randn(5, 8), "kept": torch.zeros(2, 3).long(), "scale": torch.ones(3)}[name]
    with pytest.raises((RuntimeError, NotImplementedError)):
        op(**{name: good.to_sparse()})


def test_nothing_in_nothing_out():
    empty = randn(2, 0, 4, 2, 8)
    assert torch.ops.lbfast.temporal_attention_native(empty, empty, empty, 1.0).shape == empty.shape
    assert torch.ops.lbfast.attention_native(*[randn(0, 4, 3, 8)] * 3, None, False, 1.0)[0].shape == (0, 4, 3, 8)
    assert rows(pixels=randn(2, 0, 4, 9, 9)).shape == (4, 10, 0)
    assert stats(x=randn(0, 8), diag=-1)[1].shape == (2, 5)
