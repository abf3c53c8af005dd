"""What is in a container, as plain numbers for a table or for JSON; nothing but the measured losses is read beyond what `open` has read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe.container.reader import Container
from d2moe.types import WIDTHS, DenseWidths


@dataclass(frozen=True)
class WidthSize:
    """What a width costs: bytes per expert, of all experts, read by one token with nothing resident, of dense weights."""

    bits: int
    bits_per_weight: float
    """Scales and padding included."""
    expert_bytes: int
    all_experts_bytes: int
    token_bytes: int | None
    """All layers, the model's experts per token; None if config.json does not say how many."""
    dense_bytes: int
    """In memory: matrices at this width and float32 tensors."""
    dense_widths: DenseWidths
    """The engine's default for dense weights beside experts of this width."""
    default_dense_bytes: int
    """In memory at these."""


@dataclass(frozen=True)
class FileSize:
    name: str
    n_bytes: int
    optional: bool


@dataclass(frozen=True)
class TensorSize:
    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int


@dataclass(frozen=True)
class Description:
    """A container in numbers; `dataclasses.asdict` makes it JSON."""

    path: str
    model_type: str
    hidden: int
    inner: int
    group: int
    rotation: int
    moe_layers: tuple[int, ...]
    experts: int
    experts_per_token: int | None
    expert_weights: int
    """Weights of all experts together."""
    expert_bytes: int
    """All experts with all the bits they have."""
    kept_bits: float
    """Bits of an expert, on average: 8, or less in a trimmed model."""
    most_bits: int
    total_bytes: int
    least_bytes: int | None
    """Dense weights and one token's experts of one layer, all at 2 bits: no engine runs in less than this."""
    widths: tuple[WidthSize, ...]
    files: tuple[FileSize, ...]
    dense: tuple[TensorSize, ...]
    source: Mapping[str, Any]
    quantizer: Mapping[str, Any]


def measured_losses(container: Container) -> tuple[tuple[int, ...], dict[int, npt.NDArray[np.float64]]] | None:
    """Widths, and by layer the squared error of the outputs of gate, up and down at each of them, as a share of their own squares,
    float64 [3, widths]: the mean over experts, each counted as often as the calibration text chose it.

    None if the model was converted without calibration text.
    """
    targets = container.manifest.quantizer.get("targets")
    if not isinstance(targets, dict) or not all(f"optional.losses.{layer}" in container.dense for layer in container.moe_layers):
        return None
    found = {}
    for layer in container.moe_layers:
        losses = container.read_dense(f"optional.losses.{layer}").astype(np.float64)
        tokens = container.read_dense(f"optional.tokens.{layer}").astype(np.float64)
        found[layer] = np.average(losses, axis=0, weights=tokens if tokens.sum() else None)
    return tuple(int(bits) for bits in targets["experts"]), found


def describe(container: Container) -> Description:
    """The description of an open container."""
    manifest, record, config = container.manifest, container.record, container.config
    found = config.get("num_experts_per_tok", 1 if container.experts == 1 else None)
    top_k = found if type(found) is int and 0 < found <= container.experts else None
    layers, count = len(container.moe_layers), len(container.moe_layers) * container.experts
    widths = tuple(
        WidthSize(
            bits,
            record.bits_per_weight(bits),
            record.prefix_bytes(bits),
            container.experts_bytes(bits),
            layers * top_k * record.prefix_bytes(bits) if top_k else None,
            container.dense_bytes(DenseWidths(bits)),
            default := container.stored_widths(DenseWidths.beside(bits, own_embedding=container.has("head"))),
            container.dense_bytes(default),
        )
        for bits in WIDTHS
    )
    return Description(
        path=str(container.path),
        model_type=str(config.get("model_type", "unknown")),
        hidden=record.hidden,
        inner=record.inner,
        group=record.group,
        rotation=record.rotation,
        moe_layers=container.moe_layers,
        experts=container.experts,
        experts_per_token=top_k,
        expert_weights=count * 3 * record.hidden * record.inner,
        expert_bytes=container.experts_bytes(),
        kept_bits=float(container.kept.mean()),
        most_bits=container.most_bits,
        total_bytes=sum(facts.n_bytes for facts in manifest.files.values()),
        least_bytes=widths[0].dense_bytes + top_k * widths[0].expert_bytes if top_k else None,
        widths=widths,
        files=tuple(FileSize(name, facts.n_bytes, facts.optional) for name, facts in manifest.files.items()),
        dense=tuple(TensorSize(name, e.dtype, e.shape, e.n_bytes) for name, e in container.dense.items()),
        source=manifest.source,
        quantizer=manifest.quantizer,
    )
