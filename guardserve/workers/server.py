"""The server of one worker."""

from __future__ import annotations

import asyncio
import signal
import socket
from types import FrameType

import uvicorn

from guardserve.exceptions import GuardserveError
from guardserve.runtime import UNPROBED
from guardserve.service.app import Service
from guardserve.service.server import POLL, Server
from guardserve.workers.link import Link


class WorkerServer(Server):
    """Takes connections once its model has passed its start-up probe, lest it refuse what another worker could answer.

    It drains on SIGTERM, and when its supervisor is gone.

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
        while self._metrics.runtime.failure == UNPROBED and not self.should_exit:  # noqa: ASYNC110 - a thread's doing
            await asyncio.sleep(POLL)
        if not self.should_exit:
            self._failure = self._metrics.runtime.failure
        if self.should_exit or self._failure is not None:
            self.should_exit = True
            return
        loop = asyncio.get_running_loop()
        for sock in sockets or ():
            self.servers.append(
                await loop.create_server(self._protocol, sock=sock, ssl=self.config.ssl, backlog=self.config.backlog)
            )
        self._link.up(self._versions)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain.

        Who signals all processes at once, as a terminal does for Ctrl-C, or systemd, signals the supervisor too, which
        passes it on: the same signal twice must not end the delay.
        """
        if sig != signal.SIGINT and not self._life.draining:
            super().handle_exit(sig, frame)

    def _told(self) -> None:
        """Drain, as the supervisor has gone, or wait for nobody new, as it says so."""
        if self._life.draining:
            self._stop()
        else:
            self.handle_exit(signal.SIGTERM, None)
