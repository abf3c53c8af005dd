"""The training text: documents, their tokens kept on disk, and windows of them in an order that only the seed decides."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

SEPARATOR = "<|endoftext|>"
HELD_OUT_EVERY = 200  # every so manieth document is kept back
_DOCUMENTS_AT_ONCE = 64


def documents(paths: list[Path]) -> Iterator[str]:
    """The documents of text files (.zst ones through the zstd command), each file as often as it is named."""
    for path in paths:
        if path.suffix == ".zst":
            text = subprocess.run(["zstd", "-dc", str(path)], check=True, capture_output=True).stdout.decode()
        else:
            text = path.read_text(encoding="utf-8")
        yield from (document for document in text.split(SEPARATOR) if document.strip())


def tokens_of(
    paths: list[Path], tokenizer: Tokenizer, folder: Path, most: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) tokens, uint16, every document followed by the separator; kept in `folder` for the next start.

    At `most` so many documents are taken, drawn by the seed.
    """
    kept = folder / "train.npy", folder / "held_out.npy"
    if not all(path.exists() for path in kept):
        end = tokenizer.token_to_id(SEPARATOR)
        if end is None or tokenizer.get_vocab_size() > 1 << 16:
            raise ValueError(f"the tokenizer needs the token {SEPARATOR} and at most 65,536 tokens")
        parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        found = list(documents(paths))
        found = [found[i] for i in np.random.default_rng(seed).permutation(len(found))[:most]]
        for at in range(0, len(found), _DOCUMENTS_AT_ONCE):
            print(f"\rtokens: {at:,} of {len(found):,} documents", end="", flush=True)
            chunk = found[at : at + _DOCUMENTS_AT_ONCE]
            for i, encoded in enumerate(tokenizer.encode_batch_fast(chunk, add_special_tokens=False), at):
                parts[i % HELD_OUT_EVERY == 0].append(np.array([*encoded.ids, end], np.uint16))
        print()
        for path, part in zip(kept, parts, strict=True):
            written = path.with_suffix(".partial.npy")
            np.save(written, np.concatenate(part) if part else np.zeros(0, np.uint16))
            written.replace(path)
    return np.load(kept[0], mmap_mode="r"), np.load(kept[1], mmap_mode="r")


def batch(tokens: np.ndarray, step: int, size: int, context: int, seed: int) -> np.ndarray:
    """Windows of step `step`, int64 [size, context + 1]: every window once, shuffled, then all in another order.

    A function of its arguments alone, so that a run that was stopped goes on with what it would have read.
    """
    windows = (len(tokens) - 1) // context
    if windows < 1:
        raise ValueError(f"{len(tokens)} tokens make no window of {context}")
    rows = np.empty((size, context + 1), np.int64)
    for row, i in enumerate(range(step * size, (step + 1) * size)):
        epoch, place = divmod(i, windows)
        start = _order(windows, seed, epoch)[place] * context
        rows[row] = tokens[start : start + context + 1]
    return rows


_orders: dict[tuple[int, int, int], np.ndarray] = {}


def _order(windows: int, seed: int, epoch: int) -> np.ndarray:
    key = (windows, seed, epoch)
    if key not in _orders:
        _orders.clear()
        _orders[key] = np.random.default_rng((seed, epoch)).permutation(windows)
    return _orders[key]
