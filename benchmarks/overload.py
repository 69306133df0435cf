"""Ten times as many requests as the server can answer, for a minute: what is accepted, how soon, and what is left over.

    python benchmarks/overload.py [--times 10] [--seconds 60] [--queue 32] [--connections 512]

The server runs alone on one processor with all of its safeguards on, and serves a ResNet-18 for 64x64 images; this
program asks from another. It first finds out how many requests a second are answered when 16 connections never pause,
then sends so many times that number on a schedule that no answer delays. What finds every connection busy is counted as
not sent. Needs Linux with two processors.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from serving import GUARDSERVE, OPTIONS, READY, TASKSET, request

HERE = Path(__file__).parent
SHAPE = (3, 64, 64)
TICK = 0.005
"""Seconds between two looks at the schedule."""


class Connection(asyncio.Protocol):
    """A connection that has one request on its way at most.

    Args:
        load: What it works for.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._buffer = b""
        self.began = 0.0
        self.status = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = transport

    def ask(self) -> None:
        """Send the request."""
        self.began = time.perf_counter()
        self.transport.write(self._load.request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        """Take a part of an answer."""
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0])
        if len(rest) >= length:
            self._buffer = rest[length:]
            self.status = int(head[9:12])
            self._load.answered(self, self.status, time.perf_counter() - self.began)

    def connection_lost(self, _: Exception | None) -> None:
        """End, with a request lost if one was on its way."""
        self._load.lost(self)


class Load:
    """Sends one request over many connections, and counts the answers.

    Attributes:
        statuses: Answers by status; 0 stands for a connection that ended before its answer.
        accepted: Seconds that each 200 took.
        refused: Seconds that each other answer took.
        unsent: Requests for which there was no connection.
    """

    def __init__(self, port: int) -> None:
        body, headers = request("oip-binary", SHAPE)
        lines = [f"POST /v2/models/bench/infer HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.request = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
        self._port = port
        self._idle: deque[Connection] = deque()  # each in its turn: the server ends those that say nothing for long
        self._busy: set[Connection] = set()
        self._pauses = True
        self.clear()

    def clear(self) -> None:
        """Begin to count anew."""
        self.statuses: Counter[int] = Counter()
        self.accepted: list[float] = []
        self.refused: list[float] = []
        self.unsent = 0

    async def connect(self, count: int) -> None:
        """Open more connections."""
        loop = asyncio.get_running_loop()
        for _ in range(count):
            _, connection = await loop.create_connection(lambda: Connection(self), "127.0.0.1", self._port)
            self._idle.append(connection)

    async def without_pause(self, seconds: float) -> float:
        """Use every connection all the time; return how many requests were answered each second."""
        self._pauses = False
        while self._idle:
            self._ask()
        await asyncio.sleep(1)
        self.clear()
        await asyncio.sleep(seconds)
        rate = self.statuses[200] / seconds
        self._pauses = True
        await self.settled()
        return rate

    async def on_schedule(self, rate: float, seconds: float) -> None:
        """Send so many requests a second, whatever becomes of them."""
        began, sent = time.perf_counter(), 0
        while (now := time.perf_counter() - began) < seconds:
            due = int(rate * now)
            for _ in range(due - sent):
                if self._idle:
                    self._ask()
                else:
                    self.unsent += 1
            sent = due
            await asyncio.sleep(TICK)

    async def settled(self) -> None:
        """Wait until every request has its answer."""
        while self._busy:  # noqa: ASYNC110 - it is not what is measured
            await asyncio.sleep(0.01)

    async def once(self) -> float:
        """Send one request; return the seconds until its 200, which are endless if it is refused."""
        while not self._idle:  # noqa: ASYNC110 - a millisecond is exact enough
            await asyncio.sleep(0.0005)
        connection = self._ask()
        while connection in self._busy:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.0005)
        return time.perf_counter() - connection.began if connection.status == httpx.codes.OK else math.inf

    def _ask(self) -> Connection:
        connection = self._idle.popleft()
        self._busy.add(connection)
        connection.ask()
        return connection

    def answered(self, connection: Connection, status: int, seconds: float) -> None:
        """Count an answer."""
        self.statuses[status] += 1
        (self.accepted if status == httpx.codes.OK else self.refused).append(seconds)
        self._busy.discard(connection)
        self._idle.append(connection)
        if not self._pauses:
            self._ask()

    def lost(self, connection: Connection) -> None:
        """Count a connection that has ended."""
        if connection in self._busy:
            self._busy.discard(connection)
            self.statuses[0] += 1
        else:
            self._idle.remove(connection)


