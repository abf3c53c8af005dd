"""Plan → executor: where a step waits for experts, their reads are decided on and started; and what all cost is counted.

For plain HEBF the compiled core does the same by itself (`Program::bring` in csrc/program.cpp) and says afterwards what it did.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe.errors import StorageError
from d2moe.models.layers import Decoder
from d2moe.policy.ledger import Ledger
from d2moe.policy.plan import Plan, Wave
from d2moe.policy.policy import Policy
from d2moe.policy.trace import NO_FORECAST, Recorder
from d2moe.runtime.timeline import Timeline
from d2moe.types import BASE_BITS, MAX_BITS

I32 = npt.NDArray[np.int32]
ByWidth = tuple[int, ...]
"""A number for each width from 0 to MAX_BITS."""
NO_WIDTHS: ByWidth = (0,) * (MAX_BITS + 1)


def plus(a: Sequence[int], b: Sequence[int], sign: int = 1) -> ByWidth:
    return tuple(x + sign * y for x, y in zip(a, b, strict=True))


@dataclass
class Counters:
    """What an engine did since it was loaded; `a - b` gives a stretch.

    `wanted_bytes` and `missing_bytes`: plane bytes the experts of each layer call asked for, and what of them was not
    resident; `planes_wanted`, `planes_missing` and `planes_read` count planes instead, by the width
    that each makes (2 is an expert's base), the last with what was read ahead. `plans`: layer calls that were decided on.
    `forecast`: choices foreseen for a next layer by policies that look ahead, and `forecast_right` those that came. `uses`,
    `use_bits`: (token, expert) pairs and the sum of their widths; `width_uses` is how many at each width.
    Seconds: in steps altogether, deciding (from a layer's routing until the reads of its first wave were started), in the experts'
    arithmetic, and waiting for reads while there was nothing to compute.
    """

    steps: int = 0
    tokens: int = 0
    uses: int = 0
    use_bits: int = 0
    wanted_bytes: int = 0
    missing_bytes: int = 0
    read_bytes: int = 0
    reads: int = 0
    plans: int = 0
    forecast: int = 0
    forecast_right: int = 0
    step_seconds: float = 0.0
    decide_seconds: float = 0.0
    compute_seconds: float = 0.0
    stall_seconds: float = 0.0
    planes_wanted: ByWidth = NO_WIDTHS
    planes_missing: ByWidth = NO_WIDTHS
    planes_read: ByWidth = NO_WIDTHS
    width_uses: ByWidth = NO_WIDTHS

    def snapshot(self) -> Counters:
        return replace(self)

    def __sub__(self, earlier: Counters) -> Counters:
        def less(a: Any, b: Any) -> Any:
            return plus(a, b, -1) if isinstance(a, tuple) else a - b

        return Counters(**{f.name: less(getattr(self, f.name), getattr(earlier, f.name)) for f in fields(self)})

    @property
    def hit_rate(self) -> float:
        """Share of the wanted plane bytes that was resident when asked for."""
        return 1 - self.missing_bytes / self.wanted_bytes if self.wanted_bytes else 1.0

    @property
    def average_bits(self) -> float:
        """Mean width over (token, expert) pairs."""
        return self.use_bits / self.uses if self.uses else 0.0


def _count(planes: list[int], have: int, bits: int) -> None:
    """Count the planes that take an expert from `have` to `bits`."""
    for width in range(max(BASE_BITS, have + 1), bits + 1):
        planes[width] += 1


SILENT_STEPS = 64
"""Steps after which the ledger hears of what went by; bounds the notes that the compiled core keeps."""


class Streamer:
    """The experts of one engine."""

    def __init__(
        self, experts: Any, ledger: Ledger, counters: Counters, failure: type[Exception], policy: Policy | None = None
    ):
        self.experts, self.ledger, self.counters, self._failure = experts, ledger, counters, failure
        self.policy = policy or Policy(ledger, 1)
        self.recorder: Recorder | None = None
        self.timeline: Timeline | None = None
        self._plan = Plan()
        self._silent_steps = 0
        self._expected: tuple[int, I32] | None = None
        self._waiting: I32 | None = None

    def follow(self, policy: Policy) -> None:
        """Another policy over the same ledger from the next step on."""
        self._call_off()
        self.policy, self._expected = policy, None

    def run(self, decoder: Decoder) -> None:
        """Bring the step that was started to its end."""
        in_core = self.in_core(decoder)
        try:
            while (layer := decoder.run()) >= 0:
                if self.recorder is not None:
                    forecast = decoder.forecast(self.recorder.ahead)
                    self.recorder.call(*decoder.choices(layer), decoder.program.gates, forecast)
                if not in_core and not decoder.program.held:
                    self._bring(decoder, layer)
        except self._failure as error:
            raise StorageError(f'{error}; run "d2moe verify" on the model, and check the disk') from None
        if in_core and decoder.program.planned:
            plans, missing_bytes, decide_ns, planes = decoder.program.take_planned()
            c = self.counters
            c.plans += plans
            c.missing_bytes += missing_bytes
            c.decide_seconds += decide_ns / 1e9
            c.planes_missing, c.planes_read = plus(c.planes_missing, planes), plus(c.planes_read, planes)
        self._silent_steps += 1
        if self._silent_steps >= SILENT_STEPS:
            self.hear(decoder)

    def in_core(self, decoder: Decoder) -> bool:
        """Whether the back end plans by itself, which the NumPy twin and the simulator do not."""
        return self.policy.in_core and hasattr(decoder.program, "plan_by")

    def hear(self, decoder: Decoder) -> None:
        """Tell the ledger of the layers that went by with all their experts in memory; it need not know at once."""
        for first_layer, ids, bits in decoder.program.take_notes():
            self.policy.touch(first_layer, ids, bits)
        self._silent_steps = 0

    def _bring(self, decoder: Decoder, layer: int) -> None:
        """Start the reads of a layer that waits, and compute all its waves but the last, which `run` does."""
        begin = time.perf_counter()
        self.hear(decoder)
        self._layer = layer
        c, policy = self.counters, self.policy
        self._call_off()
        ids, bits = decoder.choices(layer)
        if policy.decides:
            asked = bits
            bits, gates = policy.choose(layer, ids, asked, decoder.program.gates)
            if bits is not asked:
                bits = np.minimum(bits, self.ledger.kept[layer, ids])  # a policy need not know what records have
                # Before the core overwrites what was asked; what the width router itself left out counts as 0 bits.
                c.uses -= int(np.count_nonzero((bits == 0) & (asked > 0)))
                decoder.program.choose(np.ascontiguousarray(bits, np.int32), gates)
        self._plan = plan = policy.plan(layer, ids, bits)
        c.plans += 1
        c.missing_bytes += plan.missing_bytes
        self._send(0)
        c.decide_seconds += time.perf_counter() - begin
        if self.timeline is not None:
            self.timeline.decision(begin, layer, plan)
        for index, wave in enumerate(plan.waves[:-1]):
            # The next wave's reads run while this one is computed, unless they need its memory.
            overlap = not self._evicts(index + 1, wave.experts)
            if overlap:
                self._send(index + 1)
            decoder.compute(wave.experts)
            if not overlap:
                self._send(index + 1)
        if policy.ahead:
            self._look_ahead(decoder, layer, ids, int(bits.max()))

    def _look_ahead(self, decoder: Decoder, layer: int, ids: I32, bits: int) -> None:
        """Queue reads for later layers behind this one's, and count how well the last forecast did."""
        c, begin = self.counters, time.perf_counter()
        if self._expected is not None and self._expected[0] == layer and len(self._expected[1]) == len(ids):
            c.forecast += ids.size
            c.forecast_right += int((self._expected[1][:, :, None] == ids[:, None]).any(2).sum())
        forecast = decoder.forecast(self.policy.ahead)
        self._expected = (layer + 1, forecast[:, 0]) if (forecast[:, 0] != NO_FORECAST).all() else None
        wave = self.policy.prefetch(layer, forecast, bits) if bits else None
        c.decide_seconds += time.perf_counter() - begin
        if wave is not None:
            self._move(wave, self.policy.may_wait)
            if self.policy.may_wait:
                self._waiting = wave.read

    def _call_off(self) -> None:
        """Reads that were to wait for an idle disk and have not begun are not made: now there is a demand."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self.experts.cancel(waiting)
            unread = [0] * len(NO_WIDTHS)
            for layer, expert, bits in waiting.tolist():
                width = self.experts.width(layer, expert)
                self.ledger.shrink(layer, expert, width)
                _count(unread, width, bits)
            self.counters.planes_read = plus(self.counters.planes_read, unread, -1)

    def _send(self, index: int) -> None:
        c = self.counters
        c.planes_missing = plus(c.planes_missing, self._move(self._plan.waves[index]))

    def _move(self, wave: Wave, may_wait: bool = False) -> Sequence[int]:
        """Evict and start reading; the planes that are read, by the width that each makes."""
        planes = [0] * len(NO_WIDTHS)
        if len(wave.evict):
            self.experts.evict(wave.evict)
        if len(wave.read):
            for layer, expert, bits in wave.read.tolist():
                _count(planes, self.experts.width(layer, expert), bits)
            self.experts.read(wave.read, may_wait)
            self.counters.planes_read = plus(self.counters.planes_read, planes)
        return planes

    def _evicts(self, index: int, experts: I32) -> bool:
        gone = self._plan.waves[index].evict
        return bool(np.isin(gone[gone[:, 0] == self._layer, 1], experts).any())

    def abandon(self) -> None:
        """A step was broken off: wait for reads on their way, and bring the ledger back to what is really held."""
        self.experts.abandon()
        self.resync()

    def resync(self) -> None:
        ledger = self.ledger
        for layer in range(ledger.layers):
            for expert in range(ledger.experts):
                width = self.experts.width(layer, expert)
                ledger.shrink(layer, expert, width)
                ledger.grow(layer, expert, width)
