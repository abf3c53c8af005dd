"""The one bookkeeping of residency: how many bits of each expert are in memory, under a byte limit.

Planes of an expert are resident as a prefix, so one small integer per expert says all. What a plane is worth is the demand that its
layer's next call will probably have for it: the share of tokens that wanted it over the long run, decayed, and a part of the share in the
layer's last call, because what a token wanted the next one often wants again. By nesting, whoever wants a plane wants all lower
ones, so a lower plane is never worth less than a higher one: evicting the least valuable plane first, the higher one among equals, is the
paper's "highest bit first, base last" (arXiv 2504.15299, section on the memory budget) and keeps whole experts
together when all tokens ask for the same width.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection

import numpy as np
import numpy.typing as npt

from d2moe.types import BASE_BITS, MAX_BITS

I32 = npt.NDArray[np.int32]
F64 = npt.NDArray[np.float64]

HALF_LIFE = 64
"""Calls of its layer after which a demand counts half in the long run (docs/log.md)."""
LAST_CALL = 0.2
"""What the share of tokens in the last call counts beside the one of the long run."""
SEGMENTS = MAX_BITS - BASE_BITS + 1
PLACES = np.arange(SEGMENTS, dtype=np.int32)
NOTED_CALLS = 64
"""Runs of layer calls whose demand waits to be worked into the values; bounds what they hold."""
TURN = 1e-6
"""Breaks ties between layers that take turns."""


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
        self._demand = np.zeros((layers, experts, SEGMENTS))
        self._tokens = np.zeros((layers, 1, 1))
        """Decayed numbers of tokens: those that wanted each plane, and all."""
        self._last, self._last_tokens = np.zeros_like(self._demand), np.ones_like(self._tokens)
        """The same of the last call alone."""
        self._worth = np.zeros((layers, experts, SEGMENTS))
        self._noted: list[tuple[int, I32, I32]] = []
        self._queues: list[list[tuple[float, int]] | None] = [None] * layers
        """Of each layer the (worth, place) of its resident planes, the one to go first at the end; None where it has to be sorted anew."""
        self.takes_turns = False
        """Whether every step wants every expert, layer by layer, as of a dense model: the latest use is then the farthest next one."""
        self.rank: Callable[[int], F64] | None = None
        """A policy's own order: what each expert [layers, experts] is worth while a layer is planned. The least goes first, whole;
        infinite stays."""

    def touch(self, first_layer: int, ids: I32, bits: I32) -> None:
        """Note the demand of the layer calls `ids` int32 [layers, tokens, top_k] of the layers from `first_layer` on, at
        widths `bits` of that shape; both are kept and must not change. Worked into the values when they are next asked
        for: most steps find all in memory and never ask."""
        self._noted.append((first_layer, ids, bits))
        if len(self._noted) >= NOTED_CALLS:
            self._value_noted()

    def _value_noted(self) -> None:
        """Work the noted calls into what the planes of their layers are worth."""
        fade = 2.0 ** (-1 / HALF_LIFE)
        parts: set[tuple[int, int]] = set()
        for first, ids, bits in self._noted:
            layers, tokens, _ = ids.shape
            expert = ids + (np.arange(layers, dtype=np.int32) * self.experts)[:, None, None]
            # Who wants a plane wants all lower ones; the width router and some policies leave choices out, which have 0 bits.
            place = (expert * SEGMENTS)[..., None] + PLACES
            wanted = np.bincount(place[(bits - BASE_BITS)[..., None] >= PLACES], minlength=layers * self.experts * SEGMENTS)
            part = slice(first, first + layers)
            demand, seen = self._demand[part], self._tokens[part]
            demand *= fade
            demand += wanted.reshape(demand.shape)
            seen *= fade
            seen += tokens
            self._last[part], self._last_tokens[part] = wanted.reshape(demand.shape), tokens
            self._queues[part] = [None] * layers
            parts.add((first, first + layers))
        self._noted.clear()
        for part in (slice(*ends) for ends in parts):  # mostly one: all layers
            self._worth[part] = self._demand[part] / self._tokens[part] + (LAST_CALL / self._last_tokens[part]) * self._last[part]

    def heat(self) -> npt.NDArray[np.float64]:
        """float64 [layers, experts]: the share of recent tokens that wanted each expert, the latest counting most."""
        self._value_noted()
        share: npt.NDArray[np.float64] = self._demand[..., 0] / np.maximum(self._tokens[..., 0], 1)
        return share

    def grow(self, layer: int, expert: int, bits: int) -> None:
        """The expert now has (or is being read up to) `bits`."""
        if bits > self.width[layer, expert]:
            self._set(layer, expert, bits)
            self._queues[layer] = None

    def shrink(self, layer: int, expert: int, bits: int) -> None:
        """Only `bits` of the expert stay."""
        if bits < self.width[layer, expert]:
            self._set(layer, expert, bits)
            self._queues[layer] = None

    def _set(self, layer: int, expert: int, bits: int) -> None:
        self.used_bytes += int(self.prefix_bytes[bits] - self.prefix_bytes[self.width[layer, expert]])
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
        self._queues[pinned_layer] = self._queue(pinned_layer, pinned)
        queues = [self._queue(layer) if queue is None else queue for layer, queue in enumerate(self._queues)]
        turns = [TURN * ((pinned_layer - layer) % self.layers) if self.takes_turns else 0.0 for layer in range(self.layers)]
        heads = [(queue[-1][0] + turns[layer], layer) for layer, queue in enumerate(queues) if queue]
        heapq.heapify(heads)
        out: dict[tuple[int, int], int] = {}
        while self.used_bytes + n_bytes > self.limit_bytes:
            layer = heads[0][1]
            expert, segment = divmod(queues[layer].pop()[1], SEGMENTS)
            bits = segment + BASE_BITS - 1 if segment else 0
            self._set(layer, expert, bits)
            out[layer, expert] = bits
            if queues[layer]:
                heapq.heapreplace(heads, (queues[layer][-1][0] + turns[layer], layer))
            else:
                heapq.heappop(heads)
        self._queues[:] = queues
        self._queues[pinned_layer] = None  # the pinned ones are missing in it
        return out

    def _queue(self, layer: int, without: Collection[int] = ()) -> list[tuple[float, int]]:
        """(worth, place) of the layer's resident planes, the least valuable last and higher planes after lower ones."""
        held = np.arange(SEGMENTS) <= (self.width[layer] - BASE_BITS)[:, None]
        if without:
            held[list(without)] = False
        places = np.flatnonzero(held)
        worth = self._worth[layer].reshape(-1)[places]
        order = np.argsort(-worth, kind="stable")
        return list(zip(worth[order].tolist(), places[order].tolist(), strict=True))

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
