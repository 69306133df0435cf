"""The clients against real servers: every datatype, every kind of error, and retries that are counted."""

from __future__ import annotations

import asyncio
import json
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias

import httpx
import numpy as np
import pytest
import torch
from served_models import Echo, Two
from serving import free_port, listening, loaded, metric, serving, wait_until
from torch import nn

from guardserve import AsyncClient, Client, exceptions
from guardserve.client.client import MAX_WAIT
from guardserve.runtime import Runtime
from guardserve.service.access import Access
from guardserve.service.app import create_app
from guardserve.service.background import serve_in_background
from guardserve.signature import DATATYPES, TensorSpec

KEY = "a-key-of-a-client-1"
ROWS = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)

Call: TypeAlias = Callable[..., Any]


def call_sync(url: str, method: str, *arguments: Any, options: dict[str, Any] | None = None, **named: Any) -> Any:
    """Make one call with a client."""
    with Client(url, **{"model": "net", **(options or {})}) as client:
        return getattr(client, method)(*arguments, **named)


def call_async(url: str, method: str, *arguments: Any, options: dict[str, Any] | None = None, **named: Any) -> Any:
    """Make one call with an async client."""

    async def call() -> Any:
        async with AsyncClient(url, **{"model": "net", **(options or {})}) as client:
            return await getattr(client, method)(*arguments, **named)

    return asyncio.run(call())


