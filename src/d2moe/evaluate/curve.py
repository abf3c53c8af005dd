"""Speed and quality over the memory budget, taken together: a text is scored a token at a time, as in generation.

Each point is a fresh engine. A first part of the text fills its slots, the next part is measured: tokens/s, bytes read, and the perplexity
of these very tokens, so that a policy whose answers depend on its memory shows both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2moe.container import Container
from d2moe.errors import ConfigError, D2MoeError, RequestError
from d2moe.evaluate.perplexity import negative_log_likelihood
from d2moe.runtime.request import Chunk

SHARES = (0.25, 0.35, 0.5, 0.75, 1.0)
"""Budgets of the experts, of their size at 4 bits."""
WIDTHS = (2.0, 3.0, 4.0)


@dataclass(frozen=True)
class Point:
    """`memory_bytes` of the whole process, `expert_memory_bytes` of it for experts."""

    bits: float
    average_bits: float
    share: float
    memory_bytes: int
    expert_memory_bytes: int
    tokens_per_s: float
    read_bytes_per_token: float
    hit_rate: float
    perplexity: float


def budgets(container: Container) -> list[tuple[float, int]]:
    """(share, bytes) for experts, each enough for one whole expert."""
    whole, one = container.experts_bytes(4), container.record.prefix_bytes(container.most_bits)
    return [(share, max(int(share * whole), one)) for share in SHARES]


def measure(engine: Any, tokens: Sequence[int], warm: int, bits: float, share: float) -> Point:
    """Feed `tokens` one at a time; those after the first `warm` count. RequestError if there are none."""
    if len(tokens) < warm + 2:
        raise RequestError(f"the text has {len(tokens)} tokens, {warm + 2} are needed; give a longer one, or lower --prompt-tokens")
    sequence, nll, before, begin = engine.new_sequence(), 0.0, engine.counters.snapshot(), 0.0
    try:
        for number, token in enumerate(tokens[:-1]):
            if number == warm:
                before, begin = engine.counters.snapshot(), time.perf_counter()
            rows = engine.step([Chunk(sequence, [token], bits, "last", engine.config.uniform)])
            if number >= warm:
                nll += negative_log_likelihood(rows, tokens[number + 1 : number + 2])
        seconds = time.perf_counter() - begin
    finally:
        sequence.free()
    used, count = engine.counters.snapshot() - before, len(tokens) - 1 - warm
    budget = engine.budget
    return Point(
        bits=bits,
        average_bits=used.average_bits,
        share=share,
        memory_bytes=budget.fixed + budget.experts,
        expert_memory_bytes=budget.experts,
        tokens_per_s=count / seconds,
        read_bytes_per_token=used.read_bytes / count,
        hit_rate=used.hit_rate,
        perplexity=math.exp(nll / count),
    )


def check_plot(path: Path) -> None:
    """Before anything is measured: D2MoeError without matplotlib, ConfigError for a file that could not be drawn."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise D2MoeError("--plot needs matplotlib, which is not installed; run: pip install 'd2moe[plot]'") from None
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in kinds:
        raise ConfigError(f"--plot {path}: expected a name that ends in one of {', '.join(sorted(kinds))}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path} cannot be written: there is no folder {path.absolute().parent}")


def draw(points: Sequence[Point], path: Path, title: str) -> None:
    """Tokens/s and perplexity over memory, a line per width, into `path`. ConfigError if it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    speed, quality = figure.subplots(1, 2)
    for bits in sorted({p.bits for p in points}):
        line = sorted((p for p in points if p.bits == bits), key=lambda p: p.memory_bytes)
        label = f"{bits:g} bits"
        memory = [p.memory_bytes / 1e9 for p in line]
        speed.plot(memory, [p.tokens_per_s for p in line], marker="o", label=label)
        quality.plot(memory, [p.perplexity for p in line], marker="o", label=label)
    for axes, name in ((speed, "tokens/s"), (quality, "perplexity")):
        axes.set(xlabel="memory of the process, GB", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    speed.set_ylim(bottom=0)
    figure.suptitle(title)
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot {path} cannot be written: {error.strerror}") from None


def curve(
    open_engine: Callable[..., Any],
    container: Container,
    tokens: Sequence[int],
    warm: int,
    widths: Sequence[float],
    progress: Callable[[int, int, str], None],
) -> list[Point]:
    """All points; `open_engine(expert_memory_bytes=…, bits=…)` gives a model whose engine is measured and that is closed afterwards."""
    found: list[Point] = []
    sizes = budgets(container)
    for bits in widths:
        for share, memory in sizes:
            model = open_engine(expert_memory=memory, bits=bits)
            try:
                found.append(measure(model.engine, tokens, warm, bits, share))
            finally:
                model.close()
            progress(len(found), len(sizes) * len(widths), f"{bits:g} bits, {100 * share:.0f} %")
    return found
