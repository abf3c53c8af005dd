"""A checkpoint becomes a container, tensor by tensor: nothing larger than a piece of a tensor or one expert is held.

Peak memory is a few experts in float32, or a piece of `huggingface.PIECE_BYTES` of a dense matrix with its codes,
whatever the size of the model. Every finished tensor and expert is in the journal of the .partial folder, so a run that
was killed goes on where it was, and gives the same bytes as one that was not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from d2moe.container import ContainerWriter, NestedMatrix, RecordLayout
from d2moe.container.manifest import GROUPS
from d2moe.convert.balance import SHARE, Balanced
from d2moe.convert.huggingface import F32, dense_tensors
from d2moe.convert.source import ModelSource, open_source
from d2moe.errors import CheckpointError, ConfigError
from d2moe.kernels import native
from d2moe.types import TILE_ROWS


class Progress(Protocol):
    """What the caller shows. All counts are weights; those of an earlier run come at once in `start`."""

    def start(self, total: int, done: int) -> None:
        """Called once, before the first weight is read."""

    def advance(self, weights: int, text: str) -> None:
        """So many weights more are written; `text` says what they were, "layer 3 expert 17". None: what is read now."""


class _Silent:
    def start(self, total: int, done: int) -> None:
        pass

    def advance(self, weights: int, text: str) -> None:
        pass


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    group: int = 64,
    balance: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
    ignore_config_keys: Collection[str] = (),
) -> Path:
    """Convert `src`, the folder of a Hugging Face checkpoint or a GGUF file, to the container `dst`; returns `dst`.

    `group` weights along the input share a scale; `balance` moves factors between weights that follow each other, which
    changes no output and helps the lower widths (convert/balance.py); `threads` None means all CPUs this process may use.
    `dst`.partial holds an unfinished conversion; the same call resumes it. Interrupted, it raises KeyboardInterrupt with a message
    that says so. Raises ConfigError (the config, or an argument), CheckpointError (the weights or the tokenizer; then
    nothing is left behind), ContainerError (`dst` exists, or the .partial is of another conversion) and StorageError.
    """
    if isinstance(group, bool) or group not in GROUPS:
        raise ConfigError(f"group is {group!r}, expected a multiple of {GROUPS[0]} up to {GROUPS[-1]}, such as 64")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ConfigError(f"threads is {threads!r}, expected a whole number of at least 1")
    threads = threads or len(os.sched_getaffinity(0))
    with open_source(src, ignore_config_keys) as checkpoint:
        quantizer = {"name": "range", "group": group, "balance": SHARE if balance else None}
        writer = _writer(checkpoint, Path(dst), quantizer, ignore_config_keys)
        progress = progress or _Silent()
        source = Balanced(checkpoint, partial(progress.advance, 0)) if balance else checkpoint
        job = _Job(source, writer, group, threads, progress)
        try:
            with writer:
                job.run()
                return writer.finish()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{writer.partial}: stopped after {job.done:,} of {job.total:,} weights; the same command resumes"
            ) from None
        except CheckpointError:
            # These weights can never be finished: what is done of them is of no use to anyone.
            with contextlib.suppress(OSError):
                shutil.rmtree(writer.partial)
            raise


def _writer(checkpoint: ModelSource, dst: Path, quantizer: dict[str, Any], ignored: Collection[str]) -> ContainerWriter:
    shape, group = checkpoint.shape, quantizer["group"]
    return ContainerWriter(
        dst,
        record=RecordLayout(shape.hidden, shape.expert_inner, group),
        layers=shape.moe_layers,
        experts=shape.experts,
        dense=dense_tensors(checkpoint.names.dense, group),
        files=checkpoint.companions(),
        source={**checkpoint.facts(), "ignored_config_keys": sorted(set(ignored))},
        quantizer=quantizer,
    )


class _Job:
    """One run: `done` and `total` count weights."""

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
            if self._has_dense(name):
                continue
            if source.quantized:
                self._linear(name)
            else:
                self.writer.add_dense(name, self.checkpoint.read_dense(name))
                self._advance(self.checkpoint.weights(name), name)
        for layer in self.checkpoint.shape.moe_layers:
            ready = self.writer.done_experts(layer)
            for index in range(self.checkpoint.shape.experts):
                if index not in ready:
                    self._expert(layer, index)
                    self._advance(self._expert_weights, f"layer {layer} expert {index}")

    def _advance(self, weights: int, text: str) -> None:
        self.done += weights
        self.progress.advance(weights, text)

    def _linear(self, name: str) -> None:
        """In pieces of whole tiles: what is encoded of them is what is encoded of the whole matrix."""
        tile = 0
        for piece in self.checkpoint.linear_pieces(name, TILE_ROWS):
            matrix = self._encode(piece)
            self.writer.add_nested(name, matrix, tile)
            tile += len(matrix.row_scale)
            self._advance(piece.size, name)

    def _expert(self, layer: int, index: int) -> None:
        matrices = {name: self._encode(weights) for name, weights in self.checkpoint.read_expert(layer, index)}
        self.writer.add_expert(layer, index, matrices)

    def _encode(self, weights: F32) -> NestedMatrix:
        tiles, affine, row_scale = native.encode(weights, self._group, self._threads)
        base, further = native.pack(tiles)
        return NestedMatrix(row_scale, affine, base, list(further))
