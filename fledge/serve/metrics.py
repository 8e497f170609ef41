"""What the server counts, for Prometheus. Names are vLLM's where it has them, so that its dashboards work."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fledge.serve.usage import Usage

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """One registry a server, so that two of them in one process count apart."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("fledge_http_requests", "Requests answered", "method", "route", "status")
        self._latency = self._histogram("fledge_http_request_seconds", "Whole answers, streams included", "route")
        self._prompt = self._counter("vllm:prompt_tokens", "Tokens of prompts", "model_name")
        self._cached = self._counter("vllm:prefix_cache_hits", "Tokens of prompts found in the cache", "model_name")
        self._queried = self._counter(
            "vllm:prefix_cache_queries", "Tokens of prompts looked up in the cache", "model_name"
        )
        self._generated = self._counter("vllm:generation_tokens", "Tokens generated", "model_name")
        self._finished = self._counter(
            "vllm:request_success", "Answers by how they ended", "model_name", "finished_reason"
        )
        self._first = self._histogram("vllm:time_to_first_token_seconds", "Until the first token", "model_name")
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "Until the last token", "model_name")
        self._blocked = self._counter("fledge_moderation_blocked", "Answers that moderation ended", "side")
        self._running = self._gauge("vllm:num_requests_running", "Answers being written", "model_name")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Answers not begun", "model_name")
        self._usage = self._gauge("vllm:kv_cache_usage_perc", "Share of the cache's blocks in use", "model_name")

    def http(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.labels(method, route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def first_token(self, model: str, seconds: float) -> None:
        self._first.labels(model).observe(seconds)

    def finished(self, model: str, reason: str) -> None:
        self._finished.labels(model, reason).inc()

    def blocked(self, side: str) -> None:
        """Moderation has refused what was asked ("input") or answered ("output")."""
        self._blocked.labels(side).inc()

    def generation(self, model: str, usage: Usage, seconds: float) -> None:
        """A request to an engine is over."""
        self._prompt.labels(model).inc(usage.prompt)
        self._queried.labels(model).inc(usage.prompt)
        self._cached.labels(model).inc(usage.cached)
        self._generated.labels(model).inc(usage.completion)
        self._whole.labels(model).observe(seconds)

    def engine(self, model: str, figures: Mapping[str, int | float | str]) -> None:
        """What the engine says of itself: the fields of `EngineStats`."""
        pairs = ((self._running, "num_running"), (self._waiting, "num_waiting"))
        for gauge, name in pairs:
            gauge.labels(model).set(float(figures.get(name, 0)))
        total = float(figures.get("num_blocks", 0))
        used = total - float(figures.get("num_free_blocks", total))
        self._usage.labels(model).set(used / total if total else 0.0)

    def forget_engines(self) -> None:
        """A model that was put away leaves no figures behind; those that are there are asked again."""
        for gauge in (self._running, self._waiting, self._usage):
            gauge.clear()

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(name, about, labels, registry=self.registry)

    def _gauge(self, name: str, about: str, *labels: str) -> Gauge:
        return Gauge(name, about, labels, registry=self.registry)

    def _histogram(self, name: str, about: str, *labels: str) -> Histogram:
        return Histogram(name, about, labels, registry=self.registry, buckets=_SECONDS)
