"""The gRPC server: each call becomes a request to the service's ASGI application, and its answer the call's.

So both faces have the same queue, checks, keys, limits, metrics and words, as there is only one of each.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import quote

import orjson
from starlette.types import ASGIApp, Message, Scope

from guardserve.exceptions import GuardserveError, MissingExtraError
from guardserve.identity import REQUEST_ID
from guardserve.service.answer import Answer, failure
from guardserve.service.body import HEADER_LENGTH, ProtocolError
from guardserve.service.gateway import Gateway
from guardserve.service.request import SMALL

SLACK = 64 * 1024
"""Bytes of a message beyond those of its tensors."""

CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    413: "RESOURCE_EXHAUSTED",
    415: "INVALID_ARGUMENT",
    422: "FAILED_PRECONDITION",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
"""gRPC's status for each of HTTP's that the service answers with; INTERNAL for the others."""

PASSED = {"authorization", "traceparent", "tracestate", "x-request-id"}
"""Metadata of a call that the request has as headers."""

LINGER = 0.5
"""Seconds in which calls are refused before the connections end."""

UNREADY = 503

OK = 200


class Reply(NamedTuple):
    """The service's answer to one request.

    Attributes:
        status: HTTP status.
        headers: HTTP headers by their lower-case names.
        body: Its bytes.
    """

    status: int
    headers: dict[bytes, bytes]
    body: bytes


STOPPING = Reply(503, {b"retry-after": b"1"}, b'{"error": "the server is stopping: ask another one"}')


class RpcServer:
    """Serves ``inference.GRPCInferenceService`` in the event loop of an HTTP server.

    Args:
        app: The application that answers.
        gateway: Where it counts inference requests, for those that do not get as far as that.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        max_message_size: Most bytes of the tensors of a call.
        max_calls: Most calls that are worked on; more get RESOURCE_EXHAUSTED.
        grace: Seconds to finish calls in when it stops.
        certificate: Certificate and private key to serve TLS with, as files in PEM form; the key may be in the first.

    Raises:
        MissingExtraError: If the extra ``grpc`` is not installed.

    Attributes:
        port: Where it listens, once it has started.
    """

    def __init__(
        self,
        app: ASGIApp,
        gateway: Gateway,
        host: str,
        port: int,
        *,
        max_message_size: int,
        max_calls: int = 1024,
        grace: float = 30.0,
        certificate: tuple[Path, Path | None] | None = None,
    ) -> None:
        try:
            self._grpc: Any = importlib.import_module("grpc")
            self._messages: Any = importlib.import_module("guardserve.rpc.messages")
            self._translation: Any = importlib.import_module("guardserve.rpc.translation")
        except ModuleNotFoundError as error:
            raise MissingExtraError("gRPC (--grpc-port)", "grpc") from error
        self.port = port
        self._app = app
        self._gateway = gateway
        self._host = host
        self._limits = {"maximum_concurrent_rpcs": max_calls}
        self._options = [
            ("grpc.max_receive_message_length", max_message_size + SLACK),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # a port that is taken is an error
        ]
        self._grace = grace
        self._certificate = certificate
        self._server: Any = None
        self._stopping = False
        self._asking: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start to listen.

        Raises:
            GuardserveError: If that is not possible.
        """
        grpc = self._grpc
        server = grpc.aio.server(options=self._options, **self._limits)
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                getattr(self, f"_{name}"),
                request_deserializer=self._messages.CLASSES[f"{name}Request"].FromString,
                response_serializer=self._messages.CLASSES[f"{name}Response"].SerializeToString,
            )
            for name in self._messages.METHODS
        }
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(self._messages.SERVICE, handlers)])
        address = f"[{self._host}]:{self.port}" if ":" in self._host else f"{self._host}:{self.port}"
        try:
            if self._certificate is None:
                self.port = server.add_insecure_port(address)
            else:
                chain, key = self._certificate
                pair = ((key or chain).read_bytes(), chain.read_bytes())
                self.port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        except (RuntimeError, OSError) as error:
            raise GuardserveError(f"gRPC cannot listen on {address}: is the port taken? {error}") from error
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """Take no more calls, and finish those that there are.

        New ones are refused for a moment before the connections end: gRPC cancels what arrives just then, which
        clients do not try again elsewhere as they do what is unavailable.
        """
        if self._server is not None:
            self._stopping = True
            await asyncio.sleep(LINGER)
            await self._server.stop(self._grace)
        for task in self._asking:
            task.cancel()

    async def _ServerLive(self, _: Any, context: Any) -> Any:  # noqa: N802 - the method's name in the protocol
        await self._expect(context, "GET", "/v2/health/live")
        return self._messages.CLASSES["ServerLiveResponse"](live=True)

    async def _ServerReady(self, _: Any, context: Any) -> Any:  # noqa: N802
        reply = await self._expect(context, "GET", "/v2/health/ready", also=UNREADY)
        return self._messages.CLASSES["ServerReadyResponse"](ready=reply.status == OK)

    async def _ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        path = f"{_path(request.name, request.version)}/ready"
        reply = await self._expect(context, "GET", path, also=UNREADY)
        return self._messages.CLASSES["ModelReadyResponse"](ready=reply.status == OK)

    async def _ServerMetadata(self, _: Any, context: Any) -> Any:  # noqa: N802
        reply = await self._expect(context, "GET", "/v2")
        found = orjson.loads(reply.body)
        return self._messages.CLASSES["ServerMetadataResponse"](name=found["name"], version=found["version"])

    async def _ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        reply = await self._expect(context, "GET", _path(request.name, request.version))
        return self._messages.CLASSES["ModelMetadataResponse"](**orjson.loads(reply.body))

    async def _ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self._stopping:
            await self._abort(context, STOPPING)
        path = f"{_path(request.model_name, request.model_version)}/infer"
        try:
            seconds = context.time_remaining()
            body, headers = await self._translated(request.ByteSize(), self._translation.write_http, request, seconds)
        except ProtocolError as error:
            answer = await self._gateway.counted(_refused(error, request.model_name))
            await self._abort(context, Reply(answer.status, {}, answer.body))
        reply = await self._expect(context, "POST", path, headers, body)
        head = int(reply.headers[HEADER_LENGTH.lower().encode()])
        raw = self._translation.is_raw(request)
        return await self._translated(len(reply.body), self._translation.read_http, reply.body, head, raw)

    async def _translated(self, size: int, translate: Callable[..., Any], *arguments: Any) -> Any:
        """Translate so many bytes; many where that keeps nobody waiting."""
        if size <= SMALL:
            return translate(*arguments)
        return await asyncio.get_running_loop().run_in_executor(None, translate, *arguments)

    async def _expect(
        self,
        context: Any,
        method: str,
        path: str,
        headers: Sequence[tuple[bytes, bytes]] = (),
        body: bytes = b"",
        *,
        also: int = OK,
    ) -> Reply:
        """Ask the service; end the call with its error unless its status is 200 or another that is expected."""
        reply = await self._ask(context, method, path, headers, body)
        context.set_trailing_metadata(_trailing(reply))
        if reply.status not in (OK, also):
            await self._abort(context, reply)
        return reply

    async def _abort(self, context: Any, reply: Reply) -> NoReturn:
        try:
            text = orjson.loads(reply.body)["error"]
        except (orjson.JSONDecodeError, LookupError, TypeError):
            text = f"HTTP {reply.status}"
        code = getattr(self._grpc.StatusCode, CODES.get(reply.status, "INTERNAL"))
        await context.abort(code, text, _trailing(reply))
        raise AssertionError  # abort raises

    async def _ask(
        self, context: Any, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes
    ) -> Reply:
        """Send one request to the application; it notices when the call is cancelled, as if a client had gone."""
        passed = [
            (name.encode(), value.encode())
            for name, value in context.invocation_metadata() or ()
            if name in PASSED and isinstance(value, str)
        ]
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "2",
            "method": method,
            "scheme": "grpc",
            "path": path,
            "raw_path": quote(path).encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [*headers, *passed],
            "client": None,
            "server": (self._host, self.port),
        }
        exchange = _Exchange(body)
        task = asyncio.ensure_future(_asked(self._app(scope, exchange.receive, exchange.send)))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            exchange.gone.set()
            raise
        return exchange.reply


def _trailing(reply: Reply) -> tuple[tuple[str, str], ...]:
    """Return the headers of an answer that a call's metadata has as well."""
    passed = ((name, reply.headers.get(name)) for name in (b"retry-after", REQUEST_ID))
    return tuple((name.decode(), value.decode("latin-1")) for name, value in passed if value is not None)


async def _refused(error: ProtocolError, model: str) -> Answer:
    return failure(error, model)


async def _asked(asking: Awaitable[None]) -> None:
    await asking


class _Exchange:
    """The two channels of one request to an ASGI application."""

    def __init__(self, body: bytes) -> None:
        self.gone = asyncio.Event()
        self.reply = Reply(500, {}, b"")
        self._body: bytes | None = body

    async def receive(self) -> Message:
        """Give the whole body, and then wait until the client is gone."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Take the answer."""
        if message["type"] == "http.response.start":
            headers = {name.lower(): value for name, value in message.get("headers", ())}
            self.reply = Reply(message["status"], headers, b"")
        else:
            self.reply = self.reply._replace(body=self.reply.body + message.get("body", b""))


def _path(model: str, version: str) -> str:
    """Return the path of a model, or of one of its versions."""
    return f"/v2/models/{model}/versions/{version}" if version else f"/v2/models/{model}"
