"""Metrics of a server for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from regard.serving.service import Service

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Metrics of one server.

    Attributes:
        answers: number of HTTP answers, by path and status.
        first_token: histogram of the seconds from a request to its first token.
        between_tokens: histogram of the seconds from each token to the next.
    """

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self.answers = Counter("regard_http_answers", "Answers of HTTP.", ["path", "status"], registry=self._registry)
        self.first_token = Histogram(
            "regard_first_token_seconds",
            "From a request to its first token.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self.between_tokens = Histogram(
            "regard_between_tokens_seconds",
            "From a token of an answer to the next.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self._registry.register(_EngineCounts(service))

    def text(self) -> tuple[bytes, str]:
        """Return all metrics in Prometheus' format, and its media type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4


class _EngineCounts(Collector):
    """The scheduler's own counts, read at each scrape."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        engine = self._service.engine
        counts = {
            "prompt_tokens": ("Tokens of prompts that were read.", engine.prompt_tokens),
            "shared_tokens": ("Tokens of prompts that earlier ones had in common.", engine.shared_tokens),
            "new_tokens": ("Tokens that were written.", engine.new_tokens),
            "preemptions": ("Sequences that gave back their pages to be read again.", engine.preempted),
        }
        for name, (words, value) in counts.items():
            yield CounterMetricFamily(f"regard_{name}", words, value=value)
        gauges = {
            "running": ("Requests in the batch.", len(engine.active)),
            "waiting": ("Requests that wait for a place.", self._service.waiting),
        }
        gauges["state_bytes"] = "Bytes of states that are not in pages.", engine.reader.held_bytes
        if engine.pages is not None:
            gauges["pages"] = "Pages of the cache.", engine.pages.count
            gauges["pages_used"] = "Pages with an owner.", engine.pages.count - engine.pages.free
            gauges["page_bytes"] = "Bytes of a page, in all layers.", engine.reader.page_bytes
        if engine.prefixes is not None:
            gauges["prefix_blocks"] = "Blocks of beginnings that are kept, a page each.", engine.prefixes.count
        for name, (words, value) in gauges.items():
            yield GaugeMetricFamily(f"regard_{name}", words, value=value)
