"""What a policy is, and how one is found by name.

A policy decides over a ledger: which planes are read and evicted (`plan`), how wide the choices of a layer are computed
(`choose`), what is read before it is asked for (`prefetch`). It never looks at the clock or at what has arrived, so the
engine and the simulator get the same answers. Each has a file of its own, whose docstring names source and deviations.
"""

from __future__ import annotations

from importlib import import_module
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from d2moe.errors import ConfigError
from d2moe.policy import POLICIES, hebf
from d2moe.policy.ledger import Ledger
from d2moe.policy.plan import Plan, Wave
from d2moe.policy.trace import NO_FORECAST, Trace

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def policy_class(name: str) -> type[Policy]:
    """The class of this name; ConfigError if there is none."""
    if name not in POLICIES:
        raise ConfigError(f"policy is {name!r}, expected one of {', '.join(POLICIES)}")
    module, kind = POLICIES[name].split(":")
    found: type[Policy] = getattr(import_module(module), kind)
    return found


def make(name: str, ledger: Ledger, top_k: int, *, learn: Trace | None = None, future: Trace | None = None) -> Policy:
    """The policy of this name over `ledger`; `learn` is a trace to learn from, `future` what will be replayed (simulation).

    ConfigError for a name that does not exist, or a policy that needs the future where there is none.
    """
    made = policy_class(name)(ledger, top_k)
    if made.needs_future:
        if future is None:
            raise ConfigError(f'policy {name} must know the future, so it exists in simulation only; use "d2moe simulate"')
        made.foresee(future)
    if learn is not None:
        if not made.learns:
            raise ConfigError(f"policy {name} learns nothing beforehand; leave the trace to learn from out")
        learn.check(ledger.layers, ledger.experts, top_k, "the model")
        made.learn(learn)
    return made


class Policy:
    """Hottest-expert-bit-first over the ledger's own eviction (`hebf.py`, `ledger.py`); what others derive from."""

    name: ClassVar[str] = "hebf"
    decides: ClassVar[bool] = False
    """Whether it must see every layer call before it is computed. Else only calls with something missing come to Python."""
    ahead: ClassVar[int] = 0
    """How many next layers' routers are applied to this layer's input for it."""
    may_wait: ClassVar[bool] = False
    """Whether what it reads ahead may wait until nothing else is to be read."""
    learns: ClassVar[bool] = False
    """Whether a recorded trace is of use to it beforehand."""
    needs_future: ClassVar[bool] = False

    def __init__(self, ledger: Ledger, top_k: int):
        self.ledger, self.top_k = ledger, top_k
        ledger.takes_turns = top_k == ledger.experts

    def learn(self, trace: Trace) -> None:
        """Take what can be learned beforehand from a recorded run."""

    def foresee(self, trace: Trace) -> None:
        """Told before a replay what will be replayed."""

    def touch(self, first_layer: int, ids: I32, bits: I32) -> None:
        """Layer calls that went by with everything in memory: ids int32 [layers, tokens, top_k], bits likewise."""
        self.ledger.touch(first_layer, ids, bits)

    def choose(self, layer: int, ids: I32, bits: I32, gates: F32) -> tuple[I32, F32 | None]:
        """Widths [tokens, top_k] that a layer call is computed at, 0 leaving a choice out, and its gates where they change."""
        return bits, None

    def plan(self, layer: int, ids: I32, bits: I32) -> Plan:
        """The layer call's plan. Raises MemoryBudgetError if the limit does not hold even one expert."""
        return hebf.plan(self.ledger, layer, ids, bits)

    @property
    def in_core(self) -> bool:
        """Whether the compiled core may plan by itself, because this is nothing but `hebf.plan`."""
        return type(self) is Policy

    def prefetch(self, layer: int, forecast: I32, bits: int) -> Wave | None:
        """What to read for later layers after this layer's own reads: forecast int32 [tokens, ahead, top_k]."""
        return None


class WholeExperts(Policy):
    """A policy that evicts whole experts, the one of least `worth` first, as systems do that keep one copy per expert."""

    def __init__(self, ledger: Ledger, top_k: int):
        super().__init__(ledger, top_k)
        self.calls = 0
        self.last = np.full((ledger.layers, ledger.experts), -1, np.int64)
        """Number of the layer call that last wanted each expert."""
        self.pinned: set[tuple[int, int]] = set()
        """(layer, expert) that no read ahead may evict; a layer's own reads take them last."""
        self._reading_ahead = False
        ledger.rank = self._rank

    def worth(self, layer: int) -> F64:
        """What each expert is worth keeping [layers, experts] while `layer` is being planned; here its last use."""
        return self.last.astype(np.float64)

    def _rank(self, layer: int) -> F64:
        worth = self.worth(layer)
        for pin in self.pinned:
            worth[pin] = np.inf if self._reading_ahead else 1e300
        return worth

    def use(self, layer: int, ids: I32, bits: I32) -> None:
        """Count one layer call."""
        self.last[layer, ids[bits > 0]] = self.calls
        self.calls += 1

    def touch(self, first_layer: int, ids: I32, bits: I32) -> None:
        super().touch(first_layer, ids, bits)  # for heat, and for a policy that may follow
        for offset, (of_layer, widths) in enumerate(zip(ids, bits, strict=True)):
            self.use(first_layer + offset, of_layer, widths)

    def plan(self, layer: int, ids: I32, bits: I32) -> Plan:
        self.use(layer, ids, bits)
        return hebf.define(self.ledger, layer, ids, bits)

    def read_ahead(self, layer: int, target: int, experts: list[int], bits: int) -> Wave | None:
        """A wave that brings `experts` of layer `target` to `bits`, or what their records have, evicting for it what is worth
        less; those that fit, in order.

        This layer's experts and those of the target that are there stay.
        """
        ledger = self.ledger
        wanted = ledger.lack(target, experts, bits)
        here = {(layer, int(e)) for e in np.flatnonzero(self.last[layer] == self.calls - 1)}
        pinned, self.pinned, self._reading_ahead = self.pinned, self.pinned | here, True
        try:
            while wanted:
                total = sum(ledger.prefix[w] - ledger.prefix[ledger.width[target, e]] for e, w in wanted.items())
                freed = ledger.make_room(total, target, set(experts))
                if freed is not None:
                    break
                wanted.popitem()
        finally:
            self.pinned, self._reading_ahead = pinned, False
        if not wanted:
            return None
        assert freed is not None
        for e, w in wanted.items():
            ledger.grow(target, e, w)
        return Wave.of(freed, [(target, e, w) for e, w in wanted.items()], total)


def mass_before(gates: F32) -> F64:
    """float64 [tokens, top_k]: the share of a token's gate mass that its heavier choices have together."""
    order = np.argsort(-gates, axis=1, kind="stable")
    falling = np.take_along_axis(gates, order, 1).astype(np.float64)
    share = falling / np.maximum(falling.sum(1, keepdims=True), 1e-30)
    before: F64 = np.empty_like(share)
    np.put_along_axis(before, order, share.cumsum(1) - share, 1)
    return before


def named(forecast: I32, step: int) -> list[int]:
    """The experts that the router of the `step`-th next layer names (1 is the next), most wanted first, each once."""
    if not forecast.size or forecast.shape[1] < step:
        return []
    ids = forecast[:, step - 1].reshape(-1)
    found, count = np.unique(ids[ids != NO_FORECAST], return_counts=True)
    return [int(e) for e in found[np.argsort(-count, kind="stable")]]
