"""Several processes that serve one port: who starts them, what they tell, and one scrape of all of them.

Only what :mod:`guardserve.cli` needs to put them together; a server of one process has no part of it.
"""

from guardserve.workers.link import Link
from guardserve.workers.pool import Pool
from guardserve.workers.server import WorkerServer
from guardserve.workers.sockets import bind
from guardserve.workers.stand_in import StandIn
from guardserve.workers.supervisor import Supervisor

__all__ = ["Link", "Pool", "StandIn", "Supervisor", "WorkerServer", "bind"]
