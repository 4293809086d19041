"""What `/metrics` shows, in Prometheus' form. The engine counts for itself; requests are counted here."""

from collections.abc import Callable, Iterator
from typing import Any

from sana.serving.engine import EngineStats
from sana.serving.extras import need

GAUGES = {"queued": "Pictures that wait.", "active": "Pictures in work."}
COUNTERS = {
    "steps": "Denoising steps of pictures.",
    "forwards": "Calls of the transformer.",
    "images": "Pictures made.",
    "failed": "Pictures that failed.",
    "cancelled": "Pictures given up.",
    "handed_back": "Pictures handed back at the end.",
    "rejected": "Pictures turned away because the queue was full.",
}
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The registry of one server.

    Args:
        stats: returns the engine's counters.
    """

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._client = need("prometheus_client")
        self._core = need("prometheus_client.core")
        self._stats = stats
        self.registry = self._client.CollectorRegistry()
        self.registry.register(self)
        self._client.ProcessCollector(registry=self.registry)
        self._requests = self._client.Counter(
            "sana_requests", "Answered requests.", ("route", "status"), registry=self.registry
        )
        self._seconds = self._client.Histogram(
            "sana_request_seconds", "From a request's head to the end of its answer.", ("route",), buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Counts a request.

        Args:
            route: the address as the program knows it, never as a client wrote it.
            status: of HTTP; 499 for a client that went away.
            seconds: that it took.
        """
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def collect(self) -> Iterator[Any]:
        """Yields the engine's numbers; called by the registry."""
        stats = self._stats()
        for name, text in GAUGES.items():
            yield self._core.GaugeMetricFamily(f"sana_{name}", text, value=getattr(stats, name))
        for name, text in COUNTERS.items():
            yield self._core.CounterMetricFamily(f"sana_{name}", text, value=getattr(stats, name))

    def page(self) -> tuple[bytes, str]:
        """Returns the page and its content type."""
        return self._client.generate_latest(self.registry), self._client.CONTENT_TYPE_LATEST
