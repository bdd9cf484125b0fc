"""What the service tells Prometheus. A registry for each service, so that several fit in one process."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

_TENTHS = tuple(k / 10 for k in range(1, 11))
_ROUGHNESS = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics:
    """Counters, gauges and latencies of one service; `text` is what is scraped."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"robustkit_{name}", what, labels, registry=self.registry)

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"robustkit_{name}", what, labels, registry=self.registry)

        def histogram(name: str, what: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"robustkit_{name}", what, buckets=buckets, registry=self.registry)

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
        self.seconds = histogram("seconds", "From the first byte to the answer", _SECONDS)
        # Of single inputs: a distribution that moves is a reason to look, never one to reject (telemetry.py).
        self.confidence = histogram("confidence", "The largest score of an answer", _TENTHS)
        self.roughness = histogram("roughness", "Mean difference of neighbouring pixels", _ROUGHNESS)
        self.squeezing = histogram("squeezing", "How far squeezing moves the scores, of a sample", _TENTHS)
        self.events = gauge("events", "Number of the newest event of the chain")
        self.chain = Info("robustkit_chain", "Digest of the newest event", registry=self.registry)
        self.quarantined = gauge("quarantine_bytes", "Bytes of sealed images in quarantine")

    def text(self) -> bytes:
        """In Prometheus' own format."""
        return generate_latest(self.registry)
