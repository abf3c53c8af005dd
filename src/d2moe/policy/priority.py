"""MoNE (arXiv 2407.19985): nested experts, full width for the choices of highest priority under a capacity, less for others.

In MoNE nested experts are prefixes of one feed-forward block's width, and a trained router's probability is the priority;
routing fills the largest first. Here the prefixes are of bits: of a layer call's choices, by falling gate, the first share
computes at the width asked for, the next a bit less, the last two bits less, as CAPACITY says. Deviation: no training, the
gates as they are. Residency and order of reads are HEBF's, which nesting suits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2moe.policy.policy import Policy
from d2moe.types import BASE_BITS

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]

CAPACITY = (0.4, 0.3, 0.3)
"""Shares of the choices at full width, one bit less, two bits less."""


class Priority(Policy):
    name = "priority"
    decides = True

    def choose(self, layer: int, ids: I32, bits: I32, gates: F32) -> tuple[I32, F32 | None]:
        rank = np.empty(gates.size, np.int64)
        rank[np.argsort(-gates, axis=None, kind="stable")] = np.arange(gates.size)
        less = np.searchsorted(np.cumsum(CAPACITY[:-1]) * gates.size, rank.reshape(gates.shape), side="right")
        return np.where(bits > 0, np.maximum(bits - less, BASE_BITS), 0).astype(np.int32), None
