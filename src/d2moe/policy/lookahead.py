"""Read-ME (arXiv 2410.19123): the experts of later layers are known before their turn, so they are read ahead exactly and the one
whose next use is farthest is evicted (Belady's rule).

Read-ME trains one router, apart from the layers, that decides all layers at once. No supported model has one, so the next AHEAD
layers' own routers on this layer's input stand in for it, and "known" is what they name. Beyond them an expert's next
use is when its layer comes again, the one used last first. Grouping requests by expert is the scheduler's, not a policy's.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2moe.policy.ledger import Ledger
from d2moe.policy.plan import Wave
from d2moe.policy.policy import WholeExperts, named

I32 = npt.NDArray[np.int32]
F64 = npt.NDArray[np.float64]

AHEAD = 3


class Lookahead(WholeExperts):
    name = "lookahead"
    decides = True
    ahead = AHEAD

    def __init__(self, ledger: Ledger, top_k: int):
        super().__init__(ledger, top_k)
        self.known: dict[int, list[int]] = {}

    def use(self, layer: int, ids: I32, bits: I32) -> None:
        super().use(layer, ids, bits)
        self.known.pop(layer, None)

    def worth(self, layer: int) -> F64:
        layers = self.ledger.layers
        turn = ((np.arange(layers) - layer - 1) % layers + 1).astype(np.float64)  # layer calls until each layer's next
        far = turn[:, None] + layers * (2 - (self.last + 1) / (self.calls + 1.0))  # not named: a later turn, sooner if used lately
        for target, experts in self.known.items():
            far[target, experts] = turn[target]
        return np.asarray(-far, np.float64)

    def prefetch(self, layer: int, forecast: I32, bits: int) -> Wave | None:
        self.known = {layer + step: found for step in range(1, AHEAD + 1) if (found := named(forecast, step))}
        for target, experts in self.known.items():
            if self.ledger.lack(target, experts, bits):
                return self.read_ahead(layer, target, experts[: 2 * self.top_k], bits)
        return None
