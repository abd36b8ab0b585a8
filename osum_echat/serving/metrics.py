"""What a server counts, in the form of Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
_TOKENS = (0, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.sessions = Gauge("osum_echat_realtime_sessions", "Sessions that are open", registry=registry)
        self.refused = Counter("osum_echat_refused", "Connections and requests that were refused", ["why"], registry=registry)
        self.responses = Counter("osum_echat_responses", "Responses by how they ended", ["status"], registry=registry)
        self.requests = Counter("osum_echat_requests", "REST requests", ["path", "status"], registry=registry)
        self.errors = Counter("osum_echat_client_errors", "Error events by code", ["code"], registry=registry)
        self.first_audio = Histogram(
            "osum_echat_time_to_first_audio_seconds",
            "From the commit of a turn (or a later response.create) to the first sound of its answer",
            ["thought"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.thought_tokens = Histogram(
            "osum_echat_thought_tokens", "Length of the thought of a response", buckets=_TOKENS, registry=registry
        )
        self.barge_ins = Counter("osum_echat_barge_in", "Answers that somebody interrupted by speaking", registry=registry)
        self.stop_seconds = Histogram(
            "osum_echat_barge_in_stop_seconds",
            "From the confirmation of speech to the end of the answer",
            buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
            registry=registry,
        )
        self.gaps = Counter("osum_echat_audio_gaps", "Silences inside answers: sound came too late", registry=registry)
        self.gap_seconds = Counter("osum_echat_audio_gap_seconds", "Length of these silences", registry=registry)
        self.guards = Counter("osum_echat_guard_actions", "How often a guard of decoding acted", ["guard"], registry=registry)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A number that is read when it is asked for."""
        Gauge(f"osum_echat_{name}", text, registry=self.registry).set_function(read)

    def render(self) -> bytes:
        return generate_latest(self.registry)
