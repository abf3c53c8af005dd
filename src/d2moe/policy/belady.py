"""Belady's rule: the expert whose next use is farthest in the future goes first. It needs the future, so it exists in simulation
only: the bound that no policy of whole experts and reads on demand can beat."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2moe.policy.ledger import Ledger
from d2moe.policy.policy import WholeExperts
from d2moe.policy.trace import Trace

I32 = npt.NDArray[np.int32]
F64 = npt.NDArray[np.float64]


class Belady(WholeExperts):
    name = "belady"
    needs_future = True

    def __init__(self, ledger: Ledger, top_k: int):
        super().__init__(ledger, top_k)
        self.next = np.full(self.last.shape, np.inf)
        self._after: list[tuple[I32, F64]] = []

    def foresee(self, trace: Trace) -> None:
        calls = [call for step in trace for call in step.calls]
        following = np.full(self.last.shape, np.inf)
        for number in range(len(calls) - 1, -1, -1):
            layer, experts = calls[number].layer, np.unique(calls[number].ids)
            self._after.append((experts, following[layer, experts].copy()))
            following[layer, experts] = number
        self._after.reverse()

    def use(self, layer: int, ids: I32, bits: I32) -> None:
        experts, following = self._after[self.calls]
        super().use(layer, ids, bits)
        self.next[layer, experts] = following

    def worth(self, layer: int) -> F64:
        return np.where(np.isinf(self.next), -1e18, -self.next)
