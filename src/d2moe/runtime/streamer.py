"""Plan → executor: one layer's experts are decided on, read and computed; and what that cost is counted."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe.errors import StorageError
from d2moe.policy import hebf
from d2moe.policy.ledger import Ledger
from d2moe.policy.plan import Plan

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]


@dataclass
class Counters:
    """What an engine did since it was loaded; `a - b` gives a stretch.

    `wanted_bytes` and `missing_bytes`: plane bytes the experts of each layer call asked for, and what of them was not
    resident. `uses`, `use_bits`: (token, expert) pairs and the sum of their widths. Seconds: in steps altogether,
    deciding, in the experts' arithmetic, and waiting for reads while there was nothing to compute.
    """

    steps: int = 0
    tokens: int = 0
    uses: int = 0
    use_bits: int = 0
    wanted_bytes: int = 0
    missing_bytes: int = 0
    read_bytes: int = 0
    reads: int = 0
    step_seconds: float = 0.0
    decide_seconds: float = 0.0
    compute_seconds: float = 0.0
    stall_seconds: float = 0.0

    def snapshot(self) -> Counters:
        return replace(self)

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})

    @property
    def hit_rate(self) -> float:
        """Share of the wanted plane bytes that was resident when asked for."""
        return 1 - self.missing_bytes / self.wanted_bytes if self.wanted_bytes else 1.0

    @property
    def average_bits(self) -> float:
        """Mean width over (token, expert) pairs."""
        return self.use_bits / self.uses if self.uses else 0.0


class Streamer:
    """The experts of one engine. `bits` int32 [max_tokens, top_k] holds the widths of the step in progress."""

    def __init__(self, experts: Any, ledger: Ledger, counters: Counters, failure: type[Exception], max_tokens: int, top_k: int):
        self.experts, self.ledger, self.counters, self._failure = experts, ledger, counters, failure
        self.bits = np.zeros((max_tokens, top_k), np.int32)
        self._top_k = top_k
        self._plan = Plan()
        self._layer = 0

    def start(self, moe_index: int, tokens: int, h: F32, ids: I32) -> None:
        """Decide on the layer and start its first reads."""
        begin = time.perf_counter()
        self._layer = moe_index
        bits = self.bits[:tokens]
        self._plan = plan = hebf.plan(self.ledger, moe_index, ids[:tokens], bits)
        c = self.counters
        c.decide_seconds += time.perf_counter() - begin
        c.wanted_bytes += plan.wanted_bytes
        c.missing_bytes += plan.missing_bytes
        c.uses += bits.size
        try:
            self.experts.begin(moe_index, tokens, self._top_k, h, ids, self.bits)
            self._send(0)
        except self._failure as error:
            raise self._failed(error) from None

    def finish(self, tokens: int, gates: F32, x: F32) -> None:
        """Compute all experts of the layer as they arrive; add the gated sum to x."""
        waves = self._plan.waves
        try:
            if len(waves) == 1:
                self.experts.compute(None)
            else:
                for index, wave in enumerate(waves):
                    # The next wave's reads run while this one is computed, unless they need its memory.
                    overlap = index + 1 < len(waves) and not self._evicts(index + 1, wave.experts)
                    if overlap:
                        self._send(index + 1)
                    self.experts.compute(wave.experts)
                    if index + 1 < len(waves) and not overlap:
                        self._send(index + 1)
            self.experts.finish(tokens, self._top_k, gates, x)
        except self._failure as error:
            raise self._failed(error) from None

    def _send(self, index: int) -> None:
        wave = self._plan.waves[index]
        if len(wave.evict):
            self.experts.evict(wave.evict)
        if len(wave.read):
            self.experts.read(wave.read)

    def _evicts(self, index: int, experts: I32) -> bool:
        gone = self._plan.waves[index].evict
        return bool(np.isin(gone[gone[:, 0] == self._layer, 1], experts).any())

    def abandon(self) -> None:
        """A step ended in the middle of a layer: forget the layer, and bring the ledger back to what is really held."""
        self.experts.abandon()
        self.resync()

    def _failed(self, error: Exception) -> StorageError:
        return StorageError(f'{error}; run "d2moe verify" on the model, and check the disk')

    def resync(self) -> None:
        ledger = self.ledger
        for layer in range(ledger.layers):
            for expert in range(ledger.experts):
                width = self.experts.width(layer, expert)
                ledger.shrink(layer, expert, width)
                ledger.grow(layer, expert, width)
