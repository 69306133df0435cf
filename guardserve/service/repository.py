"""The Open Inference Protocol's model repository: which model there is, and loading it again."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.exceptions import HTTPException

from guardserve.service.access import Access
from guardserve.service.schemas import ErrorBody, LoadRequest, RepositoryModel
from guardserve.service.versions import ReloadError, ReloadRunningError, Versions

MAX_BODY = 64 * 1024
"""Most bytes of a request to load the model."""


class Repository:
    """The endpoints of a repository that holds one model.

    Args:
        versions: The versions of the model.
        access: Who may load it.
    """

    def __init__(self, versions: Versions, access: Access) -> None:
        self._versions = versions
        self._access = access

    def router(self) -> APIRouter:
        """Build the router."""
        router = APIRouter(prefix="/v2/repository", tags=["model repository"])
        refusals: dict[int | str, dict[str, Any]] = {
            code: {"model": ErrorBody} for code in (400, 401, 403, 404, 409, 413, 422, 503)
        }
        body = {"requestBody": {"content": {"application/json": {"schema": LoadRequest.model_json_schema()}}}}
        router.post("/index")(self.index)
        router.post("/models/{model}/load", responses=refusals, openapi_extra=body)(self.load)
        return router

    async def index(self) -> list[RepositoryModel]:
        """Tell which model there is, in which version, and whether it is ready."""
        return [self._entry()]

    async def load(self, model: str, request: Request) -> RepositoryModel:
        """Load the model again and let the new version answer, if it passes its probe; if not, nothing has changed."""
        why_not = self._access.no_administrator(request.scope)
        if why_not is not None:
            raise HTTPException(403, f"the model is not loaded again: {why_not}")
        name = self._versions.current.runtime.name
        if model != name:
            raise HTTPException(404, f"unknown model {model!r}: this server has {name!r}")
        _check(await _body(request))
        try:
            await self._versions.reload()
        except ReloadRunningError as error:
            raise HTTPException(409, str(error)) from error
        except ReloadError as error:
            raise HTTPException(422, str(error)) from error
        return self._entry()

    def _entry(self) -> RepositoryModel:
        current = self._versions.current
        failure = current.runtime.failure
        state = "READY" if failure is None else "UNAVAILABLE"
        return RepositoryModel(
            name=current.runtime.name, version=current.versions[-1], state=state, reason=failure or ""
        )


async def _body(request: Request) -> bytes:
    """Read a small body."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"a request to load a model has {MAX_BODY} bytes at most: send no files")
    return body


def _check(body: bytes) -> None:
    """Refuse a request that would load something else."""
    try:
        content = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError as error:
        raise HTTPException(400, f"the request's body is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise HTTPException(400, f"the request's body is a {type(content).__name__}, not an object")
    if content.get("parameters"):
        raise HTTPException(400, "the model is loaded as it was when the server started: send no parameters")
