"""HOBBIT (arXiv 2411.01433): width by gate mass on a miss, prefetch by the next layers' routers, weighted eviction.

- On a miss: with a token's experts by falling normalised gate weight, s the mass of those before one: s ≤ T1 reads it at the width
  asked for, s ≤ T2 at 2 bits, else the token does without it. T1 and T2 are the paper's for Mixtral (67 / 30 / 3 % of misses).
  What is resident is used as it is; a light expert that has some planes is computed with them (deviation: a second copy in the
  paper, the same record here). The gates of what is left keep their values.
- Prefetch: the routers of the next 1 … 3 layers on this layer's input, one layer further only if all predicted experts are there;
  predicted ones are pinned until their layer has come. Deviation: all at the width asked for.
- Eviction: the least of w_lru R/T + w_lfu F/T + w_lhu H/T + w_fld (1 − d/l), R last use, F uses, H uses at full width, T calls of
  the layer, d the layers until it comes again of l; equal weights. The paper resets the counters with each sequence; here a
  step of several tokens, a prompt, does. Deviations: d counts ahead (the paper's formula read literally counts back), and one
  pool, since narrow and wide copies are one record.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2moe.policy.ledger import Ledger
from d2moe.policy.plan import Wave
from d2moe.policy.policy import WholeExperts, mass_before, named
from d2moe.types import BASE_BITS

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

T1, T2 = 0.6, 0.9
LRU, LFU, LHU, FLD = 0.25, 0.25, 0.25, 0.25


class Hobbit(WholeExperts):
    name = "hobbit"
    decides = True
    ahead = 3

    def __init__(self, ledger: Ledger, top_k: int):
        super().__init__(ledger, top_k)
        self._reset()

    def _reset(self) -> None:
        self.uses = np.zeros(self.last.shape, np.int64)
        self.high_uses = np.zeros(self.last.shape, np.int64)
        self.recent = np.zeros(self.last.shape, np.int64)
        self.turns = np.zeros(self.ledger.layers, np.int64)

    def choose(self, layer: int, ids: I32, bits: I32, gates: F32) -> tuple[I32, F32 | None]:
        have = self.ledger.width[layer, ids]
        before = mass_before(gates)
        light = np.where(before <= T2, np.maximum(have, BASE_BITS), np.where(have > 0, have, 0))
        return np.where((have >= bits) | (before <= T1), bits, np.minimum(light, bits)).astype(np.int32), None

    def use(self, layer: int, ids: I32, bits: I32) -> None:
        if layer == 0 and len(ids) > 1:
            self._reset()
        super().use(layer, ids, bits)
        self.turns[layer] += 1
        used = ids[bits > 0]
        self.uses[layer] += np.bincount(used, minlength=self.ledger.experts)
        self.high_uses[layer] += np.bincount(ids[bits == bits.max(initial=BASE_BITS)], minlength=self.ledger.experts)
        self.recent[layer, used] = self.turns[layer]
        self.pinned = {pin for pin in self.pinned if pin[0] != layer}

    def worth(self, layer: int) -> F64:
        layers = self.ledger.layers
        turns = np.maximum(self.turns, 1)[:, None]
        ahead = (np.arange(layers) - layer) % layers
        near = 1 - ahead[:, None] / layers
        return np.asarray((LRU * self.recent + LFU * self.uses + LHU * self.high_uses) / turns + FLD * near, np.float64)

    def prefetch(self, layer: int, forecast: I32, bits: int) -> Wave | None:
        for step in range(1, self.ahead + 1):
            experts = named(forecast, step)[: 2 * self.top_k]
            if not experts:
                return None
            target = layer + step
            self.pinned = {pin for pin in self.pinned if pin[0] != target}
            wave = self.read_ahead(layer, target, experts, bits)
            self.pinned |= {(target, e) for e in experts if self.ledger.width[target, e] > 0}
            if wave is not None or self.ledger.lack(target, experts, bits):
                return wave
        return None
