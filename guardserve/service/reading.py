"""How the requests of one model are read: small ones on the event loop, others where they keep nobody waiting."""

from __future__ import annotations

import asyncio
import functools
import math
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, TypeAlias

from guardserve.runtime import Runtime
from guardserve.service.body import MAX_REST, ProtocolError, decompress
from guardserve.service.holding import Held
from guardserve.service.images import is_image, read_image_request
from guardserve.service.lanes import SHORT, Lanes, NobodyWaitsError
from guardserve.service.limits import Hold, Limits
from guardserve.service.request import SMALL, InferRequest, RequestReader

Receive: TypeAlias = Callable[[], Awaitable[Any]]


class Reading:
    """Reads requests, whatever form and coding they have.

    Args:
        runtime: The model.
        limits: What is accepted.
        max_batch_size: The largest batch size accepted.
        lanes: Where what is not small is read.
    """

    def __init__(self, runtime: Runtime, limits: Limits, max_batch_size: int, lanes: Lanes) -> None:
        self._runtime = runtime
        self._limits = limits
        self._lanes = lanes
        self._reader = RequestReader(lambda: runtime.signature, max_batch_size)

    def read(
        self,
        body: bytes,
        headers: Mapping[bytes, bytes],
        held: Held,
        hold: Hold | None = None,
        most: int = sys.maxsize,
    ) -> InferRequest:
        """Read a request.

        Args:
            body: Its body, all of it.
            headers: Its headers by their lower-case names.
            held: What it holds, so far its body.
            hold: Told of what it is to hold; by default ``held`` itself.
            most: Bytes that the body may have when it is unpacked, if that is less than the limit.

        Raises:
            ProtocolError: If it is malformed or does not fit the model.
            RefusedBodyError: If there is no room for what is made of the body.
        """
        encoding = headers.get(b"content-encoding")
        received = len(body)
        hold = hold or held.more
        if encoding is not None or received > self._limits.max_body_size:
            coding = None if encoding is None else encoding.decode("latin-1")
            body = decompress(body, coding, min(most, self._limits.max_body_size), hold)
        if is_image(headers):
            runtime, pixels = self._runtime, self._limits.max_image_pixels
            request = read_image_request(body, headers, runtime.signature, runtime.preprocessing, pixels, hold=hold)
        else:
            length = headers.get(b"inference-header-content-length")
            request = self._reader.read(body, None if length is None else length.decode("latin-1"), hold)
        # from here on there are its tensors, and an identifier and parameters, which are no longer than this
        tensors = sum([tensor.nbytes for tensor in request.inputs.values()])
        held.keep(max(tensors, received, min(len(body), MAX_REST)))
        return request

    async def aside(
        self, body: bytes, headers: Mapping[bytes, bytes], receive: Receive, held: Held
    ) -> InferRequest | Literal["expired", "gone"]:
        """Read a request that is not small; return how it ended if nobody waits for it any more.

        Args:
            body: See :meth:`read`, as for the errors.
            headers: See above.
            receive: ASGI's channel, on which a client that goes away is noticed.
            held: See above.
        """
        timeout = self._limits.request_timeout
        late = math.inf if timeout is None else time.monotonic() + timeout
        if not _is_long(body, headers):
            reading = await self._lanes.short(functools.partial(self._read_short, late, body, headers, held))
            if reading is not None:
                return reading
        gone = threading.Event()
        hold = self._lanes.makes_way(held.more, late, gone)
        watch = asyncio.ensure_future(_until_gone(receive, gone))
        try:
            return await self._lanes.long(functools.partial(self.read, body, headers, held, hold))
        except NobodyWaitsError:
            return "gone" if gone.is_set() else "expired"
        finally:
            watch.cancel()
            gone.set()

    def _read_short(
        self, late: float, body: bytes, headers: Mapping[bytes, bytes], held: Held
    ) -> InferRequest | Literal["expired"] | None:
        """Read a request, unless it is too late by now; return None if it turns out to be a long one."""
        if time.monotonic() >= late:
            return "expired"
        received = len(body)
        try:
            return self.read(body, headers, held, most=SHORT)
        except ProtocolError as error:
            if error.reason != "too_large" or self._limits.max_body_size <= SHORT:
                raise
            held.keep(received)
            return None


def is_small(body: bytes | bytearray, headers: Mapping[bytes, bytes]) -> bool:
    """Tell whether a request is read on the event loop."""
    return len(body) <= SMALL and b"content-encoding" not in headers and not is_image(headers)


def _is_long(body: bytes, headers: Mapping[bytes, bytes]) -> bool:
    """Tell whether a request says that it has so much JSON that others are to be read while it is."""
    if len(body) <= SHORT or b"content-encoding" in headers or is_image(headers):
        return False
    length = headers.get(b"inference-header-content-length", b"")
    return not length.isdigit() or int(length[:18]) > SHORT


async def _until_gone(receive: Receive, gone: threading.Event) -> None:
    """Say so when a client goes away: after the body nothing else can come."""
    message = await receive()
    if message["type"] == "http.disconnect":
        gone.set()
