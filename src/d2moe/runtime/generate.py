"""`Model`: an engine and a tokenizer behind the few calls most people need."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2moe.errors import RequestError
from d2moe.runtime.request import Chunk, Completion, EngineLike, FinishReason, Piece, Request, Stats, check_prompt
from d2moe.runtime.sampling import SamplingParams, TokenLogprob
from d2moe.runtime.streamer import Counters
from d2moe.runtime.tokenizer import Tokenizer
from d2moe.types import ModelShape

RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Keys of generation_config.json that become defaults."""


def end_tokens(shape: ModelShape, generation_config: Mapping[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end an answer: those of config.json and generation_config.json; else the tokenizer's own."""
    named = generation_config.get("eos_token_id")
    listed = named if isinstance(named, list) else [named]
    ids = {*shape.eos_ids, *(i for i in listed if isinstance(i, int))}
    if not ids and tokenizer.eos_id is not None:
        ids = {tokenizer.eos_id}
    return frozenset(ids)


@dataclass
class _Clock:
    """Times and counters of one answer."""

    start: float
    first: float = 0.0
    end: float = 0.0
    before: Any = None
    after: Any = None


class Model:
    """Generates text. Closes the engine with `close()` or at the end of a `with` block.

    Keyword parameters are those of `SamplingParams`. Those that are not given come from the model's own
    generation_config.json, as in transformers (temperature, top_k, top_p, min_p, repetition_penalty; greedy unless it
    says do_sample), then from SamplingParams. A SamplingParams given whole is used as it is. The seed is 0 unless
    given, so the same call gives the same text.
    """

    def __init__(self, engine: EngineLike, tokenizer: Tokenizer, generation_config: Mapping[str, Any] | None = None):
        self.engine, self.tokenizer = engine, tokenizer
        if generation_config is None:
            generation_config = getattr(getattr(engine, "container", None), "generation_config", None)
        self.generation_config = dict(generation_config or {})
        self.last: Stats | None = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free everything the engine holds."""
        self.engine.close()

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer, see `end_tokens`."""
        return end_tokens(self.engine.shape, self.generation_config, self.tokenizer)

    @property
    def defaults(self) -> dict[str, Any]:
        """Sampling parameters the model's generation_config.json recommends; empty if it does not sample."""
        config = self.generation_config
        if config.get("do_sample") is not True:
            return {}
        found = {k: v for k in RECOMMENDED if (v := config.get(k)) is not None}
        return {"temperature": 1.0, **found}

    def params(self, **values: Any) -> SamplingParams:
        """SamplingParams of `values` over the model's defaults; ConfigError for an unknown name or a bad value."""
        return SamplingParams.make({**self.defaults, **values})

    def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None, **values: Any) -> Completion:
        """The answer to `prompt` (text, or token ids used as they are).

        RequestError for an empty prompt, one longer than the context, or a width the file does not have.
        """
        return self._collect(self._encode(prompt), self._settle(params, values))

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, **values: Any
    ) -> Iterator[Piece]:
        """One Piece per token as they come; `last` holds the Stats afterwards. Errors are raised by this call itself.

        Leaving the loop early, or an exception in it, frees the sequence.
        """
        request = self._request(self._encode(prompt), self._settle(params, values))
        return self._run(request, _Clock(time.perf_counter()))

    def chat(
        self, messages: Iterable[Mapping[str, Any]], params: SamplingParams | None = None, **values: Any
    ) -> Completion:
        """The assistant's answer to `messages` (dicts with "role" and "content"), by the model's own chat template."""
        return self._collect(self.tokenizer.chat(messages), self._settle(params, values))

    def stream_chat(
        self, messages: Iterable[Mapping[str, Any]], params: SamplingParams | None = None, **values: Any
    ) -> Iterator[Piece]:
        """`chat` as a stream, see `stream`."""
        request = self._request(self.tokenizer.chat(messages), self._settle(params, values))
        return self._run(request, _Clock(time.perf_counter()))

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return check_prompt(prompt, self.engine.shape.vocab, self.engine.context)
        if not prompt:
            raise RequestError("the prompt is empty; give at least one character of text")
        return self.tokenizer.encode(prompt)

    def _settle(self, params: SamplingParams | None, values: dict[str, Any]) -> SamplingParams:
        if params is None:
            return self.params(**values)
        if values:
            raise RequestError(f"give either params or keywords, not both; keywords were {', '.join(sorted(values))}")
        return params

    def _dial(self, params: SamplingParams) -> tuple[float, bool]:
        """Average width, and whether it is a plain one; RequestError if the model cannot give it."""
        config, asked = self.engine.config, params.average_bits
        bits = config.bits if asked is None else asked
        uniform = config.uniform if params.uniform is None else params.uniform
        self.engine.dial(bits, uniform)
        return bits, uniform

    def _request(self, tokens: list[int], params: SamplingParams) -> Request:
        self._dial(params)
        engine = self.engine
        return Request(
            tokens, params, self.tokenizer, vocab=engine.shape.vocab, context=engine.context, eos_ids=self.eos_ids
        )

    def _run(self, request: Request, clock: _Clock) -> Iterator[Piece]:
        bits, uniform = self._dial(request.params)
        sequence = self.engine.new_sequence()
        clock.before = self.engine.counters.snapshot()
        try:
            while request.finish_reason is None:
                rows = self.engine.step([Chunk(sequence, request.pending, bits, "last", uniform)])
                piece = request.accept(rows[-1])
                clock.end = time.perf_counter()
                clock.first = clock.first or clock.end
                if piece.finish_reason is not None:
                    clock.after = self.engine.counters.snapshot()
                    self.last = _stats(request, clock)
                yield piece
        finally:
            # Also when the caller stops iterating or Ctrl-C comes between two tokens.
            sequence.free()

    def _collect(self, tokens: list[int], params: SamplingParams) -> Completion:
        clock = _Clock(time.perf_counter())
        request = self._request(tokens, params)
        text: list[str] = []
        scored: list[TokenLogprob] = []
        reason: FinishReason | None = None
        for piece in self._run(request, clock):
            text.append(piece.text)
            reason = piece.finish_reason
            if piece.logprob is not None:
                scored.append(piece.logprob)
        if reason is None or self.last is None:
            raise AssertionError("a request ended without a reason")
        logprobs = None if params.logprobs is None else scored
        return Completion("".join(text), request.tokens, reason, request.prompt, logprobs, self.last)


def _stats(request: Request, clock: _Clock) -> Stats:
    ttft = clock.first - clock.start
    later = clock.end - clock.first
    used: Counters = clock.after - clock.before
    return Stats(
        prompt_tokens=len(request.prompt),
        generated_tokens=len(request.tokens),
        ttft_s=ttft,
        total_s=clock.end - clock.start,
        prompt_tokens_per_s=len(request.prompt) / ttft if ttft > 0 else 0.0,
        generation_tokens_per_s=(len(request.tokens) - 1) / later if later > 0 else 0.0,
        bits=used.average_bits,
        read_bytes=used.read_bytes,
        hit_rate=used.hit_rate,
    )
