"""Calibration text that a model writes itself, for conversions without any (data-free, as in LLM-QAT, arXiv 2305.17888).

The checkpoint is first rounded to the nearest, and read at 8 bits its text is as good as the checkpoint's own; the engine writes
windows of it at temperature 1, a batch at a time. All of it is in a folder beside the container to be made: the rounded model until the
windows are written, then those, until the container is. Each window has random numbers of its own and logits do not depend on the
company, so a run that was killed gives the same text.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe.container import Container
from d2moe.convert.calibration import Calibration
from d2moe.convert.job import Progress
from d2moe.errors import CheckpointError, ContainerError, StorageError
from d2moe.kernels.native import draw
from d2moe.models import shape_from_config
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import Engine
from d2moe.runtime.generate import end_tokens
from d2moe.runtime.request import Chunk
from d2moe.runtime.tokenizer import Tokenizer
from d2moe.types import MAX_BITS, ModelShape

I32 = npt.NDArray[np.int32]

WINDOW = 256
"""Tokens of a window, or the model's context if that is less: fewer steps than with long ones, and no model is trained for less."""
BATCH = 32
"""Windows that are written at once: their experts are read together."""
KEEP_EVERY_S = 20.0


@dataclass(frozen=True)
class OwnSamples:
    """`max_tokens` tokens in whole windows, at least one. `beside`: text to calibrate with as well, in windows of the same
    length."""

    max_tokens: int = 32768
    beside: Calibration | None = None


class Samples:
    """The text of one conversion, in the folder `dst`.samples. `key` is what tells the model that writes it from others."""

    def __init__(self, dst: Path, key: dict[str, Any]):
        self._dst, self.folder = dst, dst.with_name(dst.name + ".samples")
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self._model, self._file = self.folder / f"model-{digest}", self.folder / f"tokens-{digest}.npy"

    def windows(
        self, wanted: OwnSamples, round_plainly: Callable[[Path], Path], threads: int, progress: Progress
    ) -> I32:
        """int32 [windows, length]; `round_plainly` converts to the nearest, to the path it is given.

        Raises KeyboardInterrupt with a message, ContainerError (`dst` exists), StorageError, and what the engine raises, such as
        MemoryBudgetError.
        """
        if self._dst.exists():
            raise ContainerError(f"{self._dst}: is there already; delete it or give another name")
        try:
            tokens = self._read(wanted)
            if tokens is None or (tokens < 0).any():
                self.folder.mkdir(exist_ok=True)
                model = self._model if self._model.exists() else round_plainly(self._model)
                tokens = self._write(model, wanted, tokens, threads, progress)
            shutil.rmtree(self._model, ignore_errors=True)
            return tokens
        except CheckpointError:
            self.remove()
            raise
        except OSError as error:
            raise StorageError(f"{self.folder}: cannot be written: {error.strerror}") from None

    def remove(self) -> None:
        """Remove the folder: the container is complete, or can never be."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, wanted: OwnSamples) -> I32 | None:
        try:
            found = np.load(self._file, allow_pickle=False)
        except (OSError, ValueError):
            return None
        same = found.ndim == 2 and found.dtype == np.int32 and len(found) == _count(wanted, found.shape[1])
        return found if same else None

    def _write(self, model: Path, wanted: OwnSamples, tokens: I32 | None, threads: int, progress: Progress) -> I32:
        container = Container.open(model)
        shape = shape_from_config(container.config, str(container.path / "config.json"))
        length = min(WINDOW, shape.context)
        config = EngineConfig(bits=MAX_BITS, uniform=True, threads=threads, max_sequences=BATCH, context=length)
        engine = Engine(container, config)
        try:
            if tokens is None:
                tokens = np.full((_count(wanted, length), length), -1, np.int32)
                tokens[:, 0] = _first(container, len(tokens), shape)
            progress.start(tokens.size, int((tokens >= 0).sum()))
            for at in range(0, len(tokens), BATCH):
                self._continue(engine, tokens, slice(at, at + BATCH), progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{self.folder}: has what the model wrote so far; the same command resumes") from None
        finally:
            engine.close()
        return tokens

    def _continue(self, engine: Engine, tokens: I32, part: slice, progress: Progress) -> None:
        """Write the windows of `part` to their end."""
        rows = tokens[part]
        at = int((rows[0] >= 0).sum())
        if at == rows.shape[1]:
            return
        chance = np.stack([np.random.default_rng(part.start + i).random(rows.shape[1]) for i in range(len(rows))])
        sequences = [engine.new_sequence() for _ in rows]
        kept, fed = time.monotonic(), 0
        try:
            for place in range(at, rows.shape[1]):
                chunks = [Chunk(s, row[fed:place], MAX_BITS, "last", True) for s, row in zip(sequences, rows, strict=True)]
                for i, logits in enumerate(engine.step(chunks)):
                    rows[i, place] = draw(logits, 1.0, 0, 1.0, 0.0, float(chance[i, place]))
                fed = place
                progress.advance(len(rows), f"the model writes windows {part.start} to {part.start + len(rows) - 1}")
                if time.monotonic() - kept > KEEP_EVERY_S:
                    self._keep(tokens)
                    kept = time.monotonic()
        except KeyboardInterrupt:
            rows[:, fed + 1 :] = -1  # a step that was cut short
            self._keep(tokens)
            raise
        finally:
            for sequence in sequences:
                sequence.free()
        self._keep(tokens)

    def _keep(self, tokens: I32) -> None:
        fresh = self._file.with_suffix(".new")
        with fresh.open("wb") as file:
            np.save(file, tokens)
        fresh.rename(self._file)


def _count(wanted: OwnSamples, length: int) -> int:
    return max(1, wanted.max_tokens // length)


def _first(container: Container, count: int, shape: ModelShape) -> I32:
    """What the windows begin with, int32 [count]: the token a text begins with, else one that ends the text before, else any."""
    tokenizer = Tokenizer.load(container.path)
    ends = end_tokens(shape, container.generation_config, tokenizer)
    first = tokenizer.bos_id if tokenizer.bos_id is not None else min(ends, default=None)
    if first is None or not 0 <= first < shape.vocab:
        return np.random.default_rng(count).integers(0, shape.vocab, count).astype(np.int32)
    return np.full(count, first, np.int32)
