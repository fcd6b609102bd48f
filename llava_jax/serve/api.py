"""The HTTP application: OpenAI's endpoints over an engine's loop, /health and /metrics."""

from __future__ import annotations

import hmac

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llava_jax.serve.completions import CHAT, TEXT, Json
from llava_jax.serve.handling import Desk, Endpoint, error_response, why_not
from llava_jax.serve.jobs import Served, chat_job, check_model, completion_job
from llava_jax.serve.protocol import ApiError, unavailable
from llava_jax.serve.running import internal_error

OPEN_PATH = "/health"  # which needs no key


def build_app(served: Served) -> Starlette:
    """The application. With `served.api_key`, whoever does not give it gets 401 everywhere but at /health."""
    desk = Desk(served)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_card(served)]})

    async def model(request: Request) -> Response:
        check_model(served, request.path_params["name"])
        return JSONResponse(_card(served))

    async def health(request: Request) -> Response:
        if reason := why_not(served.loop):
            raise unavailable(reason)
        return JSONResponse({"status": "ready"})

    async def metrics(request: Request) -> Response:
        return Response(desk.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    routes = [
        Route("/v1/chat/completions", Endpoint(desk, CHAT, chat_job), methods=["POST"]),
        Route("/v1/completions", Endpoint(desk, TEXT, completion_job), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route(OPEN_PATH, health),
        Route("/metrics", metrics),
    ]
    key = served.api_key
    middleware = [] if key is None else [Middleware(KeyRequired, key=key)]
    handlers = {HTTPException: _http_error, ApiError: _api_error, Exception: _unexpected}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


def _card(served: Served) -> Json:
    own = {"owned_by": "llava_jax", "root": served.name, "parent": None, "max_model_len": served.loop.max_model_len}
    return {"id": served.name, "object": "model", "created": served.created, **own}


class KeyRequired:
    """Lets through who gives the key, in a time that says nothing about it."""

    def __init__(self, app: ASGIApp, key: str):
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] == OPEN_PATH:
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if hmac.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
            return
        headers = {"WWW-Authenticate": "Bearer"}
        refusal = ApiError("the API key is missing or wrong", 401, code="invalid_api_key", headers=headers)
        await error_response(refusal)(scope, receive, send)


# ---- errors


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is no such endpoint", 405: "this endpoint does not have that method"}
    message = what.get(error.status_code, error.detail)
    return error_response(ApiError(message, error.status_code, headers=error.headers or {}))


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _unexpected(request: Request, error: Exception) -> Response:
    """The traceback is uvicorn's to log: Starlette raises the exception once more."""
    return error_response(internal_error())
