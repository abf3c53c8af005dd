"""Pieces of text to the objects of OpenAI's interface, whole and in chunks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from typing import Any

from d2moe.errors import ConfigError, MemoryBudgetError, RequestError, StoppingError
from d2moe.runtime.request import Piece
from d2moe.runtime.sampling import TokenLogprob
from d2moe.runtime.scheduler import Ended, Job
from d2moe.runtime.tokenizer import UNFINISHED
from d2moe.serve.service import Plan, Service
from d2moe.serve.stream import Channel
from d2moe.serve.tools import ToolReader

REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


def problem(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body that tell a client of `error`."""
    text = " ".join(str(error).split())
    if isinstance(error, (RequestError, ConfigError, MemoryBudgetError)):
        return 400, error_body(text, "invalid_request_error")
    if isinstance(error, StoppingError):
        return 503, error_body(text, "server_error")
    # Names files and the like, which are the operator's business.
    return 500, error_body("the engine failed; the server's log says more", "server_error")


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    message = message.encode("utf-8", "backslashreplace").decode()  # a lone surrogate cannot be sent
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(plan: Plan, jobs: list[Job]) -> dict[str, Any]:
    prompt = sum(map(len, plan.prompts))
    drawn = [len(job.request.tokens) for job in jobs]
    fed = [len(job.request.prompt) + n for job, n in zip(jobs, drawn, strict=True)]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sum(drawn),
        "total_tokens": prompt + sum(drawn),
        "prompt_tokens_details": {"cached_tokens": sum(job.reused_tokens for job in jobs[:: plan.n])},
        "bits": sum(job.average_bits * n for job, n in zip(jobs, fed, strict=True)) / sum(fed),
    }


class Words:
    """Tokens by themselves as text, as lists of log-probabilities show them."""

    def __init__(self, service: Service):
        self._tokenizer = service.model.tokenizer

    def of(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special=False)

    def completion(self, scored: list[tuple[int, TokenLogprob | None]], offset: int = 0) -> dict[str, Any]:
        """The `logprobs` of a completion for (token, score) pairs; the text before them has `offset` characters."""
        out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, score in scored:
            text = self.of(token)
            top: dict[str, float] | None = None
            if score is not None:
                top = {}
                for other, value in score.top:
                    top.setdefault(self.of(other), value)
            out["tokens"].append(text)
            out["token_logprobs"].append(score.logprob if score else None)
            out["top_logprobs"].append(top)
            out["text_offset"].append(offset)
            offset += len(text)
        return out

    def chat(self, score: TokenLogprob) -> dict[str, Any]:
        """One entry of the `logprobs.content` of a chat."""
        return {**self._one(score.token, score.logprob), "top_logprobs": [self._one(t, v) for t, v in score.top]}

    def _one(self, token: int, value: float) -> dict[str, Any]:
        text = self.of(token)
        return {"token": text, "logprob": value, "bytes": None if UNFINISHED in text else list(text.encode())}


