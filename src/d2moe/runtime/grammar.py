"""Answers held to a JSON schema, a grammar or a regular expression: which tokens may come next, by llguidance.

llguidance (https://github.com/guidance-ai/llguidance) walks the vocabulary's trie along the grammar; here it is only asked for
the mask of each step. It is part of the extra `serve`.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from d2moe.errors import RequestError
from d2moe.runtime.tokenizer import Tokenizer

Kind = Literal["json_schema", "lark", "regex"]
MAX_GRAMMAR_BYTES = 200_000
JSON_SPACE = r"( |\n {0,40})"
"""Between the parts of a JSON value: a space, or a line's end with its indent. Small models love endless blank lines."""


class Grammars:
    """Makes grammars for one model. `vocab` is the number of logits, `eos_ids` the tokens that end an answer; those that the
    tokenizer does not have are left out.

    Raises RequestError if none is left, and ImportError if llguidance is not installed. Building takes some 20 ms per 4,000 tokens of the
    vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, eos_ids: Collection[int]):
        import llguidance

        self._library: Any = llguidance
        self._vocab = vocab
        ends = sorted(i for i in eos_ids if i < tokenizer.backend.get_vocab_size())
        if not ends:
            raise RequestError(f"{tokenizer.where} has no token that ends an answer, and a grammar must be able to end")
        self._tokenizer = llguidance.LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocab, eos_token=ends)

    def make(self, kind: Kind, source: Any) -> Grammar:
        """A grammar at its beginning; `source` is a schema (dict or bool), or text. RequestError if it is not one."""
        text = json.dumps(source) if kind == "json_schema" else str(source)
        if len(text.encode("utf-8", "replace")) > MAX_GRAMMAR_BYTES:
            raise RequestError(f"the {kind} has more than {MAX_GRAMMAR_BYTES:,} bytes; make it shorter")
        matcher = self._library.LLMatcher
        try:
            if kind == "json_schema":
                grammar = matcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": JSON_SPACE})
            else:
                grammar = getattr(matcher, f"grammar_from_{kind}")(text)
            state = matcher(self._tokenizer, grammar, log_level=0)
        except ValueError as error:
            raise RequestError(f"the {kind} cannot be used: {_short(error)}") from None
        if state.is_error():
            raise RequestError(f"the {kind} cannot be used: {_short(state.get_error())}")
        return Grammar(state, self._vocab)


class Grammar:
    """The place that one answer has reached in its grammar."""

    def __init__(self, state: Any, vocab: int):
        self._state, self._vocab = state, vocab

    def allowed(self) -> npt.NDArray[np.bool_]:
        """bool [vocab]: the tokens that may come next, those that end the answer where it may end."""
        bits = np.frombuffer(self._state.compute_bitmask(), np.uint8)
        self._check()
        mask = np.unpackbits(bits, bitorder="little")[: self._vocab].astype(np.bool_)
        if not mask.any():
            raise RequestError("the grammar allows no token of this model here; loosen it")
        return mask

    def advance(self, token: int) -> None:
        """`token` was drawn."""
        self._state.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Whether nothing but an end can follow."""
        return bool(self._state.is_stopped())

    def _check(self) -> None:
        if self._state.is_error():
            raise RequestError(f"the grammar failed: {_short(self._state.get_error())}")


def _short(error: object) -> str:
    return " ".join(str(error).split())[:300]
