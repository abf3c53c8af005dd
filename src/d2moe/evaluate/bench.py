"""Speed of one request, and how far it is from what the machine could do.

Each repeat feeds a prompt of running text to an empty sequence and generates past end tokens. The first
repeat starts with empty expert slots; speeds are medians over all repeats. The bandwidths' own buffers do not count as peak
memory.

`roofline` is the least time a token could take over the time it took: the larger of (bytes of weights and cache a token
must touch / measured memory bandwidth) and (bytes it read from storage / measured storage bandwidth). 1 is perfect. A virtual
machine's bandwidths move within seconds, so they are measured after every repeat; a repeat's are the means of those before and after
it, and the roofline is the median over repeats.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2moe.errors import ConfigError, RequestError
from d2moe.runtime.generate import Model
from d2moe.runtime.kv import BLOCK_TOKENS
from d2moe.runtime.memory import available_bytes, kv_bytes, peak_bytes, resident_bytes, usable_cpus
from d2moe.runtime.request import Progress
from d2moe.runtime.sampling import SamplingParams
from d2moe.types import BASE_BITS

READERS = 16
"""Reads in flight while storage is measured."""
MEASURE_S = 0.4
"""About how long each bandwidth is measured."""
TEXT = (
    "Once upon a time there was a small lighthouse on a rock in the northern sea. Every evening the keeper climbed the "
    "one hundred and twelve steps to the lamp, cleaned its glass and lit it, so that the ships could find their way. "
    "The history of such towers is long: the Romans built them along the coasts of the empire, and in the nineteenth "
    "century the lens of Augustin Fresnel let a lamp of modest power be seen twenty miles away. One winter a storm "
    "broke the window, and the keeper had to think of something new. She took the mirror from her bedroom, a kettle, "
    "and a length of rope, and said to the cat that they would not sleep tonight. "
)


@dataclass(frozen=True)
class _Run:
    """One repeat: seconds and counters of the prompt and of the tokens after the first; `busy_s` of the latter's seconds
    were spent in the compiled core (None for the NumPy twin)."""

    ttft_s: float
    decode_s: float
    busy_s: float | None
    tokens: int
    prompt: Any
    decode: Any


def prompt_of(model: Model, n_tokens: int, text: str = TEXT) -> list[int]:
    """`n_tokens` tokens of `text`, repeated as needed: routing of random tokens would not be that of any text."""
    tokens = model.tokenizer.encode(text)
    if not tokens:
        raise RequestError("the prompt text has no tokens; give a longer one")
    more = model.tokenizer.encode(text, add_special=False) or tokens
    while len(tokens) < n_tokens:
        tokens += more
    return tokens[:n_tokens]


def bench(
    model: Model,
    prompt: Sequence[int],
    *,
    generate: int = 64,
    repeats: int = 3,
    bits: float | None = None,
    explain: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure; returns the JSON line's keys. What the engine does not count or the machine does not tell is None.

    `explain` adds "products": [rows, columns, bits, way, products, tokens] of every matrix shape and kernel that ran.

    RequestError if prompt and answer do not fit the context together.
    """
    engine = model.engine
    if generate < 2 or repeats < 1:
        raise ConfigError(f"generate {generate} and repeats {repeats}: expected at least 2 tokens and 1 repeat")
    if len(prompt) + generate - 1 > engine.context:
        raise RequestError(
            f"{len(prompt)} prompt tokens and {generate} generated ones do not fit the context of {engine.context}; "
            "lower --prompt-tokens or --generate, or raise --context"
        )
    width = engine.config.bits if bits is None else bits
    runs = []
    runtime: Any = getattr(engine, "runtime", None)
    counts = explain and hasattr(runtime, "count_products")
    if counts:
        runtime.count_products(True)
    peak, rates = 0, list[Rates]()
    for n in range(repeats):
        # Another prompt order and another seed each time: the same text again would find its own experts in memory.
        params = SamplingParams(max_tokens=generate, ignore_eos=True, bits=width, temperature=1.0, top_k=40, seed=n)
        turn = n * 17 % len(prompt)
        for run in _repeat(model, [*prompt[turn:], *prompt[:turn]], params):
            if isinstance(run, _Run):
                runs.append(run)
            elif progress is not None:
                progress(n * generate + run, repeats * generate)
        peak = max(peak, resident_bytes() if rates else peak_bytes())
        rates.append(_rates(model, width))
    products = [list(p) for p in runtime.products] if counts else None
    if counts:
        runtime.count_products(False)
    used = [run.decode for run in runs]
    busy = [run.busy_s for run in runs]
    tokens = sum(run.tokens for run in runs)
    seconds = sum(run.decode_s for run in runs)
    token_s = statistics.median(run.decode_s / run.tokens for run in runs)
    ttft_s = statistics.median(run.ttft_s for run in runs)
    read = sum(c.read_bytes for c in used) / tokens
    wanted = sum(c.wanted_bytes for c in used)
    about = engine.describe()
    return {
        "generation_tokens_per_s": 1 / token_s,
        "prompt_tokens_per_s": len(prompt) / ttft_s,
        "ttft_s": ttft_s,
        "ttft_first_s": runs[0].ttft_s,
        "prompt_tokens": len(prompt),
        "generated_tokens": generate,
        "repeats": repeats,
        "peak_bytes": peak,
        "memory_bytes": about.get("budget", {}).get("memory"),
        "expert_memory_bytes": about.get("budget", {}).get("experts"),
        "read_bytes_per_token": read,
        "prompt_read_bytes": runs[0].prompt.read_bytes,
        "hit_rate": 1 - sum(c.missing_bytes for c in used) / wanted if wanted else 1.0,
        "bits": sum(c.use_bits for c in used) / max(1, sum(c.uses for c in used)),
        "stall_share": sum(c.stall_seconds for c in used) / seconds,
        "decide_share": sum(c.decide_seconds for c in used) / seconds,
        "python_share": None if None in busy else 1 - sum(b for b in busy if b) / seconds,
        **_limits(model, runs, rates, len(prompt) + generate / 2),
        "kernels": about.get("kernels"),
        "threads": about.get("threads"),
        "dense_bits": about.get("dense_bits"),
        "dense_widths": about.get("dense_widths"),
        "kv": about.get("kv"),
        **({"products": products} if explain else {}),
        "context": engine.context,
        "budget": about.get("budget"),
    }


