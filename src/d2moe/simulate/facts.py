"""What simulation must know of a model, from a converted model, a config.json, or one of a few names: no weights are needed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from d2moe.container import Container, MatrixLayout, RecordLayout, read_router
from d2moe.errors import ConfigError, ContainerError
from d2moe.models import family, shape_from_config
from d2moe.policy.trace import Meta
from d2moe.runtime.config import EngineConfig
from d2moe.simulate.device import Device, guess, parse_rates
from d2moe.types import GROUP, MAX_BITS, WIDTHS, DenseWidths, ModelShape


@dataclass(frozen=True)
class ModelFacts:
    """A model's shape, the layout of its experts and the bytes of all its other weights by width."""

    name: str
    shape: ModelShape
    record: RecordLayout
    dense_bytes: Callable[[DenseWidths], int]
    kept_bytes: Callable[[DenseWidths], int]
    """Those a step reads: not the embedding, of which a token is one row."""
    kept: npt.NDArray[np.int64]
    """Bits that each expert has [layers with experts, experts]."""
    routed: bool
    """Whether it has a width router."""

    def meta(self) -> Meta:
        """What a trace of this model says of itself."""
        s, last = self.shape, self.shape.moe_layers[-1] == self.shape.layers - 1
        sizes = (self.record.base_bytes, self.record.plane_bytes)
        return Meta(len(s.moe_layers), s.experts, s.top_k, *sizes, last, self.name)

    def all_experts_bytes(self, bits: int) -> int:
        return self.record.records_bytes(self.kept.reshape(-1).tolist(), bits)

    @property
    def one_expert_bytes(self) -> int:
        """The largest."""
        return self.record.prefix_bytes(int(self.kept.max()))

    def dense_widths(self, config: EngineConfig) -> DenseWidths:
        return config.dense_widths(not self.shape.tied_embeddings, routed=self.routed and not config.uniform)

    def device(self, text: str, dense: DenseWidths) -> Device:
        """A device by its two bandwidths, "io=1.2GB,memory=30GB", or from a profile's file; ConfigError else."""
        rates = parse_rates(text)
        if rates is None:
            if not Path(text).is_file():
                raise ConfigError(
                    f"device is {text!r}, expected a profile's file (d2moe profile --json), or two bandwidths as "
                    "io=1.2GB,memory=30GB"
                )
            return Device.load(Path(text))
        return guess(
            *rates,
            expert_bytes={b: self.record.prefix_bytes(b) for b in WIDTHS},
            dense_bytes=self.kept_bytes(dense),
            expert_weights=3 * self.shape.hidden * self.shape.expert_inner,
        )


def model_facts(path: Path, group: int = GROUP) -> ModelFacts:
    """Facts of a converted model's folder, or of a config.json (or a folder with one), for which `group` is assumed."""
    stored, routed = {}, False
    if (path / "d2moe.json").is_file() or (path / "experts").is_dir():
        container = Container.open(path)
        shape = shape_from_config(container.config, f"{path}/config.json", container.manifest.source.get("ignored_config_keys", []))
        record, kept, stored = container.record, container.kept, container.nested
        routed = read_router(container) is not None
    else:
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise ContainerError(f"{path}: no such model; give a converted model, or a config.json")
        try:
            config = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise ConfigError(f"{file} is not valid JSON: {error}") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{file} holds no JSON object")
        shape = shape_from_config(config, str(file), [])
        record = RecordLayout(shape.hidden, shape.expert_inner, group)
        kept = np.full((len(shape.moe_layers), shape.experts), MAX_BITS)
    sources = family(shape.model_type).source_names(shape).dense

    def size(widths: DenseWidths, without: str = "") -> int:
        total = 0
        for name, source in sources.items():
            if name != without:
                if source.quantized:
                    layout = stored.get(name) or MatrixLayout(source.shape[0], source.shape[1], record.group)
                    total += layout.memory_bytes(widths.of(name))
                else:
                    total += 4 * math.prod(source.shape)
        return total

    untied = "" if shape.tied_embeddings else "embed"
    name = path.parent.name or path.name if path.name == "config.json" else path.name
    return ModelFacts(name, shape, record, size, lambda widths: size(widths, untied), kept, routed)
