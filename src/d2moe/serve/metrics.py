"""What the server measures, in Prometheus' form. Engine figures are read when somebody asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from d2moe.runtime import memory
from d2moe.runtime.scheduler import Ended, Job
from d2moe.types import BASE_BITS, WIDTHS

if TYPE_CHECKING:
    from d2moe.runtime.worker import Worker

TOKEN_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
FIRST_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
BATCH = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """An observer of the scheduler, and the text for /metrics."""

    def __init__(self, engine: Any):
        self._engine = engine
        self.registry = registry = CollectorRegistry()
        self._first = Histogram("d2moe_time_to_first_token_seconds", "From arrival to the first token", buckets=FIRST_S, registry=registry)
        self._gap = Histogram("d2moe_time_per_token_seconds", "Between two tokens of an answer", buckets=TOKEN_S, registry=registry)
        self._queued = Histogram("d2moe_queue_seconds", "From arrival to the first step", buckets=FIRST_S, registry=registry)
        self._step = Histogram("d2moe_step_seconds", "Of one step of the engine", buckets=TOKEN_S, registry=registry)
        self._batch = Histogram("d2moe_step_sequences", "Sequences in one step", buckets=BATCH, registry=registry)
        self._tokens = Histogram("d2moe_step_tokens", "Tokens in one step", buckets=(1, 4, 16, 64, 256, 1024), registry=registry)
        self._ended = Counter("d2moe_requests", "Answers by how they ended", ["outcome"], registry=registry)
        self._prompt = Counter("d2moe_prompt_tokens", "Tokens of prompts", ["bits"], registry=registry)
        self._reused = Counter("d2moe_prompt_tokens_reused", "Tokens of prompts that need not be computed", registry=registry)
        self._drawn = Counter("d2moe_generated_tokens", "Tokens of answers", ["bits"], registry=registry)
        self._http = Counter("d2moe_http_responses", "Responses by status", ["status"], registry=registry)

    def watch(self, worker: Worker) -> None:
        self.registry.register(_Engine(self._engine, worker))

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def responded(self, status: int) -> None:
        self._http.labels(str(status)).inc()

    def stepped(self, jobs: int, tokens: int, seconds: float) -> None:
        self._step.observe(seconds)
        self._batch.observe(jobs)
        self._tokens.observe(tokens)

    def token(self, job: Job, gap_s: float) -> None:
        (self._gap if job.last else self._first).observe(gap_s)

    def ended(self, job: Job, outcome: Ended) -> None:
        name = "error" if outcome.error else "cancelled" if outcome.cancelled else job.request.finish_reason or "scored"
        self._ended.labels(name).inc()
        if job.admitted:
            self._queued.observe(job.admitted - job.submitted)
            self._prompt.labels(str(round(job.bits))).inc(len(job.request.prompt))
            self._reused.inc(job.reused_tokens)
        self._drawn.labels(str(round(job.bits))).inc(len(job.request.tokens))


class _Engine(Collector):
    def __init__(self, engine: Any, worker: Worker):
        self._engine, self._worker = engine, worker

    def collect(self) -> Iterator[Metric]:
        engine, worker, c = self._engine, self._worker, self._engine.counters.snapshot()
        ledger = engine.ledger
        running = worker.running
        for name, text, value in (
            ("running_requests", "Answers in the running batch", running),
            ("waiting_requests", "Answers that wait for their turn", max(0, worker.live - running)),
            ("resident_bytes", "What the process holds in memory", memory.resident_bytes()),
            ("memory_budget_bytes", "What it may hold", engine.budget.memory),
            ("expert_resident_bytes", "Planes of experts in memory", ledger.used_bytes),
            ("expert_budget_bytes", "What they may take", engine.budget.experts),
            ("kv_blocks", "Blocks of the key/value cache", engine.pages.blocks),
            ("kv_blocks_free", "Blocks that no running answer holds", engine.pages.available),
            ("expert_hit_rate", "Share of the wanted plane bytes that was in memory", c.hit_rate),
        ):
            yield GaugeMetricFamily(f"d2moe_{name}", text, value)
        for name, text, total in (
            ("steps", "Steps of the engine", c.steps),
            ("tokens", "Tokens computed, prompts included", c.tokens),
            ("expert_read_bytes", "Bytes of experts read from storage", c.read_bytes),
            ("expert_reads", "Reads of experts", c.reads),
            ("expert_wanted_bytes", "Plane bytes that steps asked for", c.wanted_bytes),
            ("expert_missing_bytes", "Of them, not in memory when asked for", c.missing_bytes),
            ("stall_seconds", "Waiting for reads with nothing to compute", c.stall_seconds),
            ("decide_seconds", "Deciding what to read", c.decide_seconds),
            ("engine_seconds", "In steps altogether", c.step_seconds),
        ):
            yield CounterMetricFamily(f"d2moe_{name}", text, total)
        planes = GaugeMetricFamily("d2moe_plane_resident_bytes", "Bytes in memory of planes, by the width each makes", labels=["bits"])
        experts = GaugeMetricFamily("d2moe_experts_resident", "Experts in memory at each width", labels=["bits"])
        counts = np.bincount(ledger.width.reshape(-1), minlength=max(WIDTHS) + 1)
        for bits in WIDTHS:
            plane = ledger.base_bytes if bits == BASE_BITS else ledger.plane_bytes
            planes.add_metric([str(bits)], float(counts[bits:].sum() * plane))
            experts.add_metric([str(bits)], float(counts[bits]))
        yield planes
        yield experts
