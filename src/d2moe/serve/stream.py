"""From the engine's thread to a client: pieces of text as they come, and what happens when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
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


class ClientGone(Exception):
    """The connection was closed before the answer was complete."""


class Channel:
    """What the jobs of one request say, in order, on the event loop."""

    def __init__(self, jobs: int):
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Said] = asyncio.Queue()
        self._open = jobs

    def listener(self, index: int) -> Listener:
        """For job `index`; runs in the engine's thread."""

        def hear(said: Piece | Ended) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, said))

        return hear

    async def batches(self) -> AsyncIterator[list[Said]]:
        """All that was said since the last time, until every job has ended."""
        while self._open:
            batch = [await self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get_nowait())
            self._open -= sum(isinstance(said, Ended) for _, said in batch)
            yield batch


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
    """Server-sent events from a generator of lists of JSON values; a list is sent at once. The generator is closed at the end,
    also when the client goes away in the middle."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[list[Any], None]):
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
        async for values in _with_breaks(self._events):
            # A comment keeps those on the way from taking the silence for the end.
            body = b": at work\n\n" if values is None else b"".join(b"data: " + json.dumps(v).encode() + b"\n\n" for v in values)
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _with_breaks(events: AsyncGenerator[list[Any], None]) -> AsyncGenerator[list[Any] | None, None]:
    """What `events` gives, and None whenever it has given nothing for PING_S seconds."""
    while True:
        task = asyncio.ensure_future(anext(events, None))
        try:
            while not (await asyncio.wait({task}, timeout=PING_S))[0]:
                yield None
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
        values = task.result()
        if values is None:
            return
        yield values