@pytest.fixture(params=[call_sync, call_async], ids=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Call:
    """Give both ways to call."""
    found: Call = request.param
    return found


def test_a_request_gets_its_outputs_with_what_the_server_tells(call: Call) -> None:
    """Arrays and tensors alike; names, identifier and version come with them."""
    with serving(Two()) as client:
        for x in (ROWS, torch.from_numpy(ROWS)):
            outputs = call(str(client.base_url), "infer", {"x": x}, request_id="one")
            assert list(outputs) == ["normal", "inverse"]
            np.testing.assert_allclose(outputs["normal"], ROWS / np.sqrt(1 + 1e-5), rtol=1e-6)
            assert outputs["inverse"].dtype == np.float32
            version = call(str(client.base_url), "metadata")["versions"][-1]
            assert (outputs.id, outputs.model_name, outputs.model_version) == ("one", "net", version)
        chosen = call(str(client.base_url), "infer", {"x": ROWS}, outputs=["inverse"], options={"version": "1"})
        assert list(chosen) == ["inverse"]


def test_parameters_go_and_come(call: Call) -> None:
    """What guardserve tells about a non-finite output is there beside it."""
    with serving(Two()) as client:
        zero = np.zeros((1, 3), np.float32)
        outputs = call(str(client.base_url), "infer", {"x": zero}, parameters={"guardserve_on_nonfinite": "flag"})
        assert np.isinf(outputs["inverse"]).all()
        assert "inverse" in outputs.parameters["guardserve_nonfinite"]


@pytest.mark.parametrize("datatype", sorted(DATATYPES))
def test_every_datatype_is_served(datatype: str) -> None:
    """BF16 and FP16 included, which have no JSON form."""
    tensor = torch.tensor([[0, 1, 1]]).to(DATATYPES[datatype])
    with serving(Echo(), TensorSpec("x", tensor.dtype, (-1, 3))) as client:
        outputs = call_sync(str(client.base_url), "infer", {"x": tensor})
    (back,) = outputs.values()
    assert torch.equal(torch.from_numpy(back).to(tensor.dtype), tensor)


def test_readiness_and_metadata(call: Call) -> None:
    """Of the model; a server that is not there has none that is ready."""
    with serving(Two()) as client:
        url = str(client.base_url)
        assert call(url, "ready") is True
        found = call(url, "metadata")
        assert found["name"] == "net"
        assert found["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
        with pytest.raises(exceptions.ResponseError, match="unknown model") as caught:
            call(url, "ready", options={"model": "other"})
        assert caught.value.status == 404
    assert call(url, "ready") is False
    with serving(Broken()) as client:
        assert call(str(client.base_url), "ready") is False


class Broken(nn.Module):
    """Fails always."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Fail."""
        raise ValueError(x)


@pytest.mark.parametrize(
    ("inputs", "options", "status", "says"),
    [
        ({"x": ROWS[:, :2]}, {}, 400, "shape is [2, 2]"),
        ({"x": ROWS.astype(np.float64)}, {}, 400, "FP64"),
        ({"y": ROWS}, {}, 400, "unknown input 'y'"),
        ({"x": np.array([["a", "b", "c"]])}, {}, 400, "BYTES"),
        ({"x": ROWS * np.nan}, {}, 400, "send finite numbers"),
        ({"x": np.zeros((1, 3), np.float32)}, {}, 500, "non-finite output"),
        ({"x": ROWS}, {"version": "7"}, 404, "unknown version '7'"),
        ({"x": ROWS}, {"model": "a/b"}, 404, ""),
    ],
)
def test_what_the_server_refuses_is_raised_with_its_words(
    call: Call, inputs: dict[str, Any], options: dict[str, Any], status: int, says: str
) -> None:
    """The status and the message are there, and the request was sent once."""
    with serving(Two()) as client:
        with pytest.raises(exceptions.ResponseError) as caught:
            call(str(client.base_url), "infer", inputs, options=options)
        assert caught.value.status == status
        assert says in caught.value.message
        assert str(status) in str(caught.value)
        again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - it was made here
        assert (type(again), str(again)) == (type(caught.value), str(caught.value))


def test_an_api_key_is_sent(call: Call) -> None:
    """Without it: 401, in the server's words."""
    runtime = Runtime(loaded(Two()))
    with serve_in_background(create_app(runtime, access=Access([KEY]))) as url:
        wait_until(lambda: runtime.failure is None)
        assert len(call(url, "infer", {"x": ROWS}, options={"api_key": KEY})) == 2
        for options in ({}, {"api_key": KEY + "x"}):
            with pytest.raises(exceptions.ResponseError, match="API key") as caught:
                call(url, "infer", {"x": ROWS}, options=options)
            assert caught.value.status == 401


class Gate(nn.Module):
    """Waits until it is opened, but for the probes' noise."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.open = threading.Event()
        self.waiting = threading.Event()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise, when it is open."""
        if (x[:, 0] == 77).any():
            self.waiting.set()
            self.open.wait(30)
        y: torch.Tensor = self.bn(x)
        return y


@contextmanager
def overloaded() -> Iterator[tuple[httpx.Client, Gate]]:
    """Serve a model whose worker waits and whose queue is full."""
    gate = Gate()
    stuck = {"x": np.full((1, 3), 77, np.float32)}
    with serving(gate, max_queue_size=1, max_batch_size=1) as client:
        url = str(client.base_url)
        threads = [threading.Thread(target=call_sync, args=(url, "infer", stuck)) for _ in range(2)]
        try:
            threads[0].start()
            gate.waiting.wait(30)
            threads[1].start()
            wait_until(lambda: metric(client, 'guardserve_queue_size{model="net"}') == 1)
            yield client, gate
        finally:
            gate.open.set()
            for thread in threads:
                thread.join()


def refused(client: httpx.Client) -> float:
    """Read how many requests were refused."""
    return metric(client, 'guardserve_requests_total{model="net",status="503"}')


def test_a_server_that_is_full_is_asked_again_as_often_as_was_said(call: Call) -> None:
    """After the seconds that it asks for; then the error is typed."""
    with overloaded() as (client, _):
        for retries in (0, 1):
            before, started = refused(client) if retries else 0.0, time.monotonic()
            with pytest.raises(exceptions.OverloadedError, match="requests are waiting") as caught:
                call(str(client.base_url), "infer", {"x": ROWS[:1]}, options={"retries": retries})
            assert refused(client) - before == retries + 1
            assert retries <= time.monotonic() - started < retries + 2
            assert (caught.value.status, caught.value.retry_after) == (503, 1)


def test_a_server_that_has_room_again_answers_the_second_try(call: Call) -> None:
    """The caller sees nothing of the first."""
    with overloaded() as (client, gate):

        def make_room() -> None:
            wait_until(lambda: refused(client) == 1)
            gate.open.set()

        room = threading.Thread(target=make_room)
        room.start()
        outputs = call(str(client.base_url), "infer", {"x": ROWS[:1]})
        room.join()
        assert len(outputs) == 1
        assert refused(client) == 1


def test_a_wait_beyond_the_time_that_is_left_is_not_begun(call: Call) -> None:
    """A request of not quite a second gives up at once when asked to come back in one."""
    with overloaded() as (client, _):
        started = time.monotonic()
        with pytest.raises(exceptions.OverloadedError):
            call(str(client.base_url), "infer", {"x": ROWS[:1]}, timeout=0.99)
        assert time.monotonic() - started < 0.99


def test_a_timeout_is_the_callers_and_the_servers(call: Call) -> None:
    """Whoever notices first; the request that waited is not run."""
    gate = Gate()
    with serving(gate) as client:
        try:
            with pytest.raises((exceptions.ClientTimeoutError, exceptions.ResponseError)) as caught:
                call(str(client.base_url), "infer", {"x": ROWS * 0 + 77}, timeout=0.2)
            assert isinstance(caught.value, TimeoutError) or caught.value.args[0] == 504
        finally:
            gate.open.set()


def test_a_server_that_is_not_there_is_told_so(call: Call) -> None:
    """It is tried once."""
    with pytest.raises(exceptions.UnreachableError, match=r"127\.0\.0\.1"):
        call(f"http://127.0.0.1:{free_port()}", "infer", {"x": ROWS})


class Canned(BaseHTTPRequestHandler):
    """Answers as its server's list says, one answer after the other."""

    server: Any
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        """Count the connection."""
        super().setup()
        self.server.connections += 1

    def do_GET(self) -> None:
        """Answer."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen += 1
        status, headers, body = self.server.answers.pop(0)
        if status == 0:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815 - that is its name

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def canned(*answers: tuple[int, dict[str, str], bytes]) -> Iterator[tuple[str, Any]]:
    """Run a server of canned answers; give its URL and itself."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Canned)
    server.answers, server.seen, server.connections = list(answers), 0, 0
    with listening(server):
        yield f"http://127.0.0.1:{server.server_port}", server


GOOD = json.dumps(
    {"model_name": "net", "outputs": [{"name": "y", "shape": [1, 2], "datatype": "FP32", "data": [[1, 2]]}]}
).encode()
SOON = {"Retry-After": "0"}


def test_a_server_without_the_binary_extension_is_understood(call: Call) -> None:
    """Its answer is JSON alone."""
    with canned((200, {}, GOOD)) as (url, _):
        np.testing.assert_array_equal(call(url, "infer", {"x": ROWS})["y"], [[1, 2]])


@pytest.mark.parametrize(
    ("answers", "tries", "kind"),
    [
        ([(429, SOON, b"slow down"), (503, SOON, b"{}"), (200, {}, GOOD)], 3, None),
        ([(429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b""), (200, {}, GOOD)], 2, None),
        ([(503, {}, b"no")], 1, exceptions.OverloadedError),
        ([(503, {"Retry-After": "soon"}, b"no")], 1, exceptions.OverloadedError),
        ([(503, {"Retry-After": str(int(MAX_WAIT) + 1)}, b"no")], 1, exceptions.OverloadedError),
        ([(503, {"Retry-After": "Mon, 01 Jan 99999999999 00:00:00 GMT"}, b"no")], 1, exceptions.OverloadedError),
        ([(500, {"Content-Type": "text/plain; charset=hex"}, b"no")], 1, exceptions.ResponseError),
        ([(500, SOON, b"no")], 1, exceptions.ResponseError),
        ([(502, SOON, b"no")], 1, exceptions.ResponseError),
        ([(302, {"Location": "/"}, b"no")], 1, exceptions.ResponseError),
        ([(0, {}, b"")], 1, exceptions.UnreachableError),
        ([(200, {}, b"<html>")], 1, exceptions.ClientError),
        ([(200, {}, b"[]")], 1, exceptions.ClientError),
        ([(200, {"Inference-Header-Content-Length": "x"}, GOOD)], 1, exceptions.ClientError),
        ([(200, {"Content-Encoding": "gzip"}, GOOD)], 1, exceptions.ClientError),
    ],
)
def test_only_refusals_that_ask_for_it_are_tried_again(
    call: Call, answers: list[Any], tries: int, kind: type[Exception] | None
) -> None:
    """By seconds or by date; everything else is an error at once, of its own class."""
    with canned(*answers) as (url, server):
        if kind is None:
            assert list(call(url, "infer", {"x": ROWS})) == ["y"]
        else:
            with pytest.raises(exceptions.ClientError) as caught:
                call(url, "infer", {"x": ROWS})
            assert type(caught.value) is kind
        assert server.seen == tries


@pytest.mark.parametrize("answer", [b"[]", b"null", b"<html>"])
def test_what_tells_nothing_of_a_model_is_no_metadata(call: Call, answer: bytes) -> None:
    """It is an error of the client's own class."""
    with canned((200, {}, answer)) as (url, _), pytest.raises(exceptions.ClientError, match="JSON"):
        call(url, "metadata")


def test_fewer_retries_than_none_are_refused() -> None:
    """At once, not when a call is made."""
    with pytest.raises(ValueError, match="retries is -1"):
        Client("http://127.0.0.1:9", "net", retries=-1)


@contextmanager
def dripping(turn: Callable[[socket.socket], object], at_once: bytes = b"") -> Iterator[str]:
    """Run a server that takes a turn every 20 ms, without end, after a part of an answer; give its URL."""
    over = threading.Event()

    def drip(taken: socket.socket) -> None:
        with taken, suppress(OSError):
            taken.recv(2**14)
            taken.sendall(at_once)
            while not over.wait(0.02):
                turn(taken)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=lambda: drip(listener.accept()[0]))
        server.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            over.set()
            server.join()


@pytest.mark.parametrize(
    "at_once", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"], ids=["head", "body"]
)
def test_a_call_ends_in_time_however_slowly_its_answer_comes(call: Call, at_once: bytes) -> None:
    """Bytes that keep coming do not put off its end."""
    with dripping(lambda taken: taken.sendall(b"x"), at_once) as url:
        started = time.monotonic()
        with pytest.raises(exceptions.ClientTimeoutError, match=r"within 0\.5 s"):
            call(url, "infer", {"x": ROWS}, timeout=0.5)
        assert 0.5 <= time.monotonic() - started < 10


def test_a_call_ends_in_time_however_slowly_its_request_is_taken(call: Call) -> None:
    """A server that takes some of it now and then does not put off its end."""
    with dripping(lambda taken: taken.recv(2**14)) as url:
        started = time.monotonic()
        with pytest.raises(exceptions.ClientTimeoutError):
            call(url, "infer", {"x": np.zeros(2**23)}, timeout=0.5)
        assert time.monotonic() - started < 10


def test_a_connection_that_is_used_again_has_the_deadline_of_its_new_call() -> None:
    """Not that of the last call, which is over; also in another thread."""
    with canned((200, {}, GOOD), (200, {}, GOOD)) as (url, server), Client(url, "net") as client:
        client.infer({"x": ROWS}, timeout=1)
        time.sleep(1.1)
        with ThreadPoolExecutor(1) as other:
            other.submit(client.infer, {"x": ROWS}, timeout=30).result()
        assert server.connections == 1


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan"), 1e9])
def test_a_timeout_that_is_none_is_refused(call: Call, timeout: float) -> None:
    """Of a client and of a call, before anything is sent."""
    with canned() as (url, server):
        for given in ({"timeout": timeout}, {"options": {"timeout": timeout}}):
            with pytest.raises(ValueError, match=r"timeout is .*: give seconds above 0"):
                call(url, "infer", {"x": ROWS}, **given)
        assert server.seen == 0


@pytest.mark.parametrize("url", ["http://[::1", "127.0.0.1:8000", "ftp://host", "http://", "http://host:99999"])
def test_a_url_that_is_none_of_a_server_is_refused(url: str) -> None:
    """When the client is made, with one that would do."""
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="give one such as http://"):
            kind(url, "net")


