"""The page's endpoints: its three files, its data, and a stream of what changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from importlib.resources import files

import orjson
from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from guardserve.page import content
from guardserve.watch import Watch

STREAMS = 32
"""Pages that may follow at once; another is told to ask again later."""

CHECK_INTERVAL = 0.5
"""Seconds between two questions whether there is something new to send."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}

FILES = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}


class Page:
    """The page of one served model.

    Args:
        watch: What looks at the model.
        stopping: Tells that the server is about to stop, so that streams end and do not hold it up.
    """

    def __init__(self, watch: Watch, stopping: Callable[[], bool]) -> None:
        self._watch = watch
        self._stopping = stopping
        self._streams = 0
        folder = files("guardserve.page") / "static"
        self._files = {name: (folder / name).read_bytes() for name in FILES}

    def router(self) -> APIRouter:
        """Build the router."""
        router = APIRouter(include_in_schema=False)
        router.get("/ui")(self.html)
        router.get("/ui/page.{kind}")(self.file)
        router.get("/ui/state")(self.state)
        router.get("/ui/events")(self.events)
        router.get("/ui/layer")(self.layer)
        return router

    async def html(self) -> Response:
        """Give the page."""
        return self._file("page.html")

    async def file(self, kind: str) -> Response:
        """Give its style or its script."""
        return self._file(f"page.{kind}")

    def _file(self, name: str) -> Response:
        if name not in self._files:
            return _json({"error": f"no {name}"}, 404)
        return Response(self._files[name], headers=HEADERS, media_type=FILES[name])

    async def state(self) -> Response:
        """Give all that the page shows."""
        return _json(await run_in_threadpool(content.whole, self._watch))

    async def layer(self, name: str) -> Response:
        """Give the channels of one layer."""
        channels = content.channels(self._watch.verdict, name)
        if channels is None:
            return _json({"error": f"layer {name!r} has seen no sample yet"}, 404)
        return _json(channels)

    async def events(self) -> Response:
        """Send the state after each look, as server-sent events."""
        if self._streams >= STREAMS:
            text = f"{STREAMS} pages follow this model already: close one, or load this one again later"
            return _json({"error": text}, 503)
        return StreamingResponse(self._stream(), headers=HEADERS, media_type="text/event-stream")

    async def _stream(self) -> AsyncIterator[bytes]:
        self._streams += 1
        try:
            sent = 0.0
            while not self._stopping():
                if self._watch.looked_at != sent:
                    sent = self._watch.looked_at
                    yield b"data: " + orjson.dumps(content.now(self._watch)) + b"\n\n"
                await asyncio.sleep(CHECK_INTERVAL)
        finally:
            self._streams -= 1


def _json(value: object, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, HEADERS, "application/json")
