"""Loading on demand, the baseline of the D2MoE paper (arXiv 2504.15299): each layer's experts are read when its router has
spoken, in the router's numbering, and nothing is kept for the next token.

Deviation: reads still overlap the arithmetic of the same layer, because the executor knows no other way.
"""

from __future__ import annotations

from itertools import groupby, islice
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from d2moe.policy import hebf
from d2moe.policy.ledger import SEGMENTS
from d2moe.policy.plan import Plan, Wave
from d2moe.policy.policy import WholeExperts

I32 = npt.NDArray[np.int32]

class OnDemand(WholeExperts):
    name = "on-demand"
    decides = True
    hottest_first: ClassVar[bool] = False
    separate: ClassVar[bool] = False
    """Whether each width is a copy of its own: an expert that a layer call wants at several widths is read once for each."""

    def plan(self, layer: int, ids: I32, bits: I32) -> Plan:
        ledger = self.ledger
        gone = [(of_layer, expert, 0) for of_layer, expert in np.argwhere(ledger.width > 0).tolist()]
        for of_layer, expert, _ in gone:
            ledger.shrink(of_layer, expert, 0)
        copies = self._narrower(layer, ids, bits) if self.separate else []
        self.use(layer, ids, bits)
        plan = hebf.define(ledger, layer, ids, bits, hottest_first=self.hottest_first)
        waves = []
        for moves in copies:  # read, and let go of for the next: a slot holds one copy
            n_bytes = int(ledger.prefix_bytes[[bits for *_, bits in moves]].sum())
            waves.append(Wave.of({(la, e): b for la, e, b in gone}, moves, n_bytes))
            gone = [(*move[:2], 0) for move in moves]
        if not gone:
            return plan
        first = plan.waves[0]
        # Nothing is left that the plan could have evicted before its first read.
        waves.append(Wave(np.concatenate([np.array(gone, np.int32), first.evict]), first.read, first.experts, first.read_bytes))
        return Plan([*waves, *plan.waves[1:]], plan.missing_bytes + sum(wave.read_bytes for wave in waves[:-1]))

    def _narrower(self, layer: int, ids: I32, bits: I32) -> list[list[tuple[int, int, int]]]:
        """(layer, expert, bits) of all copies but the widest of each expert, in groups of one copy an expert that fit."""
        pairs = sorted({(int(e), int(b)) for e, b in zip(ids.reshape(-1), bits.reshape(-1), strict=True) if b})
        narrow = [(e, b) for (e, b), following in zip(pairs, [*pairs[1:], (-1, 0)], strict=True) if following[0] == e]
        groups: list[list[tuple[int, int, int]]] = []
        room = 0
        for rank in range(SEGMENTS):
            for expert, same in groupby(narrow, key=lambda pair: pair[0]):
                copy = next(islice(same, rank, None), None)
                if copy is None:
                    continue
                n_bytes = int(self.ledger.prefix_bytes[copy[1]])
                if not groups or n_bytes > room or any(move[1] == expert for move in groups[-1]):
                    groups.append([])
                    room = self.ledger.limit_bytes
                groups[-1].append((layer, *copy))
                room -= n_bytes
        return groups


class Copies(OnDemand):
    """Loading on demand with a separate copy of each expert per width, which is what nesting is compared with. Tokens are computed at
    their own widths from the widest copy, which has the same bits."""

    name = "copies"
    separate = True
