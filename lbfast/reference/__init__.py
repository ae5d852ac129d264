"""Oracles: slow, clear, small enough to check by eye. For tests and benches; the product never imports them."""
