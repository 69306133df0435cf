"""How all workers load their model again: none answers with the new version before every one of them has it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from itertools import combinations
from typing import Literal

from guardserve.service.versions import LOAD_TIMEOUT
from guardserve.workers.contents import Contents, differences
from guardserve.workers.messages import Decide, Decided, Outcome, Prepare, Prepared
from guardserve.workers.worker import Worker

_log = logging.getLogger(__name__)

MARGIN = 30.0
"""Seconds beyond its own limit that a worker has to say what came of it."""


class Reloading:
    """Has the workers load their model again, in two steps.

    First each loads and probes the new version beside the old one, and says so. When all have the same one, each is
    told to let it answer; if one of them has not, or ends meanwhile, each is told to drop it. A worker that is held
    back starts anew. One that is starting is left to get ready: it may have begun before the files were changed, or
    have other code than they hold now, and starts anew if that shows then, or if nobody answers by whom it could show.
    One that has started anew for that answers, whatever was asked meanwhile, and loads its model once more: nobody
    would answer where this is asked for faster than workers start.

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
        self._prepared: list[Contents] = []
        self._failure: str | None = None
        self._asker: tuple[Worker, int] | None = None
        self._once_more = False
        self.ends_by: float | None = None

    @property
    def running(self) -> bool:
        """Whether workers are loading their model again."""
        return self._step != "none"

    def begin(self, asker: tuple[Worker, int] | None = None) -> None:
        """Begin, for a worker that was asked to, with its ticket, or for a signal.

        For a signal that comes meanwhile there is another round: files may be newer than what is being loaded.
        """
        if self.running:
            if asker is None:
                self._once_more = True
            else:
                text = "the model is being loaded already: ask again when that is over"
                asker[0].tell(Outcome(asker[1], text, running=True))
            return
        for worker in self._workers:
            if worker.admitted:
                continue
            if worker.loaded is None:
                worker.outdated = worker.process is not None
            else:
                worker.renew()
        self._taking_part = [worker for worker in self._workers if worker.answers]
        if self._taking_part:
            self._number += 1
            self._failure, self._asker, self._prepared = None, asker, []
            self._tell("prepare", Prepare(self._number))
            self._go_on()

    def hear(self, worker: Worker, message: Prepared | Decided) -> None:
        """Take a worker's answer."""
        if message.number != self._number or worker not in self._waiting:
            return
        if isinstance(message, Prepared) == (self._step == "prepare"):
            self._waiting.discard(worker)
            if isinstance(message, Decided):
                worker.loaded = message.loaded
            elif message.failure is None:
                self._prepared.append(message.loaded)
            else:
                self._fail(message.failure)
            self._go_on()

    def lose(self, worker: Worker) -> None:
        """Note that a worker has ended; one that takes its place loads what there is then."""
        if self._asker is not None and self._asker[0] is worker:
            self._asker = None
        if worker in self._waiting:
            self._waiting.discard(worker)
            self._fail(f"worker {worker.number} has ended while it loaded the model")
        self._go_on()

    def give_up(self) -> None:
        """End the workers that say nothing; their end is heard of."""
        self.ends_by = math.inf
        for worker in self._waiting:
            worker.end("does not say what came of loading its model")

    def _go_on(self) -> None:
        """Take the next step, if nobody is waited for."""
        if self._waiting:
            return
        if self._step == "prepare":
            self._compare()
            self._tell("decide", Decide(self._number, commit=self._failure is None))
        if self._step == "decide" and not self._waiting:
            self._end()

    def _compare(self) -> None:
        """Find out whether all have loaded the same."""
        if not self._prepared:
            self._fail("no worker is left that could have loaded it")
        pairs = combinations(self._prepared, 2)  # of three, one may have code that only another has too
        differing = sorted({part for one, other in pairs for part in differences(one, other)})
        if differing:
            self._fail(f"the workers differ in {', '.join(differing)}, as files have changed meanwhile: try again")

    def _tell(self, step: Literal["prepare", "decide"], message: Prepare | Decide) -> None:
        """Begin a step."""
        self._step = step
        self.ends_by = time.monotonic() + LOAD_TIMEOUT + MARGIN
        self._waiting = {worker for worker in self._taking_part if worker.tell(message)}

    def _end(self) -> None:
        if self._failure is None:
            _log.warning("%d workers have loaded their model again", len(self._taking_part))
            for worker in self._taking_part:
                if worker.loaded is not None and differences(worker.loaded, self._prepared[0]):
                    worker.end("could not let the new version answer")
        else:
            _log.error("no worker has another version of its model: %s", self._failure)
        self._step, self.ends_by = "none", None
        if self._asker is not None:
            self._asker[0].tell(Outcome(self._asker[1], self._failure))
        if self._once_more:
            self._once_more = False
            self.begin()

    def _fail(self, reason: str) -> None:
        """Remember the first failure."""
        if self._step == "prepare" and self._failure is None:
            self._failure = reason
