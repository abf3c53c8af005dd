"""What the process holds, and how a budget is split. `--memory` is the whole process, so all of it is counted."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from d2moe.errors import MemoryBudgetError
from d2moe.runtime.config import EngineConfig, show_bytes
from d2moe.runtime.kv import BLOCK_TOKENS
from d2moe.types import ModelShape, padded

MARGIN_BYTES = 12 * 10**6
"""Stacks, allocator slack, the interpreter's own growth while generating."""
CHUNKS = (256, 128, 64, 32, 16, 8)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def resident_bytes() -> int:
    """What this process holds in memory now (VmRSS)."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most it ever held (VmHWM)."""
    return _status("VmHWM")


def available_bytes() -> int:
    """What could be allocated without swapping: the machine's, or the cgroup's limit where that is less."""
    free = 2**62
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(usage).read_text()))
        except (OSError, ValueError):
            continue
    return max(free, 0)


def usable_cpus() -> int:
    """CPUs this process may run on: affinity, and the cgroup's quota where there is one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        try:
            base = Path("/sys/fs/cgroup/cpu")
            quota_us = int((base / "cpu.cfs_quota_us").read_text())
            if quota_us > 0:
                count = min(count, max(1, quota_us // int((base / "cpu.cfs_period_us").read_text())))
        except (OSError, ValueError):
            pass
    return count


def kv_bytes(shape: ModelShape, context: int, sequences: int) -> int:
    """Bytes of the f16 key/value cache when full."""
    return shape.layers * padded(context, BLOCK_TOKENS) * sequences * 2 * shape.kv_heads * shape.head_dim * 2


def scratch_bytes(shape: ModelShape, group: int, tokens: int, context: int, threads: int) -> int:
    """An upper bound of the compiled core's scratch memory for steps of `tokens` tokens."""

    def rows(m: int, cols: int) -> int:  # int8 rows with scale and sum
        cols = padded(cols, group)
        return m * (cols + 8 * (cols // group)) + 256

    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = rows(tokens, h) + rows(tokens, q) + 4 * (tokens * (h + 2 * q + 2 * kv) + threads * (context + shape.head_dim))

    def feed_forward(inner: int) -> int:
        return rows(tokens, h) + rows(tokens, inner) + 4 * tokens * (2 * inner + h)

    pairs = tokens * shape.top_k
    inner = shape.expert_inner
    experts = rows(tokens, h) + rows(pairs, h) + rows(pairs, inner) + 4 * pairs * (2 * inner + h)
    experts += feed_forward(shape.shared_inner) if shape.shared_inner else 0
    head = rows(tokens, h) + 4 * h + 4 * tokens * shape.experts
    return max(attention, experts, head, feed_forward(shape.dense_inner) if shape.dense_inner else 0) + 8192


@dataclass(frozen=True)
class Budget:
    """Where the memory goes, in bytes; `experts` is what slots may hold, `chunk_tokens` the step size that fits."""

    memory: int
    process: int
    dense: int
    kv: int
    buffers: int
    margin: int
    experts: int
    chunk_tokens: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def split(
    config: EngineConfig,
    shape: ModelShape,
    *,
    group: int,
    dense: int,
    all_experts: int,
    one_expert: int,
    context: int,
    threads: int,
    where: str,
) -> Budget:
    """Split the budget before anything is loaded; MemoryBudgetError says the least that would do.

    `dense`, `all_experts` (every record in full) and `one_expert` (a record in full) are bytes.
    """
    process, kv = resident_bytes(), kv_bytes(shape, context, config.max_sequences)

    def buffers(chunk: int) -> int:
        rows = 4 * chunk * (2 * shape.hidden + 3 * shape.top_k) + 4 * 4 * shape.vocab
        return rows + scratch_bytes(shape, group, chunk, context, threads)

    fixed = process + dense + kv + MARGIN_BYTES
    least = fixed + buffers(CHUNKS[-1]) + one_expert
    memory = config.memory_bytes
    if memory is None:
        wanted = fixed + buffers(CHUNKS[0]) + all_experts
        memory = max(min(wanted, int(0.8 * available_bytes()) + process), least)
    if memory < least:
        raise MemoryBudgetError(
            f"{where}: a memory of {show_bytes(memory)} is too small; the least that would do is {show_bytes(least + 10**5)} "
            f"(process {show_bytes(process)}, dense weights {show_bytes(dense)}, key/value cache for {context} tokens "
            f"{show_bytes(kv)}, buffers {show_bytes(buffers(CHUNKS[-1]))}, one expert {show_bytes(one_expert)}, margin "
            f"{show_bytes(MARGIN_BYTES)}); a smaller context needs less"
        )
    chunk = config.chunk_tokens
    if chunk is None:
        spare = memory - fixed - one_expert
        chunk = next((c for c in CHUNKS if buffers(c) <= spare // 5), CHUNKS[-1])
    experts = min(memory - fixed - buffers(chunk), all_experts)
    if config.expert_memory_bytes is not None:
        if config.expert_memory_bytes > experts:
            raise MemoryBudgetError(
                f"{where}: {show_bytes(config.expert_memory_bytes)} for experts do not fit, {show_bytes(max(experts, 0))} are left "
                f"of a memory of {show_bytes(memory)}"
            )
        experts = config.expert_memory_bytes
    if experts < one_expert:
        raise MemoryBudgetError(
            f"{where}: {show_bytes(max(experts, 0))} are left for experts and one expert needs {show_bytes(one_expert)}; allow more "
            "memory, or a smaller context or chunk"
        )
    return Budget(memory, process, dense, kv, buffers(chunk), MARGIN_BYTES, experts, chunk)
