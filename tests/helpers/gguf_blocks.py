"""Blocks of quantised GGUF types."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind


def random_blocks(rng: np.random.Generator, kind: Kind, *shape: int) -> np.ndarray[Any, Any]:
    """Random bytes of a type, uint8 [..., bytes of a row], with weights of an ordinary size."""
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    n_blocks = int(np.prod(shape)) // per_block
    raw = rng.integers(0, 256, (n_blocks, block_bytes), dtype=np.uint8)
    while True:
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(raw, kind).reshape(n_blocks, -1)
            bad = np.flatnonzero(~(np.abs(values) < 100).all(axis=1))
        if not len(bad):
            return raw.reshape(*shape[:-1], shape[-1] // per_block * block_bytes)
        raw[bad] = rng.integers(0, 256, (len(bad), block_bytes), dtype=np.uint8)
