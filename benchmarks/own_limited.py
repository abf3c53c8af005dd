"""d2moe decoding a token at a time in a budget; benchmarks/limited.py runs it, in a control group or without.

    python benchmarks/own_limited.py olmoe.d2moe --tokens tokens.npy --prompt 64 --warm 2 --bits 4 --memory 900000000 \\
      --seconds 12 --least 6

Prints one JSON line. Between tokens it measures the disk's rate of plain direct reads, whose buffers --memory leaves room for.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path

import click
import numpy as np

from d2moe.container import Container
from d2moe.evaluate.bench import storage_bandwidth
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import Engine
from d2moe.runtime.memory import peak_bytes
from d2moe.runtime.request import Chunk

FILL = 64
"""Steps of four tokens that read everything where there is room for it."""
DISK_READERS, DISK_S, DISK_EVERY_S = 4, 0.25, 1.0
"""Readers of the measurement of the disk, how long it takes, and how often it is made."""


class Disk:
    """The disk's rate of plain direct reads, measured between the tokens of a run: that of a shared one moves within seconds."""

    def __init__(self, container: Container):
        self.container = container
        self.rates = [self._rate()]
        self.n_bytes, self.seconds = 0, 0.0
        """Read so far by the run, and how long plain reads of it would have taken."""
        self._span, self._part = 0.0, 0

    def _rate(self) -> float:
        return storage_bandwidth(self.container, 4, DISK_READERS, DISK_S) or math.nan

    def add(self, seconds: float, n_bytes: int, last: bool = False) -> None:
        """A token took so long and read so much."""
        self._span, self._part = self._span + seconds, self._part + n_bytes
        if self._span > DISK_EVERY_S or last:
            self.rates.append(self._rate())
            self.n_bytes += self._part
            self.seconds += self._part / statistics.fmean(self.rates[-2:])
            self._span, self._part = 0.0, 0

    @property
    def rate(self) -> float | None:
        """Bytes per second for what the run read; None where direct reads are refused."""
        found = self.n_bytes / self.seconds if self.seconds else statistics.fmean(self.rates)
        return None if math.isnan(found) else found


@click.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@click.option("--tokens", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--prompt", type=int, required=True)
@click.option("--warm", type=int, required=True)
@click.option("--bits", type=float, required=True)
@click.option("--memory", type=int, required=True)
@click.option("--experts-only", is_flag=True, help="--memory is for expert slots alone.")
@click.option("--seconds", type=float, required=True, help="Stop measuring then …")
@click.option("--least", type=int, required=True, help="… after at least so many tokens.")
def main(
    path: Path, tokens: Path, prompt: int, warm: int, bits: float, memory: int, experts_only: bool, seconds: float, least: int
) -> None:
    """One run of ours; 4 bits are one width for all experts, others go through the width router."""
    fed, uniform = np.load(tokens), bits == 4
    config = EngineConfig(
        memory_bytes=None if experts_only else memory,
        expert_memory_bytes=memory if experts_only else None,
        reserve_bytes=DISK_READERS * Container.open(path).record.prefix_bytes(4),
        bits=bits,
        uniform=uniform,
        context=max(256, len(fed)),
    )
    with Engine.load(path, config) as engine:
        container, sequence = engine.container, engine.new_sequence()
        if engine.budget.experts >= len(container.moe_layers) * container.experts * container.record.prefix_bytes(4):
            for ids in np.random.default_rng(0).integers(10, 50000, (FILL, 4)):
                engine.step([Chunk(sequence, ids, bits, "all", uniform)])
                sequence.free()
                sequence = engine.new_sequence()
        begin = time.perf_counter()
        engine.step([Chunk(sequence, fed[:prompt], bits, "last", uniform)])
        prompt_s = time.perf_counter() - begin
        for token in fed[prompt : prompt + warm]:
            engine.step([Chunk(sequence, [token], bits, "last", uniform)])
        before, spans, disk = engine.counters.snapshot(), [], Disk(container)
        for left, token in zip(reversed(range(len(fed) - prompt - warm)), fed[prompt + warm :], strict=True):
            begin, read = time.perf_counter(), engine.counters.read_bytes
            engine.step([Chunk(sequence, [token], bits, "last", uniform)])
            spans.append(time.perf_counter() - begin)
            enough = not left or (sum(spans) > seconds and len(spans) >= least)
            disk.add(spans[-1], engine.counters.read_bytes - read, enough)
            if enough:
                break
        used, about = engine.counters.snapshot() - before, engine.describe()
        line = {
            "spans": [round(s, 5) for s in spans],
            "prompt_s": round(prompt_s, 3),
            "read_bytes": used.read_bytes,
            "hit_rate": used.hit_rate,
            "average_bits": used.average_bits,
            "stall_s": used.stall_seconds,
            "decide_s": used.decide_seconds,
            "peak_bytes": peak_bytes(),
            "direct": about["direct"],
            "threads": about["threads"],
            "dense_bits": about["dense_bits"],
            "budget": about["budget"] | {"fixed": engine.budget.fixed},
            "disk_bytes_per_s": disk.rate,
        }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