def test_one_name_of_an_output_is_not_taken_for_its_letters(call: Call) -> None:
    """A string is a sequence of strings."""
    with canned() as (url, server):
        with pytest.raises(TypeError, match=r"outputs is 'output': give names, such as \['output'\]"):
            call(url, "infer", {"x": ROWS}, outputs="output")
        assert server.seen == 0


def answer(*outputs: dict[str, Any], tail: bytes = b"", length: int | None = None) -> tuple[int, dict[str, str], bytes]:
    """Return an answer with outputs that differ from a good one of binary data as is said."""
    good = {"name": "y", "shape": [2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
    head = json.dumps({"outputs": [{**good, **output} for output in outputs]}).encode()
    return 200, {"Inference-Header-Content-Length": str(len(head) if length is None else length)}, head + tail


@pytest.mark.parametrize(
    ("answered", "reason"),
    [
        (answer({}, tail=bytes(8), length=-2), "Inference-Header-Content-Length is '-2'"),
        (answer({}, tail=bytes(8), length=1000), "Inference-Header-Content-Length is '1000'"),
        (answer({"parameters": {"binary_data_size": 100}}, tail=bytes(8)), "output 'y': its binary_data_size is 100"),
        (answer({"parameters": {"binary_data_size": -8}}, tail=bytes(8)), "output 'y': its binary_data_size is -8"),
        (answer({"parameters": {"binary_data_size": True}}, tail=bytes(8)), "its binary_data_size is True"),
        (answer({}, tail=bytes(16)), "8 bytes are left over"),
        (answer({}, {}, tail=bytes(16)), "an output's name is 'y'"),
        (answer({"name": 5}, tail=bytes(8)), "an output's name is 5"),
        (answer({"shape": [-1]}, tail=bytes(8)), r"output 'y': its shape is \[-1\]"),
        (answer({"shape": 2}, tail=bytes(8)), "output 'y': its shape is 2"),
        (answer({"parameters": {}, "data": [1.7, 2], "datatype": "INT32"}), r"output 'y': 1\.7 is no INT32"),
        (answer({"parameters": {}, "data": [300, 2], "datatype": "UINT8"}), "output 'y': 300 is beyond UINT8"),
        (answer({"parameters": {}}), "KeyError"),
    ],
)
def test_an_answer_that_contradicts_itself_is_refused_by_what_is_wrong(answered: Any, reason: str) -> None:
    """A client that guessed would return numbers that no model gave."""
    with canned(answered) as (url, _), pytest.raises(exceptions.ClientError, match=reason):
        call_sync(url, "infer", {"x": ROWS})


def test_an_input_of_no_datatype_is_refused_by_name(call: Call) -> None:
    """Nothing is sent."""
    with canned() as (url, server):
        with pytest.raises(TypeError, match="input 'x': complex128"):
            call(url, "infer", {"x": np.zeros(2, complex)})
        assert server.seen == 0


def test_many_threads_and_tasks_share_one_client() -> None:
    """Each gets its own answer."""
    with serving(Two()) as client:
        url = str(client.base_url)

        async def together() -> None:
            async with AsyncClient(url, "net") as shared:
                inputs = [ROWS + n for n in range(1, 20)]
                answers = await asyncio.gather(*(shared.infer({"x": x}) for x in inputs))
            for x, answer in zip(inputs, answers, strict=True):
                np.testing.assert_allclose(answer["inverse"], 1 / x[:, :1], rtol=1e-6)

        asyncio.run(together())


@contextmanager
def silent() -> Iterator[int]:
    """Have a port whose connections are never made, as nobody takes those that wait already."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_a_call_ends_in_time_however_many_addresses_do_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connections to all of a name's addresses have one call's time, not as much each."""
    with silent() as port:
        address = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
        find = socket.getaddrinfo
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda host, *rest, **named: [address] * 20 if host == "many" else find(host, *rest, **named),
        )
        started = time.monotonic()
        with pytest.raises(exceptions.ClientTimeoutError, match=r"within 0\.5 s"):
            call_sync(f"http://many:{port}", "infer", {"x": ROWS}, timeout=0.5)
        assert 0.4 <= time.monotonic() - started < 5


def test_a_call_ends_in_time_however_long_its_servers_name_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's own search for an address has no limit."""
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(60))
    started = time.monotonic()
    try:
        with pytest.raises(exceptions.ClientTimeoutError):
            call_sync("http://nowhere:1", "infer", {"x": ROWS}, timeout=0.5)
        assert time.monotonic() - started < 10
    finally:
        over.set()


