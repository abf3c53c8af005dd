"""The engine without weights: its own `Streamer`, policy and ledger over a trace, on a clock that a device profile drives.

Two classes stand in for the compiled core and keep no account of their own beyond what it keeps: `SimulatedExperts` holds
each expert's width and when its read arrives, `Replay` goes through a trace's layer calls and says like `Program` where it
waits. All decisions and counts are the engine's.

The clock: as many reads as the engine has in flight share the device's rate, so that those of a layer arrive late and nearly together;
a read that finds the device idle has a latency, which others hide. A layer's dense part comes before its experts are known; what is there
is computed first, then each expert when it arrives, and a wait is stall.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe.errors import MemoryBudgetError
from d2moe.policy import policy as policies
from d2moe.policy.ledger import Ledger
from d2moe.policy.trace import Call, Step, Trace
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.streamer import Counters, Streamer
from d2moe.simulate.device import Device

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]


class SimulatedExperts:
    """Stands in for the compiled `Experts`: widths, arrivals, and the clock in seconds."""

    def __init__(self, device: Device, ledger: Ledger):
        self.device, self._prefix = device, ledger.prefix_bytes
        self.widths = np.zeros((ledger.layers, ledger.experts), np.int32)
        self.now = self.stall_s = self.compute_s = 0.0
        self.depth = int(device.facts.get("chosen", {}).get("read_depth", EngineConfig.read_depth))
        self._reading: dict[tuple[int, int], float] = {}
        """Seconds of the whole device that reads on their way still need, in the order in which they were asked for."""
        self._idle: dict[tuple[int, int], float] = {}
        self._begun: dict[tuple[int, int], float] = {}
        """The same of reads that wait until nothing else is to be read, and of those that have begun."""
        self._clock = 0.0
        """How far reading has been followed."""
        self._arrived: dict[tuple[int, int], float] = {}
        self.read_bytes = self.reads = self.calls = 0

    def width(self, layer: int, expert: int) -> int:
        return int(self.widths[layer, expert])

    def evict(self, moves: I32) -> None:
        for layer, expert, bits in moves.tolist():
            self.now = max(self.now, self._arrival(layer, expert))  # the slot is not free before its read is done
            self.widths[layer, expert] = min(self.widths[layer, expert], bits)

    def read(self, moves: I32, may_wait: bool = False) -> None:
        self._follow(self.now)
        for layer, expert, bits in moves.tolist():
            have = self.widths[layer, expert]
            if bits <= have:
                continue
            if have:  # one read of an expert at a time
                self.now = max(self.now, self._arrival(layer, expert))
            n_bytes = int(self._prefix[bits] - self._prefix[have])
            if not (self._reading or self._begun or self._idle):
                self._clock = max(self._clock, self.now + self.device.read_latency_s)
            self._arrived.pop((layer, expert), None)
            (self._idle if may_wait else self._reading)[layer, expert] = self.device.read_each_s + n_bytes / self.device.read_bytes_per_s
            self.widths[layer, expert] = bits
            self.read_bytes += n_bytes
            self.reads += 1

    def compute(self, layer: int, groups: list[tuple[int, int, int]]) -> None:
        """Compute (expert, bits, tokens): those that are there, then each as it arrives."""
        arrivals = {expert: self._arrival(layer, expert) for expert, _, _ in groups}
        for expert, bits, tokens in sorted(groups, key=lambda g: arrivals[g[0]]):
            wait = arrivals[expert] - self.now
            if wait > 0:
                self.stall_s += wait
                self.now += wait
            spent = self.device.expert_seconds(bits, tokens)
            self.compute_s += spent
            self.now += spent

    def _arrival(self, layer: int, expert: int) -> float:
        """When the expert's last read is done; nothing is asked for before it has been waited for."""
        key = (layer, expert)
        if key in self._idle:
            self._reading[key] = self._idle.pop(key)
        while key in self._reading or key in self._begun:
            self._follow(float("inf"), key)
        return self._arrived.get(key, 0.0)

    def cancel(self, moves: I32) -> None:
        self._follow(self.now)
        for layer, expert, _ in moves.tolist():
            if self._idle.pop((layer, expert), None) is not None:  # what waits is a base where nothing was
                self.read_bytes -= int(self._prefix[self.widths[layer, expert]])
                self.reads -= 1
                self.widths[layer, expert] = 0

    def _follow(self, until: float, last: tuple[int, int] | None = None) -> None:
        """Go on reading until then, or until `last` is there: the first `depth` reads get equal parts of the device."""
        while self._clock < until and (self._reading or self._begun or self._idle):
            if not self._reading and not self._begun:
                key = next(iter(self._idle))
                self._begun[key] = self._idle.pop(key)
            active = [(of, key) for of in (self._begun, self._reading) for key in of][: self.depth]
            span = min(min(of[key] for of, key in active), (until - self._clock) / len(active))
            self._clock += span * len(active)
            for of, key in active:
                of[key] -= span
                if of[key] <= 1e-15:
                    del of[key]
                    self._arrived[key] = self._clock
            if last is not None and last not in self._reading and last not in self._begun:
                return

    def abandon(self) -> None:
        """Nothing is on its way that would have to be waited for."""