def state(pid: int) -> tuple[float, int, int]:
    """Return a process's resident memory in MB, its threads and its open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    kilobytes, threads = (int(status.partition(f"{key}:")[2].split()[0]) for key in ("VmRSS", "Threads"))
    return kilobytes / 1024, threads, len(list(Path(f"/proc/{pid}/fd").iterdir()))


@contextmanager
def server(queue: int, connections: int) -> Iterator[tuple[int, int]]:
    """Run guardserve on the first processor; give its port and process once it is ready."""
    port = free_port()
    command = [part.replace("MODEL", "resnet").replace("PORT", str(port)) for part in GUARDSERVE]
    options = ["--input-shape", ",".join(map(str, SHAPE)), "--max-queue-size", str(queue)]
    options += ["--max-connections", str(connections + 64)]
    first, *_ = sorted(os.sched_getaffinity(0))
    process = subprocess.Popen(  # noqa: S603 - our own command
        [TASKSET, "-c", str(first), sys.executable, *command, *OPTIONS, *options], cwd=HERE
    )
    try:
        end = time.monotonic() + 90
        while time.monotonic() < end and not ready(port):
            time.sleep(0.1)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def ready(port: int) -> bool:
    """Tell whether the server is ready."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}{READY}", trust_env=False).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def gauges(port: int) -> dict[str, float]:
    """Read what the server says it is working on."""
    lines = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text.splitlines()
    names = ("guardserve_requests_in_flight", "guardserve_queue_size")
    return {name: float(line.rsplit(" ", 1)[1]) for name in names for line in lines if line.startswith(name)}


def show(*columns: object) -> None:
    """Print a row."""
    print("".join(f"{column!s:<34}" for column in columns).rstrip())


async def measure(options: argparse.Namespace, port: int, pid: int) -> None:
    """Find out what the server can do, ask for more, and say what became of it."""
    load = Load(port)
    await load.connect(16)
    capacity = await load.without_pause(5)
    calm = float(np.median([await load.once() for _ in range(20)]))
    await load.connect(options.connections - 16)
    load.clear()
    await load.on_schedule(options.times * capacity, 3)  # every connection has its buffers, then memory is looked at
    await load.settled()
    before = state(pid)
    load.clear()
    seen = [before[0]]
    watching = asyncio.ensure_future(watch(pid, seen))
    await load.on_schedule(options.times * capacity, options.seconds)
    ended = time.perf_counter()
    watching.cancel()
    while await load.once() > 2 * calm:
        pass
    recovered = time.perf_counter() - ended
    await load.settled()
    after, left = state(pid), gauges(port)
    accepted = np.quantile(load.accepted, [0.5, 0.99, 1]) * 1e3
    refused = np.quantile(load.refused, [0.5, 0.99]) * 1e3
    show("capacity", f"{capacity:.0f}/s", f"alone {calm * 1e3:.1f} ms")
    sent = sum(load.statuses.values()) / options.seconds
    show("asked for", f"{options.times * capacity:.0f}/s", f"sent {sent:.0f}/s, no connection {load.unsent}")
    took = ", ".join(f"{name} {ms:.0f} ms" for name, ms in zip(("p50", "p99", "most"), accepted, strict=True))
    show("answered 200", f"{load.statuses[200] / options.seconds:.0f}/s", took)
    took = ", ".join(f"{name} {ms:.0f} ms" for name, ms in zip(("p50", "p99"), refused, strict=True))
    show("refused 503", f"{load.statuses[503] / options.seconds:.0f}/s", took)
    show("anything else, or no answer", sum(n for status, n in load.statuses.items() if status not in (200, 503)))
    show("memory", f"{before[0]:.0f} MB before, {after[0]:.0f} after", f"most {max(seen):.0f}")
    show("threads, open files", f"{before[1:]} before, {after[1:]} after")
    show("left over", left)
    show("as fast as alone again after", f"{recovered:.2f} s")


async def watch(pid: int, seen: list[float]) -> None:
    """Look at the memory every second."""
    while True:
        seen.append(state(pid)[0])
        await asyncio.sleep(1)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=float, default=10)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--queue", type=int, default=32)
    parser.add_argument("--connections", type=int, default=512)
    options = parser.parse_args()
    *_, last = sorted(os.sched_getaffinity(0))
    with server(options.queue, options.connections) as (port, pid):
        os.sched_setaffinity(0, {last})
        asyncio.run(measure(options, port, pid))


if __name__ == "__main__":
    main()
