"""The one bookkeeping of residency: how many bits of each expert are in memory, under a byte limit.

Planes of an expert are resident as a prefix, so one small integer per expert says all. What a plane is worth is its
decayed demand: every token that wants a plane adds 2**(now/half-life) to its value, kept as a base-2 logarithm so that
older demands fade without touching the table. By nesting, whoever wants a plane wants all lower ones, so a lower plane
is never worth less than a higher one: evicting the least valuable plane first, the higher one among equals, is the
paper's "highest bit first, base last" (arXiv 2504.15299, section on the memory budget) and keeps whole experts
together when all tokens ask for the same width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from d2moe.types import BASE_BITS, MAX_BITS

I32 = npt.NDArray[np.int32]
F64 = npt.NDArray[np.float64]

HALF_LIFE = 8
"""Turns through all layers after which a demand counts half (docs/log.md)."""
SEGMENTS = MAX_BITS - BASE_BITS + 1
VICTIM_BATCH = 128
LEAST_BATCH = 8
"""Victims that are taken at once although what was touched since may be worth less."""
NOTED_CALLS = 64
"""Runs of layer calls whose demand waits to be worked into the values; bounds what they hold."""


class Ledger:
    """Residency of `layers` × `experts` experts. `base_bytes` and `plane_bytes` are what a slot of each kind holds."""

    def __init__(self, layers: int, experts: int, base_bytes: int, plane_bytes: int, limit_bytes: int):
        self.layers, self.experts = layers, experts
        self.base_bytes, self.plane_bytes, self.limit_bytes = base_bytes, plane_bytes, limit_bytes
        self.width = np.zeros((layers, experts), np.int32)
        self.used_bytes = 0
        self.prefix_bytes = np.array(
            [0, 0, *(base_bytes + plane_bytes * i for i in range(SEGMENTS))], np.int64
        )  # by width in bits
        self._value = np.full((layers, experts, SEGMENTS), -np.inf)
        self._now = 0
        self._half_life = HALF_LIFE * layers
        self._noted: list[tuple[int, I32, I32]] = []
        self._victims: deque[tuple[int, float]] = deque()
        self.takes_turns = False
        """Whether every step wants every expert, layer by layer, as of a dense model: the latest use is then the farthest next one."""
        self.rank: Callable[[int], F64] | None = None
        """A policy's own order: what each expert [layers, experts] is worth while a layer is planned. The least goes first, whole;
        infinite stays."""
        # Among equal values the higher plane goes first.
        self._tie = np.arange(SEGMENTS) * -1e-9

    def touch(self, first_layer: int, ids: I32, bits: I32) -> None:
        """Note the demand of the layer calls `ids` int32 [layers, tokens, top_k] of the layers from `first_layer` on, at
        widths `bits` of that shape; both are kept and must not change. Worked into the values when they are next asked
        for: most steps find all in memory and never ask."""
        if self.rank is not None:  # the policy keeps its own account
            return
        self._noted.append((first_layer, ids, bits))
        if len(self._noted) >= NOTED_CALLS:
            self._value_noted()

    def _value_noted(self) -> None:
        """Add 2**(now/half-life) of each noted call to the values of the planes it wanted."""
        if not self._noted:
            return
        keys, widths, nows = [], [], []
        for first, ids, bits in self._noted:
            layers, tokens, top_k = ids.shape
            number = np.repeat(np.arange(layers), tokens * top_k)
            key, width = (first + number) * self.experts + ids.reshape(-1), bits.reshape(-1)
            keys.append(key)
            widths.append(width)
            nows.append(self._now + 1 + number)
            self._now += layers
        self._noted.clear()
        planes, place = np.unique(np.concatenate(keys), return_inverse=True)
        place = place * SEGMENTS + np.concatenate(widths) - BASE_BITS
        age = (np.concatenate(nows) - self._now) / self._half_life
        weight = np.bincount(place, np.exp2(age), len(planes) * SEGMENTS).reshape(-1, SEGMENTS)
        weight = weight[:, ::-1].cumsum(axis=1)[:, ::-1]  # who wants a plane wants all lower ones
        values = self._value.reshape(-1, SEGMENTS)
        with np.errstate(divide="ignore"):
            values[planes] = np.logaddexp2(values[planes], self._now / self._half_life + np.log2(weight))

    def heat(self) -> npt.NDArray[np.float64]:
        """float64 [layers, experts]: the share of recent steps that wanted each expert, the latest counting most."""
        self._value_noted()
        # What an expert that every step wants comes to.
        full = 1 / (1 - 2.0 ** (-1 / HALF_LIFE))
        share: npt.NDArray[np.float64] = np.exp2(self._value[..., 0] - self._now / self._half_life) / full
        return share

    def grow(self, layer: int, expert: int, bits: int) -> None:
        """The expert now has (or is being read up to) `bits`."""
        have = self.width[layer, expert]
        if bits > have:
            self.used_bytes += int(self.prefix_bytes[bits] - self.prefix_bytes[have])
            self.width[layer, expert] = bits

    def shrink(self, layer: int, expert: int, bits: int) -> None:
        """Only `bits` of the expert stay."""
        have = self.width[layer, expert]
        if bits < have:
            self.used_bytes -= int(self.prefix_bytes[have] - self.prefix_bytes[bits])
            self.width[layer, expert] = bits

    def make_room(self, n_bytes: int, pinned_layer: int, pinned: set[int]) -> dict[tuple[int, int], int] | None:
        """Shrink the least valuable experts until `n_bytes` more fit; returns {(layer, expert): bits that stay}.

        Experts `pinned` of `pinned_layer` are kept. None if even evicting all others would not do (nothing changed
        then).
        """
        short = self.used_bytes + n_bytes - self.limit_bytes
        if short <= 0:
            return {}
        self._value_noted()
        kept = sum(int(self.prefix_bytes[self.width[pinned_layer, e]]) for e in pinned)
        if self.used_bytes - kept < short:
            return None
        if self.rank is not None:
            return self._evict_whole(n_bytes, self.rank(pinned_layer), pinned_layer, pinned)
        out: dict[tuple[int, int], int] = {}
        if self.takes_turns:
            self._victims.clear()  # each layer call turns the order
        while self.used_bytes + n_bytes > self.limit_bytes:
            layer, expert, segment = self._next_victim(pinned_layer, pinned)
            bits = segment + BASE_BITS - 1 if segment else 0
            self.shrink(layer, expert, bits)
            out[layer, expert] = bits
        return out

    def _evict_whole(
        self, n_bytes: int, worth: F64, pinned_layer: int, pinned: set[int]
    ) -> dict[tuple[int, int], int] | None:
        worth = np.where(self.width > 0, worth, np.inf)
        worth[pinned_layer, list(pinned)] = np.inf
        if self.prefix_bytes[self.width[np.isfinite(worth)]].sum() < self.used_bytes + n_bytes - self.limit_bytes:
            return None
        out: dict[tuple[int, int], int] = {}
        for flat in np.argsort(worth, axis=None, kind="stable").tolist():
            if self.used_bytes + n_bytes <= self.limit_bytes:
                break
            layer, expert = divmod(flat, self.experts)
            self.shrink(layer, expert, 0)
            out[layer, expert] = 0
        return out

    def _next_victim(self, pinned_layer: int, pinned: set[int]) -> tuple[int, int, int]:
        """The least valuable resident plane that is not pinned; candidates are found a batch at a time."""
        for fresh in range(3):
            while self._victims:
                flat, value = self._victims.popleft()
                layer, rest = divmod(flat, self.experts * SEGMENTS)
                expert, segment = divmod(rest, SEGMENTS)
                resident = self.width[layer, expert] - BASE_BITS == segment
                if resident and self._value[layer, expert, segment] == value:
                    if layer == pinned_layer and expert in pinned:
                        continue
                    return layer, expert, segment
            worth = self._value + self._tie
            if self.takes_turns:  # of equal demand, values fall with the calls since the last use: let them rise as much
                age = (pinned_layer - np.arange(self.layers)) % self.layers
                worth += (2 * age / self._half_life)[:, None, None]
            key = np.where(np.arange(SEGMENTS) <= (self.width - BASE_BITS)[..., None], worth, np.inf)
            if fresh:
                key[pinned_layer, list(pinned)] = np.inf
            flat_key = key.reshape(-1)
            count = min(VICTIM_BATCH if fresh < 2 else flat_key.size, flat_key.size)
            order = np.argpartition(flat_key, count - 1)[:count]
            order = order[np.argsort(flat_key[order], kind="stable")]
            values = self._value.reshape(-1)
            # What is touched later will be worth at least a demand of now, so below that the order stays right.
            safe = int(np.searchsorted(flat_key[order], self._now / self._half_life))
            order = order[: max(safe, LEAST_BATCH)] if fresh < 2 else order
            self._victims.extend((int(i), float(values[i])) for i in order if np.isfinite(flat_key[i]))
        raise AssertionError("make_room checked that there are victims")
