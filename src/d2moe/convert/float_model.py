"""What the unquantised model predicts, in float32 without torch, with the weights of one layer in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from d2moe.convert.activations import CHUNK_BYTES, Activations, Routed
from d2moe.convert.calibration import Calibration
from d2moe.convert.source import ModelSource
from d2moe.kernels.reference import rms_norm

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]


Progress = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    pass


def last_states(source: ModelSource, tokens: I32, progress: Progress = _silent) -> F32:
    """What the head meets, float32 [windows, length, hidden], of `tokens` int32 [windows, length].

    Memory: a layer's weights, twice 4 bytes x hidden size x tokens. `progress` hears experts and blocks done, of all.
    """
    activations, shape = Activations(source, tokens), source.shape
    total, done = shape.layers * (shape.experts + 1), 0
    for layer in range(shape.layers):
        activations.attend(layer)
        h = activations.normed(layer)
        routed = Routed(activations, layer, h, least=0) if layer in shape.moe_layers else None
        for block in ("mlp", "shared"):
            if f"layers.{layer}.{block}.gate" in source.names.dense:
                mix = source.read_dense(f"layers.{layer}.shared.mix") if block == "shared" else None
                activations.block(f"layers.{layer}.{block}", h, mix)
        progress(done := done + 1, total)
        for expert in range(shape.experts):
            if routed is not None:
                routed.pass_on(expert, **dict(source.read_expert(layer, expert)), measure=False)
            progress(done := done + 1, total)
    return rms_norm(activations.x, source.read_dense("final_norm"), shape.rms_eps)


def float_nll(source: ModelSource, tokens: I32, progress: Progress = _silent) -> float:
    """Summed negative log-likelihood in nats of `tokens` int32 [windows, length + 1], each predicted from those before it in its
    window; the first of a window is only read. Memory and `progress` as in `last_states`."""
    x = last_states(source, tokens[:, :-1], progress)
    return _nll(source, x.reshape(-1, source.shape.hidden), tokens[:, 1:].reshape(-1))


def _nll(source: ModelSource, x: F32, targets: I32) -> float:
    """Of the head's inputs x [n, hidden] and targets [n], the head piece by piece: sums of exponentials are kept, not logits."""
    highest = np.full(len(x), -np.inf)
    total, picked, row = np.zeros(len(x)), np.zeros(len(x)), 0
    for piece in source.linear_pieces("embed" if source.shape.tied_embeddings else "head", 1):
        step = max(1, CHUNK_BYTES // (8 * len(piece)))
        for at in range(0, len(x), step):
            part = slice(at, at + step)
            logits = (x[part] @ piece.T).astype(np.float64)
            peak = np.maximum(highest[part], logits.max(-1))
            total[part] = total[part] * np.exp(highest[part] - peak) + np.exp(logits - peak[:, None]).sum(-1)
            highest[part] = peak
            here = np.flatnonzero((targets[part] >= row) & (targets[part] < row + len(piece)))
            picked[at + here] = logits[here, targets[part][here] - row]
        row += len(piece)
    return float((np.log(total) + highest - picked).sum())


def unread_windows(calibration: Calibration, source: ModelSource, length: int, most: int) -> I32:
    """Windows int32 [windows, length + 1] of the calibration text that calibration does not read: at `most` so many, spread over all
    of them. [0, length + 1] where all of the text is read.

    A model's context bounds the length.
    """
    read = calibration.windows(source)
    known = {window.tobytes() for window in read}
    everything = replace(calibration, max_tokens=np.iinfo(np.int64).max).windows(source)
    rest = [window for window in everything if window.tobytes() not in known]
    kept = np.array(rest, np.int32).reshape(len(rest), read.shape[1])[:, : length + 1]
    return kept[np.arange(min(most, len(kept))) * len(kept) // max(1, min(most, len(kept)))]
