"""Least frequently used: the expert with the fewest uses since the engine was loaded goes first, whole; among equals the one used
longest ago. Uses are tokens, and never fade."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2moe.policy.ledger import Ledger
from d2moe.policy.policy import WholeExperts

I32 = npt.NDArray[np.int32]
F64 = npt.NDArray[np.float64]


class Lfu(WholeExperts):
    name = "lfu"

    def __init__(self, ledger: Ledger, top_k: int):
        super().__init__(ledger, top_k)
        self.uses = np.zeros(self.last.shape, np.int64)

    def use(self, layer: int, ids: I32, bits: I32) -> None:
        super().use(layer, ids, bits)
        self.uses[layer] += np.bincount(ids[bits > 0], minlength=self.ledger.experts)

    def worth(self, layer: int) -> F64:
        return self.uses + self.last / (self.calls + 1.0)
