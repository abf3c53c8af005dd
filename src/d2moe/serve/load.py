"""Bringing a model up for serving: what a server holds beside the engine is counted before the engine splits the budget."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from d2moe.container import Container
from d2moe.errors import ContainerError, RequestError
from d2moe.models import shape_from_config
from d2moe.runtime import memory
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import DEFAULT_CONTEXT, Engine
from d2moe.runtime.generate import Model, end_tokens
from d2moe.runtime.grammar import Grammars
from d2moe.runtime.kv import BLOCK_TOKENS
from d2moe.runtime.scheduler import SCORED_BYTES
from d2moe.runtime.tokenizer import Tokenizer
from d2moe.serve.service import Limits, Service

RESERVE_BYTES = 24 * 10**6 + SCORED_BYTES
"""For requests and answers under way, grammars at work, and logits of scored prompts."""
KV_SHARE = 0.25
"""Of the memory, what the cache of keys and values takes unless told otherwise."""
SEQUENCES = 16


def load_service(
    path: Path,
    config: EngineConfig,
    limits: Limits | None = None,
    name: str | None = None,
    template: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Service:
    """A service for the container in `path`. `template`: a chat template instead of the model's own.

    Raises ContainerError, ConfigError, MemoryBudgetError.
    """
    container = Container.open(path)
    where = f"{path}/config.json"
    shape = shape_from_config(container.config, where, container.manifest.source.get("ignored_config_keys", []))
    tokenizer = Tokenizer.load(path, template)
    if template is not None:
        try:
            tokenizer.chat_text([{"role": "user", "content": "?"}])
        except RequestError as error:
            raise ContainerError(f"the chat template given does not take a plain message: {error}") from None
    grammars = None
    with contextlib.suppress(ImportError, RequestError):  # requests that need one are told
        grammars = Grammars(tokenizer, shape.vocab, end_tokens(shape, container.generation_config, tokenizer))
    context = config.context or min(shape.context, DEFAULT_CONTEXT)
    if config.kv_tokens is None:
        total = config.memory_bytes or memory.available_bytes()
        room = int(KV_SHARE * total / memory.kv_bytes(shape, config.kv, BLOCK_TOKENS)) * BLOCK_TOKENS
        config = replace(config, kv_tokens=max(context, room))
    config = replace(config, reserve_bytes=config.reserve_bytes or RESERVE_BYTES)
    engine = Engine(container, config, progress)
    return Service(Model(engine, tokenizer), limits, name, grammars)
