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
TURN = 1e-6
"""Breaks ties between layers that take turns."""


class Ledger:
    """Residency of `layers` × `experts` experts. `base_bytes` and `plane_bytes` are what a slot of each kind holds.

    The compiled core keeps and changes it (`core`, csrc/ledger.h), so that a step can be planned without Python.
    """

    def __init__(
        self, layers: int, experts: int, base_bytes: int, plane_bytes: int, limit_bytes: int,
        kept: npt.NDArray[np.int64] | None = None,
    ):  # fmt: skip
        self.layers, self.experts = layers, experts
        self.kept = np.full((layers, experts), MAX_BITS) if kept is None else kept
        """Bits that each expert's record has, int64 [layers, experts]: nobody can ask for more."""
        self.base_bytes, self.plane_bytes = base_bytes, plane_bytes
        self.core = native.Ledger(layers, experts, base_bytes, plane_bytes, limit_bytes, FADE, LAST_CALL)
        self.width: I32 = self.core.width
        """Bits of each expert that are in memory or on their way, int32 [layers, experts]; changed by the methods below only."""
        self.prefix = [0, 0, *(base_bytes + plane_bytes * i for i in range(SEGMENTS))]
        self.prefix_bytes = np.array(self.prefix, np.int64)
        """Bytes of an expert by its width in bits, as a list and as an array."""
        self.rank: Callable[[int], F64] | None = None
        """A policy's own order: what each expert [layers, experts] is worth while a layer is planned. The least goes first, whole;
        infinite stays."""

    @property
    def used_bytes(self) -> int:
        return int(self.core.used_bytes)

    @property
    def limit_bytes(self) -> int:
        return int(self.core.limit_bytes)

    @limit_bytes.setter
    def limit_bytes(self, n_bytes: int) -> None:
        self.core.limit_bytes = n_bytes

    @property
    def takes_turns(self) -> bool:
        """Whether every step wants every expert, layer by layer, as of a dense model: the latest use is then the farthest next one."""
        return bool(self.core.turn > 0)

    @takes_turns.setter
    def takes_turns(self, on: bool) -> None:
        self.core.turn = TURN if on else 0.0

    def touch(self, first_layer: int, ids: I32, bits: I32) -> None:
        """Note the demand of the layer calls `ids` int32 [layers, tokens, top_k] of the layers from `first_layer` on, at
        widths `bits` of that shape. Worked into the values when they are next asked for, as most steps find all in memory and never
        ask: demand and numbers of tokens fade by a call, then
        the call's own are added; worth = demand / tokens + LAST_CALL * the call's demand / its tokens. Who wants a plane wants
        all lower ones; choices of 0 bits, which the width router and some policies leave out, want none."""
        self.core.touch(first_layer, ids, bits)

    def heat(self) -> npt.NDArray[np.float64]:
        """float64 [layers, experts]: the share of recent tokens that wanted each expert, the latest counting most."""
        self.core.value()
        share: npt.NDArray[np.float64] = self.core.demand[..., 0] / np.maximum(self.core.tokens[:, None], 1)
        return share

    def lack(self, layer: int, experts: list[int], bits: int) -> dict[int, int]:
        """Those of a layer's experts that have less than `bits`, and less than their records have, with the width they would get."""
        most = np.minimum(bits, self.kept[layer, experts]).tolist()
        return {e: w for e, w, have in zip(experts, most, self.width[layer, experts].tolist(), strict=True) if have < w}

    def grow(self, layer: int, expert: int, bits: int) -> None:
        """The expert now has (or is being read up to) `bits`."""
        if bits > self.width[layer, expert]:
            self.core.set(layer, expert, bits)

    def shrink(self, layer: int, expert: int, bits: int) -> None:
        """Only `bits` of the expert stay."""
        if bits < self.width[layer, expert]:
            self.core.set(layer, expert, bits)

    def make_room(self, n_bytes: int, pinned_layer: int, pinned: set[int]) -> dict[tuple[int, int], int] | None:
        """Shrink the least valuable experts until `n_bytes` more fit; returns {(layer, expert): bits that stay}.

        The plane of the least (worth, layer) goes first; of equal planes in a layer the last one, so a higher plane before those below
        it. Experts `pinned` of `pinned_layer` are kept. None if even evicting all others would not do (nothing changed then).
        """
        if self.rank is not None:
            short = self.used_bytes + n_bytes - self.limit_bytes
            if short <= 0:
                return {}
            widths = self.width[pinned_layer].tolist()
            if self.used_bytes - sum(self.prefix[widths[e]] for e in pinned) < short:
                return None
            return self._evict_whole(n_bytes, self.rank(pinned_layer), pinned_layer, pinned)
        rows = self.core.make_room(n_bytes, pinned_layer, list(pinned))
        return None if rows is None else {(layer, expert): bits for layer, expert, bits in rows.tolist()}

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
