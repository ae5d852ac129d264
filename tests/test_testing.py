"""Error budgets: what another order of sums costs, and that a budget has room for that and no more."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lbfast import testing


@pytest.mark.parametrize("terms", [256, 4096])
def test_serial_sums_err_as_derived(terms):
    rows = np.random.default_rng(0).standard_normal((400, terms)).astype(np.float32)
    serial, exact = rows.cumsum(1)[:, -1], rows.astype(np.float64).sum(1)  # cumsum adds one after the other
    error = np.linalg.norm(serial - exact) / np.linalg.norm(exact)
    assert error == pytest.approx(testing.order_of_sums(terms), rel=0.3)
    blocked = np.linalg.norm(rows.sum(1, dtype=np.float32) - exact) / np.linalg.norm(exact)
    assert 2 * blocked + testing.ROUNDING[torch.float32] < 2 * error  # plain's error says nothing of a serial sum's


def test_sums_of_equal_terms_err_as_derived():
    """Each step of a binade alike: as `tests/fuzz/cases.py` allows where tensors repeat themselves."""
    terms = np.random.default_rng(0).uniform(1, 2, 2000).astype(np.float32)
    for count in (130, 1000):
        serial = np.broadcast_to(terms[:, None], (2000, count)).cumsum(1, dtype=np.float32)[:, -1]
        error = np.abs(serial / (count * terms.astype(np.float64)) - 1).max()
        assert error == pytest.approx(count / 4 * 2**-24, rel=0.1)
        assert error > 2 * testing.order_of_sums(count)


def test_terms_are_the_longest_sums():
    inputs = [
        torch.zeros(5, 6, 7),
        torch.zeros(9, 40),
        torch.zeros(3),
        torch.zeros(()),
        torch.zeros(50, dtype=torch.long),
    ]
    assert testing._terms(inputs) == 30 + 40 + 3


def test_the_budget_has_room_for_an_order_and_no_more():
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    plain = exact.float()
    order = testing.order_of_sums(1536)
    off = (exact * (1 + 0.9 * order)).float()
    testing.assert_within_budget(off, exact, plain, order=order)
    with pytest.raises(AssertionError, match="allowed"):
        testing.assert_within_budget(off, exact, plain)
    with pytest.raises(AssertionError, match="allowed"):
        testing.assert_within_budget((exact * (1 + 3 * order)).float(), exact, plain, order=order)


def test_what_cancels_by_luck_is_judged_among_draws():
    """A sum of a thousandth of its terms' size errs, in another order, by a thousand times as large a share of it."""
    draws = [[testing.randn(1, 512, seed=seed)] for seed in range(12)]
    draws[0][0][0, 0] -= draws[0][0].sum() - 0.02

    def serial(x, more=0.0):
        return torch.from_numpy(x.numpy().cumsum(1)[:, -1]) * (1 + more)

    def rounded(x):
        return x.double().sum(1).float()  # a library's order is the machine's

    def check(op, tensors, others=()):
        testing.assert_matches(op, lambda x: x.sum(1), tensors, [False], rounded, others)

    check(serial, *draws[1:2])
    with pytest.raises(AssertionError, match="output 0: error"):
        check(serial, draws[0])
    check(serial, draws[0], draws[1:])
    with pytest.raises(AssertionError, match="output 0: error"):
        check(lambda x: serial(x, 2e-6), draws[0], draws[1:])
