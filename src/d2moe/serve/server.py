"""uvicorn with our end: running answers get their time, the rest is told that the server stops."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from d2moe.serve.api import create_app
from d2moe.serve.gate import HEADER_BYTES, Guard
from d2moe.serve.service import Service


class Server(uvicorn.Server):
    """Serves a service; `run(sockets=[...])` returns after a signal, when its worker has stopped."""

    def __init__(self, service: Service, guard: Guard):
        self._worker, self._drain_s = service.worker, service.limits.drain_s
        super().__init__(
            uvicorn.Config(
                create_app(service, guard),
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                ws="none",
                lifespan="on",
                h11_max_incomplete_event_size=HEADER_BYTES,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.create_task(asyncio.to_thread(self._worker.close, self._drain_s))
        await super().shutdown(sockets)  # waits for the connections, so for the answers
        if self.force_exit:
            await asyncio.to_thread(self._worker.close)
        await closing
