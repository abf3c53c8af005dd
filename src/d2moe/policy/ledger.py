"""The one bookkeeping of residency: how many bits of each expert are in memory, under a byte limit.

Planes of an expert are resident as a prefix, so one small integer per expert says all. What a plane is worth is the demand that its
layer's next call will probably have for it: the share of tokens that wanted it over the long run, decayed, and a part of the share in the
layer's last call, because what a token wanted the next one often wants again. By nesting, whoever wants a plane wants all lower
ones, so a lower plane is never worth less than a higher one: evicting the least valuable plane first, the higher one among equals, is the
paper's "highest bit first, base last" (arXiv 2504.15299, section on the memory budget) and keeps whole experts
together when all tokens ask for the same width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from d2moe.kernels import native
from d2moe.types import BASE_BITS, MAX_BITS

I32 = npt.NDArray[np.int32]
F64 = npt.NDArray[np.float64]

HALF_LIFE = 64
"""Calls of its layer after which a demand counts half in the long run (docs/log.md)."""
FADE = 2.0 ** (-1 / HALF_LIFE)
LAST_CALL = 0.2
"""What the share of tokens in the last call counts beside the one of the long run."""
SEGMENTS = MAX_BITS - BASE_BITS + 1
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
        self.prefix = [0, 0, *(base_bytes + plane_bytes * i for i in range(SEGMENTS))]
        self.prefix_bytes = np.array(self.prefix, np.int64)
        """Bytes of an expert by its width in bits, as a list and as an array."""
        planes, calls = (layers, experts, SEGMENTS), layers
        self._demand = np.zeros(planes), np.zeros(calls), np.zeros(planes), np.ones(calls), np.zeros(planes)
        """Decayed numbers of tokens, those that wanted each plane, and all; the same of the last call alone; what each plane is worth."""
        self._noted: list[tuple[int, I32, I32]] = []
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
        """Work the noted calls into what the planes of their layers are worth: demand and numbers of tokens fade by a call, then
        the call's own are added; worth = demand / tokens + LAST_CALL * the call's demand / its tokens. Who wants a plane wants
        all lower ones; choices of 0 bits, which the width router and some policies leave out, want none."""
        for first, ids, bits in self._noted:
            native.value(*self._demand, first, ids, bits, FADE, LAST_CALL)
        self._noted.clear()

    def heat(self) -> npt.NDArray[np.float64]:
        """float64 [layers, experts]: the share of recent tokens that wanted each expert, the latest counting most."""
        self._value_noted()
        share: npt.NDArray[np.float64] = self._demand[0][..., 0] / np.maximum(self._demand[1][:, None], 1)
        return share

    def grow(self, layer: int, expert: int, bits: int) -> None:
        """The expert now has (or is being read up to) `bits`."""
        if bits > self.width[layer, expert]:
            self._set(layer, expert, bits)

    def shrink(self, layer: int, expert: int, bits: int) -> None:
        """Only `bits` of the expert stay."""
        if bits < self.width[layer, expert]:
            self._set(layer, expert, bits)

    def _set(self, layer: int, expert: int, bits: int) -> None:
        self.used_bytes += self.prefix[bits] - self.prefix[self.width[layer, expert]]
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
        widths = self.width[pinned_layer].tolist()
        kept = sum(self.prefix[widths[e]] for e in pinned)
        if self.used_bytes - kept < short:
            return None
        if self.rank is not None:
            return self._evict_whole(n_bytes, self.rank(pinned_layer), pinned_layer, pinned)
        # The least (worth, layer) first; of equal planes in a layer the last one, so a higher plane before those below it.
        turn = TURN if self.takes_turns else 0.0
        rows, freed = native.evict(*self._demand, self.width, self.prefix_bytes, pinned_layer, list(pinned), short, turn)
        self.used_bytes -= freed
        return {(layer, expert): bits for layer, expert, bits in rows.tolist()}

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
