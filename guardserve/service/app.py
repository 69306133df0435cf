"""The FastAPI application that serves one model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import HTTPException, RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from guardserve import __version__
from guardserve.metrics import Metrics
from guardserve.runtime import Runtime
from guardserve.service.endpoints import ProtocolEndpoints, error_response, metrics_router
from guardserve.service.inference import Inference

_log = logging.getLogger(__name__)


def create_app(
    runtime: Runtime,
    *,
    model_version: str = "1",
    max_batch_size: int = 64,
    max_body_size: int = 64 * 2**20,
) -> FastAPI:
    """Build the application.

    It probes the model in the background once it runs, and closes the runtime when it stops.

    Args:
        runtime: The model to serve, not yet started.
        model_version: The model's version in URLs.
        max_batch_size: Most rows that one request may carry.
        max_body_size: Most bytes of a request body, after decompression.
    """
    metrics = Metrics(runtime)
    inference = Inference(
        runtime,
        metrics,
        model_version=model_version,
        max_batch_size=max_batch_size,
        max_body_size=max_body_size,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(inference.start())
        yield
        await starting
        inference.close()
        runtime.close()

    app = FastAPI(
        title="guardserve",
        version=__version__,
        summary=f"Serves {runtime.name} behind BatchNorm safeguards.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    endpoints = ProtocolEndpoints(runtime, inference, metrics, model_version=model_version, max_body_size=max_body_size)
    app.include_router(endpoints.router())
    app.include_router(metrics_router(metrics))
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _unexpected)
    return app


async def _http_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, (HTTPException, StarletteHTTPException)):
        raise error
    return error_response(error.status_code, str(error.detail), dict(error.headers or {}))


async def _validation_error(_: Request, error: Exception) -> Response:
    return error_response(422, str(error))


async def _unexpected(_: Request, error: Exception) -> Response:
    _log.error("unexpected %s", type(error).__name__, exc_info=error)
    return error_response(500, "internal error; the server's log has the details")
