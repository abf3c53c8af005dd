"""Loading on demand, the baseline of the D2MoE paper (arXiv 2504.15299): each layer's experts are read when its router has
spoken, and nothing is kept for the next token.

Deviation: reads still overlap the arithmetic of the same layer, because the executor knows no other way.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2moe.policy.plan import Plan, Wave
from d2moe.policy.policy import WholeExperts

I32 = npt.NDArray[np.int32]


class OnDemand(WholeExperts):
    name = "on-demand"
    decides = True

    def plan(self, layer: int, ids: I32, bits: I32) -> Plan:
        old = np.argwhere(self.ledger.width > 0).astype(np.int32)
        for of_layer, expert in old.tolist():
            self.ledger.shrink(of_layer, expert, 0)
        plan = super().plan(layer, ids, bits)
        if not len(old):
            return plan
        first = plan.waves[0]
        # Nothing is left that the plan could have evicted before its first read.
        gone = np.concatenate([np.column_stack([old, np.zeros(len(old), np.int32)]), first.evict])
        return Plan([Wave(gone.astype(np.int32), first.read, first.experts, first.read_bytes), *plan.waves[1:]], plan.missing_bytes)
