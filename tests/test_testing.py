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
