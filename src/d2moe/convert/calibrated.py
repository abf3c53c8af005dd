"""Conversion with error feedback: layer by layer, with what the unquantised model makes of the calibration text.

One layer's weights are in memory, and the residual stream of all windows. Each matrix is rounded for the inputs it meets
there (convert/activations.py, convert/feedback.py), and channels between up and down are scaled by what they carry
(convert/balance.py); the stream itself goes on in float, since it has no one width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from d2moe.container import ContainerWriter, NestedMatrix
from d2moe.container.layout import PROJECTIONS, Tensors
from d2moe.convert.activations import Routed
from d2moe.convert.balance import Balanced, columns, factors
from d2moe.convert.calibration import I32, Stream
from d2moe.convert.feedback import F32, F64, Feedback, Rounded, Target
from d2moe.convert.job import Job, Progress, packed
from d2moe.convert.source import ModelSource
from d2moe.kernels import native
from d2moe.planes import tile, tile_affine
from d2moe.types import MAX_BITS, TILE_ROWS, ModelShape

TARGETS = {
    "experts": (Target(2, 8.0), Target(3, 3.0), Target(4, 1.5), Target(5, 0.5), Target(6, 0.4), Target(8, 0.05)),
    "dense": (Target(4, 0.3), Target(5, 1.0), Target(6, 0.5), Target(8, 0.2)),
}
"""The widths that count. Dense weights are read at two more bits than the experts, at 5 or more; 4 is for who asks for it."""
BELOW, ABOVE = 0.1, 1e-3
"""Where a matrix is rounded for the bits that are kept: what a width counts that is a bit less, and again for each bit less; and what
eight bits do, which nobody will read."""
TIED = 0.1
"""What an embedding's own rows count beside the head's outputs where both are one matrix."""


def facts() -> dict[str, Any]:
    """What the quantiser's notes in a manifest say of all this."""
    return {"targets": {kind: {str(t.bits): t.share for t in targets} for kind, targets in TARGETS.items()}}


def targets(kind: str, kept: int | None = None) -> tuple[Target, ...]:
    """The widths that count for a matrix of which all bits are kept, or only `kept`: those of it count most then."""
    if kept is None:
        return TARGETS[kind]
    lower = tuple(Target(t.bits, BELOW ** (kept - t.bits)) for t in TARGETS[kind] if t.bits < kept)
    above = (Target(MAX_BITS, ABOVE),) if kept < MAX_BITS else ()
    return (*lower, Target(kept, 1.0), *above)


def loss_tensors(shape: ModelShape) -> Tensors:
    """The measured losses that a container keeps: of each layer float32 [experts, projections, targets], the squared error of a
    matrix's outputs as a share of their own squares; and how many calibration tokens chose each expert, float32 [experts]."""
    out: Tensors = {}
    for layer in shape.moe_layers:
        out[f"optional.losses.{layer}"] = ("F32", (shape.experts, len(PROJECTIONS), len(TARGETS["experts"])))
        out[f"optional.tokens.{layer}"] = ("F32", (shape.experts,))
    return out


