"""Calibration text as windows of tokens, and the residual stream that a model makes of them, kept between runs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from d2moe.convert.activations import Activations
from d2moe.convert.source import ModelSource
from d2moe.errors import ConfigError

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

WINDOW = 512
"""Tokens of a window, or the model's context if that is less."""


@dataclass(frozen=True)
class Calibration:
    """`files` of UTF-8 text, of each of which an equal share of `max_tokens` tokens is taken in windows of `window`, evenly spread over
    the file."""

    files: tuple[Path, ...]
    max_tokens: int = 32768
    window: int = WINDOW

    def windows(self, source: ModelSource) -> I32:
        """int32 [windows, length]; ConfigError if a file cannot be read or is too short for one window."""
        length = min(self.window, source.shape.context)
        tokenizer = Tokenizer.from_buffer(source.companions()["tokenizer.json"])
        wanted = max(1, self.max_tokens // length // len(self.files))
        parts = []
        for file in self.files:
            try:
                text = file.read_text(encoding="utf-8", errors="replace")
            except OSError as error:
                raise ConfigError(f"{file}: cannot be read as calibration text: {error.strerror}") from None
            ids = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
            count = len(ids) // length
            if not count:
                raise ConfigError(f"{file}: has {len(ids)} tokens, calibration needs at least {length}; give a longer text")
            if ids.max() >= source.shape.vocab:
                raise ConfigError(f"{file}: holds token {ids.max()}, the model has {source.shape.vocab}; is its tokenizer.json its own?")
            whole = ids[: count * length].reshape(count, length)
            take = min(wanted, count)
            parts.append(whole[np.arange(take) * count // take])
        return np.concatenate(parts)


def facts(windows: I32) -> dict[str, Any]:
    """What tells one calibration from another."""
    return {"windows": list(windows.shape), "sha256": hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest()}


class Stream:
    """The activations of a conversion, kept in `folder` after each layer: a run that was killed goes on with the layer it was in.

    `layer` is the one to go on with.
    """

    def __init__(self, source: ModelSource, windows: I32, folder: Path):
        self._folder = folder
        self.layer, x = 0, None
        for file in sorted(folder.glob("activations-*.npy"), reverse=True):
            found = np.load(file, allow_pickle=False)
            if found.shape == (*windows.shape, source.shape.hidden) and found.dtype == np.float32:
                self.layer, x = int(file.stem.rpartition("-")[2]), found
                break
        self.activations = Activations(source, windows, x)

    def keep(self, next_layer: int) -> None:
        """Write the stream that `next_layer` will meet, then drop that of the layer before."""
        self.layer = next_layer
        name = self._folder / f"activations-{next_layer:03d}.npy"
        fresh = name.with_suffix(".new")
        with fresh.open("wb") as file:
            np.save(file, self.activations.x)
        fresh.rename(name)
        self._drop(but=name)

    def _drop(self, but: Path | None = None) -> None:
        for file in self._folder.glob("activations-*.n*"):
            if file != but:
                file.unlink()

    def close(self) -> None:
        """Remove what was kept; the container is complete."""
        self._drop()

