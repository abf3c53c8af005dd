"""What speed each budget and width would give, from a model's shape and a device's times alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from d2moe.errors import MemoryBudgetError
from d2moe.policy.trace import Trace
from d2moe.runtime import memory
from d2moe.runtime.config import EngineConfig
from d2moe.simulate.device import Device
from d2moe.simulate.facts import ModelFacts
from d2moe.simulate.simulate import simulate
from d2moe.simulate.synthetic import synthetic_trace
from d2moe.types import MAX_BITS, DenseWidths

TOKENS = 48
"""Decoded in each simulation after PROMPT_TOKENS that fill the slots."""
PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Choice:
    """One budget and width; `tokens_per_s` and the other outcomes are None where the budget does not do."""

    memory_bytes: int
    bits: int
    expert_memory_bytes: int | None = None
    tokens_per_s: float | None = None
    hit_rate: float | None = None
    bytes_per_token: float | None = None


def default_budgets(facts: ModelFacts, context: int, threads: int) -> list[int]:
    """Whole-process budgets that leave a quarter, a third, a half, three quarters and all of the experts' 4-bit size to them."""
    fixed = least(facts, EngineConfig(context=context), threads)
    return [int(fixed + share * facts.all_experts_bytes(4)) for share in (0.25, 0.35, 0.5, 0.75, 1.0)]


def least(facts: ModelFacts, config: EngineConfig, threads: int) -> int:
    """Bytes that a process of this model takes beside its experts."""
    budget = _split(facts, config, threads)
    return budget.memory - budget.experts


def experts_bytes(facts: ModelFacts, config: EngineConfig, threads: int) -> int:
    """Bytes that a budget leaves to experts; MemoryBudgetError if it does not do."""
    return _split(facts, config, threads).experts


def _split(facts: ModelFacts, config: EngineConfig, threads: int) -> memory.Budget:
    shape = facts.shape
    return memory.split(
        config,
        shape,
        group=facts.record.group,
        dense=facts.dense_bytes(facts.dense_widths(config)),
        all_experts=facts.all_experts_bytes(MAX_BITS),
        one_expert=facts.one_expert_bytes,
        context=config.context or shape.context,
        threads=threads,
        where=facts.name,
    )


def plan(
    facts: ModelFacts,
    device: Callable[[DenseWidths], Device],
    budgets: Sequence[int],
    widths: Sequence[int],
    *,
    context: int,
    threads: int,
    trace: Trace | None = None,
    policy: str = "hebf",
    progress: Callable[[int, int], None] | None = None,
) -> list[Choice]:
    """Simulate each budget (bytes of the whole process) and width; `device` gives the device for dense weights of such widths.

    Routing is `trace`'s, or made up with the statistics of models with many experts.
    """
    trace = trace or synthetic_trace(facts.meta(), tokens=TOKENS, prompt_tokens=PROMPT_TOKENS)
    out: list[Choice] = []
    for budget in budgets:
        for bits in widths:
            config = EngineConfig(memory_bytes=budget, bits=bits, context=context)
            try:
                experts = experts_bytes(facts, config, threads)
                found = simulate(trace, device(facts.dense_widths(config)), experts, policy=policy, bits=bits, kept=facts.kept)
            except MemoryBudgetError:
                out.append(Choice(budget, bits))
            else:
                out.append(Choice(budget, bits, experts, found.tokens_per_s, found.hit_rate, found.bytes_per_token))
            if progress is not None:
                progress(len(out), len(budgets) * len(widths))
    return out