Rates = tuple[float | None, float | None]
"""Bytes per second of memory and of storage; None where it cannot be measured."""


def _rates(model: Model, bits: float) -> Rates:
    container = getattr(model.engine, "container", None)
    if container is None:
        return None, None
    return memory_bandwidth(model.engine.describe()["threads"]), storage_bandwidth(container, math.ceil(bits))


def _limits(model: Model, runs: Sequence[_Run], rates: Sequence[Rates], position: float) -> dict[str, Any]:
    """The roofline and what it is made of; None where a bandwidth cannot be measured."""
    container = getattr(model.engine, "container", None)
    if container is None:
        return {"roofline": None, "tier": None}
    touched, shares, means = 0, [], []
    for run, before, after in zip(runs, [rates[0], *rates], rates, strict=False):
        touched = touched_bytes(model, run.decode.average_bits, position)
        memory_rate, storage_rate = (None if a is None or b is None else (a + b) / 2 for a, b in zip(before, after, strict=True))
        means.append((memory_rate, storage_rate))
        asked = ((touched, memory_rate), (run.decode.read_bytes / run.tokens, storage_rate))
        least = [n_bytes / rate for n_bytes, rate in asked if rate]
        if least:
            shares.append(max(least) / (run.decode_s / run.tokens))
    memory_rates, storage_rates = ([rate for rate in kind if rate] for kind in zip(*means, strict=True))
    return {
        "roofline": statistics.median(shares) if shares else None,
        "rooflines": shares,
        "touched_bytes_per_token": touched,
        "memory_bandwidth_bytes_per_s": statistics.median(memory_rates) if memory_rates else None,
        "storage_bandwidth_bytes_per_s": statistics.median(storage_rates) if storage_rates else None,
        "tier": tier(container.path, bool(model.engine.describe()["direct"])),
    }


