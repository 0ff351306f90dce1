"""Metrics of a server for Prometheus.

Metrics that vLLM has too use its names, so that its dashboards work. Our own begin with
``sirius:``.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from sirius_runtime.serve.answers import Answer, News

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_TOKENS = tuple(2**i for i in range(16))


class Watched(Protocol):
    """The values that gauges read when Prometheus scrapes them."""

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    @property
    def kv_usage(self) -> float: ...


class Metrics:
    """The metrics of one server."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._label = model_name
        gauge, counter, seconds = self._gauge, self._counter, self._histogram
        self._running = gauge("vllm:num_requests_running", "Answers that have a row.")
        self._waiting = gauge("vllm:num_requests_waiting", "Answers in the queue.")
        self._kv = gauge("vllm:kv_cache_usage_perc", "Share of the K/V slots in use; 1 is all.")
        self._prompt_tokens = counter(
            "vllm:prompt_tokens", "Prompt tokens, prefilled or from the prefix cache."
        )
        self._tokens = counter("vllm:generation_tokens", "Tokens of answers.")
        self._queries = counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self._hits = counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._drafts = counter("vllm:spec_decode_num_drafts", "Periods with a draft, by row.")
        self._drafted = counter("vllm:spec_decode_num_draft_tokens", "Drafted tokens.")
        self._accepted = counter("vllm:spec_decode_num_accepted_tokens", "Accepted draft tokens.")
        self._ends = Counter(
            "vllm:request_success",
            "Answers that ended, by reason.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._first = seconds("vllm:time_to_first_token_seconds", "From request to first token.")
        self._between = seconds("vllm:inter_token_latency_seconds", "Per token after the first.")
        self._whole = seconds("vllm:e2e_request_latency_seconds", "From request to end.")
        self._queue = seconds("vllm:request_queue_time_seconds", "Time in the queue.")
        self._length = self._histogram(
            "vllm:request_generation_tokens", "Tokens of an answer.", _TOKENS
        )
        self._rate = gauge(
            "sirius:acceptance_rate", "Share of drafted tokens accepted since the start."
        )
        self._mean = gauge(
            "sirius:mean_acceptance_length", "Tokens that a row commits per period with a draft."
        )
        self._ratio = gauge(
            "sirius:prefix_cache_hit_ratio", "Share of prompt tokens found in the prefix cache."
        )
        self._failed = counter("sirius:request_failures", "Answers that ended with an error.")
        self._left = counter("sirius:request_cancellations", "Answers whose client disconnected.")
        self._refused = counter(
            "sirius:request_refusals", "Requests refused because the queue was full."
        )
        self._batch = self._histogram("sirius:batch_rows", "Rows of a period.", _TOKENS[:9])
        self._rate.set_function(lambda: _share(self._accepted, self._drafted))
        self._mean.set_function(lambda: 1 + _share(self._accepted, self._drafts))
        self._ratio.set_function(lambda: _share(self._hits, self._queries))

    def watch(self, engine: Watched) -> None:
        """Makes the gauges read this engine."""
        self._running.set_function(lambda: engine.running)
        self._waiting.set_function(lambda: engine.waiting)
        self._kv.set_function(lambda: engine.kv_usage)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def prompt(self, answer: Answer) -> None:
        """Records a prefilled prompt."""
        self._prompt_tokens.inc(len(answer.prompt))
        self._queries.inc(len(answer.prompt))
        self._hits.inc(answer.cached)

    def period(self, rows: int) -> None:
        """Records a period of a batch of so many rows."""
        self._batch.observe(rows)

    def draft(self, drafted: int, accepted: int) -> None:
        """Records how many of a row's drafted tokens were accepted."""
        if drafted:
            self._drafts.inc()
            self._drafted.inc(drafted)
            self._accepted.inc(accepted)

    def tokens(self, answer: Answer, count: int) -> None:
        """Records new tokens of an answer."""
        self._tokens.inc(count)
        if len(answer.row.tokens) == count:
            self._first.observe(time.monotonic() - answer.begun)

    def refused(self) -> None:
        """Records a request that was refused because the queue was full."""
        self._refused.inc()

    def end(self, answer: Answer, news: News | None) -> None:
        """Records how an answer ended; `news` is None if it was cancelled."""
        now = time.monotonic()
        if news is None:
            self._left.inc()
        elif news.reason is None:
            self._failed.inc()
        else:
            reason = "length" if news.reason == "length" else "stop"
            self._ends.labels(self._label, reason).inc()
            self._whole.observe(now - answer.begun)
            self._length.observe(len(answer.row.tokens))
            if answer.admitted is not None:
                self._queue.observe(answer.admitted - answer.begun)
            if answer.first is not None and len(answer.row.tokens) > 1:
                self._between.observe((now - answer.first) / (len(answer.row.tokens) - 1))

    def _gauge(self, name: str, text: str) -> Gauge:
        made = Gauge(name, text, ("model_name",), registry=self._registry)
        return made.labels(self._label)

    def _counter(self, name: str, text: str) -> Counter:
        made = Counter(name, text, ("model_name",), registry=self._registry)
        return made.labels(self._label)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        made = Histogram(name, text, ("model_name",), buckets=buckets, registry=self._registry)
        return made.labels(self._label)


def _share(part: Counter, whole: Counter) -> float:
    """The ratio of two counters' values; 0 while `whole` is 0."""
    total = _value(whole)
    return _value(part) / total if total else 0.0


def _value(counter: Counter) -> float:
    (metric,) = counter.collect()
    return next(sample.value for sample in metric.samples if sample.name.endswith("_total"))
