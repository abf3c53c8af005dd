"""What the process holds, and how a budget is split. `--memory` is the whole process, so all of it is counted."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from d2moe.errors import MemoryBudgetError
from d2moe.runtime.config import EngineConfig, show_bytes
from d2moe.runtime.kv import BLOCK_TOKENS
from d2moe.types import ModelShape, padded

MARGIN_BYTES = 12 * 10**6
"""Stacks, allocator slack, the interpreter's own growth while generating."""
CHUNKS = (512, 256, 128, 64, 32, 16, 8)
QUERIES = 8
"""Queries that attention takes at a time (csrc/kernels.h, kQueries)."""
BATCH_ROWS = 512
"""Pairs of token and expert that are computed together (csrc/executor.h, kBatchRows)."""


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
    for limit, used in _memory_limits():
        free = min(free, limit - used)
    return max(free, 0)


def check_allowed(n_bytes: int, where: str) -> None:
    """MemoryBudgetError if the cgroup of this process, or one above it, would end it before it holds `n_bytes`."""
    allowed = min((limit for limit, _ in _memory_limits()), default=n_bytes)
    if n_bytes > allowed:
        raise MemoryBudgetError(
            f"{where}: a budget of {show_bytes(n_bytes)} is more than a cgroup allows this process, {show_bytes(allowed)}; "
            "give less memory, or raise the cgroup's limit"
        )


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of this process's cgroup and every cgroup above it that has a limit, version 2 and version 1."""
    names = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
    for controller, (limit, usage) in names.items():
        for folder in cgroup_folders(controller):
            try:
                yield int((folder / limit).read_text()), int((folder / usage).read_text())
            except (OSError, ValueError):
                continue


def usable_cpus() -> int:
    """CPUs this process may run on: affinity, and the cgroup's quota where there is one, rounded down, at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min(_cpu_quotas(), default=math.inf)
    return max(1, int(min(count, quota)))


def _cpu_quotas() -> Iterator[float]:
    """CPUs allowed by this process's cgroup and every cgroup above it, version 2 and version 1."""
    for folder in cgroup_folders(""):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                yield int(quota) / int(period)
        except (OSError, ValueError):
            continue
    for folder in cgroup_folders("cpu"):
        try:
            quota_us = int((folder / "cpu.cfs_quota_us").read_text())
            if quota_us > 0:
                yield quota_us / int((folder / "cpu.cfs_period_us").read_text())
        except (OSError, ValueError):
            continue


def cgroup_folders(controller: str, mounts: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """Folders of this process's cgroup and those above it: `controller` "" for version 2, a name like "cpu" for version 1."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    found: list[Path] = []
    for line in lines:
        _, names, path = line.split(":", 2)
        if controller not in names.split(","):
            continue
        # Version 1 mounts controllers that go together under both names, like cpu,cpuacct; links make each findable.
        root = mounts / controller if controller else mounts
        folder = root / path.lstrip("/")
        found += [f for f in (folder, *folder.parents) if f == root or root in f.parents]
    return found or [mounts / controller if controller else mounts]


def kv_blocks(config: EngineConfig, context: int) -> int:
    """Blocks of the key/value cache: at least a full context, at most one for every sequence."""
    one = padded(context, BLOCK_TOKENS) // BLOCK_TOKENS
    wanted = one * config.max_sequences if config.kv_tokens is None else -(-config.kv_tokens // BLOCK_TOKENS)
    return min(max(wanted, one), one * config.max_sequences)


def kv_bytes(shape: ModelShape, kind: str, tokens: int) -> int:
    """Bytes of a full key/value cache of `tokens`; `kind` is "f16", or "q8" (a byte each, and a float32 scale per head)."""
    per_head = 4 * shape.head_dim if kind == "f16" else 2 * shape.head_dim + 8
    return shape.layers * tokens * shape.kv_heads * per_head


def scratch_bytes(shape: ModelShape, group: int, tokens: int, context: int, threads: int) -> int:
    """An upper bound of the compiled core's scratch memory for steps of `tokens` tokens."""

    def rows(m: int, cols: int) -> int:  # int8 rows with scale and sum
        cols = padded(cols, group)
        return m * (cols + 8 * (cols // group)) + 256

    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    desk = QUERIES * 4 * (padded(context, BLOCK_TOKENS) + 3 * shape.head_dim) + 4 * shape.head_dim + 576  # of one thread in attention
    attention = rows(tokens, h) + rows(tokens, q) + 4 * tokens * (h + 2 * q + 2 * kv) + threads * desk

    def feed_forward(inner: int) -> int:
        return rows(tokens, h) + rows(tokens, inner) + 4 * tokens * (2 * inner + h)

    pairs = tokens * shape.top_k
    inner = shape.expert_inner
    batch = min(pairs, max(tokens, BATCH_ROWS))
    experts = rows(tokens, h) + rows(batch, h) + rows(batch, inner) + 4 * (2 * batch * inner + pairs * h)
    experts += feed_forward(shape.shared_inner) if shape.shared_inner else 0
    head = rows(tokens, h) + 4 * threads * h + 4 * tokens * shape.experts
    return max(attention, experts, head, feed_forward(shape.dense_inner) if shape.dense_inner else 0) + 8192


class Arena:
    """One piece of memory for many arrays, in huge pages where the system has them: small ones cost bandwidth."""

    def __init__(self, n_bytes: int):
        # 64 bytes of slack for each array's alignment are a thousandth of what they hold.
        self._memory = mmap.mmap(-1, n_bytes + n_bytes // 64 + (1 << 20))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._all = np.frombuffer(self._memory, np.uint8)
        self._used = 0

    def take(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """uint8 [n_bytes] that begins at a multiple of 64 bytes."""
        begin = self._used
        self._used = padded(begin + n_bytes, 64)
        if self._used > len(self._all):
            raise AssertionError(f"the arena of {len(self._all):,} bytes is too small for {n_bytes:,} more")
        return self._all[begin : begin + n_bytes]


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

    @property
    def fixed(self) -> int:
        """Bytes of all but the experts."""
        return self.process + self.dense + self.kv + self.buffers + self.margin


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
    process, kv_tokens = resident_bytes(), kv_blocks(config, context) * BLOCK_TOKENS
    kv = kv_bytes(shape, config.kv, kv_tokens)

    def buffers(chunk: int) -> int:
        rows = 4 * chunk * (2 * shape.hidden + 3 * shape.top_k) + 4 * (3 + config.max_sequences) * shape.vocab
        return rows + scratch_bytes(shape, group, chunk, context, threads)

    margin = MARGIN_BYTES + config.reserve_bytes
    fixed = process + dense + kv + margin
    least = fixed + buffers(CHUNKS[-1]) + one_expert
    memory = config.memory_bytes
    if memory is None:
        wanted = fixed + buffers(CHUNKS[0]) + all_experts
        memory = max(min(wanted, int(0.8 * available_bytes()) + process), least)
    if memory < least:
        raise MemoryBudgetError(
            f"{where}: a memory of {show_bytes(memory)} is too small; the least that would do is {show_bytes(least + 10**5)} "
            f"(process {show_bytes(process)}, dense weights {show_bytes(dense)}, key/value cache for {kv_tokens} tokens "
            f"{show_bytes(kv)}, buffers {show_bytes(buffers(CHUNKS[-1]))}, one expert {show_bytes(one_expert)}, margin "
            f"{show_bytes(margin)}); a smaller context needs less"
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
    return Budget(memory, process, dense, kv, buffers(chunk), margin, experts, chunk)
