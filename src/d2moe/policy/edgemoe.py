"""EdgeMoE (arXiv 2308.14352): static widths per expert, preloading by activation paths, eviction by frequency and layer.

- Widths: the experts that matter least are read at 2 bits, always. The paper measures each expert's loss at INT2 alone
  and finds how many by bisection against a tolerated loss. Deviation: what matters is the gate mass an expert got in the trace
  given to learn from, and LOW_SHARE of all experts are low. Without a trace every expert keeps the width asked for.
- Preloading: the experts of the previous two MoE layers are the key to how often each expert followed in the next; those
  that followed most are read, in that order, as many as a token chooses. Deviation: the table is counted while running, too; and
  a read once begun is not broken off when the router has spoken.
- Eviction: the greatest −f / d goes first, f uses, d layers until the expert's layer comes again, so rarely used experts of far
  layers go first. Deviation: the paper's (S − i + I) mod S with layer i and current layer I counts the layers since, and would evict
  the next layer's experts first; what its text wants is the distance ahead, which is what is counted here.
- The paper is for one sequence; with several, the key is the most wanted expert of each of the two layers.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import numpy.typing as npt

from d2moe.policy.ledger import Ledger
from d2moe.policy.plan import Wave
from d2moe.policy.policy import WholeExperts
from d2moe.policy.trace import Trace
from d2moe.types import BASE_BITS

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

LOW_SHARE = 0.25


class EdgeMoE(WholeExperts):
    name = "edgemoe"
    learns = True
    decides = True
    ahead = 1

    def __init__(self, ledger: Ledger, top_k: int):
        super().__init__(ledger, top_k)
        self.uses = np.zeros(self.last.shape, np.int64)
        self.low = np.zeros(self.last.shape, bool)
        self.paths: defaultdict[tuple[int, tuple[int, ...], tuple[int, ...]], F64] = defaultdict(
            lambda: np.zeros(ledger.experts)
        )
        self._path: list[tuple[int, tuple[int, ...]]] = []

    def learn(self, trace: Trace) -> None:
        mass = np.zeros(self.last.shape)
        for step in trace:
            for call in step.calls:
                np.add.at(mass[call.layer], call.ids, call.gates)
                self._follow(call.layer, call.ids)
        order = np.argsort(mass, axis=None, kind="stable")[: int(LOW_SHARE * mass.size)]
        self.low.reshape(-1)[order] = True
        self._path.clear()

    def choose(self, layer: int, ids: I32, bits: I32, gates: F32) -> tuple[I32, F32 | None]:
        return np.where(self.low[layer, ids] & (bits > 0), BASE_BITS, bits).astype(np.int32), None

    def use(self, layer: int, ids: I32, bits: I32) -> None:
        super().use(layer, ids, bits)
        self.uses[layer] += np.bincount(ids.reshape(-1), minlength=self.ledger.experts)
        self._follow(layer, ids)

    def worth(self, layer: int) -> F64:
        distance = (np.arange(self.ledger.layers) - layer - 1) % self.ledger.layers + 1
        return np.asarray(self.uses / distance[:, None], np.float64)

    def prefetch(self, layer: int, forecast: I32, bits: int) -> Wave | None:
        if layer + 1 >= self.ledger.layers or len(self._path) < 2:
            return None
        key = (layer + 1, self._path[-2][1], self._path[-1][1])
        if key not in self.paths:
            return None
        score = self.paths[key]
        order = np.argsort(-score, kind="stable")[: self.top_k]
        experts = [int(e) for e in order if score[e] > 0]
        return self.read_ahead(layer, layer + 1, [e for e in experts if not self.low[layer + 1, e]], bits)

    def _follow(self, layer: int, ids: I32) -> None:
        """Count what followed the last two layers' experts, and go one layer on."""
        if layer == 0 or (self._path and self._path[-1][0] != layer - 1):
            self._path.clear()
        if len(self._path) == 2:
            self.paths[layer, self._path[0][1], self._path[1][1]] += np.bincount(ids.reshape(-1), minlength=self.ledger.experts)
        found, count = np.unique(ids, return_counts=True)
        whole = tuple(sorted(found.tolist())) if len(ids) == 1 else (int(found[np.argmax(count)]),)
        self._path = [*self._path[-1:], (layer, whole)]
