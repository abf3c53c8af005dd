"""Logits of two kernels that round alike but for the order of additions."""

import numpy as np


def alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether rows [tokens, vocab] are those of one model. A last bit can move an activation by a step, and a choice of experts
    within rounding of its threshold to its other side: then that one row differs in all it says."""
    apart = np.abs(a - b).mean(axis=1)
    return bool(a.shape == b.shape and np.median(apart) < 0.03 and np.mean(apart > 0.06) <= 0.1)