class Answer(ABC):
    """One request under way; subclasses know the shape of its objects. `close` frees what it holds, whatever happened."""

    kind = chunk_kind = ""

    def __init__(self, service: Service, plan: Plan, jobs: list[Job], channel: Channel, name: str, created: int):
        self.service, self.plan, self.jobs, self._channel = service, plan, jobs, channel
        self._head = {"id": name, "created": created, "model": service.name}
        self.words = Words(service)
        self.reasons: list[str | None] = [None] * len(jobs)

    def close(self) -> None:
        self.service.worker.cancel(self.jobs)

    async def whole(self) -> dict[str, Any]:
        """The complete answer; raises what ended a job early."""
        try:
            async for batch in self._channel.batches():
                for index, said in batch:
                    if isinstance(said, Piece):
                        self.hear(index, said)
                    elif said.error is not None:
                        raise said.error
            choices = [self.choice(index) for index in range(len(self.jobs))]
            return {**self._head, "object": self.kind, "choices": choices, "usage": usage(self.plan, self.jobs)}
        finally:
            self.close()

    async def chunks(self, with_usage: bool) -> AsyncGenerator[list[dict[str, Any]] | None, None]:
        """Objects to stream as they come, in batches, None after a long silence; an error ends them as an object with "error"."""
        try:
            yield [self._chunk(choice) for index in range(len(self.jobs)) for choice in self.first(index)]
            async for batch in self._channel.batches():
                out: list[dict[str, Any]] = []
                for index, said in batch:
                    if isinstance(said, Piece):
                        out += [self._chunk(choice) for choice in self.next(index, said)]
                    elif said.error is not None:
                        yield [*out, problem(said.error)[1]]
                        return
                    else:
                        out += [self._chunk(choice) for choice in self.last(index, said)]
                yield out if batch else None
            if with_usage:
                yield [{**self._head, "object": self.chunk_kind, "choices": [], "usage": usage(self.plan, self.jobs)}]
        finally:
            self.close()

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": [choice]}

    @abstractmethod
    def hear(self, index: int, piece: Piece) -> None:
        """Take in a piece of a complete answer."""

    @abstractmethod
    def choice(self, index: int) -> dict[str, Any]:
        """What was heard, as an object of `choices`."""

    def first(self, index: int) -> list[dict[str, Any]]:
        return []

    @abstractmethod
    def next(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Objects of `choices` to stream for a piece."""

    def last(self, index: int, ended: Ended) -> list[dict[str, Any]]:
        return []


class CompletionAnswer(Answer):
    """`echo` puts the prompt in front, with its log-probabilities if any are asked for."""

    kind = chunk_kind = "text_completion"

    def __init__(self, *facts: Any, echo: bool):
        super().__init__(*facts)
        decode = self.service.model.tokenizer.decode
        self._prompts = [decode(p) for p in self.plan.prompts] if echo else [""] * len(self.plan.prompts)
        self._echo = echo
        self._text = [""] * len(self.jobs)
        self._scored: list[list[tuple[int, TokenLogprob | None]]] = [[] for _ in self.jobs]
        self._begun = [False] * len(self.jobs)
        self._offset = [0] * len(self.jobs)

    def hear(self, index: int, piece: Piece) -> None:
        self._text[index] += piece.text
        self._scored[index].append((piece.token, piece.logprob))
        if piece.finish_reason:
            self.reasons[index] = REASONS[piece.finish_reason]

    def choice(self, index: int) -> dict[str, Any]:
        text = self._prompts[index // self.plan.n] + self._text[index]
        logprobs = None
        if self.plan.params.logprobs is not None:
            logprobs = self.words.completion([*self._prompt_scores(index), *self._scored[index]])
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": self.reasons[index] or "length"}

    def _prompt_scores(self, index: int) -> list[tuple[int, TokenLogprob | None]]:
        if not self._echo:
            return []
        request = self.jobs[index].request
        return [(request.prompt[0], None), *((s.token, s) for s in request.prompt_logprobs)]

    def next(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        return self._part(index, piece.text, [(piece.token, piece.logprob)], piece.finish_reason)

    def last(self, index: int, ended: Ended) -> list[dict[str, Any]]:
        return [] if self.plan.generate else self._part(index, "", [], "length")

    def _part(self, index: int, text: str, scored: list[tuple[int, TokenLogprob | None]], reason: str | None) -> list[dict[str, Any]]:
        if not self._begun[index]:
            self._begun[index] = True
            text = self._prompts[index // self.plan.n] + text
            scored = [*self._prompt_scores(index), *scored]
        logprobs = None
        if self.plan.params.logprobs is not None:
            logprobs = self.words.completion(scored, self._offset[index])
            self._offset[index] += sum(map(len, logprobs["tokens"]))
        if not text and logprobs is None and reason is None:
            return []
        return [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": REASONS[reason] if reason else None}]


class ChatAnswer(Answer):
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, *facts: Any):
        super().__init__(*facts)
        plan = self.plan
        self._readers = [ToolReader(plan.form, plan.tools, plan.several_calls) if plan.tools else None for _ in self.jobs]
        self._text = [""] * len(self.jobs)
        self._calls: list[list[dict[str, Any]]] = [[] for _ in self.jobs]
        self._scored: list[list[dict[str, Any]]] = [[] for _ in self.jobs]

    def hear(self, index: int, piece: Piece) -> None:
        text, calls, scored, reason = self._read(index, piece)
        self._text[index] += text
        self._calls[index] += calls
        self._scored[index] += scored
        self.reasons[index] = reason

    def _read(self, index: int, piece: Piece) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]], str | None]:
        reader, text, calls = self._readers[index], piece.text, list[dict[str, Any]]()
        if reader:
            text, calls = reader.push(text, last=piece.finish_reason is not None)
        reason = REASONS[piece.finish_reason] if piece.finish_reason else None
        if reason == "stop" and reader and reader.calls:
            reason = "tool_calls"
        return text, calls, [self.words.chat(piece.logprob)] if piece.logprob else [], reason

    def choice(self, index: int) -> dict[str, Any]:
        text, calls = self._text[index], self._calls[index]
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
        if calls:
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in calls]
        logprobs = None if self.plan.params.logprobs is None else {"content": self._scored[index]}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self.reasons[index]}

    def first(self, index: int) -> list[dict[str, Any]]:
        return [self._delta(index, {"role": "assistant", "content": ""})]

    def next(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        text, calls, scored, reason = self._read(index, piece)
        out = []
        if text or scored:
            out.append(self._delta(index, {"content": text}, scored))
        out += [self._delta(index, {"tool_calls": [call]}) for call in calls]
        if reason:
            out.append(self._delta(index, {}, reason=reason))
        return out

    @staticmethod
    def _delta(
        index: int, delta: dict[str, Any], scored: list[dict[str, Any]] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = {"content": scored} if scored else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
