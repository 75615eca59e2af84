"""What is counted, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from bpt_dist.backbones.prefixes import Prefixes

SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TOKENS = (64, 256, 1024, 2048, 4096, 8192, 16_384, 32_768)


class Metrics:
    """The counters of one server. Labels are of closed sets: what clients send makes no new ones."""

    def __init__(self, waiting: Callable[[], float], tasks: Callable[[], float], prefixes: Prefixes | None = None) -> None:
        self._registry = own = CollectorRegistry()
        ProcessCollector(registry=own)
        self.requests = Counter("bpt_requests", "Requests by route and status.", ["route", "status"], registry=own)
        self.seconds = Histogram("bpt_request_seconds", "From head to answer.", ["route"], buckets=SECONDS, registry=own)
        self.rows = Counter("bpt_rows", "Rows that were asked.", registry=own)
        self.row_errors = Counter("bpt_row_errors", "Rows answered by an error, by its kind.", ["kind"], registry=own)
        self.abandoned = Counter("bpt_abandoned_requests", "Requests whose client was gone before the answer.", registry=own)
        self._batch_rows = Histogram("bpt_batch_rows", "Rows of a pass.", buckets=ROWS, registry=own)
        self._batch_tokens = Histogram("bpt_batch_tokens", "Tokens of a pass, prompts included.", buckets=TOKENS, registry=own)
        self._pass_seconds = Histogram("bpt_pass_seconds", "Time of a pass.", buckets=SECONDS, registry=own)
        Gauge("bpt_waiting_rows", "Rows that have no answer yet.", registry=own).set_function(waiting)
        Gauge("bpt_tasks", "Prompts that are served.", registry=own).set_function(tasks)
        self._prefixes, self._counted = prefixes, {"kept": 0, "read": 0}
        if prefixes is not None:
            self._prompts = Counter("bpt_prompts", "Prompts of passes: kept, or read.", ["prefix"], registry=own)
            Gauge("bpt_prefix_bytes", "Memory of the prompts that are kept.", registry=own).set_function(lambda: prefixes.bytes)

    def passed(self, rows: int, tokens: int, seconds: float) -> None:
        """Take note of a pass."""
        self._batch_rows.observe(rows)
        self._batch_tokens.observe(tokens)
        self._pass_seconds.observe(seconds)
        if self._prefixes is not None:
            now = {"kept": self._prefixes.found, "read": self._prefixes.missed}
            for label, number in now.items():
                self._prompts.labels(label).inc(number - self._counted[label])
            self._counted = now

    def text(self) -> bytes:
        """Return everything in the text format."""
        return generate_latest(self._registry)
