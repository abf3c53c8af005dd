"""A device measured with a model, once: reads through the engine's own reader, its arithmetic, and the memory's bandwidth.

Profiles are kept in the user's cache folder under a key of everything they depend on: CPU, threads, kernel table, file system and the
model's shape. Where one of them changes, the key does, and there is no profile until it is measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from d2moe.container import Container
from d2moe.evaluate.bench import TEXT, memory_bandwidth, tier
from d2moe.policy.trace import Trace
from d2moe.runtime.engine import Engine
from d2moe.runtime.memory import usable_cpus
from d2moe.runtime.request import Chunk
from d2moe.simulate.device import FORMAT, Device
from d2moe.types import BASE_BITS, WIDTHS

READ_WIDTHS = (2, 4, 8)
"""Prefixes that are read, besides a single plane: the block sizes."""
DEPTHS = (1, 2, 4, 8, 16)
MEASURE_S = 0.2
"""About how long each block size and queue depth is read."""
BURST_BYTES = 96 << 20
"""Read between two waits for all that is on its way."""
COMPUTE_WIDTHS = (2, 3, 4, 6, 8)
PRELOAD_TURNS, PRELOAD_STEPS = 4, 5
"""Turns with and without reading ahead, and steps of each."""
PRELOAD_FROM = 1.05
"""Gain from which reading ahead is on, if every turn shows one; less may be noise, and it costs reads."""
PROMPT_TOKENS = 64
STEPS = 10
DIRECT_UNLESS = 1.2
"""The page cache is chosen when it is this much faster: its copies cost CPU time that the experts' arithmetic wants, too."""
ENOUGH = 0.95
"""The least depth with this share of the best rate is chosen: more threads cost memory and company."""


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/d2moe, by default ~/.cache/d2moe."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "d2moe"


def profile_path(container: Container, threads: int | None = None) -> Path:
    """Where the profile of this machine with this model is kept, be it there or not."""
    r, shape = container.record, container.config
    disk = container.path.stat().st_dev
    facts = [FORMAT, _cpu_name(), threads or usable_cpus(), r.hidden, r.inner, r.group, container.experts_bytes(), container.experts]
    facts += [container.moe_layers, disk, tier(container.path, True), shape.get("num_hidden_layers"), shape.get("vocab_size")]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return cache_folder() / "devices" / f"{container.path.resolve().stem}-{key}.json"


def known_profile(container: Container, threads: int | None = None) -> Device | None:
    """The stored profile, if there is one."""
    path = profile_path(container, threads)
    return Device.load(path) if path.is_file() else None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "CPU part", "Hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def profile(engine: Engine, tokens: list[int], progress: Callable[[int, int], None] | None = None) -> Device:
    """Measure with an open engine; `tokens` of some text, at least PROMPT_TOKENS + STEPS. Takes about 20 seconds.

    StorageError if a read fails.
    """
    total = 2 * len(DEPTHS) * (len(READ_WIDTHS) + 1) + len(COMPUTE_WIDTHS) + 2
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    container = engine.container
    io = {name: _measure_reads(engine, name == "direct", advance) for name in ("direct", "page cache")}
    chosen = _choose(io, container.record.prefix_bytes(round(engine.config.bits)))
    each, rate, latency = _fit(io[chosen["path"]], chosen["read_depth"])
    expert_s: dict[int, tuple[float, float]] = {}
    dense_s, decide_s = (0.0, 0.0), 0.0
    for bits in COMPUTE_WIDTHS:
        if container.record.prefix_bytes(bits) > engine.ledger.limit_bytes:
            continue
        expert_s[bits], dense, decide = _measure_compute(engine, tokens, bits)
        if bits <= engine.config.bits or not dense_s[0]:
            dense_s, decide_s = dense, decide
        advance()
    preload = _measure_preload(engine, tokens)
    chosen["policy"] = "preload" if preload["gain"] >= PRELOAD_FROM and preload["least_gain"] > 1 else "hebf"
    advance()
    about = engine.describe()
    bandwidth = memory_bandwidth(about["threads"]) or 0.0
    advance()
    facts = {
        "model": container.path.name,
        "layers": len(container.moe_layers),
        "experts": container.experts,
        "record_bytes": container.experts_bytes() // container.kept.size,
        "cpu": _cpu_name(),
        "kernels": about["kernels"],
        "threads": about["threads"],
        "tier": tier(container.path, chosen["direct"]),
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "reads": io,
        "chosen": chosen,
        "preload": preload,
        "dense_bits": about["dense_bits"],
        "dense_widths": about["dense_widths"],
    }
    return Device(platform.node() or "this machine", rate, each, latency, expert_s, dense_s, decide_s, bandwidth, facts)