class Replay:
    """Stands in for the decoder and its `Program`: goes through a step's layer calls and waits where `Program` would."""

    def __init__(self, experts: SimulatedExperts, dense_layers: int, when: str):
        self.experts, self.when = experts, when
        self.program = self
        self.wanted_bytes = self.use_bits = 0
        self.held = False
        self._dense_layers = max(dense_layers, 1)
        self._notes: list[tuple[int, list[I32], list[I32]]] = []
        self._noting = self._waits = False
        self._index = 0
        self._calls: list[Call] = []

    def start(self, step: Step) -> None:
        self._step, self._calls, self._index = step, step.calls, 0
        self._noting = self._waits = False
        self.experts.now += self.experts.device.dense_seconds(step.tokens) / (self._dense_layers + 1)  # embedding and head

    def run(self) -> int:
        e = self.experts
        while True:
            if self._waits:
                self.compute(None)
                self._waits = False
                self._index += 1
                e.calls += 1
            if self._index == len(self._calls):
                return -1
            call = self._calls[self._index]
            e.now += e.device.dense_seconds(self._step.tokens) / (self._dense_layers + 1)
            if len(call.ids) < self._step.tokens:
                self._noting = False  # a note has one number of tokens
            self._bits, self._done, self._waits = call.bits, set[int](), True
            self.wanted_bytes += self._wanted(call.bits)
            self.use_bits += int(call.bits.sum())
            self.held = self.when != "decide" and bool((e.widths[call.layer, call.ids] >= call.bits).all())
            if self.held:
                self._note(call)
            else:
                self._noting = False
                e.now += e.device.decide_s
                return call.layer

    def _note(self, call: Call) -> None:
        if not self._noting:
            self._notes.append((call.layer, [], []))
        self._noting = True
        self._notes[-1][1].append(call.ids)
        self._notes[-1][2].append(call.bits)

    def take_notes(self) -> list[tuple[int, I32, I32]]:
        self._noting = False
        notes, self._notes = self._notes, []
        return [(first, np.stack(ids), np.stack(bits)) for first, ids, bits in notes]

    def choices(self, layer: int) -> tuple[I32, I32]:
        return self._calls[self._index].ids, self._bits

    @property
    def gates(self) -> F32:
        return self._calls[self._index].gates

    def choose(self, bits: I32, gates: F32 | None = None) -> None:
        self.wanted_bytes += self._wanted(bits) - self._wanted(self._bits)
        self.use_bits += int(bits.sum()) - int(self._bits.sum())
        self._bits = bits

    def forecast(self, ahead: int) -> I32:
        return self._calls[self._index].forecast[:, :ahead]

    def compute(self, experts: I32 | None) -> None:
        call = self._calls[self._index]
        chosen = np.unique(call.ids) if experts is None else experts
        groups = []
        for expert in chosen.tolist():
            if expert not in self._done:
                self._done.add(expert)
                widths = self._bits[call.ids == expert]
                groups += [(expert, int(b), int((widths == b).sum())) for b in np.unique(widths[widths > 0])]
        self.experts.compute(call.layer, groups)

    def _wanted(self, bits: I32) -> int:
        widest = np.zeros(self.experts.widths.shape[1], np.int32)
        np.maximum.at(widest, self._calls[self._index].ids.reshape(-1), bits.reshape(-1))
        return int(self.experts._prefix[widest].sum())


