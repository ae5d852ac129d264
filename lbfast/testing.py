"""What tests of ops share: error budgets derived from float64, input makers, NaN-poisoned allocations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

ROUNDING = {torch.float64: 1e-12, torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""One unit of relative rounding of each dtype."""


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """||actual - exact|| / ||exact|| in float64; infinite where anything is NaN or shapes differ."""
    if actual.shape != exact.shape:
        return float("inf")
    exact, actual = exact.detach().double().cpu(), actual.detach().double().cpu()
    if exact.numel() == 0:
        return 0.0
    error = (actual - exact).norm() / exact.norm().clamp_min(1e-300)
    return float(error) if torch.isfinite(error) else float("inf")


def order_of_sums(terms: float) -> float:
    """The relative error that adding `terms` numbers in float32 one after the other makes: sqrt(terms / 6) 2^-24.

    The k-th partial sum of terms of variance s^2 is about sqrt(k) s, and rounding it errs evenly within 2^-24 of it: by
    2^-24 sqrt(k / 3) s. Over all k that adds up, in squares, to 2^-24 terms s / sqrt(6); the sum is sqrt(terms) s.
    (Terms of one sign: sqrt(terms) / 3, less.) Squares of a chain's sums add: `terms` is then that of all of them.
    Libraries add in blocks, whose error is much smaller, so that plain torch's says nothing of other orders.
    """
    return (terms / 6) ** 0.5 * 2**-24


def _terms(tensors: Sequence[torch.Tensor]) -> int:
    """Of the sums in an op and its gradients: along the last axis of each input, and along all others together."""
    shapes = [tensor.shape for tensor in tensors if tensor.is_floating_point() and tensor.dim()]
    return sum(max(shape[-1], shape[:-1].numel()) for shape in shapes)


def assert_within_budget(
    actual: torch.Tensor,
    exact: torch.Tensor,
    plain: torch.Tensor,
    what: str = "",
    factor: float = 2.0,
    order: float = 0.0,
) -> None:
    """Fails unless the error of `actual` is within `factor` times that of plain torch in that dtype, plus rounding.

    Args:
        actual: result under test, any dtype.
        exact: the same in float64.
        plain: the same computed by plain torch in the dtype under test.
        what: named in the failure.
        order: what another order of sums may add (`order_of_sums`).
    """
    assert actual.dtype == plain.dtype, f"{what}: expected {plain.dtype}, got {actual.dtype}"
    error = relative_error(actual, exact)
    allowed = factor * relative_error(plain, exact) + ROUNDING[plain.dtype] + order
    assert error <= allowed, f"{what}: error {error:.3e} against float64, allowed {allowed:.3e}"


def assert_rounded_to_float8(values: torch.Tensor, scales: torch.Tensor, exact: torch.Tensor) -> None:
    """Fails unless values e4m3 (..., K) times scales (..., 1) are `exact`, rounded, the largest of a row being 448.

    Within 0.51 of a unit in the last place.
    """
    assert values.dtype == torch.float8_e4m3fn and values.shape == exact.shape, (values.dtype, values.shape)
    assert scales.dtype == torch.float32 and scales.shape == (*exact.shape[:-1], 1), (scales.dtype, scales.shape)
    largest = exact.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(scales.double(), largest / 448, rtol=1e-2, atol=1e-12)
    wanted = exact / scales.double()
    unit = 2 ** (wanted.abs().clamp(min=2**-6).log2().floor() - 3)
    wrong = (values.double() - wanted).abs() - 0.51 * unit
    assert not wrong.numel() or wrong.max() <= 0, float(wrong.max())


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """torch.empty and its kin hand out NaN (integers: the largest) inside the block: unwritten memory shows."""
    flags: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        flags.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    flags.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        flags.fill_uninitialized_memory = before[2]


def randn(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, scale: float = 1.0
) -> torch.Tensor:
    """Standard normal times `scale`, drawn in float64 on the CPU: every dtype and device sees the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device=device, dtype=dtype)


def assert_matches(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    tensors: Sequence[torch.Tensor],
    wanted: Sequence[bool] = (),
    plain: Callable[..., Any] | None = None,
    others: Sequence[Sequence[torch.Tensor]] = (),
) -> None:
    """Fails unless op(*tensors) and its gradients are within the budget that plain torch's errors give.

    The order of products and sums changes with the library, the launch table and the machine's instructions: the budget
    has room for another order of float32 sums as long as the inputs' axes.

    Args:
        op: what is tested; gives a tensor or a tuple of tensors.
        reference: the same function, slow and clear, run in float64.
        tensors: inputs; those that are not floating point get no gradient.
        wanted: whose gradients to take; default all of them.
        plain: the same function in plain torch, run in the inputs' dtype; default the reference.
        others: more draws of `tensors`, whose errors are taken together with theirs. A single number, such as a scale's
            gradient, may be what little is left of terms that happen to cancel: each order of its sum then errs by
            another large share of it. Over draws it is as large as such sums are, which `order_of_sums` is about.
    """
    exact_sums = any(t.dtype == torch.float64 for t in tensors)  # whose order is below their rounding
    order = 0.0 if exact_sums else order_of_sums(_terms(tensors))
    mask = [t.is_floating_point() and (not wanted or wanted[i]) for i, t in enumerate(tensors)]

    def drawn(
        function: Callable[..., Any], tensors: Sequence[torch.Tensor], dtype: torch.dtype | None
    ) -> tuple[list[Any], list[torch.Tensor]]:
        given = [t.detach().to(dtype) if dtype and t.is_floating_point() else t.detach() for t in tensors]
        given = [t.requires_grad_(need) for t, need in zip(given, mask)]
        outs = function(*given)
        outs = [outs] if isinstance(outs, torch.Tensor) else list(outs)
        if not any(mask):
            return outs, []
        live, along = zip(*((o, randn(*o.shape, seed=7 + i).to(o)) for i, o in enumerate(outs) if o.requires_grad))
        return outs, list(torch.autograd.grad(live, [t for t, need in zip(given, mask) if need], along))

    def run(function: Callable[..., Any], dtype: torch.dtype | None = None) -> tuple[list[Any], list[torch.Tensor]]:
        """Outputs and gradients, each of all draws."""
        outs, grads = zip(*(drawn(function, each, dtype) for each in (tensors, *others)))
        return [torch.stack(each) for each in zip(*outs)], [torch.stack(each) for each in zip(*grads)]

    (actual, grads), (exact, exact_grads), (near, near_grads) = (
        run(op),
        run(reference, torch.float64),
        run(plain or reference),
    )
    for i, results in enumerate(zip(actual, exact, near)):
        assert_within_budget(*results, f"output {i}", order=order)
    for i, results in zip([i for i, need in enumerate(mask) if need], zip(grads, exact_grads, near_grads)):
        assert_within_budget(*results, f"gradient of input {i}", order=order)
