"""The HTTP endpoints: Open Inference Protocol V2 and ``/metrics``."""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.exceptions import HTTPException
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from guardserve import __version__
from guardserve.metrics import CONTENT_TYPE, Metrics
from guardserve.runtime import Runtime
from guardserve.service.inference import Answer, Inference
from guardserve.service.protocol import model_metadata, server_metadata
from guardserve.service.schemas import ErrorBody, InferenceRequest, InferenceResponse, ModelMetadata, ServerMetadata

CLIENT_CLOSED_REQUEST = 499
"""Counted for a client that went away before its request was whole; nobody is left to receive it."""

BINARY_BODY = "The JSON, its byte count in the header Inference-Header-Content-Length, then the tensors."


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """Render a failure in the protocol's form."""
    return Response(orjson.dumps({"error": message}), status, headers, "application/json")


def metrics_router(metrics: Metrics) -> APIRouter:
    """Build the endpoint that Prometheus scrapes."""
    router = APIRouter(tags=["observability"])

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def scrape() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(await run_in_threadpool(metrics.render), headers={"Content-Type": CONTENT_TYPE})

    return router


class ProtocolEndpoints:
    """The endpoints of the Open Inference Protocol V2 for one model.

    Args:
        runtime: The model.
        inference: What answers its requests.
        metrics: Where they are counted.
        model_version: The model's version in URLs.
        max_body_size: Most bytes of a request body.
    """

    def __init__(
        self, runtime: Runtime, inference: Inference, metrics: Metrics, *, model_version: str, max_body_size: int
    ) -> None:
        self._runtime = runtime
        self._inference = inference
        self._metrics = metrics
        self._model_version = model_version
        self._max_body_size = max_body_size

    def router(self) -> APIRouter:
        """Build the router."""
        router = APIRouter(tags=["Open Inference Protocol V2"])
        answers: dict[int | str, dict[str, Any]] = {200: {"model": InferenceResponse}}
        answers |= {code: {"model": ErrorBody} for code in (400, 404, 413, 415, 500, 503)}
        unready: dict[int | str, dict[str, Any]] = {503: {"model": ErrorBody}}
        router.get("/v2")(self.server)
        # some load balancers ask for health by HEAD
        for methods, listed in ((["GET"], True), (["HEAD"], False)):
            options: dict[str, Any] = {"methods": methods, "include_in_schema": listed, "response_class": Response}
            router.add_api_route("/v2/health/live", self.live, **options)
            router.add_api_route("/v2/health/ready", self.ready, responses=unready, **options)
        for prefix, kind in (("/v2/models/{model}", "model"), ("/v2/models/{model}/versions/{version}", "version")):
            unknown: dict[int | str, dict[str, Any]] = {404: {"model": ErrorBody}}
            router.get(prefix, operation_id=f"{kind}_metadata", responses=unknown)(self.metadata)
            router.get(
                f"{prefix}/ready",
                operation_id=f"{kind}_ready",
                response_class=Response,
                responses=unknown | unready,
            )(self.model_ready)
            router.post(
                f"{prefix}/infer",
                operation_id=f"{kind}_infer",
                response_class=Response,
                responses=answers,
                openapi_extra=_infer_body(),
            )(self.infer)
        return router

    async def server(self) -> ServerMetadata:
        """Tell what the server is and which extensions it knows."""
        return ServerMetadata.model_validate(server_metadata("guardserve", __version__))

    async def live(self) -> Response:
        """Answer as long as the process works."""
        return Response()

    async def ready(self) -> Response:
        """Tell whether the model has passed its start-up probe."""
        if self._runtime.failure is not None:
            return error_response(HTTPStatus.SERVICE_UNAVAILABLE, f"not ready: {self._runtime.failure}")
        return Response()

    async def metadata(self, model: str, version: str | None = None) -> ModelMetadata:
        """Tell what the model takes and gives."""
        self._require(model, version)
        runtime = self._runtime
        return ModelMetadata.model_validate(
            model_metadata(runtime.name, [self._model_version], runtime.platform, runtime.signature)
        )

    async def model_ready(self, model: str, version: str | None = None) -> Response:
        """Tell whether the model is ready."""
        self._require(model, version)
        return await self.ready()

    async def infer(self, request: Request, model: str, version: str | None = None) -> Response:
        """Run the model on one batch of samples."""
        started = time.perf_counter()
        answer = Answer(HTTPStatus.INTERNAL_SERVER_ERROR, reason="internal")
        try:
            with self._metrics.in_flight.track_inprogress():
                answer = await self._answer(request, model, version)
        finally:
            self._metrics.request_ended(answer.status, time.perf_counter() - started, answer.reason)
        if answer.reason is not None:
            return error_response(answer.status, answer.error)
        return Response(answer.body, answer.status, answer.headers)

    async def _answer(self, request: Request, model: str, version: str | None) -> Answer:
        try:
            self._require(model, version)
        except HTTPException as error:
            return Answer(error.status_code, reason="not_found", error=error.detail)
        try:
            body = await _read(request, self._max_body_size)
        except ClientDisconnect:
            return Answer(CLIENT_CLOSED_REQUEST, reason="disconnected", error="the request was not whole")
        if body is None:
            text = f"the request's body is larger than {self._max_body_size} bytes: send fewer rows at once"
            return Answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, reason="too_large", error=text)
        return await self._inference.answer(body, request.headers)

    def _require(self, model: str, version: str | None) -> None:
        if model != self._runtime.name:
            raise HTTPException(404, f"unknown model {model!r}: this server has {self._runtime.name!r}")
        if version is not None and version != self._model_version:
            raise HTTPException(
                404, f"unknown version {version!r} of {model!r}: this server has {self._model_version!r}"
            )


def _infer_body() -> dict[str, Any]:
    """Describe both forms of an inference request for the OpenAPI document."""
    binary = {"type": "string", "format": "binary", "description": BINARY_BODY}
    json_schema = InferenceRequest.model_json_schema()
    json_schema = _inlined(json_schema, json_schema.pop("$defs"))
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": json_schema}, "application/octet-stream": {"schema": binary}},
        }
    }


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """Put definitions in the place of references to them, which would point nowhere in the whole document."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(item, definitions) for key, item in schema.items()}


async def _read(request: Request, limit: int) -> bytes | None:
    """Read a request's body, giving up (None) as soon as it is larger than ``limit`` bytes."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        return None
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            return None
        chunks.append(chunk)
    return b"".join(chunks)
