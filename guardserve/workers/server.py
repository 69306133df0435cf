"""The server of one worker."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn

from guardserve.exceptions import GuardserveError
from guardserve.runtime import UNPROBED
from guardserve.service.app import Service
from guardserve.service.server import POLL, Server
from guardserve.workers.link import Link


class WorkerServer(Server):
    """Takes connections once its model has passed its start-up probe, lest it refuse what another worker could answer.

    Then it waits until its supervisor lets it, lest clients be answered by two versions of the model in turn. It drains
    on SIGTERM, and when its supervisor is gone.

    Args:
        config: uvicorn's configuration.
        app: The application, whose metrics are from now on shown together with the other workers'.
        drain_delay: See :class:`Server`.
        link: The line to the supervisor.
    """

    def __init__(self, config: uvicorn.Config, app: Service, drain_delay: float, link: Link) -> None:
        super().__init__(config, app.life, drain_delay)
        self._link = link
        self._metrics = app.metrics
        self._versions = app.versions
        self._failure: str | None = None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal.

        Raises:
            GuardserveError: If the model fails its start-up probe: others may have one that works.
        """
        self._link.attach(self._metrics, self._told)
        super().run(sockets)
        if self._failure is not None:
            raise GuardserveError(self._failure)
        self._link.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the model, then listen."""
        await super().startup([])
        await self._until(lambda: self._metrics.runtime.failure != UNPROBED)
        if not self.should_exit:
            self._failure = self._metrics.runtime.failure
            self.should_exit = self._failure is not None
        if not self.should_exit:
            self._link.ready(self._versions)
            await self._until(lambda: self._link.admitted)
        if not self.should_exit:
            await self._listen(sockets or ())
            self._link.up()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain.

        Who signals all processes at once, as a terminal does for Ctrl-C, or systemd, signals the supervisor too, which
        passes it on: the same signal twice must not end the delay.
        """
        if sig != signal.SIGINT and not self._life.draining:
            super().handle_exit(sig, frame)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait for what a thread does, or for a signal."""
        while not condition() and not self.should_exit:  # noqa: ASYNC110 - a thread's doing
            await asyncio.sleep(POLL)

    async def _listen(self, sockets: Sequence[socket.socket]) -> None:
        loop = asyncio.get_running_loop()
        for sock in sockets:
            self.servers.append(
                await loop.create_server(self._protocol, sock=sock, ssl=self.config.ssl, backlog=self.config.backlog)
            )

    def _told(self) -> None:
        """Drain, as the supervisor has gone, or wait for nobody new, as it says so."""
        if self._life.draining:
            self._stop()
        else:
            self.handle_exit(signal.SIGTERM, None)
