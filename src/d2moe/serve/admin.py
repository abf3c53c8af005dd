"""Live control: what is in memory, the budget, the policy, and the default width. Behind the API key, or for this machine alone."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel, Field

from d2moe.policy import POLICIES
from d2moe.policy.policy import policy_class
from d2moe.runtime import memory
from d2moe.runtime.config import parse_bytes
from d2moe.serve import schema
from d2moe.serve.service import Service
from d2moe.types import QUALITIES


class State(BaseModel):
    """Figures are totals since the start, bytes and seconds; `planes` and `heat` have a string per layer, a digit per expert."""

    model: str
    default_bits: float
    policy: str
    policies: list[str] = Field(description="Those it can be changed to.")
    quality: dict[str, float]
    context: int
    running: int
    waiting: int
    memory_bytes: int = Field(description="The budget of the whole process.")
    least_memory_bytes: int = Field(description="The least it can be set to.")
    resident_bytes: int
    expert_bytes: int
    expert_budget_bytes: int
    kv_blocks: int
    kv_blocks_free: int
    tokens: int
    reads: int
    read_bytes: int
    hit_rate: float
    stall_seconds: float
    step_seconds: float
    layers: list[int] = Field(description="The model's layers that have experts.")
    planes: list[str] = Field(description="Resident width in bits, 0 for nothing.")
    heat: list[str] = Field(description="How much an expert was wanted lately, 0 to 9.")


def add_admin(app: FastAPI, service: Service, errors: dict[int | str, dict[str, Any]]) -> None:
    refusals: dict[int | str, dict[str, Any]] = {status: errors[status] for status in (400, 401, 413, 503)}
    refusals[403] = {"model": schema.ErrorAnswer, "description": "Without an API key only the server's own machine may."}

    async def state() -> dict[str, Any]:
        return await asyncio.wrap_future(service.worker.call(lambda: snapshot(service)))

    @app.get("/admin/state", response_model=State, responses=refusals)
    async def look() -> dict[str, Any]:
        return await state()

    @app.post("/admin/memory", response_model=State, responses=refusals)
    async def set_memory(body: schema.MemoryRequest) -> dict[str, Any]:
        """Change the memory budget between two steps; what experts hold beyond it is given back at once."""
        n_bytes = parse_bytes(body.memory)
        await asyncio.wrap_future(service.worker.call(lambda: service.engine.set_memory(n_bytes)))
        return await state()

    @app.post("/admin/policy", response_model=State, responses=refusals)
    async def set_policy(body: schema.PolicyRequest) -> dict[str, Any]:
        """Change which planes are read, kept and computed, between two steps; what is in memory stays."""
        await asyncio.wrap_future(service.worker.call(lambda: service.engine.set_policy(body.policy)))
        return await state()

    @app.post("/admin/defaults", response_model=State, responses=refusals)
    async def set_defaults(body: schema.DefaultsRequest) -> dict[str, Any]:
        """Change the width of requests that name none; those under way keep theirs."""
        service.model.engine.dial(body.bits, service.model.engine.config.uniform)
        service.default_bits = body.bits
        return await state()


def snapshot(service: Service) -> dict[str, Any]:
    """A State; for the engine's thread."""
    engine, worker = service.engine, service.worker
    ledger, pages, c = engine.ledger, engine.pages, engine.counters
    running = worker.running
    # A demand of each of the last steps gives 9, one every thirty-second step of the half-life still shows.
    heat = np.clip(np.ceil(9 + 1.5 * np.log2(np.maximum(engine.heat(), 2.0**-9))), 0, 9).astype(np.int32)
    return {
        "model": service.name,
        "default_bits": service.default_bits,
        "policy": engine.policy.name,
        "policies": [name for name in POLICIES if not policy_class(name).needs_future],
        "quality": QUALITIES,
        "context": engine.context,
        "running": running,
        "waiting": max(0, worker.live - running),
        "memory_bytes": engine.budget.memory,
        "least_memory_bytes": engine.least_bytes,
        "resident_bytes": memory.resident_bytes(),
        "expert_bytes": ledger.used_bytes,
        "expert_budget_bytes": engine.budget.experts,
        "kv_blocks": pages.blocks,
        "kv_blocks_free": pages.available,
        "tokens": c.tokens,
        "reads": c.reads,
        "read_bytes": c.read_bytes,
        "hit_rate": c.hit_rate,
        "stall_seconds": c.stall_seconds,
        "step_seconds": c.step_seconds,
        "layers": list(engine.shape.moe_layers),
        "planes": _digits(ledger.width),
        "heat": _digits(heat),
    }


def _digits(values: Any) -> list[str]:
    return ["".join(map(str, row)) for row in values.tolist()]
