"""Prometheus metrics of the server: requests, tokens, latencies and the load of each model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from ..engine.request import Answer
from .types import ServedModel, Usage

LATENCY_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds


class Metrics:
    """Counters and latencies that grow when a request ends, and gauges that are read at each scrape."""

    def __init__(self, models: Sequence[ServedModel]):
        self.models = list(models)
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "limbeck_requests", "Answers by how they ended", ["model", "end"], registry=self.registry
        )
        self.tokens = Counter(
            "limbeck_tokens",
            "Tokens read, read again for nothing, said, thought",
            ["model", "kind"],
            registry=self.registry,
        )
        self.first = self._latency("limbeck_first_token_seconds", "Until the first token")
        self.whole = self._latency("limbeck_answer_seconds", "Until the last token")
        self.registry.register(self)

    def _latency(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ["model"], buckets=LATENCY_BUCKETS, registry=self.registry)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauges of every model. Prometheus's registry calls this method at each scrape."""
        names = [model.name for model in self.models]
        schedulers = [model.scheduler for model in self.models]
        gauges = [
            ("limbeck_rows_busy", "Rows that speak or are about to", [model.busy for model in self.models]),
            ("limbeck_rows", "Rows there are", [model.rows for model in self.models]),
            ("limbeck_requests_waiting", "Requests in line", [model.waiting for model in self.models]),
            ("limbeck_steps_seconds", "Seconds spent in steps of decoding", [s.seconds for s in schedulers]),
            ("limbeck_steps", "Steps of decoding", [s.steps for s in schedulers]),
            ("limbeck_failures", "Batches that failed", [s.failures for s in schedulers]),
        ]
        for name, text, values in gauges:
            family = GaugeMetricFamily(name, text, labels=["model"])
            for model, value in zip(names, values, strict=True):
                family.add_metric([model], value)
            yield family

    def ended(self, served: ServedModel, output: Answer, usage: Usage, end: str) -> None:
        """Count a request that has ended, with its tokens and latencies.

        `end` is "stop", "length" (cut at the token limit), "left" (the client disconnected) or "failed".
        """
        name = served.name
        self.requests.labels(name, end).inc()
        counts = {
            "prompt": usage.prompt_tokens,
            "cached": usage.cached_tokens,
            "completion": usage.completion_tokens,
            "reasoning": usage.reasoning_tokens,
        }
        for kind, count in counts.items():
            self.tokens.labels(name, kind).inc(count)
        if output.first:
            self.first.labels(name).observe(usage.seconds_to_first)
            self.whole.labels(name).observe(usage.seconds)

    def refused(self, model: str) -> None:
        """Count a request to `model` that was refused because its queue was full."""
        self.requests.labels(model, "refused").inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)
