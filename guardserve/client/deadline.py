"""When a call in this thread has to end: httpx limits each step of it, of which there may be many."""

from __future__ import annotations

import math
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import httpcore
import httpx
from httpcore import SOCKET_OPTION, NetworkBackend, NetworkStream

PIECE = 2**16
"""Bytes that are written at once."""


class Deadline(threading.local):
    """Each thread's own end of what it is sending and receiving.

    Attributes:
        end: Seconds of the monotonic clock.
    """

    end = math.inf

    def client(self, **options: Any) -> httpx.Client:
        """Make a client whose connections, to proxies too, are held to the deadline of whoever uses them."""
        client = httpx.Client(**options)
        # neither httpx nor its transports take a backend; the pools below them do, before they connect
        for transport in (client._transport, *client._mounts.values()):  # noqa: SLF001
            if isinstance(transport, httpx.HTTPTransport):
                pool: Any = transport._pool  # noqa: SLF001
                pool._network_backend = _Backend(self, pool._network_backend)  # noqa: SLF001
        return client

    def left(self, timeout: float | None, error: type[httpcore.TimeoutException]) -> float | None:
        """Return the seconds that there are for a step which may take so many; None for any.

        Raises:
            TimeoutException: The given one, if there are none.
        """
        left = self.end - time.monotonic()
        if left <= 0:
            raise error("the call's time is over")
        if timeout is None or timeout > left:
            return None if math.isinf(left) else left
        return timeout


class _Backend(NetworkBackend):
    """Connects in time, with all the addresses of a name, and with the search for them."""

    def __init__(self, deadline: Deadline, backend: NetworkBackend) -> None:
        self._deadline = deadline
        self._backend = backend

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[SOCKET_OPTION] | None = None,
    ) -> NetworkStream:
        addresses = _addresses(host, port, self._deadline.left(timeout, httpcore.ConnectTimeout))
        while True:
            address, *others = addresses
            left = self._deadline.left(timeout, httpcore.ConnectTimeout)
            part = None if left is None else left / len(addresses)  # what is quick leaves its time to the others
            try:
                stream = self._backend.connect_tcp(address, port, part, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if not others:
                    raise
                addresses = others
            else:
                return _Stream(self._deadline, stream)


class _Stream(NetworkStream):
    """A connection on which every step of a call ends in time."""

    def __init__(self, deadline: Deadline, stream: NetworkStream) -> None:
        self._deadline = deadline
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.left(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), PIECE):
            left = self._deadline.left(timeout, httpcore.WriteTimeout)
            self._stream.write(buffer[start : start + PIECE], left)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> NetworkStream:
        left = self._deadline.left(timeout, httpcore.ConnectTimeout)
        return _Stream(self._deadline, self._stream.start_tls(ssl_context, server_hostname, left))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _addresses(host: str, port: int, timeout: float | None) -> list[str]:
    """Return the addresses of a name, in the order in which they are to be tried.

    The system's search has no limit of its own: it goes on in a thread when the time is over, and nobody waits for it.
    """
    try:
        found = _aside(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), timeout)
    except FutureTimeoutError as error:
        raise httpcore.ConnectTimeout(f"the address of {host} was not found in time") from error
    except (OSError, UnicodeError) as error:
        raise httpcore.ConnectError(f"there is no address of {host}: {error}") from error
    return [socket.getnameinfo(entry[4], socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0] for entry in found]


def _aside(search: Callable[[], list[Any]], timeout: float | None) -> list[Any]:
    found: Future[list[Any]] = Future()

    def run() -> None:
        try:
            found.set_result(search())
        except Exception as error:  # noqa: BLE001 - whoever waits raises it
            found.set_exception(error)

    threading.Thread(target=run, name="guardserve-address", daemon=True).start()
    return found.result(timeout)
