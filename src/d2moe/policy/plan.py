"""A layer's plan: what crosses from deciding to doing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Wave:
    """One step of a layer: evict, then start reading, then compute `experts` (int32 [n]).

    `evict` and `read` are int32 [n, 3] of layer, expert, bits that stay or bits to have. Reads are started in order and move
    `read_bytes` bytes.
    """

    evict: I32
    read: I32
    experts: I32
    read_bytes: int

    @classmethod
    def of(
        cls, freed: dict[tuple[int, int], int], reads: list[tuple[int, int, int]], read_bytes: int, experts: Sequence[int] = ()
    ) -> Wave:
        """From what `Ledger.make_room` answered and (layer, expert, bits) to read."""
        moves = [(layer, expert, bits) for (layer, expert), bits in freed.items()]
        evict, read = (np.array(rows, np.int32).reshape(-1, 3) for rows in (moves, reads))
        return cls(evict, read, np.array(experts, np.int32), read_bytes)


@dataclass(frozen=True)
class Plan:
    """Waves in order; wave i+1's evictions touch nothing that wave i computes, so its reads overlap that computation.

    `missing_bytes` must be read of what the layer asked for.
    """

    waves: list[Wave] = field(default_factory=list)
    missing_bytes: int = 0
