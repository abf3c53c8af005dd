"""The compiled back end: the only importer of `d2moe._native`.

Arrays are C-contiguous; float16 data crosses as its uint16 bits. Sizes are checked on the way in (ValueError); a
failed read raises `StorageFailure`, whose message names file, expert, bits and the cause; `NoRoom` is a MemoryBudgetError.
"""

from __future__ import annotations

from d2moe._native import (
    Attention,
    Experts,
    FeedForward,
    KvCache,
    Ledger,
    Linear,
    NoRoom,
    Program,
    Router,
    Runtime,
    StorageFailure,
    WidthRouter,
    descend,
    direct_read_rate,
    draw,
    drawing_ns,
    encode,
    matmul,
    mix,
    pack,
    quantize_activations,
    read_bandwidth,
    rotate,
    scores,
    tables,
    vector_op,
)

__all__ = [
    "Attention",
    "Experts",
    "FeedForward",
    "KvCache",
    "Ledger",
    "Linear",
    "NoRoom",
    "Program",
    "Router",
    "Runtime",
    "StorageFailure",
    "WidthRouter",
    "descend",
    "direct_read_rate",
    "draw",
    "drawing_ns",
    "encode",
    "matmul",
    "mix",
    "pack",
    "quantize_activations",
    "read_bandwidth",
    "rotate",
    "scores",
    "tables",
    "vector_op",
]
