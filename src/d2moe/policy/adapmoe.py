"""AdapMoE (arXiv 2408.10284): fewer experts where the layer does not care, prefetch by the next router, slots per layer.

- Gating: a choice beyond a token's first is left out when its share of the gates is below τ_l = sqrt(c / h_l). h_l is
  a layer's Fisher sensitivity, which the paper's code has for Mixtral: 46.7 in the first layer to 0.02 in the last, c = 0.005.
  Deviations: these two are joined by a geometric series over the depth of any model; and τ is for two experts a token, so
  it is scaled by 2 / top_k. Gates that are left are scaled to the sum they had.
- Prefetch: what the next layer's router says to this layer's input, at the width asked for.
- Slots: the paper gives each layer a number of slots by dynamic programming over expected loads on demand. A layer's gain from one more
  slot falls with each (its next popular expert), so taking the most popular experts of all layers together is that
  optimum; counted while running. Experts of layers above their number go first, by last use. Deviation: the success of
  prefetching is not in the expectation.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2moe.policy.ledger import Ledger
from d2moe.policy.plan import Wave
from d2moe.policy.policy import WholeExperts, named
from d2moe.policy.trace import Trace

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

COST = 0.005
FIRST_SENSITIVITY, LAST_SENSITIVITY = 46.7, 0.02
ALLOT_CALLS = 256
"""Layer calls after which the slots are dealt out again."""


class AdapMoE(WholeExperts):
    name = "adapmoe"
    learns = True
    decides = True
    ahead = 1

    def __init__(self, ledger: Ledger, top_k: int):
        super().__init__(ledger, top_k)
        sensitivity = np.geomspace(FIRST_SENSITIVITY, LAST_SENSITIVITY, ledger.layers)
        self.threshold = np.sqrt(COST / sensitivity) * 2 / top_k
        self.uses = np.zeros(self.last.shape, np.int64)
        self.slots = np.zeros(ledger.layers, np.int64)
        self._dealt = -ALLOT_CALLS

    def learn(self, trace: Trace) -> None:
        for step in trace:
            for call in step.calls:
                self.uses[call.layer] += np.bincount(call.ids.reshape(-1), minlength=self.ledger.experts)

    def choose(self, layer: int, ids: I32, bits: I32, gates: F32) -> tuple[I32, F32 | None]:
        whole = gates.sum(1, keepdims=True)
        drop = (gates < self.threshold[layer] * whole) & (gates < gates.max(1, keepdims=True))
        if not drop.any():
            return bits, None
        left = np.where(drop, np.float32(0), gates)
        return np.where(drop, 0, bits).astype(np.int32), np.asarray(left * (whole / left.sum(1, keepdims=True)), np.float32)

    def use(self, layer: int, ids: I32, bits: I32) -> None:
        super().use(layer, ids, bits)
        self.uses[layer] += np.bincount(ids[bits > 0], minlength=self.ledger.experts)

    def worth(self, layer: int) -> F64:
        if self.calls - self._dealt >= ALLOT_CALLS:
            self._dealt = self.calls
            held = self.ledger.width[self.ledger.width > 0]
            each = float(self.ledger.prefix_bytes[held].mean()) if held.size else float(self.ledger.prefix_bytes[-1])
            count = int(self.ledger.limit_bytes / each)
            best = np.argsort(-self.uses, axis=None, kind="stable")[:count]
            self.slots = np.bincount(best // self.ledger.experts, minlength=self.ledger.layers)
        above = (self.ledger.width > 0).sum(1) - self.slots > 0
        return self.last.astype(np.float64) - np.where(above, self.calls + 1.0, 0.0)[:, None]

    def prefetch(self, layer: int, forecast: I32, bits: int) -> Wave | None:
        experts = named(forecast, 1)
        return self.read_ahead(layer, layer + 1, experts[: 2 * self.top_k], bits) if experts else None
