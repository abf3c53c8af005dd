"""The routes. Everything slow (reading a text, a template, a grammar) runs in threads, everything with the engine in its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from d2moe import __version__
from d2moe.errors import BusyError, D2MoeError
from d2moe.runtime.scheduler import Job
from d2moe.serve import schema
from d2moe.serve.admin import add_admin
from d2moe.serve.answers import Answer, ChatAnswer, CompletionAnswer, error_body, problem
from d2moe.serve.gate import Gate, Guard
from d2moe.serve.service import Plan, Service
from d2moe.serve.stream import ClientGone, EventStream, unless_gone

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": schema.ErrorAnswer, "description": "The request cannot be served as it is."},
    401: {"model": schema.ErrorAnswer, "description": "The API key is missing or wrong."},
    404: {"model": schema.ErrorAnswer, "description": "There is no such model."},
    413: {"model": schema.ErrorAnswer, "description": "The request is too large."},
    429: {"model": schema.ErrorAnswer, "description": "The queue is full; Retry-After says when to come back."},
    500: {"model": schema.ErrorAnswer, "description": "The engine failed."},
    503: {"model": schema.ErrorAnswer, "description": "The server is stopping."},
}
PAGE = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


def create_app(service: Service, guard: Guard | None = None) -> FastAPI:
    """The ASGI application of a service."""
    app = FastAPI(title="d2moe", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, guard=guard or Guard(body_bytes=service.limits.body_bytes), responded=service.metrics.responded)
    _add_errors(app)
    _add_openai(app, service)
    add_admin(app, service, ERRORS)
    _add_rest(app, service)
    return app


def _add_openai(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", response_model=schema.CompletionAnswer, responses={**ERRORS, **STREAM})
    async def completions(body: schema.CompletionRequest, request: Request) -> Response:
        """Text goes on where the prompt ends. With `stream`, server-sent events."""

        def answer(*facts: Any) -> Answer:
            return CompletionAnswer(*facts, echo=bool(body.echo))

        return await _complete(service, request, body, lambda: service.plan_completion(body), answer, "cmpl")

    @app.post("/v1/chat/completions", response_model=schema.ChatAnswer, responses={**ERRORS, **STREAM})
    async def chat(body: schema.ChatRequest, request: Request) -> Response:
        """The assistant's answer, through the model's chat template. With `stream`, server-sent events."""
        return await _complete(service, request, body, lambda: service.plan_chat(body), ChatAnswer, "chatcmpl")

    def card() -> dict[str, Any]:
        model = service.model
        facts = {"context": model.engine.context, "chat": model.tokenizer.has_chat}
        return {"id": service.name, "object": "model", "created": service.created, "owned_by": "d2moe", **facts}

    @app.get("/v1/models", response_model=schema.ModelList, responses={401: ERRORS[401]})
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}", response_model=schema.ModelCard, responses={401: ERRORS[401], 404: ERRORS[404]})
    async def model(name: str) -> Any:
        return card() if name == service.name else _no_model(service, name)


async def _complete(
    service: Service,
    request: Request,
    body: schema.Common,
    plan: Callable[[], Plan],
    make: Callable[..., Answer],
    prefix: str,
) -> Response:
    """Plan, queue, and answer whole or as events."""
    if body.model != service.name:
        return _no_model(service, body.model)
    worked_out = await asyncio.to_thread(plan)
    jobs, channel = service.start(worked_out)
    name = f"{prefix}-{request.state.request_id}"
    answer = make(service, worked_out, jobs, channel, name, int(time.time()))
    request.state.say = lambda: _facts(jobs)
    if body.stream:
        return EventStream(answer.chunks(bool(body.stream_options and body.stream_options.include_usage)))
    try:
        return JSONResponse(await unless_gone(request.receive, answer.whole()))
    except ClientGone:
        return Response(status_code=499)


def _facts(jobs: list[Job]) -> dict[str, Any]:
    """What the log says of a request's jobs; no word of their text."""
    first = min((job.first for job in jobs if job.first), default=None)
    return {
        "prompt_tokens": sum(len(job.request.prompt) for job in jobs),
        "reused_tokens": sum(job.reused_tokens for job in jobs),
        "generated_tokens": sum(len(job.request.tokens) for job in jobs),
        "first_token_s": round(first - jobs[0].submitted, 4) if first else None,
        "bits": jobs[0].bits,
        "finish": ",".join(sorted({job.request.finish_reason or "none" for job in jobs})),
    }


def _no_model(service: Service, name: str) -> JSONResponse:
    text = f"there is no model {name!r} here, only {service.name!r}"
    return JSONResponse(error_body(text, "invalid_request_error", "model", "model_not_found"), 404)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        text = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
        return JSONResponse(error_body(f"{where or 'the body'}: {text}", "invalid_request_error", where or None), 400)

    @app.exception_handler(D2MoeError)
    async def failed(_: Request, error: D2MoeError) -> JSONResponse:
        if isinstance(error, BusyError):
            return JSONResponse(
                error_body(str(error), "rate_limit_error", code="queue_full"), 429, {"retry-after": str(error.retry_after_s)}
            )
        status, body = problem(error)
        return JSONResponse(body, status)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        return JSONResponse(error_body(str(error.detail), "invalid_request_error"), error.status_code, headers)


def _add_rest(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=schema.Health, responses={503: {"model": schema.Health}})
    async def health() -> JSONResponse:
        worker = service.worker
        ok, running = worker.accepting, worker.running
        body = {"status": "ok" if ok else "stopping", "running": running, "waiting": max(0, worker.live - running)}
        return JSONResponse(body, 200 if ok else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, 401: ERRORS[401]})
    async def metrics() -> Response:
        return Response(await asyncio.to_thread(service.metrics.text), headers={"content-type": CONTENT_TYPE_LATEST})

    def add_page(path: str, name: str, kind: str) -> None:
        data = (files("d2moe.serve") / "page" / name).read_bytes()

        async def page() -> Response:
            return Response(data, media_type=kind, headers={"cache-control": "no-cache"})

        app.add_api_route(path, page, methods=["GET"], include_in_schema=False)

    for name, kind in PAGE.items():
        add_page("/" if name == "page.html" else f"/page/{name}", name, kind)
