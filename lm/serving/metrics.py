"""What the server counts, for Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lm.generation.engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """All figures of a server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        every: dict[str, Any] = {"registry": self._registry}
        of_model: dict[str, Any] = {"labelnames": ["model"], **every}
        self.requests = Counter("lm_requests", "Answers, by path and status.", ["path", "status"], **every)
        self.cancelled = Counter("lm_cancelled", "Requests whose client went away, or that took too long.", **of_model)
        self.prompt_tokens = Counter("lm_prompt_tokens", "Tokens of prompts.", **of_model)
        self.tokens = Counter("lm_generated_tokens", "Tokens that were made.", **of_model)
        self.running = Gauge("lm_texts_running", "Texts in work.", **of_model)
        self.waiting = Gauge("lm_texts_waiting", "Texts that wait for a slot.", **of_model)
        self.slots = Gauge("lm_cache_slots", "Cache blocks, one a text.", **of_model)
        self.used = Gauge("lm_cache_slots_used", "Cache blocks in use.", **of_model)
        self.bytes = Gauge("lm_cache_bytes", "Memory of all cache blocks.", **of_model)
        self.first = Histogram("lm_time_to_first_token_seconds", "From a request to its first token.",
                               buckets=SECONDS, **of_model)  # fmt: skip
        self.between = Histogram("lm_time_between_tokens_seconds", "Time of a step, a token of each text.",
                                 buckets=SECONDS, **of_model)  # fmt: skip
        self.whole = Histogram("lm_request_seconds", "From a request to the end of its answer.",
                               buckets=SECONDS, **of_model)  # fmt: skip

    def step(self, model: str, tokens: int, seconds: float) -> None:
        """Count a step of an engine."""
        self.tokens.labels(model).inc(tokens)
        self.between.labels(model).observe(seconds)

    def text(self, engines: dict[str, Engine]) -> bytes:
        """Return all figures in Prometheus' format."""
        for model, engine in engines.items():
            running = len(engine.running)
            self.running.labels(model).set(running)
            self.waiting.labels(model).set(len(engine.waiting))
            self.used.labels(model).set(running)
            self.slots.labels(model).set(engine.slots)
            self.bytes.labels(model).set(engine.memory)
        return generate_latest(self._registry)
