"""Pages of the key/value cache: which blocks belong to which sequence."""

from __future__ import annotations

from typing import Any

import numpy as np

from d2moe.errors import RequestError

BLOCK_TOKENS = 32


class Pages:
    """Blocks of BLOCK_TOKENS tokens, handed out as sequences grow."""

    def __init__(self, cache: Any, blocks: int, context: int):
        self.cache, self.context = cache, context
        self.table_blocks = -(-context // BLOCK_TOKENS)
        self._free = list(range(blocks - 1, -1, -1))

    def grow(self, table: list[int], tokens: int) -> None:
        """Append blocks to `table` until it holds `tokens`; RequestError when none are left (nothing changes then)."""
        more = -(-tokens // BLOCK_TOKENS) - len(table)
        if more > len(self._free):
            raise RequestError(
                f"the key/value cache has {len(self._free)} free blocks of {BLOCK_TOKENS} tokens and {more} are needed; "
                "finish other sequences or load with a larger context"
            )
        table.extend(self._free.pop() for _ in range(more))

    def free(self, table: list[int]) -> None:
        for block in table:
            self.cache.release(block)
            self._free.append(block)
        table.clear()


class Sequence:
    """One text being read or written: its length in tokens and its blocks."""

    def __init__(self, pages: Pages):
        self._pages = pages
        self.length = 0
        self.blocks: list[int] = []

    def reserve(self, tokens: int) -> None:
        if self.length + tokens > self._pages.context:
            raise RequestError(
                f"{self.length + tokens} tokens do not fit the context of {self._pages.context}; "
                "shorten the prompt or load with a larger context"
            )
        self._pages.grow(self.blocks, self.length + tokens)

    def table(self) -> Any:
        row = np.zeros(self._pages.table_blocks, np.int32)
        row[: len(self.blocks)] = self.blocks
        return row

    def free(self) -> None:
        """Give the blocks back; the sequence is empty then."""
        self._pages.free(self.blocks)
        self.length = 0
