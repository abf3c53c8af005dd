"""One request's life: waiting for its prompt to be fed, then logits row → token → text, until something ends it.

`Request` knows nothing of the engine: whoever drives it feeds `pending` tokens to a sequence and hands the last logits
row to `accept`. So one request alone and many in a batch take the same path.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from d2moe.errors import RequestError
from d2moe.runtime.sampling import Sampler, SamplingParams, TokenLogprob, logprob
from d2moe.types import ModelShape

if TYPE_CHECKING:
    from d2moe.runtime.grammar import Grammar
    from d2moe.runtime.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "eos"]
Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass(frozen=True)
class Chunk:
    """Tokens to append to one sequence, and which of their logits rows are wanted.

    `bits` is their average width, by the file's width router; `uniform` (and a file without one) gives each expert the same."""

    sequence: Any
    tokens: Any  # list[int] or int32 [n]
    bits: float
    logits: Literal["last", "all", "none"] = "last"
    uniform: bool = False


class EngineLike(Protocol):
    """What generation and evaluation need of `d2moe.runtime.engine.Engine`; a test can bring less than a whole one."""

    @property
    def shape(self) -> ModelShape: ...
    @property
    def context(self) -> int: ...
    @property
    def config(self) -> Any: ...
    @property
    def counters(self) -> Any: ...
    def dial(self, bits: float, uniform: bool = False) -> Any: ...
    def new_sequence(self) -> Any: ...
    def step(self, chunks: list[Any]) -> npt.NDArray[np.float32]: ...
    def describe(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Piece:
    """One token of an answer and the text that became certain with it (may be empty, may be of earlier tokens)."""

    text: str
    token: int
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Stats:
    """What an answer took. Seconds are wall time; `ttft_s` runs from the call to the first token, prompt included.

    `generation_tokens_per_s` counts the tokens after the first one. `bits` is the average width of the experts used,
    as it came out.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    ttft_s: float = 0.0
    total_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    generation_tokens_per_s: float = 0.0
    bits: float = 0.0
    read_bytes: int = 0
    hit_rate: float = 0.0


@dataclass(frozen=True)
class Completion:
    """A finished answer. `tokens` are all that were drawn, an end token and those of a stop text included."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    prompt_tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    stats: Stats = field(default_factory=Stats)


def check_prompt(prompt: Sequence[int], vocab: int, context: int) -> list[int]:
    """The prompt as a list of ints; RequestError if it is empty, too long or holds a token the model does not have."""
    tokens = [int(t) for t in prompt]
    if not tokens:
        raise RequestError("the prompt is empty; give at least one token of text")
    if len(tokens) > context:
        raise RequestError(
            f"the prompt has {len(tokens):,} tokens, the context holds {context:,}; shorten it or allow more"
        )
    for token in tokens:
        if not 0 <= token < vocab:
            raise RequestError(
                f"the prompt holds token {token}, the vocabulary has 0 to {vocab - 1}; tokens of another tokenizer?"
            )
    return tokens


class Request:
    """State of one answer. `pending` are the tokens to feed next; `finish_reason` is None until it ends.

    `limit` is the most tokens it may have. `grammar` limits the tokens that may be drawn; it is used up. `shown` are special
    tokens that are part of the text all the same. `prompt_logprobs` is
    filled by `score`.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        *,
        vocab: int,
        context: int,
        eos_ids: Collection[int],
        grammar: Grammar | None = None,
        shown: Collection[int] = (),
    ):
        self.prompt = check_prompt(prompt, vocab, context)
        self.params = params
        self.pending = list(self.prompt)
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        # The last token drawn need not be fed, so a full context still gives one token.
        room = context - len(self.prompt) + 1
        self.limit = room if params.max_tokens is None else min(params.max_tokens, room)
        self._eos = frozenset() if params.ignore_eos else frozenset(eos_ids)
        self._sampler = Sampler(params, self.prompt, vocab)
        self._decoder = tokenizer.stream(shown=shown)
        self._stops = StopText(params.stop)
        self._grammar = grammar
        self.prompt_logprobs: list[TokenLogprob] = []

    def score(self, logits: npt.NDArray[np.float32], position: int) -> None:
        """Note log-probabilities of prompt tokens from logits float32 [rows, vocab] after the tokens from `position` on.

        Rows of tokens that were scored already are left out, as when a prompt had to be fed again.
        """
        if self.params.prompt_logprobs is None:
            return
        for row in range(max(0, len(self.prompt_logprobs) - position), len(logits)):
            after = position + row + 1
            if after < len(self.prompt):
                self.prompt_logprobs.append(logprob(logits[row], self.prompt[after], self.params.prompt_logprobs))

    def accept(self, logits: npt.NDArray[np.float32]) -> Piece:
        """Draw the next token from logits float32 [vocab] after all `pending` tokens; sets `finish_reason`."""
        token = self._sampler.sample(logits, self._grammar.allowed() if self._grammar else None)
        if self._grammar:
            self._grammar.advance(token)
        scored = None if self.params.logprobs is None else logprob(logits, token, self.params.logprobs)
        self.tokens.append(token)
        self.pending = [token]
        ends: FinishReason | None = "eos" if token in self._eos else None
        complete = ends is None and self._grammar is not None and self._grammar.complete
        if ends is None and (complete or len(self.tokens) >= self.limit):
            ends = "stop" if complete else "length"
        # An end token is no part of the text even if the tokenizer does not call it special.
        text = "" if ends == "eos" else self._decoder.push(token)
        if ends:
            text += self._decoder.finish()
        text, stopped = self._stops.push(text, last=ends is not None)
        self.finish_reason = "stop" if stopped else ends
        return Piece(text, token, scored, self.finish_reason)


class StopText:
    """Cuts a stream of text before the first stop text; never lets a part of one out."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str, last: bool = False) -> tuple[str, bool]:
        """The text that is certain to be outside any stop text, and whether one was found (the rest is dropped)."""
        if not self._stops:
            return text, False
        text = self._held + text
        # The one that ends first, so that the result does not depend on how the text is cut into pieces.
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = 0 if last else max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, not all of it."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
