"""Rescaling that leaves a model's function alone and makes its weights easier to quantise.

Some products of a model hold a free factor for each channel: a norm's weights and the columns that meet them, rows of up
and columns of down, rows of v and columns of o. Training leaves it anywhere; where it varies within a group of columns,
the small ones drown in the step of the largest. Here each channel's factor is set by what no such factor changes, the
product p of its two norms: the consumer's column gets the norm (p / mean p) ** SHARE, the producer has the rest, up to one
constant for all. So a model and its rescaled twin come out alike, and neither is worse for how its factors fell.
The idea is that of SmoothQuant (arXiv 2211.10438) and AWQ (2306.00978), without their calibration; figures in docs/log.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe.convert.source import ModelSource

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

SHARE = 0.25
"""Exponent of p that stays in the columns: 0 gives all columns one norm and int8 activations all the differences."""
HUGE = 2.0**60
"""Norms above it, which no trained model has, are left alone, so that no weight can overflow."""


def factors(producer: F64, consumer: F64) -> F32:
    """What to multiply the consumer's columns with, and to divide the producer's rows by, float32 [n].

    `producer` and `consumer` float64 [n] are norms of the rows and columns of each channel. A channel without weights on
    one side keeps its own; so do all if a norm is above HUGE.
    """
    p = producer * consumer
    out = np.ones(len(p), np.float32)
    live = p > 0
    if live.any() and max(producer.max(), consumer.max()) <= HUGE:
        scale = np.exp(np.log(consumer[live]).mean())  # the columns stay about as large as they are
        found = scale * (p[live] / p[live].mean()) ** SHARE / consumer[live]
        if found.min() > 1 / HUGE and found.max() < HUGE:
            out[live] = found
    return out


def row_norms(w: F32) -> F64:
    norms: F64 = np.sqrt(np.einsum("ij,ij->i", w, w, dtype=np.float64))
    return norms


class Balanced:
    """A `ModelSource` in balanced form, with the same interface. What it must know of a layer is read when the layer comes:
    gate of all its experts, and q, k, v, o. Tied embeddings are used twice and are not scaled, nor are v and o of a
    model that clips v."""

    def __init__(self, source: ModelSource, tell: Callable[[str], None] = lambda text: None):
        self._tell = tell  # hears "layer 3 gates, for balance" before a layer's gates are read
        self._source, self.shape, self.names = source, source.shape, source.names
        self._found: dict[str, F32] = {}  # factors by the name of the norm, block or attention they belong to
        self.weights, self.target_shape, self.companions = source.weights, source.target_shape, source.companions

    def facts(self) -> dict[str, Any]:
        return self._source.facts()

    # --- what is read ---

    def read_dense(self, canonical: str) -> F32:
        """As `ModelSource.read_dense`."""
        values = self._source.read_dense(canonical)
        stem, _, last = canonical.rpartition(".")
        if canonical == "final_norm" or last in ("attn_norm", "mlp_norm"):
            return values / self._norm(canonical)
        if last == "router" or canonical.endswith(".shared.mix"):
            return values * self._norm(f"{stem.removesuffix('.shared')}.mlp_norm")
        if last == "v_bias":
            return values / self._v(stem)
        return values

    def linear_pieces(self, canonical: str, multiple: int) -> Iterator[F32]:
        """As `ModelSource.linear_pieces`."""
        cols, rows = self._factors_of(canonical)
        row = 0
        for piece in self._source.linear_pieces(canonical, multiple):
            out = piece if cols is None else piece * cols
            if rows is not None:
                out = out / rows[row : row + len(piece), None]
            row += len(piece)
            yield out

    def read_expert(self, layer: int, index: int) -> Iterator[tuple[str, F32]]:
        """As `ModelSource.read_expert`."""
        parts = dict(self._source.read_expert(layer, index))
        norm = self._norm(f"layers.{layer}.mlp_norm")
        yield "gate", parts.pop("gate") * norm
        up, down = parts.pop("up") * norm, parts.pop("down")
        inner = factors(row_norms(up), columns([down]))
        yield "up", up / inner[:, None]
        yield "down", down * inner

    # --- factors ---

    def _factors_of(self, canonical: str) -> tuple[F32 | None, F32 | None]:
        """Of the columns (to multiply with) and of the rows (to divide by) of a matrix."""
        if canonical == "head":
            return self._norm("final_norm"), None
        if canonical == "embed":
            return None, None
        stem, _, last = canonical.rpartition(".")  # "layers.3.attn", "q"
        layer = stem.rpartition(".")[0]
        if last in ("q", "k"):
            return self._norm(f"{layer}.attn_norm"), None
        if last == "v":
            return self._norm(f"{layer}.attn_norm"), self._v(stem)
        if last == "o":
            return self._heads(self._v(stem)), None
        if last == "gate":
            return self._norm(f"{layer}.mlp_norm"), None
        if last == "up":
            return self._norm(f"{layer}.mlp_norm"), self._block(stem)
        return self._block(stem), None

    def _norm(self, name: str) -> F32:
        """Factors [hidden] of the columns that meet the norm `name`."""
        if name not in self._found:
            weights = np.abs(self._source.read_dense(name).astype(np.float64))
            tied = name == "final_norm" and self.shape.tied_embeddings
            met = np.zeros(len(weights)) if tied else columns(self._consumers(name))
            self._found[name] = factors(weights, met)
        return self._found[name]

    def _consumers(self, norm: str) -> Iterator[F32]:
        """The matrices that stand for all that meet a norm: those whose rows have no free factor of their own."""
        layer, _, kind = norm.rpartition(".")
        if norm == "final_norm":
            yield from self._source.linear_pieces("head", 1)
        elif kind == "attn_norm":
            for part in "qk":
                yield from self._source.linear_pieces(f"{layer}.attn.{part}", 1)
        else:
            number = int(layer.rpartition(".")[2])
            self._tell(f"layer {number} gates, for balance")
            for index in range(self.shape.experts if number in self.shape.moe_layers else 0):
                yield next(self._source.read_expert(number, index))[1]
            for block in ("shared", "mlp"):
                if f"{layer}.{block}.gate" in self.names.dense:
                    yield from self._source.linear_pieces(f"{layer}.{block}.gate", 1)

    def _block(self, stem: str) -> F32:
        """Factors [inner] of the columns of a dense block's down."""
        if stem not in self._found:
            norm = self._norm(f"{stem.rpartition('.')[0]}.mlp_norm")
            up = [row_norms(piece * norm) for piece in self._source.linear_pieces(f"{stem}.up", 1)]
            down = columns(self._source.linear_pieces(f"{stem}.down", 1))
            self._found[stem] = factors(np.concatenate(up), down)
        return self._found[stem]

    def scale_block(self, stem: str, by: F32) -> None:
        """From now on multiply the columns of a dense block's down by `by` float32 [inner], too, and divide the rows of its up."""
        self._found[stem] = self._block(stem) * by

    def _v(self, stem: str) -> F32:
        """Factors [kv_heads * head_dim] of the columns of o, that of a key-value head for all the heads that share it."""
        s = self.shape
        if stem not in self._found:
            if s.clip_qkv is not None:
                return np.ones(s.kv_heads * s.head_dim, np.float32)
            norm = self._norm(f"{stem.rpartition('.')[0]}.attn_norm")
            v = np.concatenate([row_norms(piece * norm) for piece in self._source.linear_pieces(f"{stem}.v", 1)])
            o = columns(self._source.linear_pieces(f"{stem}.o", 1)).reshape(s.kv_heads, -1, s.head_dim)
            self._found[stem] = factors(v, np.sqrt((o**2).mean(axis=1)).reshape(-1))
        return self._found[stem]

    def _heads(self, factors: F32) -> F32:
        """Factors of all heads from those of the key-value heads."""
        s = self.shape
        each = factors.reshape(s.kv_heads, 1, s.head_dim)
        return np.broadcast_to(each, (s.kv_heads, s.heads // s.kv_heads, s.head_dim)).reshape(-1)

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> Balanced:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def columns(matrices: Iterator[F32] | list[F32]) -> F64:
    """Root mean squares of the columns over all rows, float64 [cols]."""
    squares, rows = np.zeros(1), 0
    for w in matrices:
        # In float64: the square of a float32 can overflow or vanish.
        squares = squares + np.einsum("ij,ij->j", w, w, dtype=np.float64)
        rows += len(w)
    norms: F64 = np.sqrt(squares / rows)
    return norms
