"""HEBF that takes what is in memory before it reads: a mode of its own, since what is cached then shows in the answers.

- Planes of an expert that are resident are used by every token that chose it, beyond the width it asked for, too.
- On a miss a light choice, one behind others that have at least HEAVY of its token's gate mass together, makes do with what is there,
  and has the base alone read where nothing is. What another token has read at the same time is used.
- Residency and order of reads are HEBF's, by the widths that were asked for: using planes because they are there gives them no worth.

HOBBIT's rule on a miss (arXiv 2411.01433) and dropping missing light experts are its kin; a base keeps more of the answer
than nothing does, and by nesting it is part of what a heavy choice reads later.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2moe.policy import hebf
from d2moe.policy.ledger import Ledger
from d2moe.policy.plan import Plan
from d2moe.policy.policy import Policy, mass_before
from d2moe.types import BASE_BITS

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]

HEAVY = 0.5


class ResidentFirst(Policy):
    name = "resident-first"
    decides = True

    def __init__(self, ledger: Ledger, top_k: int):
        super().__init__(ledger, top_k)
        self._asked = np.zeros((0, top_k), np.int32)

    def choose(self, layer: int, ids: I32, bits: I32, gates: F32) -> tuple[I32, F32 | None]:
        self._asked = bits.copy()  # the caller's array is overwritten with what is chosen
        have = self.ledger.width[layer, ids]
        light = np.where(bits > 0, np.maximum(have, BASE_BITS), have)  # who was left out stays out, unless it is there
        chosen = np.where(mass_before(gates) >= HEAVY, light, np.maximum(have, bits))
        if len(ids) > 1:
            widest = np.zeros(self.ledger.experts, np.int32)
            np.maximum.at(widest, ids.reshape(-1), chosen.reshape(-1))
            chosen = np.maximum(chosen, np.minimum(widest[ids], bits))
        return chosen.astype(np.int32), None

    def plan(self, layer: int, ids: I32, bits: I32) -> Plan:
        return hebf.plan(self.ledger, layer, ids, bits, self._asked)
