"""How all workers load their model again: none answers with the new version before every one of them has it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Literal

from guardserve.service.versions import LOAD_TIMEOUT
from guardserve.workers.messages import MODEL, Decide, Decided, Outcome, Prepare, Prepared
from guardserve.workers.worker import Worker

_log = logging.getLogger(__name__)

MARGIN = 30.0
"""Seconds beyond its own limit that a worker has to say what came of it."""


class Reloading:
    """Has the workers load their model again, in two steps.

    First each loads and probes the new version beside the old one, and says so. When all have the same one, each is
    told to let it answer; if one of them has not, or ends meanwhile, each is told to drop it. A worker that is
    starting may have begun before the files were changed: it is told when it is ready. One that was held back starts
    anew: its code may be another than what the files hold now.

    Args:
        workers: All of them, also those that do not take connections now.

    Attributes:
        ends_by: When the workers have to have answered; None when none is asked.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers
        self._number = 0
        self._step: Literal["none", "prepare", "decide"] = "none"
        self._taking_part: list[Worker] = []
        self._waiting: set[Worker] = set()
        self._versions: set[str] = set()
        self._committed: str | None = None
        self._failure: str | None = None
        self._asker: tuple[Worker, int] | None = None
        self.ends_by: float | None = None

    @property
    def running(self) -> bool:
        """Whether workers are loading their model again."""
        return self._step != "none"

    def begin(self, asker: tuple[Worker, int] | None = None) -> None:
        """Begin, for a worker that was asked to, with its ticket, or for a signal."""
        if self.running:
            text = "the model is being loaded already: ask again when that is over"
            if asker is None:
                _log.warning("SIGHUP: %s", text)
            else:
                asker[0].tell(Outcome(asker[1], text, running=True))
            return
        self._committed = None
        for worker in self._workers:
            if worker.held:
                worker.renew()
            worker.outdated = worker.process is not None and not (worker.admitted or worker.held)
        self._ask([worker for worker in self._workers if worker.admitted], asker)

    def hear(self, worker: Worker, message: Prepared | Decided) -> None:
        """Take a worker's answer."""
        if message.number != self._number or worker not in self._waiting:
            return
        if isinstance(message, Prepared) == (self._step == "prepare"):
            self._waiting.discard(worker)
            if isinstance(message, Prepared):
                self._fail(message.failure)
                self._versions.add(message.version)
            else:
                worker.loaded = message.loaded
            self.go_on()

    def lose(self, worker: Worker) -> None:
        """Note that a worker has ended; one that takes its place loads what there is then."""
        if self._asker is not None and self._asker[0] is worker:
            self._asker = None
        if worker in self._waiting:
            self._waiting.discard(worker)
            self._fail(f"worker {worker.number} has ended while it loaded the model")
        self.go_on()

    def give_up(self) -> None:
        """End the workers that say nothing; their end is heard of."""
        self.ends_by = math.inf
        for worker in self._waiting:
            worker.end("does not say what came of loading its model")

    def go_on(self) -> None:
        """Take the next step, if nobody is waited for."""
        if self._waiting:
            return
        if self._step == "prepare":
            if len(self._versions) > 1:
                self._fail("the workers have loaded different versions, as files have changed meanwhile: try again")
            self._tell("decide", Decide(self._number, commit=self._failure is None))
        if self._step == "decide" and not self._waiting:
            self._end()
        late = [worker for worker in self._workers if worker.outdated and worker.loaded is not None]
        if late and not self.running:
            for worker in late:
                worker.outdated = False
            self._ask(late, None)

    def _ask(self, workers: Sequence[Worker], asker: tuple[Worker, int] | None) -> None:
        if not workers:
            return
        self._number += 1
        self._failure, self._asker = None, asker
        self._versions = set() if self._committed is None else {self._committed}
        self._taking_part = list(workers)
        self._tell("prepare", Prepare(self._number))
        self.go_on()

    def _tell(self, step: Literal["prepare", "decide"], message: Prepare | Decide) -> None:
        """Begin a step."""
        self._step = step
        self.ends_by = time.monotonic() + LOAD_TIMEOUT + MARGIN
        self._waiting = {worker for worker in self._taking_part if worker.tell(message)}

    def _end(self) -> None:
        if self._failure is None:
            _log.warning("%d workers have loaded their model again", len(self._taking_part))
            self._committed = next(iter(self._versions), None)
            for worker in self._taking_part:
                if worker.loaded is not None and worker.loaded[MODEL] != self._committed:
                    worker.end("could not let the new version answer")
        else:
            for worker in self._workers:  # those that were starting must not be the only ones
                worker.outdated = False
            _log.error("no worker has another version of its model: %s", self._failure)
        self._step, self.ends_by = "none", None
        if self._asker is not None:
            self._asker[0].tell(Outcome(self._asker[1], self._failure))

    def _fail(self, reason: str | None) -> None:
        """Remember the first failure."""
        if self._step == "prepare" and self._failure is None:
            self._failure = reason