def test_the_second_address_is_tried_when_the_first_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when localhost means IPv6 first, and the server has only the other; none at all is an error of its own."""
    with canned((200, {}, GOOD)) as (url, _):
        port = int(url.rpartition(":")[2])
        find = socket.getaddrinfo
        both = [find(address, port, type=socket.SOCK_STREAM)[0] for address in ("127.0.0.2", "127.0.0.1")]
        known: dict[str, Any] = {"both": both}

        def found(host: str, *rest: Any, **named: Any) -> Any:
            if host == "none":
                raise socket.gaierror(socket.EAI_NONAME, "not known")
            return known.get(host) or find(host, *rest, **named)

        monkeypatch.setattr(socket, "getaddrinfo", found)
        call_sync(f"http://both:{port}", "infer", {"x": ROWS})
        with pytest.raises(exceptions.UnreachableError, match="no address of none"):
            call_sync(f"http://none:{port}", "infer", {"x": ROWS})


def only_proxy(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Name a proxy in the environment, and no other."""
    for name in ("http_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HTTP_PROXY", url)


def test_proxies_of_the_environment_are_heeded_when_asked_for_only(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server on loopback is asked itself, whatever the way to the outside is."""
    with canned((200, {}, GOOD)) as (proxy, asked), canned((200, {}, GOOD)) as (url, server):
        only_proxy(monkeypatch, proxy)
        call(url, "infer", {"x": ROWS})
        assert (server.seen, asked.seen) == (1, 0)
        call(url, "infer", {"x": ROWS}, options={"trust_env": True})
        assert (server.seen, asked.seen) == (1, 1)


def test_a_call_through_a_proxy_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slowly that answers."""
    with dripping(lambda taken: taken.sendall(b"x"), b"HTTP/1.1 200 OK\r\nX: ") as proxy:
        only_proxy(monkeypatch, proxy)
        started = time.monotonic()
        with pytest.raises(exceptions.ClientTimeoutError):
            call_sync("http://127.0.0.1:1", "infer", {"x": ROWS}, timeout=0.5, options={"trust_env": True})
        assert time.monotonic() - started < 10
