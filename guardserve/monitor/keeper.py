"""Keeps a monitor's state in a file, so that the detector remembers across restarts."""

from __future__ import annotations

import logging
import threading
from os import PathLike

from guardserve.monitor.monitor import Monitor

_log = logging.getLogger(__name__)

SAVE_INTERVAL = 60.0
"""Seconds between two times that the state is saved."""

PATIENCE = 5.0
"""Seconds to wait for a file that is being written."""


class StateKeeper:
    """Saves what a monitor's detector remembers every so often, in a thread of its own, and when it is closed.

    A file that cannot be written is logged and counted, and tried again the next time. While there is no detector, as
    its reference is still being made, nothing is saved.

    Args:
        monitor: The monitor.
        path: The file.
        interval: Seconds between two times.

    Attributes:
        failures: How often the state could not be saved.
    """

    def __init__(self, monitor: Monitor, path: str | PathLike[str], interval: float = SAVE_INTERVAL) -> None:
        self.failures = 0
        self._monitor = monitor
        self._path = path
        self._interval = interval
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="guardserve-state", daemon=True)

    def start(self) -> None:
        """Start the thread; once is enough."""
        if not self._thread.is_alive() and not self._closing.is_set():
            self._thread.start()

    def save(self) -> None:
        """Save the state now, if there is one."""
        if self._monitor.reference is None:
            return
        try:
            self._monitor.save_state(self._path)
        except Exception as error:  # noqa: BLE001 - a state that is not saved costs a warm-up, and nobody's answer
            self.failures += 1
            _log.error(
                "the monitor's state could not be saved to %s, which is tried again later: %s", self._path, error
            )

    def close(self, *, save: bool = True) -> None:
        """Save the state for the last time, unless it is to stay as it is, and end the thread."""
        started = self._thread.is_alive()
        self._closing.set()
        if started:
            self._thread.join(PATIENCE)
            if save and not self._thread.is_alive():
                self.save()

    def _run(self) -> None:
        while not self._closing.wait(self._interval):
            self.save()
