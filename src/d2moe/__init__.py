"""d2moe: mixture-of-experts language models that do not fit in memory.

    import d2moe
    model = d2moe.load("model.d2moe", memory="256MB", bits=4)
    print(model.generate("Once upon a time", max_tokens=60, temperature=0).text)
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2moe.runtime.generate import Model

try:
    __version__ = version("d2moe")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__", "builtin_model", "load"]


def builtin_model() -> Path:
    """Directory of the small model that comes with the package."""
    return Path(__file__).parent / "builtin" / "qwen3moe-14m.d2moe"


def load(path: str | Path | None = None, **options: Any) -> Model:
    """Load a container (default: the built-in model) and return a `Model` with generate(), stream() and chat().

    Options are those of `d2moe.runtime.config.EngineConfig`, with `memory` and `expert_memory` as text like "6GB".
    Raises ConfigError, ContainerError, MemoryBudgetError.
    """
    from d2moe.container import Container
    from d2moe.runtime.config import EngineConfig
    from d2moe.runtime.engine import Engine
    from d2moe.runtime.generate import Model
    from d2moe.runtime.tokenizer import Tokenizer

    where = builtin_model() if path is None or str(path) == "builtin" else Path(path)
    config = EngineConfig.from_options(**options)
    container = Container.open(where)
    tokenizer = Tokenizer.load(where)  # before the engine measures what the process holds
    return Model(Engine(container, config), tokenizer)
