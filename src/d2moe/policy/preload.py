"""HEBF that reads base planes of the next layer's predicted experts while the disk is idle.

Predicted are the experts that the next layer's router names for this layer's input. Of those that are not there at all the base is
asked for behind everything else: one by one they are begun when nothing else is to be read, and taken back if they have not by the
time the next layer has something to read. So how much is read depends on the clock, and answers do not. Off unless `d2moe profile`
measured a gain on this device: where reading is what a token waits for, the disk has no idle time and wrong guesses cost some.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2moe.policy.plan import Wave
from d2moe.policy.policy import Policy, named
from d2moe.types import BASE_BITS

I32 = npt.NDArray[np.int32]


class Preload(Policy):
    name = "preload"
    ahead = 1
    may_wait = True

    def prefetch(self, layer: int, forecast: I32, bits: int) -> Wave | None:
        ledger, target = self.ledger, layer + 1
        experts = [e for e in named(forecast, 1) if not ledger.width[target, e]][: self.top_k] if target < ledger.layers else []
        if not experts:
            return None
        here = {int(e) for e in np.flatnonzero(ledger.width[layer])}  # may be in use
        total = len(experts) * ledger.base_bytes
        freed = ledger.make_room(total, layer, here)
        if freed is None:
            return None
        for e in experts:
            ledger.grow(target, e, BASE_BITS)
        return Wave.of(freed, [(target, e, BASE_BITS) for e in experts], total)
