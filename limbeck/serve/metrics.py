"""What Prometheus asks for: who was answered, how fast, and who waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from ..engine.request import Answer

if TYPE_CHECKING:
    from .service import Served, Usage

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counted where answers end; numbers of this moment are read when somebody asks."""

    def __init__(self, served: Callable[[], list[Served]]):
        self.served, self.registry = served, CollectorRegistry()
        self.requests = Counter(
            "limbeck_requests", "Answers by how they ended", ["model", "end"], registry=self.registry
        )
        self.tokens = Counter(
            "limbeck_tokens",
            "Tokens read, read again for nothing, said, thought",
            ["model", "kind"],
            registry=self.registry,
        )
        self.first = Histogram(
            "limbeck_first_token_seconds",
            "Until the first token",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.whole = Histogram(
            "limbeck_answer_seconds",
            "Until the last token",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Rows that speak and requests in line, of each model."""
        kinds = {
            "limbeck_rows_busy": ("Rows that speak or are about to", lambda one: one.busy),
            "limbeck_rows": ("Rows there are", lambda one: one.rows),
            "limbeck_requests_waiting": ("Requests in line", lambda one: one.waiting),
            "limbeck_steps_seconds": (
                "Seconds spent in steps of decoding",
                lambda one: one.scheduler.seconds,
            ),
            "limbeck_steps": ("Steps of decoding", lambda one: one.scheduler.steps),
            "limbeck_failures": ("Batches that failed", lambda one: one.scheduler.failures),
        }
        for name, (text, number) in kinds.items():
            family = GaugeMetricFamily(name, text, labels=["model"])
            for one in self.served():
                family.add_metric([one.name], number(one))
            yield family

    def ended(self, served: Served, answer: Answer, usage: Usage, end: str) -> None:
        """Count one answer; `end` is "stop", "length", "left" or "failed"."""
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
        if answer.first:
            self.first.labels(name).observe(usage.seconds_to_first)
            self.whole.labels(name).observe(usage.seconds)

    def refused(self, model: str) -> None:
        self.requests.labels(model, "refused").inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
