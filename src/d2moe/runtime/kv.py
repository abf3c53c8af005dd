"""Pages of the key/value cache: which blocks belong to which sequence."""

from __future__ import annotations

import numpy as np

from d2moe.errors import RequestError

BLOCK_TOKENS = 64


class Pages:
    """Blocks of BLOCK_TOKENS tokens, handed out as sequences grow."""

    def __init__(self, blocks: int, context: int):
        self.context = context
        self.table_blocks = -(-context // BLOCK_TOKENS)
        self._free = list(range(blocks - 1, -1, -1))

    def take(self, count: int) -> list[int]:
        """`count` more blocks; RequestError when so many are not left (nothing changes then)."""
        if count > len(self._free):
            raise RequestError(
                f"the key/value cache has {len(self._free)} free blocks of {BLOCK_TOKENS} tokens and {count} are needed; "
                "finish other sequences or load with a larger context"
            )
        return [self._free.pop() for _ in range(count)]

    def give(self, blocks: list[int]) -> None:
        self._free += reversed(blocks)  # handed out again in order: the cache reads neighbours fastest


class Sequence:
    """One text being read or written: its length in tokens and its blocks. `table` int32 [blocks of a full context] has the
    first `held` blocks. `uses` and `use_bits` count its (token, expert) pairs and their widths, freed or not."""

    def __init__(self, pages: Pages):
        self._pages = pages
        self.length = self.held = self.uses = self.use_bits = 0
        self.table = np.zeros(pages.table_blocks, np.int32)

    def reserve(self, tokens: int) -> None:
        """Blocks for `tokens` more; RequestError if they do not fit the context or no blocks are left."""
        if self.length + tokens > self._pages.context:
            raise RequestError(
                f"{self.length + tokens} tokens do not fit the context of {self._pages.context}; "
                "shorten the prompt or load with a larger context"
            )
        more = -(-(self.length + tokens) // BLOCK_TOKENS) - self.held
        if more > 0:
            self.table[self.held : self.held + more] = self._pages.take(more)
            self.held += more

    @property
    def average_bits(self) -> float:
        """Mean width of the experts it used, 0 if it used none."""
        return self.use_bits / self.uses if self.uses else 0.0

    def free(self) -> None:
        """Give the blocks back; the sequence is empty then."""
        self._pages.give(self.table[: self.held].tolist())
        self.length = self.held = 0
