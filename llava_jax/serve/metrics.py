"""What Prometheus is told, under the names that vLLM gives it, so that its dashboards show this server too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from llava_jax.inference.engine_loop import EngineLoop

# Upper bounds in seconds, vLLM's own.
_FRACTIONS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75)
BETWEEN_TOKENS = (*_FRACTIONS, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75)
FIRST_TOKEN = (*_FIRST, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
REQUEST = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
TOKENS = tuple(m * 10**e for e in range(4) for m in (1, 2, 5))
LABEL = "model_name"


class Metrics:
    """Counters and histograms of one served model, in a registry of their own."""

    def __init__(self, model: str, loop: EngineLoop):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(model, loop))

        def counter(name: str, help: str) -> Counter:
            return Counter(f"vllm:{name}", help, (LABEL,), registry=self._registry).labels(model)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"vllm:{name}", help, (LABEL,), registry=self._registry, buckets=buckets)
            return made.labels(model)

        self.prompt_tokens = counter("prompt_tokens", "Positions of prompts, those of images among them.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.first_token = histogram("time_to_first_token_seconds", "Until a request's first token.", FIRST_TOKEN)
        self.between_tokens = histogram("inter_token_latency_seconds", "Between an answer's tokens.", BETWEEN_TOKENS)
        self.latency = histogram("e2e_request_latency_seconds", "Until a request's last token.", REQUEST)
        self.request_prompt = histogram("request_prompt_tokens", "Positions of a request's prompts.", TOKENS)
        self.request_generation = histogram("request_generation_tokens", "Tokens of a request's answers.", TOKENS)
        labels, help = (LABEL, "finished_reason"), "Answers that have ended."
        self._ended = Counter("vllm:request_success", help, labels, registry=self._registry)
        self._model = model

    def ended(self, reason: str, answers: int = 1) -> None:
        """`reason`: stop, length, abort or error."""
        self._ended.labels(self._model, reason).inc(answers)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """What the engine's loop counts itself, looked at when it is asked for."""

    def __init__(self, model: str, loop: EngineLoop):
        self._model, self._loop = model, loop

    def collect(self) -> Iterator[Metric]:
        stats = self._loop.stats()
        used = stats.prefix_slots_used / max(stats.prefix_slots, 1)
        for name, help, value in (
            ("num_requests_running", "Answers that are being generated.", stats.running),
            ("num_requests_waiting", "Requests that wait.", stats.waiting),
            ("kv_cache_usage_perc", "Share of the prefix slots in use, 1 is all.", used),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", help, labels=(LABEL,))
            gauge.add_metric((self._model,), value)
            yield gauge
        for name, help, value in (
            ("prefix_cache_queries", "Positions of prompts that the cache was asked for.", stats.prefix_queries),
            ("prefix_cache_hits", "Positions of prompts that were found in the cache.", stats.prefix_hits),
            ("num_preemptions", "Answers that had to make room and began again.", stats.preemptions),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", help, labels=(LABEL,))
            counter.add_metric((self._model,), value)
            yield counter
