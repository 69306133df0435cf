"""The FastAPI application that serves one model."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import HTTPException, RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Lifespan, Receive, Scope, Send

from guardserve import __version__
from guardserve.identity import Identity, identified
from guardserve.metrics import Metrics
from guardserve.page.endpoints import Page
from guardserve.runtime import Runtime
from guardserve.service.access import CHALLENGE, Access, is_open
from guardserve.service.answer import RETRY_AFTER, Answer, headed, named, refusal
from guardserve.service.endpoints import ProtocolEndpoints, error_response, metrics_router
from guardserve.service.gateway import Gateway
from guardserve.service.inference import Inference, OnNonFinite
from guardserve.service.life import Life, closing
from guardserve.service.limits import Limits
from guardserve.service.repository import Repository
from guardserve.service.shift import ShiftPolicy
from guardserve.service.versions import Load, Together, Versions
from guardserve.watch import Watch

_log = logging.getLogger(__name__)


UNAUTHORIZED = refusal(401, "unauthorized", "this server needs an API key: send Authorization: Bearer KEY", CHALLENGE)

CROWDED = refusal(503, "overloaded", "the server has as many connections as it may: try again later", RETRY_AFTER)


class Service(FastAPI):
    """The application: FastAPI for everything but the inference requests of the model, which go past it.

    Attributes:
        life: Where the server stands; whoever stops it says so here.
        access: Who may ask.
        metrics: What is counted.
        gateway: What answers inference requests.
        versions: The versions of the model.
    """

    life: Life
    access: Access
    metrics: Metrics
    gateway: Gateway
    versions: Versions

    def runs_forward(self, scope: Scope) -> bool:
        """Tell whether a request is one for a forward, and may be answered."""
        if scope["method"] != "POST" or scope["path"] not in self.gateway.inference.paths or self.life.crowded:
            return False
        return self.access.allows(scope)

    def shortcut(self, scope: Scope) -> Gateway | None:
        """Return what may answer a request past ASGI; None where it needs more than its answer, or is refused."""
        return self.gateway if self.runs_forward(scope) and not self.life.closing else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or run the lifespan."""
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        identity = Identity(dict(scope["headers"]))
        with identified(identity):
            await self._answer(scope, receive, named(send, identity))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.life.closing or self.life.crowded:
            send = closing(send)
        if self.life.crowded and not is_open(scope["path"]):
            await self._refuse(CROWDED, scope, send)
            return
        if not self.access.allows(scope):
            await self._refuse(UNAUTHORIZED, scope, send)
            return
        if scope["path"] in self.gateway.inference.paths and scope["method"] == "POST":
            await self.gateway(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope, send = {**scope, "method": "GET"}, headed(send)
        await super().__call__(scope, receive, send)

    async def _refuse(self, answer: Answer, scope: Scope, send: Send) -> None:
        """Refuse a request, and count it where it is for a forward."""
        if scope["path"] in self.gateway.inference.paths and scope["method"] == "POST":
            self.gateway.refused(answer)
        await answer.send(send)


def create_app(
    runtime: Runtime,
    *,
    model_version: str = "1",
    limits: Limits | None = None,
    access: Access | None = None,
    on_nonfinite: OnNonFinite = "error",
    shift_policy: ShiftPolicy | None = None,
    shutdown_timeout: float = 30.0,
    load: Load | None = None,
    together: Together | None = None,
) -> Service:
    """Build the application.

    It probes the model in the background once it runs, and closes the runtime when it stops.

    Args:
        runtime: The model to serve, not yet started.
        model_version: The model's version in URLs.
        limits: What is accepted.
        access: Who may ask; by default everybody.
        on_nonfinite: Whether NaN or infinity in an output is an ``"error"`` or is sent and told (``"flag"``), where the
            request does not say.
        shift_policy: What is done about samples unlike the reference profile; by default nothing.
        shutdown_timeout: Seconds to finish accepted requests in when it stops.
        load: What loads the model again, for SIGHUP and authorised calls; see :class:`Versions`.
        together: Where several processes serve the model, what has all of them load it again.
    """
    metrics = Metrics(runtime)
    limits = limits or Limits()
    life = Life(limits.max_connections, metrics.request_unreadable)

    def serve(runtime: Runtime) -> Inference:
        policy = shift_policy or ShiftPolicy()
        return Inference(runtime, metrics, limits, model_version, on_nonfinite, shift_policy=policy)

    gateway = Gateway(serve(runtime), metrics, limits)
    watch = Watch(runtime, metrics)
    versions = Versions(gateway, metrics, watch, life, serve=serve, load=load, together=together)

    app = Service(
        title="guardserve",
        version=__version__,
        summary=f"Serves {metrics.model} behind BatchNorm safeguards.",
        lifespan=_lifespan(versions, watch, life, shutdown_timeout),
        redirect_slashes=False,
        exception_handlers={
            StarletteHTTPException: _http_error,
            RequestValidationError: _validation_error,
            Exception: _unexpected,
        },
    )
    app.life, app.metrics, app.access, app.gateway, app.versions = life, metrics, access or Access(), gateway, versions
    for router in _routers(app, watch, reloads=load is not None):
        app.include_router(router)
    return app


def _lifespan(versions: Versions, watch: Watch, life: Life, timeout: float) -> Lifespan[FastAPI]:
    """Return what is done around serving."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        versions.start()
        watch.start()
        yield
        life.close()
        await versions.close(timeout)

    return lifespan


def _routers(app: Service, watch: Watch, *, reloads: bool) -> Iterator[APIRouter]:
    """Yield the endpoints of everything but inference requests."""
    yield ProtocolEndpoints(app.gateway, app.life).router()
    if reloads:
        yield Repository(app.versions, app.access).router()
    yield metrics_router(app.metrics, app.life)
    # the page's streams do not end by themselves
    yield Page(watch, lambda: app.life.draining).router()


async def _http_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, (HTTPException, StarletteHTTPException)):
        raise error
    headers = dict(error.headers or {})
    if headers.get("Allow") == "GET":
        headers["Allow"] = "GET, HEAD"
    return error_response(error.status_code, str(error.detail), headers)


async def _validation_error(_: Request, error: Exception) -> Response:
    return error_response(422, str(error))


async def _unexpected(_: Request, error: Exception) -> Response:
    _log.error("unexpected %s", type(error).__name__, exc_info=error)
    return error_response(500, "internal error; the server's log has the details")
