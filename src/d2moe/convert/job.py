"""What every conversion does: each tensor and expert that is not there yet is read, encoded and written, in some order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from d2moe.container import ContainerWriter, NestedMatrix
from d2moe.convert.huggingface import F32
from d2moe.convert.source import ModelSource
from d2moe.kernels import native
from d2moe.types import TILE_ROWS

U8 = npt.NDArray[np.uint8]


class Progress(Protocol):
    """What the caller shows. All counts are weights; those of an earlier run come at once in `start`."""

    def start(self, total: int, done: int) -> None:
        """Called once, before the first weight is read."""

    def advance(self, weights: int, text: str) -> None:
        """So many weights more are written; `text` says what they were, "layer 3 expert 17". None: what is read now."""


class Silent:
    def start(self, total: int, done: int) -> None:
        pass

    def advance(self, weights: int, text: str) -> None:
        pass


def packed(tiles: U8, affine: U8, row_scale: F32) -> NestedMatrix:
    """A matrix in storage order from register-ordered codes uint8 [tiles, groups, group/4, 64], affine and row scale in
    storage order."""
    base, further = native.pack(tiles)
    return NestedMatrix(row_scale, affine, base, list(further))


class Job:
    """One run of rounding to the nearest, in file order. `done` and `total` count weights."""

    def __init__(self, checkpoint: ModelSource, writer: ContainerWriter, group: int, threads: int, progress: Progress):
        self.checkpoint, self.writer, self.progress = checkpoint, writer, progress
        self._group, self._threads = group, threads
        shape = checkpoint.shape
        self._expert_weights = 3 * shape.hidden * shape.expert_inner
        experts = shape.experts * len(shape.moe_layers)
        self.total = sum(map(checkpoint.weights, checkpoint.names.dense)) + experts * self._expert_weights
        ready = sum(len(writer.done_experts(layer)) for layer in shape.moe_layers)
        self.done = ready * self._expert_weights
        self.done += sum(checkpoint.weights(name) for name in checkpoint.names.dense if self._has_dense(name))

    def _has_dense(self, name: str) -> bool:
        is_nested = self.checkpoint.names.dense[name].quantized
        return self.writer.is_nested_done(name) if is_nested else self.writer.is_dense_done(name)

    def run(self) -> None:
        """Everything that is not there yet, in file order."""
        self.progress.start(self.total, self.done)
        for name, source in self.checkpoint.names.dense.items():
            if source.quantized:
                self._linear(name, partial(self._nearest, name))
            else:
                self._plain(name)
        for layer in self.checkpoint.shape.moe_layers:
            ready = self.writer.done_experts(layer)
            for index in range(self.checkpoint.shape.experts):
                if index not in ready:
                    self._expert(layer, index)
                    self._advance(self._expert_weights, f"layer {layer} expert {index}")

    def _advance(self, weights: int, text: str) -> None:
        self.done += weights
        self.progress.advance(weights, text)

    def _plain(self, name: str) -> None:
        """A tensor that stays in float32."""
        if not self._has_dense(name):
            self.writer.add_dense(name, self.checkpoint.read_dense(name))
            self._advance(self.checkpoint.weights(name), name)

    def _linear(self, name: str, encode: Callable[[F32], NestedMatrix]) -> None:
        """In pieces of whole tiles: what is encoded of them is what is encoded of the whole matrix."""
        if self._has_dense(name):
            return
        tile = 0
        for piece in self.checkpoint.linear_pieces(name, TILE_ROWS):
            matrix = encode(piece).cut(self.writer.dense_width(name))
            self.writer.add_nested(name, matrix, tile)
            tile += len(matrix.row_scale)
            self._advance(piece.size, name)

    def _expert(self, layer: int, index: int) -> None:
        parts = self.checkpoint.read_expert(layer, index)
        matrices = {name: self._nearest(name, weights).cut(self.writer.width(layer, index)) for name, weights in parts}
        self.writer.add_expert(layer, index, matrices)

    def _inward(self, name: str, weights: F32) -> F32:
        """Weights float32 [rows, cols] for inputs as the engine gives them: those of every down come rotated."""
        span = self.writer.record.rotation_of(name)
        return np.asarray(native.rotate(weights, span) * np.float32(1 / span), np.float32) if span else weights

    def _nearest(self, name: str, weights: F32) -> NestedMatrix:
        return packed(*native.encode(self._inward(name, weights), self._group, self._threads))