def _repeat(model: Model, prompt: Sequence[int], params: SamplingParams) -> Iterator[int | _Run]:
    """The number of tokens so far after each, then the measurement."""
    before, start = model.engine.counters.snapshot(), time.perf_counter()
    first, middle, count, busy = 0.0, before, 0, _busy_ns(model)
    for _ in model.stream(prompt, params):
        count += 1
        if count == 1:
            first, middle, busy = time.perf_counter(), model.engine.counters.snapshot(), _busy_ns(model)
        yield count
    end, after, later = time.perf_counter(), model.engine.counters.snapshot(), _busy_ns(model)
    spent = None if busy is None or later is None else (later - busy) / 1e9
    yield _Run(first - start, end - first, spent, count - 1, middle - before, after - middle)


def _busy_ns(model: Model) -> int | None:
    """Nanoseconds that the compiled core has spent on steps and on drawing tokens so far."""
    decoder = getattr(model.engine, "decoder", None)
    spent = None if decoder is None else decoder.program.busy_ns
    if spent is None:
        return None
    from d2moe.kernels.native import drawing_ns

    return int(spent + drawing_ns())


def touched_bytes(model: Model, bits: float, position: float) -> int:
    """Bytes of weights and key-value cache that one token at `position` must read at least once."""
    engine: Any = model.engine
    container, shape, config = engine.container, engine.shape, engine.config
    dense = container.dense_bytes(engine.dense_widths)
    if not shape.tied_embeddings:  # one row of the embedding; tied, all of it is read as the head
        dense -= container.nested["embed"].memory_bytes(engine.dense_widths.of("embed"))
    experts = len(container.moe_layers) * shape.top_k * (container.record.base_bytes + (bits - BASE_BITS) * container.record.plane_bytes)
    past = sum(min(position, w) if w else position for w in shape.windows)
    return int(dense + experts + past * kv_bytes(shape, config.kv, BLOCK_TOKENS) / BLOCK_TOKENS / shape.layers)


def memory_bandwidth(threads: int | None) -> float | None:
    """Bytes per second that plain reads of memory reach with `threads` threads.

    Over 1 GiB, since server caches hold a quarter of that, or a quarter of the free memory where that is less.
    """
    from d2moe.kernels import native

    rate = native.read_bandwidth(max(1 << 24, min(1 << 30, available_bytes() // 4)), threads or usable_cpus(), MEASURE_S)
    return float(rate) if rate else None


def storage_bandwidth(container: Any, bits: int, readers: int = READERS, seconds: float = MEASURE_S) -> float | None:
    """Bytes per second of direct reads of random records as far as `bits`, `readers` at a time; None if direct I/O is refused."""
    from d2moe.kernels import native

    paths = [str(container.expert_path(layer)) for layer in container.moe_layers]
    rate = native.direct_read_rate(paths, container.offsets, container.record.prefix_bytes(bits), readers, seconds)
    return float(rate) if rate else None


def tier(path: Path, direct: bool) -> str:
    """Where the experts come from, in words: "direct I/O from ext4 on nvme0n1 (solid state)"."""
    how = "direct I/O" if direct else "page cache"
    number = path.stat().st_dev
    name, kind = f"device {os.major(number)}:{os.minor(number)}", ""
    system = _file_system(path)
    block = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if block.exists():
        disk = block.resolve()
        name = disk.name
        for folder in (disk, disk.parent):  # a partition's queue is its disk's
            if (folder / "queue" / "rotational").is_file():
                # Virtual disks call themselves rotational whatever they are, so only the other answer says something.
                kind = " (solid state)" if (folder / "queue" / "rotational").read_text().strip() == "0" else ""
                break
    return f"{how} from {system or 'unknown file system'} on {name}{kind}"


def _file_system(path: Path) -> str | None:
    """Type of the file system that holds `path`: that of the longest mount point above it."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    here, best, found = path.resolve(), -1, None
    for line in lines:
        left, _, right = line.partition(" - ")
        mount = Path(left.split()[4].replace("\\040", " "))
        if (here == mount or mount in here.parents) and len(mount.parts) >= best:
            best, found = len(mount.parts), right.split()[0]
    return found
