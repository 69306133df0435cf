"""The metrics, rendered for whoever scrapes them: a flood of that leaves forwards their share of the interpreter."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.concurrency import run_in_threadpool

SHARE = 0.2
"""Of one processor, that renderings may take, unless they take so long that scrapes would wait more than they may."""

LONGEST = 1.0
"""Seconds that a scrape waits at most for the next rendering to begin: one may have been slow by chance."""

LOOK_INTERVAL = 0.05
"""Seconds between two looks whether the server stops."""


class Scraping:
    """Renders metrics, once for all who ask for a format before that begins, also if some of them have gone by then.

    Args:
        render: What does that, for a content type.
        stopping: Whether the server is about to stop; nobody is kept waiting then.
    """

    def __init__(self, render: Callable[[str], bytes], stopping: Callable[[], bool]) -> None:
        self._render = render
        self._stopping = stopping
        self._coming: dict[str, asyncio.Future[bytes]] = {}
        self._one = asyncio.Lock()
        self._next = 0.0

    async def scrape(self, content_type: str) -> bytes:
        """Return what a rendering gives that begins from now on."""
        if content_type not in self._coming:
            self._coming[content_type] = asyncio.ensure_future(self._in_turn(content_type))
        return await asyncio.shield(self._coming[content_type])

    async def _in_turn(self, content_type: str) -> bytes:
        async with self._one:
            try:
                await self._pause()
            finally:
                del self._coming[content_type]
            return await run_in_threadpool(self._timed, content_type)

    async def _pause(self) -> None:
        while (left := self._next - time.monotonic()) > 0 and not self._stopping():  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(min(left, LOOK_INTERVAL))

    def _timed(self, content_type: str) -> bytes:
        began = time.thread_time()
        try:
            return self._render(content_type)
        finally:
            self._next = time.monotonic() + min(LONGEST, (time.thread_time() - began) * (1 / SHARE - 1))
