"""The supported architectures, by the `model_type` of their config.json.

One file per family: `shape(Config) -> ModelShape` and `source_names(ModelShape) -> SourceNames`. The forward pass is
the same for all of them (`d2moe.models.layers`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

from d2moe.errors import ConfigError
from d2moe.models import llama, mixtral, olmoe, qwen2_moe, qwen3, qwen3_moe
from d2moe.models.config import Config, Source, SourceNames
from d2moe.types import ModelShape

__all__ = ["FAMILIES", "Config", "Family", "Source", "SourceNames", "family", "shape_from_config"]


class Family(Protocol):
    """What a family's file offers."""

    MODEL_TYPE: str

    def shape(self, c: Config) -> ModelShape: ...
    def source_names(self, shape: ModelShape) -> SourceNames: ...


FAMILIES: dict[str, Family] = {f.MODEL_TYPE: f for f in (mixtral, olmoe, qwen2_moe, qwen3_moe, llama, qwen3)}


def family(model_type: object, where: str = "config.json") -> Family:
    """The family of a `model_type`; ConfigError names `where` and the supported ones."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    found = "missing" if model_type is None else repr(model_type)
    raise ConfigError(f"{where}: model_type is {found}, supported are {', '.join(FAMILIES)}")


def shape_from_config(config: dict[str, Any], where: str, ignore_keys: Collection[str] = ()) -> ModelShape:
    """The shape a config.json describes; `where` names the file in errors.

    `ignore_keys` are treated as absent. Raises ConfigError for unknown keys, missing ones, and values not supported.
    """
    c = Config(config, where, ignore_keys)
    return family(c.get("model_type"), where).shape(c)