def _measure_preload(engine: Engine, tokens: list[int]) -> dict[str, float]:
    """Speed with base planes read ahead over speed without, in turns at the engine's budget, and the share of guesses that were right."""
    before, sequence = engine.config.policy, engine.new_sequence()
    seconds: dict[str, list[float]] = {"hebf": [], "preload": []}
    guessed, right, read = 0, 0, 0
    bits = engine.config.bits
    try:
        engine.step([Chunk(sequence, tokens[:PROMPT_TOKENS], bits, "last")])
        for turn in range(2 * PRELOAD_TURNS):
            name = ("hebf", "preload")[turn % 2]
            engine.set_policy(name)
            for number in range(PRELOAD_STEPS):
                start = engine.counters.snapshot()
                engine.step([Chunk(sequence, [tokens[(turn * PRELOAD_STEPS + number) * 7 % len(tokens)]], bits, "last")])
                used = engine.counters.snapshot() - start
                seconds[name].append(used.step_seconds)
                guessed, right = guessed + used.forecast, right + used.forecast_right
                read += used.read_bytes
    finally:
        sequence.free()
        engine.set_policy(before)
    spans = {name: [median(part) for part in np.array_split(all_of_it, PRELOAD_TURNS)] for name, all_of_it in seconds.items()}
    gains = [plain / ahead for plain, ahead in zip(spans["hebf"], spans["preload"], strict=True)] if read else [1.0]
    return {"gain": median(gains), "least_gain": min(gains), "right": right / guessed if guessed else 0.0, "read_bytes": read}


Rates = dict[str, dict[str, float]]
"""Bytes per second by block size in bytes, then by queue depth; keys are text, as in JSON."""


