"""Pages of the key/value cache: which blocks belong to which sequence, and which blocks several sequences share.

A full block's keys and values depend on the tokens up to its end, on the width they were computed at, and on the policy
where that one changes widths, nothing else (results are bit-identical whatever the budget, the cut and the company). So
a block is known by a hash of those, chained from block to block, and a sequence that begins like an earlier one takes
that one's blocks instead of computing them.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from d2moe.errors import RequestError

BLOCK_TOKENS = 64


def next_key(before: bytes, tokens: npt.NDArray[np.int32]) -> bytes:
    """Key of the block `tokens` int32 [BLOCK_TOKENS] after the block `before`; the first one follows `root_key`."""
    return hashlib.blake2b(tokens.tobytes(), digest_size=16, key=before).digest()


def root_key(bits: float, epoch: int) -> bytes:
    """What the first block of a sequence at width `bits` follows; see `Engine.epoch`."""
    return hashlib.blake2b(f"{float(bits)!r} {epoch}".encode(), digest_size=16).digest()


class Pages:
    """Blocks of BLOCK_TOKENS tokens, handed out as sequences grow.

    A block that nobody holds any more keeps its content as long as no other is free; the one unused for longest goes first.
    """

    def __init__(self, blocks: int, context: int):
        self.blocks, self.context = blocks, context
        self.table_blocks = -(-context // BLOCK_TOKENS)
        self._free = list(range(blocks - 1, -1, -1))
        self._holders = [0] * blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known, held by nobody, longest unused first

    @property
    def available(self) -> int:
        """Blocks that `take` could give."""
        return len(self._free) + len(self._idle)

    def take(self, count: int) -> list[int]:
        """`count` more blocks; RequestError when so many are not left (nothing changes then)."""
        if count > self.available:
            raise RequestError(
                f"the key/value cache has {self.available} free blocks of {BLOCK_TOKENS} tokens and {count} are needed; "
                "finish other sequences or load with a larger context"
            )
        taken = [self._free.pop() if self._free else self._forget() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def _forget(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block

    def give(self, blocks: list[int]) -> None:
        for block in reversed(blocks):  # handed out again in order: the cache reads neighbours fastest
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._key_of:
                self._idle[block] = None  # a text's last block is the first to go: its beginning is shared more often
            else:
                self._free.append(block)

    def find(self, key: bytes) -> int | None:
        """The block of that key, held once more by the caller; None if there is none."""
        block = self._block_of.get(key)
        if block is not None:
            self._idle.pop(block, None)
            self._holders[block] += 1
        return block

    def name(self, block: int, key: bytes) -> None:
        """A block that was filled may be found by `key` from now on; the first of two equal ones stays known."""
        if key not in self._block_of:
            self._block_of[key], self._key_of[block] = block, key


class Sequence:
    """One text being read or written: its length in tokens and its blocks. `table` int32 [blocks of a full context] has the
    first `held` blocks. `uses` and `use_bits` count its (token, expert) pairs and their widths, freed or not."""

    def __init__(self, pages: Pages):
        self._pages = pages
        self.length = self.held = self.uses = self.use_bits = 0
        self.table = np.zeros(pages.table_blocks, np.int32)
        self._keys: list[bytes] = []  # of the full blocks that are shared or were offered

    def missing_blocks(self, tokens: int) -> int:
        """Blocks that `tokens` more would take."""
        return max(0, -(-(self.length + tokens) // BLOCK_TOKENS) - self.held)

    def reserve(self, tokens: int) -> None:
        """Blocks for `tokens` more; RequestError if they do not fit the context or no blocks are left."""
        if self.length + tokens > self._pages.context:
            raise RequestError(
                f"{self.length + tokens} tokens do not fit the context of {self._pages.context}; "
                "shorten the prompt or load with a larger context"
            )
        more = self.missing_blocks(tokens)
        if more:
            self.table[self.held : self.held + more] = self._pages.take(more)
            self.held += more

    def key_ahead(self, text: npt.NDArray[np.int32], root: bytes) -> bytes | None:
        """Key of the block that the next token of `text` int32 [n] falls in; None if `text` does not fill that block and go on.

        Something must be left to feed, as logits come from that only. `root` is `root_key` of the sequence's width.
        """
        index = self.length // BLOCK_TOKENS
        end = (index + 1) * BLOCK_TOKENS
        if end >= len(text):
            return None
        self._extend_keys(text, root, index)
        return next_key(self._keys[-1] if self._keys else root, text[end - BLOCK_TOKENS : end])

    def share(self, text: npt.NDArray[np.int32], root: bytes) -> int:
        """Take over known blocks from here on, where a block begins; the number of tokens that need not be fed."""
        begin = self.length
        while self.length % BLOCK_TOKENS == 0 and self.held * BLOCK_TOKENS == self.length:
            key = self.key_ahead(text, root)
            block = self._pages.find(key) if key is not None else None
            if key is None or block is None:
                break
            self.table[self.held] = block
            self._keys.append(key)
            self.held += 1
            self.length += BLOCK_TOKENS
        return self.length - begin

    def offer(self, text: npt.NDArray[np.int32], root: bytes) -> None:
        """Let others find the blocks that are full; `text` int32 are all tokens up to `length` at least."""
        self._extend_keys(text, root, self.length // BLOCK_TOKENS)

    def _extend_keys(self, text: npt.NDArray[np.int32], root: bytes, full: int) -> None:
        while len(self._keys) < full:
            index = len(self._keys)
            tokens = text[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
            self._keys.append(next_key(self._keys[-1] if self._keys else root, tokens))
            self._pages.name(int(self.table[index]), self._keys[-1])

    @property
    def average_bits(self) -> float:
        """Mean width of the experts it used, 0 if it used none."""
        return self.use_bits / self.uses if self.uses else 0.0

    def free(self) -> None:
        """Give the blocks back; the sequence is empty then."""
        self._pages.give(self.table[: self.held].tolist())
        self.length = self.held = 0
        self._keys.clear()
