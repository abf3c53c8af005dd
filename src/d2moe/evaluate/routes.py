"""Which experts the tokens of a text chose, and how many bits they asked of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from d2moe.errors import RequestError
from d2moe.runtime.generate import Model
from d2moe.runtime.request import Chunk, check_prompt
from d2moe.types import WIDTHS


def routes(model: Model, text: str) -> dict[str, Any]:
    """Feed `text` and report every choice, at the engine's width.

    "tokens": [{"token", "text", "average_bits", "layers": [{"experts", "bits"}]}], largest gate first; "layers": their numbers;
    "layer_bits", "average_bits": means; "shares": of each width among all choices. RequestError if the text is empty or too long.
    """
    engine: Any = model.engine
    if not text:
        raise RequestError("the text is empty; give at least one character")
    tokens = check_prompt(model.tokenizer.encode(text), engine.shape.vocab, engine.context)
    config, sequence = engine.config, engine.new_sequence()
    ids, bits = [], []
    try:
        step = engine.decoder.max_tokens
        for at in range(0, len(tokens), step):
            piece = tokens[at : at + step]
            engine.step([Chunk(sequence, piece, config.bits, "all", config.uniform)])  # all: the last layer computes all of them
            ids.append(engine.decoder.ids[:, : len(piece)].copy())
            bits.append(engine.decoder.bits[:, : len(piece)].copy())
    finally:
        sequence.free()
    chosen, wide = np.concatenate(ids, 1), np.concatenate(bits, 1)
    return {
        "dial": config.bits,
        "average_bits": float(wide.mean()),
        "layers": list(engine.shape.moe_layers),
        "experts_per_token": engine.shape.top_k,
        "layer_bits": wide.mean((1, 2)).tolist(),
        "shares": {str(width): float((wide == width).mean()) for width in (0, *WIDTHS)},
        "tokens": [
            {
                "token": token,
                "text": model.tokenizer.decode([token]),
                "average_bits": float(wide[:, t].mean()),
                "layers": [{"experts": e.tolist(), "bits": b.tolist()} for e, b in zip(chosen[:, t], wide[:, t], strict=True)],
            }
            for t, token in enumerate(tokens)
        ],
    }
