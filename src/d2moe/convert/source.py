"""What a conversion reads from, whatever its format, and opening it by what `path` is."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from d2moe.convert.huggingface import Checkpoint
from d2moe.errors import CheckpointError
from d2moe.models import SourceNames
from d2moe.types import ModelShape


class ModelSource(Protocol):
    """An opened model in a foreign format: every tensor it needs is there, and is read piece by piece.

    Weights come as float32, checked to be finite. `names.dense` lists the dense tensors by canonical name.
    """

    shape: ModelShape
    names: SourceNames

    def read_dense(self, canonical: str) -> npt.NDArray[np.float32]: ...
    def linear_pieces(self, canonical: str, multiple: int) -> Iterator[npt.NDArray[np.float32]]: ...
    def read_expert(self, layer: int, index: int) -> Iterator[tuple[str, npt.NDArray[np.float32]]]: ...
    def weights(self, canonical: str) -> int: ...
    def target_shape(self, canonical: str) -> tuple[int, ...]: ...
    def companions(self) -> dict[str, bytes]: ...
    def facts(self) -> dict[str, Any]: ...
    def close(self) -> None: ...
    def __enter__(self) -> ModelSource: ...
    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None: ...


def open_source(path: str | Path, ignore_config_keys: Collection[str] = ()) -> ModelSource:
    """Open a GGUF file or the folder of a Hugging Face checkpoint.

    Raises ConfigError for the config or the metadata it is made from, CheckpointError for everything else.
    """
    path = Path(path)
    if path.suffix == ".gguf" or _begins_as_gguf(path):
        try:
            from d2moe.convert.gguf_source import GgufModel
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "gguf":
                raise
            raise CheckpointError(
                f"{path}: reading a GGUF file needs the gguf package; pip install gguf"
            ) from None
        return GgufModel.open(path, ignore_config_keys)
    if path.is_dir() and not (path / "config.json").exists() and (files := sorted(path.glob("*.gguf"))):
        raise CheckpointError(f"{path}: has no config.json, but GGUF files; give one of them, such as {files[0]}")
    return Checkpoint.open(path, ignore_config_keys)


def _begins_as_gguf(path: Path) -> bool:
    """Some programs keep GGUF files without the suffix."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"