def _measure_reads(engine: Engine, direct: bool, advance: Callable[[], None]) -> Rates:
    """Rates of random experts read by the real reader; empty if direct I/O is refused."""
    container, record = engine.container, engine.container.record
    if not direct:
        for layer in container.moe_layers:  # what other programs left in the page cache would be measured instead
            with container.expert_path(layer).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found: Rates = {}
    rng = np.random.default_rng(0)
    having = {bits: np.flatnonzero(container.kept.reshape(-1) >= bits) for bits in WIDTHS}
    most = max((bits for bits in WIDTHS if 2 * len(having[bits]) >= container.kept.size), default=BASE_BITS)
    blocks = [(most - 1, most, record.plane_bytes)] if most > BASE_BITS else []
    blocks += [(0, bits, record.prefix_bytes(bits)) for bits in READ_WIDTHS if bits <= most]
    for depth in DEPTHS:
        experts = engine.new_experts(direct=direct, depth=depth)
        if bool(experts.direct) != direct:
            for _ in blocks:
                advance()
            continue
        for have, bits, size in blocks:
            there = having[bits]
            count = min(len(there), max(depth, min(BURST_BYTES // record.prefix_bytes(bits), len(there) // 2)))
            # No less than the engine's, whose slots are of huge pages from some size on: reads into small ones take twice as long.
            experts.set_limit(max(count * record.prefix_bytes(bits), engine.ledger.limit_bytes))
            begun, spent, total = time.perf_counter(), 0.0, -count * size
            while total <= 0 or time.perf_counter() - begun < MEASURE_S:  # the first time slots get their pages
                flat = rng.choice(there, count, replace=False)
                moves = np.column_stack([*np.divmod(flat, container.experts), np.full(count, bits)]).astype(np.int32)
                if have:
                    moves[:, 2] = have
                    experts.read(moves)
                    experts.abandon()  # waits for all that is on its way
                    moves[:, 2] = bits
                start = time.perf_counter()
                experts.read(moves)
                experts.abandon()
                spent += time.perf_counter() - start if total >= 0 else 0.0
                total += count * size
                moves[:, 2] = 0
                experts.evict(moves)
            found.setdefault(str(size), {})[str(depth)] = total / spent
            advance()
    return found


def _choose(io: dict[str, Rates], block: int) -> dict[str, Any]:
    """Reading path by the rates of the block nearest to `block` bytes, the least queue depth that is enough for all block sizes (single
    planes are read, too), and why in words."""
    best: dict[str, tuple[float, int]] = {}
    for path, rates in io.items():
        if rates:
            by_depth = rates[min(rates, key=lambda size: abs(int(size) - block))]
            enough = (d for d in by_depth if all(of[d] >= ENOUGH * max(of.values()) for of in rates.values()))
            best[path] = (max(by_depth.values()), int(next(enough, max(by_depth, key=int))))
    path = max(best, key=lambda p: best[p][0] * (DIRECT_UNLESS if p == "direct" else 1))
    words = " against ".join(f"{rate / 1e9:.2f} GB/s by {p}" for p, (rate, _) in sorted(best.items(), key=lambda item: item[0] != path))
    return {"path": path, "direct": path == "direct", "read_depth": best[path][1], "why": f"measured {words}"}


def _fit(rates: Rates, depth: int) -> tuple[float, float, float]:
    """Seconds of each read, bytes per second and what a read alone takes longer: a line through the times of the block sizes."""
    sizes = np.array([int(s) for s in rates], float)
    seconds = np.array([int(s) / by_depth[str(depth)] for s, by_depth in rates.items()])
    # Each block's relative error counts alike.
    each, per_byte = np.linalg.lstsq(np.column_stack([1 / seconds, sizes / seconds]), np.ones(len(sizes)), rcond=None)[0]
    if each < 0 or per_byte <= 0:
        each, per_byte = 0.0, float(seconds.sum() / sizes.sum())
    alone = min(int(s) / by_depth["1"] - each - int(s) * per_byte for s, by_depth in rates.items())
    return float(each), float(1 / per_byte), max(0.0, float(alone))


def _measure_compute(engine: Engine, tokens: list[int], bits: int) -> tuple[tuple[float, float], tuple[float, float], float]:
    """Seconds of an expert (one token, each further one), of all else (the same), and of a plan."""
    sequence, recorder = engine.new_sequence(), engine.record(0)
    try:
        before = engine.counters.snapshot()
        engine.step([Chunk(sequence, tokens[:PROMPT_TOKENS], bits, "last", uniform=True)])
        # Where all fits nothing would be left to plan, and fresh slots get their pages while a plan's reads begin: half are read again.
        half = [(la, e) for la in range(engine.ledger.layers) for e in range(0, engine.ledger.experts, 2)]
        engine.experts.evict(np.array([(la, e, 0) for la, e in half], np.int32))
        for la, e in half:
            engine.ledger.shrink(la, e, 0)
        marks = [engine.counters.snapshot()]
        for token in tokens[PROMPT_TOKENS : PROMPT_TOKENS + STEPS]:
            engine.step([Chunk(sequence, [token], bits, "last", uniform=True)])
            marks.append(engine.counters.snapshot())
    finally:
        sequence.free()
        engine.stop_recording()
    prompt, steps = marks[0] - before, [b - a for a, b in pairwise(marks)]
    trace = recorder.trace()
    pieces = trace.steps - STEPS  # of the prompt, which may have been cut
    (prompt_groups, prompt_pairs), (groups, _) = _groups(trace, pieces)
    # Medians: a step that another program disturbed says nothing of this device.
    first = median(used.compute_seconds for used in steps) * len(steps) / groups
    more = max(0.0, prompt.compute_seconds - prompt_groups * first) / max(prompt_pairs - prompt_groups, 1)

    def rest(used: Any) -> float:
        return float(used.step_seconds - used.compute_seconds - used.stall_seconds - used.decide_seconds)

    one = median(rest(used) for used in steps)
    further = max(0.0, rest(prompt) - pieces * one) / max(prompt.tokens - pieces, 1)
    return (first, more), (one, further), median([used.decide_seconds / used.plans for used in steps if used.plans] or [0.0])


def _groups(trace: Trace, prompts: int) -> list[tuple[int, int]]:
    """(experts computed, pairs of token and expert) in the first `prompts` steps and in the others."""
    counts = [[0, 0], [0, 0]]
    for number, step in enumerate(trace):
        part = counts[number >= prompts]
        for call in step.calls:
            part[0] += len(np.unique(call.ids))
            part[1] += call.ids.size
    return [(part[0], part[1]) for part in counts]


def profile_tokens(encode: Callable[[str], list[int]]) -> list[int]:
    """Enough tokens of running text."""
    tokens = encode(TEXT)
    return (tokens * (1 + (PROMPT_TOKENS + STEPS) // len(tokens)))[: PROMPT_TOKENS + STEPS]
