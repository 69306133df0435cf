"""The HTTP endpoints: Open Inference Protocol V2 and ``/metrics``."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Header, Response
from fastapi.exceptions import HTTPException

from guardserve import __version__
from guardserve.metrics import Metrics, negotiated
from guardserve.runtime import Runtime
from guardserve.service.answer import Answer, refusal
from guardserve.service.gateway import Gateway
from guardserve.service.images import FORMATS
from guardserve.service.life import Life
from guardserve.service.protocol import model_metadata, server_metadata
from guardserve.service.schemas import ErrorBody, InferenceRequest, InferenceResponse, ModelMetadata, ServerMetadata
from guardserve.service.scraping import Scraping

BINARY_BODY = "The JSON, its byte count in the header Inference-Header-Content-Length, then the tensors."


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """Render a failure in the protocol's form."""
    return Response(orjson.dumps({"error": message}), status, headers, "application/json")


def metrics_router(metrics: Metrics, life: Life) -> APIRouter:
    """Build the endpoint that Prometheus scrapes."""
    router = APIRouter(tags=["observability"])
    scraping = Scraping(metrics.render, lambda: life.closing)

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def scrape(accept: Annotated[str, Header(include_in_schema=False)] = "") -> Response:
        """Metrics in Prometheus' text format; to who accepts that as OpenMetrics, with exemplars."""
        content_type = negotiated(accept)
        headers = {"Content-Type": content_type, "Vary": "Accept"}
        return Response(await scraping.scrape(content_type), headers=headers)

    return router


class ProtocolEndpoints:
    """The endpoints of the Open Inference Protocol V2 for one model.

    Args:
        gateway: What answers its requests. They do not come this way; here they are documented, and others refused.
        life: Where the server stands.
    """

    def __init__(self, gateway: Gateway, life: Life) -> None:
        self._gateway = gateway
        self._life = life

    @property
    def _runtime(self) -> Runtime:
        return self._gateway.inference.runtime

    def router(self) -> APIRouter:
        """Build the router."""
        router = APIRouter(tags=["Open Inference Protocol V2"])
        answers: dict[int | str, dict[str, Any]] = {200: {"model": InferenceResponse}}
        answers |= {code: {"model": ErrorBody} for code in (400, 401, 404, 408, 413, 415, 422, 500, 503, 504)}
        unready: dict[int | str, dict[str, Any]] = {503: {"model": ErrorBody}}
        router.get("/v2")(self.server)
        router.get("/v2/health/live", response_class=Response)(self.live)
        router.get("/v2/health/ready", response_class=Response, responses=unready)(self.ready)
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
                openapi_extra=_infer_body(images=self._runtime.preprocessing is not None),
            )(self.infer)
        return router

    async def server(self) -> ServerMetadata:
        """Tell what the server is and which extensions it knows."""
        return ServerMetadata.model_validate(server_metadata("guardserve", __version__))

    async def live(self) -> Response:
        """Answer as long as the process works."""
        return Response()

    async def ready(self) -> Response:
        """Tell whether the model works and the server is not about to stop."""
        failure = "the server is stopping" if self._life.draining else self._runtime.failure
        if failure is not None:
            return error_response(HTTPStatus.SERVICE_UNAVAILABLE, f"not ready: {failure}")
        return Response()

    async def metadata(self, model: str, version: str | None = None) -> ModelMetadata:
        """Tell what the model takes and gives."""
        self._require(model, version)
        runtime = self._runtime
        return ModelMetadata.model_validate(
            model_metadata(runtime.name, self._gateway.inference.versions, runtime.platform, runtime.signature)
        )

    async def model_ready(self, model: str, version: str | None = None) -> Response:
        """Tell whether the model is ready."""
        self._require(model, version)
        return await self.ready()

    async def infer(self, model: str, version: str | None = None) -> Response:
        """Run the model on one batch of samples."""
        answer = await self._gateway.counted(self._unknown(model, version))
        return Response(answer.body, answer.status, media_type="application/json")

    async def _unknown(self, model: str, version: str | None) -> Answer:
        try:
            self._require(model, version)
        except HTTPException as error:
            return refusal(error.status_code, "not_found", error.detail)
        return refusal(404, "not_found", f"the path of {model!r} must be written plainly")

    def _require(self, model: str, version: str | None) -> None:
        if model != self._runtime.name:
            raise HTTPException(404, f"unknown model {model!r}: this server has {self._runtime.name!r}")
        versions = self._gateway.inference.versions
        if version is not None and version not in versions:
            raise HTTPException(404, f"unknown version {version!r} of {model!r}: this server has {', '.join(versions)}")


def _infer_body(*, images: bool) -> dict[str, Any]:
    """Describe the forms of an inference request for the OpenAPI document."""
    binary = {"type": "string", "format": "binary", "description": BINARY_BODY}
    json_schema = InferenceRequest.model_json_schema()
    json_schema = _inlined(json_schema, json_schema.pop("$defs"))
    content = {"application/json": {"schema": json_schema}, "application/octet-stream": {"schema": binary}}
    if images:
        content |= {name: {"schema": {"type": "string", "format": "binary"}} for name in FORMATS}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """Put definitions in the place of references to them, which would point nowhere in the whole document."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(item, definitions) for key, item in schema.items()}
