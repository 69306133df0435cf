"""The clients. What they ask and how they go on is the same; one waits for answers, the other awaits them."""

from __future__ import annotations

import asyncio
import math
import random
import ssl
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from types import MappingProxyType, TracebackType
from typing import Any, TypeAlias, TypeVar
from urllib.parse import quote

import httpx
import orjson
from typing_extensions import Self

from guardserve.client.deadline import Deadline
from guardserve.client.message import HEADER_LENGTH, Outputs, read_answer, write_request
from guardserve.exceptions import ClientError, ClientTimeoutError, OverloadedError, ResponseError, UnreachableError

T = TypeVar("T")

Try: TypeAlias = "tuple[httpx.Request, float | None]"
"""A request, and the seconds in which its answer has to be there whole."""

Steps: TypeAlias = Generator["Try | float", "httpx.Response | Exception | None", T]
"""What a call does: it yields requests to send and seconds to wait, is sent what comes of them, and returns."""

OVERLOADED = (429, 503)

MAX_WAIT = 30.0
"""Seconds that a server may ask to wait before the next try; if it asks for more there is none."""

SPREAD = 0.25
"""Part by which a wait is made longer at random, so that clients refused together do not come back together."""

MAX_PORT = 65_535

MAX_TIMEOUT = 2e6
"""Seconds that a socket can wait, about: three weeks."""

MAX_MESSAGE = 500
"""Characters of an answer that is no JSON that an error shows."""

_DEADLINE = Deadline()

NOTHING: Mapping[str, object] = MappingProxyType({})