@dataclass(frozen=True)
class Result:
    """What a replay gave. Rates are of decode steps (one token per sequence); `total` counts all steps."""

    policy: str
    memory_bytes: int
    tokens_per_s: float
    prompt_tokens_per_s: float
    hit_rate: float
    bytes_per_token: float
    stall_share: float
    average_bits: float
    forecast_right: float | None
    bound_share: float
    """The bound max(reading, computing) over the time taken."""
    seconds: float
    total: Counters


def simulate(
    trace: Trace,
    device: Device,
    memory_bytes: int,
    *,
    policy: str = "hebf",
    bits: int | None = None,
    kept: npt.NDArray[np.int64] | None = None,
    learn: Trace | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Replay `trace` with `memory_bytes` for experts; `bits` replaces the widths that were asked for, `kept` int64 [layers, experts] is
    what records have, `learn` is for policies that learn beforehand.

    MemoryBudgetError if the memory does not hold one expert, ConfigError for a policy that does not exist.
    """
    if bits is not None or kept is not None:
        trace = trace.asking(trace.arrays["bits"] if bits is None else bits, kept)
    m = trace.meta
    ledger = Ledger(m.layers, m.experts, m.base_bytes, m.plane_bytes, memory_bytes, kept)
    widest = int(trace.arrays["bits"].max(initial=2))
    if memory_bytes < ledger.prefix_bytes[widest]:
        raise MemoryBudgetError(
            f"a memory of {memory_bytes:,} bytes does not hold one expert of {widest} bits, {int(ledger.prefix_bytes[widest]):,} bytes"
        )
    made = policies.make(policy, ledger, m.top_k, learn=learn, future=trace)
    experts = SimulatedExperts(device, ledger)
    replay: Any = Replay(experts, m.layers, "decide" if made.decides else "missing")
    counters = Counters()
    streamer = Streamer(experts, ledger, counters, RuntimeError, made)
    decode = _Part()
    prompt = _Part()
    for number, step in enumerate(trace):
        before, begin = counters.snapshot(), experts.now
        replay.start(step)
        streamer.run(replay)
        _count(counters, experts, replay, step)
        counters.step_seconds = experts.now
        (decode if step.tokens == step.sequences else prompt).add(step.tokens, experts.now - begin, counters - before)
        if progress is not None:
            progress(number + 1, trace.steps)
    part = decode if decode.tokens else prompt
    bound = max(part.read_bytes / device.read_bytes_per_s, part.compute_s)
    return Result(
        policy=policy,
        memory_bytes=memory_bytes,
        tokens_per_s=decode.rate,
        prompt_tokens_per_s=prompt.rate,
        hit_rate=1 - part.missing / part.wanted if part.wanted else 1.0,
        bytes_per_token=part.read_bytes / max(part.tokens, 1),
        stall_share=part.stall_s / part.seconds if part.seconds else 0.0,
        average_bits=counters.average_bits,
        forecast_right=counters.forecast_right / counters.forecast if counters.forecast else None,
        bound_share=bound / part.seconds if part.seconds else 1.0,
        seconds=experts.now,
        total=counters,
    )


@dataclass
class _Part:
    """Sums over the steps of one kind."""

    tokens: int = 0
    seconds: float = 0.0
    read_bytes: int = 0
    wanted: int = 0
    missing: int = 0
    stall_s: float = 0.0
    compute_s: float = 0.0

    def add(self, tokens: int, seconds: float, used: Counters) -> None:
        self.tokens += tokens
        self.seconds += seconds
        self.read_bytes += used.read_bytes
        self.wanted += used.wanted_bytes
        self.missing += used.missing_bytes
        self.stall_s += used.stall_seconds
        self.compute_s += seconds - used.stall_seconds

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def _count(counters: Counters, experts: SimulatedExperts, replay: Any, step: Step) -> None:
    """What `Engine.step` takes from the core after a step."""
    counters.read_bytes, counters.reads = experts.read_bytes, experts.reads
    counters.wanted_bytes, counters.use_bits = replay.wanted_bytes, replay.use_bits
    counters.stall_seconds, counters.compute_seconds = experts.stall_s, experts.compute_s
    counters.steps += 1
    counters.tokens += step.tokens
    for call in step.calls:
        counters.uses += call.ids.size
