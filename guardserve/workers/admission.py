"""Which workers may take connections: never two that answer differently."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from guardserve.exceptions import GuardserveError
from guardserve.workers.contents import MODEL, RELOADED, Contents, differences
from guardserve.workers.messages import Listen
from guardserve.workers.reloading import Reloading
from guardserve.workers.worker import Worker

_log = logging.getLogger(__name__)


class Admission:
    """Lets those workers take connections that have loaded what the others have.

    A worker that is started again loads what the files hold then. If they were changed and nobody has had the workers
    load them again, it would answer otherwise than its mates, and clients would get the one's or the other's answer by
    chance. It is held back, ready, until all load the new files, or none that has the old ones is left; if they were to
    load them while it started, it is itself the one that may have the old ones, and starts anew. A model that is
    another each time it is made would let no second worker answer, ever: that is refused when they first start.

    Args:
        workers: All of them.
        reloading: Nobody is let in while the others may be about to change.
    """

    def __init__(self, workers: Sequence[Worker], reloading: Reloading) -> None:
        self._workers = workers
        self._reloading = reloading

    def go_on(self) -> None:
        """Decide about those that are ready.

        Raises:
            GuardserveError: If the model is another each time.
        """
        for worker in self._workers:
            if self._reloading.running:
                return
            if worker.loaded is not None and not (worker.admitted or worker.ending):
                self._decide(worker, worker.loaded)

    def _decide(self, worker: Worker, loaded: Contents) -> None:
        mates = [other for other in self._workers if other.answers]
        differing: dict[str, str] = {}
        for mate in mates:
            differing |= differences(loaded, mate.loaded or {})
        if worker.outdated and (differing or not (mates or worker.anew)):
            worker.anew = not mates
            worker.renew()
            return
        if differing.keys() == {MODEL} and worker.starts == mates[0].starts == 1:
            raise GuardserveError(
                f"workers {mates[0].number} and {worker.number} have loaded different models from the same arguments: "
                f"{differing[MODEL]}. A model that is made at random needs a seed, or --weights; if its files were "
                "being replaced, start the server again"
            )
        if not differing:
            if worker.held:
                _log.warning("worker %d answers: no worker that has loaded anything else is left", worker.number)
            worker.admitted, worker.held = worker.tell(Listen()), False
            if worker.outdated and not mates:
                self._reloading.begin()
            worker.outdated = worker.anew = False
        elif not worker.held:
            worker.held = True
            _log.error(
                "worker %d is ready, but held back from answering, as it has not loaded the same as the others: %s; "
                "the files have changed, or give something else each time. %s to process %d",
                worker.number,
                ", ".join(differing.values()),
                "To have all workers take the new files, or the old ones once they are back, send SIGHUP"
                if differing.keys() <= RELOADED
                else "No reload imports code again: start the server again, or put the old code back and send SIGHUP",
                os.getpid(),
                extra={"event": "worker", "worker": worker.number},
            )
