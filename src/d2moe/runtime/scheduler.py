"""Many requests on one engine: who gets how many tokens of the next step, and who waits.

There are no phases. A job has a text (its prompt and what was drawn so far) and a sequence that has been fed some of it; every
step feeds it more, and when nothing is left the last logits row gives the next token. A running answer is one token behind, a
prompt many. Each step first gives one token to each job that needs one only, and shares what is left among the others. So a
job joins and leaves at any step; and as logits do not depend on the company or on the cut, its text is the same as alone.

Jobs run in the order they came. When the key/value cache is full the youngest gives its blocks back and starts over when
there is room, often from blocks that are still there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from d2moe.errors import D2MoeError
from d2moe.runtime.kv import BLOCK_TOKENS, root_key
from d2moe.runtime.request import Chunk, Piece, Request

if TYPE_CHECKING:
    from d2moe.runtime.engine import Engine
    from d2moe.runtime.kv import Sequence

SCORED_BYTES = 16 * 10**6
"""Logits that a step may hold for prompts whose tokens are scored."""
STRETCH = 2.0
"""A step that carries prompts may take this many times as long as one that does not."""
LEAST_BESIDE = 8
"""Prompt tokens that go beside running answers in any case: prompts must get on."""


@dataclass(frozen=True)
class Ended:
    """The last thing a job's listener hears; `error` is None after an answer that ended by itself."""

    error: Exception | None = None
    cancelled: bool = False


Listener = Callable[["Piece | Ended"], None]


class Job:
    """A request under way. `listener` hears each Piece, then Ended once, in the engine's thread, and must be quick.

    `generate` False: only the prompt is fed (to be scored). `reuse` False: no blocks of earlier texts are taken over.
    Times are `time.perf_counter` seconds, 0 until it happens.
    """

    def __init__(self, request: Request, bits: float, listener: Listener, *, generate: bool = True, reuse: bool = True):
        self.request, self.bits, self.listener = request, bits, listener
        self.generate = generate
        # A scored prompt needs all its logits, so it has to be fed.
        self.reuse = reuse and request.params.prompt_logprobs is None
        self.sequence: Sequence | None = None
        self.text = np.empty(len(request.prompt) + request.limit, np.int32)
        self.text[: len(request.prompt)] = request.prompt
        self.total = len(request.prompt)
        self.root = b""  # of the keys of its blocks, since it was last started
        self.reused_tokens = self._uses = self._use_bits = 0
        self.cancelled = self.ended = self.restarted = False
        self.submitted = self.admitted = self.first = self.last = 0.0

    @property
    def fed(self) -> int:
        return self.sequence.length if self.sequence else 0

    @property
    def due(self) -> int:
        """Tokens still to feed before the next one can be drawn."""
        return self.total - self.fed

    @property
    def average_bits(self) -> float:
        """Mean width over the experts used for this job; the one asked for before there are any."""
        uses = self._uses + (self.sequence.uses if self.sequence else 0)
        total = self._use_bits + (self.sequence.use_bits if self.sequence else 0)
        return total / uses if uses else float(self.bits)

    def release(self) -> None:
        """Give the blocks back."""
        if self.sequence:
            self._uses += self.sequence.uses
            self._use_bits += self.sequence.use_bits
            self.sequence.free()
            self.sequence = None


class Observer(Protocol):
    """Who wants to count; called in the engine's thread."""

    def stepped(self, jobs: int, tokens: int, seconds: float) -> None: ...
    def token(self, job: Job, gap_s: float) -> None: ...
    def ended(self, job: Job, outcome: Ended) -> None: ...


class Pace:
    """How many prompt tokens may go beside running answers, so that those do not wait too long for their next token.

    The only decision that looks at the clock; it moves the cut of prompts, which does not show in any result.
    """

    def __init__(self, most: int):
        self.most = most
        self.tokens = min(most, 2 * LEAST_BESIDE)
        self._alone_s: float | None = None

    def note(self, prompt_tokens: int, answers: int, seconds: float) -> None:
        if not answers:
            return
        if not prompt_tokens:
            self._alone_s = seconds if self._alone_s is None else 0.8 * self._alone_s + 0.2 * seconds
        elif self._alone_s is not None:
            if seconds > STRETCH * self._alone_s:
                self.tokens = max(min(LEAST_BESIDE, self.most), int(0.75 * self.tokens))
            elif prompt_tokens >= self.tokens and seconds < 0.75 * STRETCH * self._alone_s:
                self.tokens = min(self.most, int(1.25 * self.tokens) + 1)


