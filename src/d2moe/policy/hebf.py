"""Hottest-expert-bit-first (arXiv 2504.15299, section on scheduling), in its first form.

Demand is the number of tokens that want an expert; experts are read in order of falling demand, each from the bits it
has to the most bits that any token wants, in one contiguous read. Deviation: the paper orders single planes; with one
width for all tokens of a step the orders are the same.

`define` is the definition; `Ledger.plan` in csrc/ledger.cpp is the same, compiled, and plans wherever no policy has an order of its own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2moe.errors import MemoryBudgetError
from d2moe.policy.ledger import Ledger
from d2moe.policy.plan import Plan, Wave

I32 = npt.NDArray[np.int32]

_NOTHING = np.zeros((0, 3), np.int32)


def demand(ids: I32, bits: I32, experts: int) -> tuple[I32, I32, I32]:
    """What `ids` and widths `bits`, int32 [tokens, top_k], want of a layer: each expert once, the most bits that any token wants
    of it and the number of tokens, int32 [n] each; `experts` are all of a layer."""
    if not bits.all():  # choices of 0 bits were left out
        ids, bits = ids[bits > 0][None], bits[bits > 0][None]
        if not ids.size:
            return ids[0], bits[0], ids[0]
    elif len(ids) == 1:  # a router names an expert once
        return ids[0], bits[0], np.ones(len(ids[0]), np.int32)
    counts = np.bincount(ids.reshape(-1), minlength=experts)
    most = np.zeros(experts, np.int32)
    np.maximum.at(most, ids.reshape(-1), bits.reshape(-1))
    found = np.flatnonzero(counts).astype(np.int32)
    return found, most[found], counts[found].astype(np.int32)


def plan(ledger: Ledger, layer: int, ids: I32, bits: I32, asked: I32 | None = None) -> Plan:
    """As `define`, compiled, over a ledger without a `rank`."""
    waves = [Wave(*wave) for wave in ledger.core.plan(layer, ids, bits, bits if asked is None else asked)]
    return Plan(waves, sum(wave.read_bytes for wave in waves))


def define(ledger: Ledger, layer: int, ids: I32, bits: I32, asked: I32 | None = None, hottest_first: bool = True) -> Plan:
    """Plan one layer for expert choices `ids` and widths `bits`, both int32 [tokens, top_k]; updates the ledger, with the widths that
    were `asked` for where a policy chose others. Not `hottest_first`: experts in the order of their numbers.

    Raises MemoryBudgetError if the limit does not hold even one expert at its width.
    """
    ledger.touch(layer, ids[None], (bits if asked is None else asked)[None])
    width = ledger.width[layer].tolist()
    items = sorted(_items(ids, bits, ledger.experts), key=(lambda i: -i[2]) if hottest_first else (lambda i: i[0]))
    missing = [item for item in items if width[item[0]] < item[1]]
    # What is resident comes first: it can be computed while the rest is read.
    order = [(e, w) for e, w, _ in items if width[e] >= w] + [(e, w) for e, w, _ in missing]
    if not missing:
        return Plan([Wave(_NOTHING, _NOTHING, np.array([e for e, _ in order], np.int32), 0)], 0)
    waves = _waves(ledger, layer, order, width)
    # Counted from the reads: an early wave may have to evict what a later one wants.
    return Plan(waves, sum(wave.read_bytes for wave in waves))


def _items(ids: I32, bits: I32, experts: int) -> list[tuple[int, int, int]]:
    """`demand` as (expert, bits, tokens)."""
    if len(ids) == 1:  # a router names an expert once
        return [(e, w, 1) for e, w in zip(ids[0].tolist(), bits[0].tolist(), strict=True) if w]
    return list(zip(*(part.tolist() for part in demand(ids, bits, experts)), strict=True))


def _waves(ledger: Ledger, layer: int, items: list[tuple[int, int]], width: list[int]) -> list[Wave]:
    """Cut the layer, whose experts have `width`, into waves that fit: all at once, or pieces of half the limit so that two fit side
    by side."""
    cost = {e: ledger.prefix[max(w, width[e])] for e, w in items}
    largest = max(cost.values())
    if largest > ledger.limit_bytes:
        raise MemoryBudgetError(
            f"one expert needs {largest} bytes and the budget leaves {ledger.limit_bytes} for experts; "
            "allow more memory or fewer bits"
        )
    if sum(cost.values()) <= ledger.limit_bytes:
        pieces = [items]
    else:
        room = max(ledger.limit_bytes // 2, largest)
        pieces, filled = [[]], 0
        for item in items:
            if filled + cost[item[0]] > room and pieces[-1]:
                pieces.append([])
                filled = 0
            pieces[-1].append(item)
            filled += cost[item[0]]
    waves: list[Wave] = []
    before: set[int] = set()
    for piece in pieces:
        now = {e for e, _ in piece}
        wave = _wave(ledger, layer, piece, now | before)
        if wave is None:  # two pieces do not fit side by side: let go of the one before
            wave = _wave(ledger, layer, piece, now)
        assert wave is not None, "a piece alone always fits"
        waves.append(wave)
        before = now
    return waves


def _wave(ledger: Ledger, layer: int, piece: list[tuple[int, int]], pinned: set[int]) -> Wave | None:
    width = ledger.width[layer].tolist()
    reads = [(e, w) for e, w in piece if width[e] < w]
    more = sum(ledger.prefix[w] - ledger.prefix[width[e]] for e, w in reads)
    freed = ledger.make_room(more, layer, pinned)
    if freed is None:
        return None
    for e, w in reads:
        ledger.grow(layer, e, w)
    return Wave.of(freed, [(layer, e, w) for e, w in reads], more, [e for e, _ in piece])
