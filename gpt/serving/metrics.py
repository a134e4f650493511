"""Metrics of the server in the format of Prometheus."""

from collections.abc import Callable, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # bounds of the buckets


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("chargpt_requests", "Answered requests.", ["path", "status"], registry=registry)
        self._seconds = Histogram(
            "chargpt_request_seconds", "Duration of a request.", ["path"], buckets=SECONDS, registry=registry
        )
        self.first_token = Histogram(
            "chargpt_time_to_first_token_seconds",
            "From a request for a completion to its first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self.tokens = Counter("chargpt_tokens", "Tokens of prompts and of generated text.", ["kind"], registry=registry)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a value that is read when the metrics are."""
        Gauge(f"chargpt_{name}", text, registry=self._registry).set_function(value)

    def count_request(self, scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
        """Count an answered request; by the path of its route, so that paths of clients add no series."""
        path = getattr(scope.get("route"), "path", "other")
        self._requests.labels(path, str(status or "closed")).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """All metrics."""
        return generate_latest(self._registry)
