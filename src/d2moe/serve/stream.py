"""From the engine's thread to a client: pieces of text as they come, and what happens when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from d2moe.runtime.request import Piece
from d2moe.runtime.scheduler import Ended, Listener

T = TypeVar("T")
PING_S = 15.0
"""Silence on a stream of events after which a sign of life is sent."""
Said = tuple[int, "Piece | Ended"]
SILENCE: Said = (-1, Ended())


class ClientGone(Exception):
    """The connection was closed before the answer was complete."""


class Outbox:
    """From the engine's thread to the event loop: however many pieces a step gives, the loop is woken once."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[asyncio.Queue[Said], Said]] = deque()
        self._woken = False

    def put(self, queue: asyncio.Queue[Said], said: Said) -> None:
        """In the engine's thread."""
        self._waiting.append((queue, said))
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._woken = False  # first: what comes after the last look wakes the loop again
        while self._waiting:
            queue, said = self._waiting.popleft()
            queue.put_nowait(said)


class Channel:
    """What the jobs of one request say, in order, on the event loop."""

    def __init__(self, outbox: Outbox, jobs: int):
        self._outbox, self._open = outbox, jobs
        self._queue: asyncio.Queue[Said] = asyncio.Queue()

    def listener(self, index: int) -> Listener:
        """For job `index`; runs in the engine's thread."""
        return lambda said: self._outbox.put(self._queue, (index, said))

    async def batches(self) -> AsyncIterator[list[Said]]:
        """All that was said since the last time, until every job has ended; an empty list after PING_S seconds of silence."""
        loop = asyncio.get_running_loop()
        self._heard, self._alarm = loop.time(), loop.call_later(PING_S, self._look)
        try:
            while self._open:
                batch = [await self._queue.get()]
                self._heard = loop.time()
                while not self._queue.empty():
                    batch.append(self._queue.get_nowait())
                batch = [said for said in batch if said is not SILENCE]
                self._open -= sum(isinstance(said, Ended) for _, said in batch)
                yield batch
        finally:
            self._alarm.cancel()

    def _look(self) -> None:
        """Once in a while instead of a timer for every token."""
        loop = asyncio.get_running_loop()
        left = PING_S - (loop.time() - self._heard)
        if left <= 0:
            self._queue.put_nowait(SILENCE)
        self._alarm = loop.call_later(left if left > 0 else PING_S, self._look)


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client closes the connection first (ClientGone)."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for one in (task, watch):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await one


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events from a generator of lists of JSON values; a list is sent at once, None is a sign of life. The generator is
    closed at the end, also when the client goes away in the middle."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[list[Any] | None, None]):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            with contextlib.suppress(ClientGone, OSError):
                await unless_gone(receive, self._write(send))
        finally:
            await self._events.aclose()

    async def _write(self, send: Send) -> None:
        async for values in self._events:
            # A comment keeps those on the way from taking the silence for the end.
            body = b": at work\n\n" if values is None else b"".join([b"data: %b\n\n" % json.dumps(v).encode() for v in values])
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
