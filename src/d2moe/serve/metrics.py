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
from d2moe.types import BASE_BITS, MAX_BITS, WIDTHS

if TYPE_CHECKING:
    from d2moe.runtime.worker import Worker

TOKEN_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
FIRST_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
DIALS = (2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)
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
        self._asked = Histogram("d2moe_request_bits", "Average width that an answer is asked for at", buckets=DIALS, registry=registry)
        self._prompt = Counter("d2moe_prompt_tokens", "Tokens of prompts", registry=registry)
        self._reused = Counter("d2moe_prompt_tokens_reused", "Tokens of prompts that need not be computed", registry=registry)
        self._drawn = Counter("d2moe_generated_tokens", "Tokens of answers", registry=registry)
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
            self._asked.observe(job.bits)
            self._prompt.inc(len(job.request.prompt))
            self._reused.inc(job.reused_tokens)
        self._drawn.inc(len(job.request.tokens))


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
        experts = GaugeMetricFamily("d2moe_experts_resident", "Experts in memory at each width", labels=["bits"])
        uses = CounterMetricFamily("d2moe_expert_uses", "Tokens times their experts, by width; 0 is left out", labels=["bits"])
        planes: list[GaugeMetricFamily | CounterMetricFamily] = [
            GaugeMetricFamily("d2moe_plane_resident_bytes", "Bytes in memory of planes, by the width that each makes", labels=["bits"]),
            CounterMetricFamily("d2moe_plane_wanted_bytes", "Bytes of planes that steps asked for", labels=["bits"]),
            CounterMetricFamily("d2moe_plane_missing_bytes", "Of them, not in memory when asked for", labels=["bits"]),
            CounterMetricFamily("d2moe_plane_read_bytes", "Bytes of planes read from storage, those read ahead included", labels=["bits"]),
            GaugeMetricFamily("d2moe_plane_hit_rate", "Share of the wanted bytes of planes that was in memory", labels=["bits"]),
        ]
        resident = np.bincount(ledger.width.reshape(-1), minlength=MAX_BITS + 1)
        for bits in WIDTHS:
            wanted, missing = int(c.planes_wanted[bits]), int(c.planes_missing[bits])
            size = ledger.base_bytes if bits == BASE_BITS else ledger.plane_bytes
            hits = 1 - missing / wanted if wanted else 1
            sums = (resident[bits:].sum() * size, wanted * size, missing * size, c.planes_read[bits] * size, hits)
            experts.add_metric([str(bits)], float(resident[bits]))
            for family, value in zip(planes, sums, strict=True):
                family.add_metric([str(bits)], float(value))
        for bits in (0, *WIDTHS):
            uses.add_metric([str(bits)], float(c.width_uses[bits]))
        yield from (experts, uses, *planes)
