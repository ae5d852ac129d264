"""What /metrics tells, of one server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """Counts of a server. `taken`: how many items it has on hand now."""

    def __init__(self, taken: Callable[[], int]):
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "lbfast_requests", "Requests to embed, by status; 499: the client left", ["status"], registry=self._registry
        )
        self.seconds = Histogram(
            "lbfast_request_seconds", "From headers to answer", buckets=_SECONDS, registry=self._registry
        )
        self.items = Counter("lbfast_items", "Items that went through a model", ["modality"], registry=self._registry)
        self._sizes = Histogram(
            "lbfast_batch_items",
            "Items of a batch",
            ["modality"],
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self._registry,
        )
        self._batch_seconds = Histogram(
            "lbfast_batch_seconds", "A batch in the model", ["modality"], buckets=_SECONDS, registry=self._registry
        )
        Gauge("lbfast_waiting_items", "Items taken and not answered yet", registry=self._registry).set_function(taken)

    def batch(self, kind: str, count: int, seconds: float) -> None:
        self.items.labels(kind).inc(count)
        self._sizes.labels(kind).observe(count)
        self._batch_seconds.labels(kind).observe(seconds)

    def shown(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)
