"""The server of one worker."""

from __future__ import annotations

import asyncio
import signal
import socket
from types import FrameType

import uvicorn

from guardserve.metrics import Metrics
from guardserve.runtime import UNPROBED
from guardserve.service.life import Life
from guardserve.service.server import POLL, Server
from guardserve.workers.link import Link


class WorkerServer(Server):
    """Takes connections once its model's start-up probe has ended, lest it refuse what another worker could answer.

    It drains on SIGTERM, and when its supervisor is gone.

    Args:
        config: uvicorn's configuration.
        life: See :class:`Server`, as for the next.
        drain_delay: See there.
        link: The line to the supervisor.
        metrics: Those of the application, from now on shown together with the other workers'.
    """

    def __init__(self, config: uvicorn.Config, life: Life, drain_delay: float, link: Link, metrics: Metrics) -> None:
        super().__init__(config, life, drain_delay)
        self._link = link
        self._metrics = metrics

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal."""
        self._link.attach(self._metrics, self._told)
        super().run(sockets)
        self._link.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the model, then listen."""
        await super().startup([])
        while self._metrics.runtime.failure == UNPROBED and not self.should_exit:  # noqa: ASYNC110 - a thread's doing
            await asyncio.sleep(POLL)
        if self.should_exit:
            return
        loop = asyncio.get_running_loop()
        for sock in sockets or ():
            self.servers.append(
                await loop.create_server(self._protocol, sock=sock, ssl=self.config.ssl, backlog=self.config.backlog)
            )
        self._link.up()

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