class Scheduler:
    """Not thread-safe: `d2moe.runtime.worker.Worker` runs one in a thread of its own."""

    def __init__(self, engine: Engine, observer: Observer | None = None, clock: Callable[[], float] = time.perf_counter):
        self.engine, self._observer, self._clock = engine, observer, clock
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.step_tokens = engine.decoder.max_tokens
        # Answers never take more than half of a step, so that prompts get on.
        self.most_running = max(1, min(engine.config.max_sequences, self.step_tokens // 2))
        self._scored_rows = max(1, SCORED_BYTES // (4 * engine.shape.vocab))
        self.pace = Pace(self.step_tokens)

    def add(self, job: Job) -> None:
        job.submitted = job.submitted or self._clock()
        self.waiting.append(job)

    def step(self) -> bool:
        """Feed one step; False if there was nothing to do."""
        for job in [j for j in (*self.running, *self.waiting) if j.cancelled]:
            self._end(job, Ended(cancelled=True))
        self._admit()
        parts = self._fit(self._share())
        if not parts:
            return False
        begin = self._clock()
        answers, tokens = sum(job.due == 1 for job, _ in parts), sum(n for _, n in parts)
        self._feed(parts)
        seconds = self._clock() - begin
        self.pace.note(tokens - answers, answers, seconds)
        if self._observer:
            self._observer.stepped(len(parts), tokens, seconds)
        return True

    def abandon(self, error: Exception) -> None:
        """End all jobs with `error`."""
        for job in (*self.running, *self.waiting):
            self._end(job, Ended(error))

    def _admit(self) -> None:
        """Start jobs as long as there is room for all the text that the running ones and they have so far."""
        pages = self.engine.pages
        while self.waiting and len(self.running) < self.most_running:
            job = self.waiting[0]
            job.sequence, job.root = self.engine.new_sequence(), root_key(job.bits, self.engine.epoch)
            reused = self._reuse(job)
            promised = sum(j.sequence.missing_blocks(j.due) for j in self.running if j.sequence)
            if promised + job.sequence.missing_blocks(job.due) > pages.available and self.running:
                job.sequence.free()
                job.sequence = None
                return
            if not job.admitted:  # what it takes over when it starts again is its own
                job.reused_tokens, job.admitted = reused, self._clock()
            self.running.append(self.waiting.popleft())

    def _share(self) -> list[tuple[Job, int]]:
        """Tokens for each job in the next step: one for each that needs one, the rest in equal parts among the others."""
        answers = [(job, 1) for job in self.running if job.due == 1]
        room = self.step_tokens - len(answers)
        if answers:
            room = min(room, self.pace.tokens)
        chasing = self._leaders()
        wants, scored_rows = {}, self._scored_rows
        for job in chasing:
            wants[id(job)] = min(job.due, scored_rows) if self._scored(job) else job.due
            scored_rows -= wants[id(job)] if self._scored(job) else 0
        parts = dict.fromkeys(wants, 0)
        left = [job for job in chasing if wants[id(job)]]
        while left and room > 0:
            each = max(1, room // len(left))
            for job in left:
                n = min(each, wants[id(job)] - parts[id(job)], room)
                parts[id(job)] += n
                room -= n
            left = [job for job in left if parts[id(job)] < wants[id(job)]]
        return answers + [(job, parts[id(job)]) for job in chasing if parts[id(job)]]

    @staticmethod
    def _scored(job: Job) -> bool:
        """Whether the logits of all tokens that are fed next are wanted."""
        return job.request.params.prompt_logprobs is not None and job.fed < len(job.request.prompt)

    def _leaders(self) -> list[Job]:
        """Jobs with more than one token due; of several at the same block of the same text only the first, as the others can
        take the block over when it is full."""
        chasing: list[Job] = []
        ahead: set[bytes] = set()
        for job in self.running:
            if job.due <= 1 or job.sequence is None:
                continue
            if job.reuse:
                found = self._reuse(job)
                job.reused_tokens += 0 if job.restarted else found
                key = job.sequence.key_ahead(job.text[: job.total], job.root)
                if key is not None:
                    if key in ahead and job.fed % BLOCK_TOKENS == 0:
                        continue
                    ahead.add(key)
            chasing.append(job)
        return chasing

    def _reuse(self, job: Job) -> int:
        """Take over blocks of other jobs' texts; the number of tokens that need not be fed."""
        return job.sequence.share(job.text[: job.total], job.root) if job.reuse and job.sequence else 0

    def _fit(self, parts: list[tuple[Job, int]]) -> list[tuple[Job, int]]:
        """What of `parts` there are blocks for; the youngest jobs give theirs back if the older ones need them."""
        pages = self.engine.pages
        place = {id(job): index for index, job in enumerate(self.running)}
        kept: list[tuple[Job, int]] = []
        promised = 0
        for job, n in sorted(parts, key=lambda part: place[id(part[0])]):
            if job.sequence is None:  # gave its blocks back a moment ago
                continue
            need = job.sequence.missing_blocks(n)
            while promised + need > pages.available and self.running[-1] is not job:
                self._put_back(self.running[-1])
            if promised + need <= pages.available:
                kept.append((job, n))
                promised += need
        return kept

    def _put_back(self, job: Job) -> None:
        self.running.remove(job)
        job.restarted = True
        job.release()
        self.waiting.appendleft(job)

    def _feed(self, parts: list[tuple[Job, int]]) -> None:
        chunks = [self._chunk(job, n) for job, n in parts]
        try:
            rows = self.engine.step(chunks)
        except Exception as error:  # whatever it is, it ends those whom it concerns and nobody else
            if len(parts) == 1:
                self._end(parts[0][0], Ended(error))
                return
            # The engine is as before the step; whoever the failure concerns meets it alone, too.
            for part in parts:
                self._feed([part])
            return
        at = 0
        for (job, n), chunk in zip(parts, chunks, strict=True):
            count = {"all": n, "last": 1, "none": 0}[chunk.logits]
            self._take(job, chunk, rows[at : at + count])
            at += count

    def _chunk(self, job: Job, n: int) -> Chunk:
        begin = job.fed
        wish: Any = "all" if self._scored(job) else "last" if n == job.due else "none"
        return Chunk(job.sequence, job.text[begin : begin + n], job.bits, wish, self.engine.config.uniform)

    def _take(self, job: Job, chunk: Chunk, rows: npt.NDArray[np.float32]) -> None:
        """What a step gave one job."""
        if job.sequence is None:
            raise AssertionError("a job without a sequence was fed")
        job.sequence.offer(job.text[: job.total], job.root)
        try:
            if chunk.logits == "all":
                job.request.score(rows, job.fed - len(rows))
            if job.due:
                return
            piece = job.request.accept(rows[-1]) if job.generate else None
        except D2MoeError as error:
            self._end(job, Ended(error))
            return
        if piece is None:
            self._end(job, Ended())
            return
        job.text[job.total] = piece.token
        job.total += 1
        now = self._clock()
        if self._observer:
            self._observer.token(job, now - (job.last or job.submitted))
        job.first, job.last = job.first or now, now
        job.listener(piece)
        if piece.finish_reason is not None:
            self._end(job, Ended())

    def _end(self, job: Job, outcome: Ended) -> None:
        """Give back what the job holds, and tell."""
        if job.ended:
            return
        job.ended = True
        if job in self.running:
            self.running.remove(job)
        elif job in self.waiting:
            self.waiting.remove(job)
        job.release()
        job.last = self._clock()
        if self._observer:
            self._observer.ended(job, outcome)
        job.listener(outcome)
