"""What the service tells Prometheus. A registry for each service, so that several fit in one process."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics:
    """Counters, gauges and latencies of one service; `text` is what is scraped."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"robustkit_{name}", what, labels, registry=self.registry)

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"robustkit_{name}", what, labels, registry=self.registry)

        self.requests = counter("requests", "Answers of POST /v1/classify", "status")
        self.answers = counter("answers", "Images classified", "alias", "model")
        self.duplicates = counter("duplicates", "Images answered from the cache")
        self.flags = counter("flags", "Queries that a detector flagged", "detector")
        self.rejected = counter("rejected", "Queries refused because a detector flagged them")
        self.bans = counter("bans", "Accounts banned because of their flags")
        self.lost = counter(
            "side_effects_lost", "Records that could not be kept; the answer went out", "kind"
        )
        self.rollbacks = counter("rollbacks", "Canaries taken back by themselves", "reason")
        self.inside = gauge("inside", "Calls that run or wait for a thread")
        self.draining = gauge("draining", "1 while the service takes leave")
        self.seconds = Histogram(
            "robustkit_seconds",
            "From the first byte to the answer",
            buckets=_SECONDS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """In Prometheus' own format."""
        return generate_latest(self.registry)
