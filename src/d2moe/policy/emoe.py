"""eMoE (arXiv 2503.06823): a predicted set of experts for coming prompts is kept, and predicted anew every few prompts only.

The paper predicts with a trained model from recent prompts' routing; nothing of it is published but the abstract's account. Deviations: the
prediction is each expert's share of recent uses (halved at each prediction), the set is as many of the most used as half the
budget holds; others come and go by last use. A prompt is a step of several tokens; a long answer counts as
one every ANSWER_TOKENS tokens. Its service-level scheduling is no part of a policy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2moe.policy.ledger import Ledger
from d2moe.policy.policy import WholeExperts
from d2moe.policy.trace import Trace

I32 = npt.NDArray[np.int32]
F64 = npt.NDArray[np.float64]

PROMPTS = 4
ANSWER_TOKENS = 64
SET_SHARE = 0.5


class EMoE(WholeExperts):
    name = "emoe"
    learns = True

    def __init__(self, ledger: Ledger, top_k: int):
        super().__init__(ledger, top_k)
        self.uses = np.zeros(self.last.shape)
        self.kept = np.zeros(self.last.shape, bool)
        self._prompts = 0.0

    def learn(self, trace: Trace) -> None:
        for step in trace:
            for call in step.calls:
                self.uses[call.layer] += np.bincount(call.ids.reshape(-1), minlength=self.ledger.experts)
        self._prompts = PROMPTS

    def use(self, layer: int, ids: I32, bits: I32) -> None:
        if layer == 0:
            self._prompts += 1 if len(ids) > 1 else 1 / ANSWER_TOKENS
            if self._prompts >= PROMPTS:
                self._predict(int(bits.max()))
        super().use(layer, ids, bits)
        self.uses[layer] += np.bincount(ids[bits > 0], minlength=self.ledger.experts)

    def _predict(self, bits: int) -> None:
        count = int(SET_SHARE * self.ledger.limit_bytes / self.ledger.prefix_bytes[bits])
        self.kept[:] = False
        self.kept.reshape(-1)[np.argsort(-self.uses, axis=None, kind="stable")[:count]] = True
        self.uses /= 2
        self._prompts = 0.0

    def worth(self, layer: int) -> F64:
        return self.last.astype(np.float64) + np.where(self.kept, self.calls + 1.0, 0.0)