class _Calls:
    """The calls, as steps."""

    _connections: Callable[..., httpx.Client | httpx.AsyncClient]

    def __init__(
        self,
        url: str,
        model: str,
        *,
        version: str | None = None,
        api_key: str | None = None,
        timeout: float | None = 60.0,
        retries: int = 2,
        verify: ssl.SSLContext | bool = True,
        trust_env: bool = False,
    ) -> None:
        self._path = f"/v2/models/{quote(model, safe='')}"
        if version is not None:
            self._path += f"/versions/{quote(version, safe='')}"
        self._timeout = _checked(timeout)
        if retries < 0:
            raise ValueError(f"retries is {retries}: give the times that a request is sent again, 0 for none")
        self._retries = retries
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = self._connections(base_url=_address(url), headers=headers, verify=verify, trust_env=trust_env)

    def _infer(
        self,
        inputs: Mapping[str, object],
        outputs: Iterable[str] | None,
        parameters: Mapping[str, object],
        timeout: float | None,
        request_id: str | None,
    ) -> Steps[Outputs]:
        if isinstance(outputs, str):
            raise TypeError(f"outputs is {outputs!r}: give names, such as [{outputs!r}]")
        timeout = self._timeout if timeout is None else _checked(timeout)
        end = math.inf if timeout is None else time.monotonic() + timeout
        outputs = None if outputs is None else list(outputs)
        for tries_left in reversed(range(self._retries + 1)):
            if timeout is not None:  # so that the server, too, knows when nobody waits any more
                parameters = {**parameters, "timeout": max(int(timeout * 1e6), 1)}
            content, headers = write_request(inputs, outputs, parameters, request_id)
            try:
                response = yield from self._send("POST", "/infer", timeout, content=content, headers=headers)
            except OverloadedError as error:
                wait = (error.retry_after or 0.0) * (1 + SPREAD * random.random())  # noqa: S311 - no secret # nosec B311
                left = end - time.monotonic()
                if not tries_left or error.retry_after is None or error.retry_after > MAX_WAIT or wait >= left:
                    raise
                yield wait
                timeout = None if timeout is None else left - wait
            else:
                return read_answer(response.content, response.headers.get(HEADER_LENGTH))
        raise AssertionError  # the last try returns or raises

    def _ready(self) -> Steps[bool]:
        try:
            yield from self._send("GET", "/ready", self._timeout)
        except (OverloadedError, UnreachableError):
            return False
        return True

    def _metadata(self) -> Steps[dict[str, Any]]:
        response = yield from self._send("GET", "", self._timeout)
        try:
            found = orjson.loads(response.content)
        except orjson.JSONDecodeError as error:
            raise ClientError(f"the server's answer is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise ClientError("the server's answer is JSON, but tells nothing of a model")
        return found

    def _send(self, method: str, path: str, timeout: float | None, **content: Any) -> Steps[httpx.Response]:
        """Send one request, once.

        Raises:
            UnreachableError: If no answer came.
            ResponseError: If it was an error.
        """
        response = yield self._http.build_request(method, self._path + path, timeout=timeout, **content), timeout
        if isinstance(response, httpx.TimeoutException):
            raise ClientTimeoutError(f"{self._http.base_url} gave no answer within {timeout:g} s") from response
        if isinstance(response, httpx.DecodingError):
            raise ClientError(f"the server's answer cannot be read: {response}") from response
        if not isinstance(response, httpx.Response):
            raise UnreachableError(f"{self._http.base_url} gave no answer: {response}") from response
        if response.status_code == httpx.codes.OK:
            return response
        message = _message(response)
        if response.status_code in OVERLOADED:
            raise OverloadedError(response.status_code, message, _retry_after(response))
        raise ResponseError(response.status_code, message)


class Client(_Calls):
    """A client of one model, for any number of threads.

    ``with Client("http://127.0.0.1:8000", "digits_cnn") as client: outputs = client.infer({"image": images})``

    Args:
        url: The server, such as ``http://127.0.0.1:8000``.
        model: The model's name.
        version: The model's version; the server's own choice by default.
        api_key: Sent as ``Authorization: Bearer``.
        timeout: Seconds that a call may take, with all of its tries and whatever the server does; None for any time.
        retries: Times that a request is sent again when the server answers 429 or 503 with ``Retry-After``. Nothing
            else is sent again.
        verify: What to verify an https server's certificate with, where the authorities that httpx brings do not do.
        trust_env: Whether to heed ``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY``, ``NO_PROXY``, ``SSL_CERT_FILE`` and
            ``SSL_CERT_DIR``, as httpx does by default. Here the default is not to: a model is served on loopback or
            beside its client, where a proxy that was set for the way to the outside cannot reach it, answers in its
            place with errors of its own, and is shown inputs and API key. ``tritonclient`` heeds none either.

    Raises:
        ValueError: If the URL is none of http or https, the timeout is no number of seconds above 0, or the retries
            are fewer than none.
    """

    _connections = staticmethod(_DEADLINE.client)
    _http: httpx.Client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def infer(
        self,
        inputs: Mapping[str, object],
        *,
        outputs: Iterable[str] | None = None,
        parameters: Mapping[str, object] = NOTHING,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Outputs:
        """Run the model on one batch.

        Args:
            inputs: Arrays or torch tensors by name, batch first, of the model's own dtypes: nothing is converted.
            outputs: Names of the outputs to send; all by default.
            parameters: Parameters of the request, such as ``guardserve_on_nonfinite``.
            timeout: Seconds that it may take, with all tries; by default the client's.
            request_id: An identifier, which comes back.

        Raises:
            TypeError: If an input's dtype is none of the protocol's, or the outputs are no names.
            ValueError: If the timeout is no number of seconds above 0.
            ResponseError: If the server refused it or failed; ``status`` and ``message`` are the server's.
            OverloadedError: If it did so as it could not take more, also when asked again.
            UnreachableError: If there was no answer.
            ClientTimeoutError: If there was none in time.
            ClientError: If the answer was not one of the protocol.
        """
        return self._run(self._infer(inputs, outputs, parameters, timeout, request_id))

    def ready(self) -> bool:
        """Tell whether the model is ready; a server that gives no answer has none that is.

        Raises:
            ResponseError: If the server has no such model, or wants an API key.
        """
        return self._run(self._ready())

    def metadata(self) -> dict[str, Any]:
        """Return what the server tells of the model: its name, versions, platform, inputs and outputs.

        Raises:
            ClientError: As for :meth:`infer`.
        """
        return self._run(self._metadata())

    def _run(self, steps: Steps[T]) -> T:
        outcome: httpx.Response | Exception | None = None
        with closing(steps):
            while True:
                try:
                    step = steps.send(outcome)
                except StopIteration as end:
                    result: T = end.value
                    return result
                if isinstance(step, float):
                    time.sleep(step)
                    continue
                request, timeout = step
                _DEADLINE.end = math.inf if timeout is None else time.monotonic() + timeout
                try:
                    outcome = self._http.send(request)
                except httpx.RequestError as error:
                    outcome = error


class AsyncClient(_Calls):
    """The same for asyncio.

    ``async with AsyncClient("http://127.0.0.1:8000", "digits_cnn") as client: outputs = await client.infer(...)``

    It takes the same arguments.
    """

    _connections = staticmethod(httpx.AsyncClient)
    _http: httpx.AsyncClient

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def infer(
        self,
        inputs: Mapping[str, object],
        *,
        outputs: Iterable[str] | None = None,
        parameters: Mapping[str, object] = NOTHING,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Outputs:
        """Run the model on one batch: see :meth:`Client.infer`."""
        return await self._run(self._infer(inputs, outputs, parameters, timeout, request_id))

    async def ready(self) -> bool:
        """Tell whether the model is ready: see :meth:`Client.ready`."""
        return await self._run(self._ready())

    async def metadata(self) -> dict[str, Any]:
        """Return what the server tells of the model: see :meth:`Client.metadata`."""
        return await self._run(self._metadata())

    async def _run(self, steps: Steps[T]) -> T:
        outcome: httpx.Response | Exception | None = None
        with closing(steps):
            while True:
                try:
                    step = steps.send(outcome)
                except StopIteration as end:
                    result: T = end.value
                    return result
                if isinstance(step, float):
                    await asyncio.sleep(step)
                    continue
                request, timeout = step
                try:
                    outcome = await asyncio.wait_for(self._http.send(request), timeout)
                except asyncio.TimeoutError:
                    outcome = httpx.ReadTimeout("the call's time is over", request=request)
                except httpx.RequestError as error:
                    outcome = error


def _checked(timeout: float | None) -> float | None:
    if timeout is not None and not 0 < timeout <= MAX_TIMEOUT:
        raise ValueError(f"timeout is {timeout}: give seconds above 0, at most {MAX_TIMEOUT:.0f}, or None for any time")
    return timeout


def _address(url: str) -> httpx.URL:
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"the URL {url!r} cannot be read ({error}): give one such as http://127.0.0.1:8000") from error
    if address.scheme not in ("http", "https") or not address.host or (address.port or 0) > MAX_PORT:
        raise ValueError(f"the URL {url!r} is none of a server: give one such as http://127.0.0.1:8000")
    return address


def _message(response: httpx.Response) -> str:
    """Return what the server, or a proxy before it, says of a failure."""
    try:
        answer = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        answer = None
    if isinstance(answer, dict) and isinstance(answer.get("error"), str):
        return str(answer["error"])
    # whatever it says that its coding is, which may be none of text
    return response.content[:MAX_MESSAGE].decode(errors="replace").strip() or response.reason_phrase


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds after which the server wants to be asked again."""
    value = response.headers.get("retry-after", "")
    if value.isdecimal():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, TypeError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return max(0.0, (moment - datetime.now(timezone.utc)).total_seconds())