class CalibratedJob(Job):
    """A run of rounding with error feedback, layer by layer."""

    def __init__(
        self, checkpoint: ModelSource, writer: ContainerWriter, group: int, threads: int, progress: Progress, windows: I32,
        for_kept: bool = False,
    ):  # fmt: skip
        """`for_kept`: for the bits that `writer` keeps, more than for those below."""
        super().__init__(checkpoint, writer, group, threads, progress)
        self._windows, self._for_kept = windows, for_kept
        self._balanced = checkpoint if isinstance(checkpoint, Balanced) else None

    def run(self) -> None:
        """Everything that is not there yet."""
        self.progress.start(self.total, self.done)
        shape = self.checkpoint.shape
        for name, source in self.checkpoint.names.dense.items():
            if not source.quantized:
                self._plain(name)
        self.progress.advance(0, "calibration text")
        stream = Stream(self.checkpoint, self._windows, self.writer.partial)
        for layer in range(stream.layer, shape.layers):
            self._layer(stream, layer)
            stream.keep(layer + 1)
        self._ends(stream.activations.final(), shape.tied_embeddings)
        stream.close()

    def _ends(self, last: F32, tied: bool) -> None:
        """Embedding and head. Rows of an embedding are looked up one by one, which no correlation of inputs can help; where
        it is the head, too, both count."""
        alone = np.eye(len(last), dtype=np.float32)
        if not tied:
            self._corrected("embed", alone)
            self._corrected("head", last)
        else:
            mean = np.float32(max(float(np.trace(last, dtype=np.float64)) / len(last), 1e-30))
            self._corrected("embed", last / mean + np.float32(TIED) * alone)

    def _layer(self, stream: Stream, layer: int) -> None:
        activations, name = stream.activations, f"layers.{layer}"
        self.progress.advance(0, f"layer {layer} attention")
        into, out = activations.attend(layer)
        for part in "qkv":
            self._corrected(f"{name}.attn.{part}", into)
        self._corrected(f"{name}.attn.o", out)
        h = activations.normed(layer)
        routed = None
        if layer in activations.shape.moe_layers:
            routed = Routed(activations, layer, h, least=h.shape[1])
        for block in ("mlp", "shared"):
            if f"{name}.{block}.gate" in self.checkpoint.names.dense:
                mix = self.checkpoint.read_dense(f"{name}.shared.mix") if block == "shared" else None
                into, inner = activations.block(f"{name}.{block}", h, mix)
                if self._balanced:
                    by = inner_factors(inner, np.concatenate(list(self.checkpoint.linear_pieces(f"{name}.{block}.down", 1))))
                    self._balanced.scale_block(f"{name}.{block}", by)
                    inner = inner / np.outer(by, by)
                for part, hessian in (("gate", into), ("up", into), ("down", inner)):
                    self._corrected(f"{name}.{block}.{part}", hessian)
        if routed is not None:
            self._experts(layer, routed)

    def _corrected(self, name: str, hessian: F32) -> None:
        if not self._has_dense(name):
            feedback = self._feedback(self._met(name, hessian), "dense", self.writer.dense_width(name))
            self._linear(name, lambda piece: nested(feedback.round(self._inward(name, piece))))

    def _met(self, name: str, hessian: F32) -> F32:
        """The Hessian of a matrix's inputs as the engine gives them (`_inward`)."""
        span = self.writer.record.rotation_of(name)
        if not span:
            return hessian
        turned: F32 = native.rotate(np.ascontiguousarray(native.rotate(hessian, span).T), span)
        return turned

    def _feedback(self, hessian: F32, kind: str, kept: int) -> Feedback:
        wanted = targets(kind, kept if self._for_kept else None)
        return Feedback(hessian, self._group, targets=wanted, threads=self._threads)

    def _experts(self, layer: int, routed: Routed) -> None:
        ready = self.writer.done_experts(layer)
        losses = f"optional.losses.{layer}"
        found = np.zeros((self.checkpoint.shape.experts, len(PROJECTIONS), len(TARGETS["experts"])), np.float32)
        for index in range(self.checkpoint.shape.experts):
            parts = dict(self.checkpoint.read_expert(layer, index))
            wanted = index not in ready or not self.writer.is_dense_done(losses)
            hessians = routed.pass_on(index, **parts, measure=wanted)
            if hessians is None:
                continue
            matrices, found[index] = self._expert_of(*hessians, parts, self.writer.width(layer, index))
            if index not in ready:
                self.writer.add_expert(layer, index, matrices)
                self._advance(self._expert_weights, f"layer {layer} expert {index}")
        if not self.writer.is_dense_done(losses):
            self.writer.add_dense(f"optional.tokens.{layer}", routed.tokens.astype(np.float32))
            self.writer.add_dense(losses, found)

    def _expert_of(self, into: F32, inner: F32, parts: dict[str, F32], kept: int) -> tuple[dict[str, NestedMatrix], F64]:
        if self._balanced:
            by = inner_factors(inner, parts["down"])
            inner = inner / np.outer(by, by)
            parts = {"gate": parts["gate"], "up": parts["up"] / by[:, None], "down": parts["down"] * by}
        inner = self._met("down", inner)
        first, second = self._feedback(into, "experts", kept), self._feedback(inner, "experts", kept)
        # Of what is measured: a width beyond the kept one is that one.
        known = [t.bits for t in targets("experts", kept if self._for_kept else None)]
        columns_of = [known.index(min(t.bits, kept)) for t in TARGETS["experts"]]
        matrices, losses = {}, []
        for name in PROJECTIONS:
            weights = self._inward(name, parts[name])
            rounded = (second if name == "down" else first).round(weights)
            hessian = inner if name == "down" else into
            matrices[name] = nested(rounded).cut(kept)
            energy = np.vdot(weights @ hessian, weights)
            losses.append(rounded.losses[columns_of] / max(float(energy), 1e-30))
        return matrices, np.array(losses)


def inner_factors(inner: F32, down: F32) -> F32:
    """What to multiply down's columns with, and to divide up's rows by, float32 [inner]: as `balance.factors`, with the channels' measured
    sizes in place of up's norms. `inner` float32 [inner, inner] is the Hessian of what down meets."""
    return factors(np.sqrt(np.diagonal(inner).astype(np.float64)), columns([down]))


def nested(rounded: Rounded) -> NestedMatrix:
    """In storage order."""
    group = rounded.codes.shape[1] // rounded.affine.shape[1]
    rows = rounded.row_scale.reshape(-1, TILE_ROWS)
    return packed(tile(rounded.codes, group), tile_affine(rounded.affine), rows)
