"""The versions of the served model: the one that answers, how the next takes its place, and how the last one ends."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import gc
import logging
import signal
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

from torch import nn

from guardserve.exceptions import GuardserveError
from guardserve.metrics import Metrics
from guardserve.runtime import Runtime
from guardserve.service.datatypes import datatype_name
from guardserve.service.gateway import Gateway
from guardserve.service.inference import Inference
from guardserve.service.life import Life
from guardserve.signature import TensorSpec
from guardserve.watch import Watch

LOAD_TIMEOUT = 900.0
"""Seconds that loading, and then compiling and probing, may take: what hangs must not keep others from coming."""

CLOSE_TIMEOUT = 30.0
"""Seconds for the forward of a version that answers no more, when nobody waits for it."""

POLL = 0.1
"""Seconds between two looks whether the server is stopping, or the way is free, while a new version is on its way."""

FREE_AFTER = (0.0, 0.2, 0.4, 0.8)
"""Seconds before each try to free the memory of a version: a thread that is just ending may still have it."""

STOPPING = "the server is stopping"

Load: TypeAlias = Callable[[Runtime], Runtime]
"""Loads the model of a runtime again, as it was loaded at the start; gives another runtime, not started."""

Together: TypeAlias = Callable[[], Awaitable[None]]
"""Has all processes that serve a model load it again, or none; raises what :meth:`Versions.reload` does."""

T = TypeVar("T")

_log = logging.getLogger(__name__)


class ReloadError(GuardserveError):
    """The model was not loaded again; the version that was there goes on."""


class ReloadRunningError(ReloadError):
    """It is being loaded already."""


class Versions:
    """Puts a new version of the model in the place of the one that answers, without losing a request.

    The new version is loaded aside, passes the start-up probe on the thread that will run it, and must take and give
    what the old one does. Then it is put behind the gateway at once. What the old one has accepted it answers; when
    the last of these requests has its answer it is closed. If anything fails, the old one has noticed nothing.

    Everything but :meth:`hang_up` is called on the event loop, which nothing but :meth:`close` holds up.

    Args:
        gateway: What answers requests.
        metrics: Where both versions are counted.
        watch: What looks at the version that answers.
        life: Where the server stands.
        serve: Makes what answers requests with a runtime.
        load: What loads the model again; without it the first version stays.
        together: Where several processes serve the model, what has all of them load it again; for signals, too, it is
            then not for this one to begin.
    """

    def __init__(
        self,
        gateway: Gateway,
        metrics: Metrics,
        watch: Watch,
        life: Life,
        *,
        serve: Callable[[Runtime], Inference],
        load: Load | None = None,
        together: Together | None = None,
    ) -> None:
        self._gateway = gateway
        self._metrics = metrics
        self._watch = watch
        self._life = life
        self._serve = serve
        self._load = load
        self._together = together
        self._loop: asyncio.AbstractEventLoop | None = None
        self._hung_up = self._heeding = False
        self._loading = False
        self._next: Inference | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        metrics.follow(self.current.runtime, self.current.engine, self.current.versions[-1])

    @property
    def current(self) -> Inference:
        """What answers requests now."""
        return self._gateway.inference

    def start(self) -> None:
        """Start the first version; from then on SIGHUP loads the model again, if it can be."""
        self.current.start().add_done_callback(functools.partial(_log_start, self._metrics.model))
        self._loop = asyncio.get_running_loop()
        if self._load is not None and self._together is None and hasattr(signal, "SIGHUP"):
            with suppress(ValueError):  # only the main thread has signals
                signal.signal(signal.SIGHUP, lambda *_: self.hang_up())
        if self._hung_up:
            self._begin_to_heed()

    def hang_up(self) -> None:
        """Load the model again for SIGHUP, once the first version was started; it may come at any moment."""
        self._hung_up = True
        if self._loop is not None:
            with suppress(RuntimeError):  # the server has ended
                self._loop.call_soon_threadsafe(self._begin_to_heed)

    async def close(self, timeout: float) -> None:
        """Finish the work that was accepted, for so many seconds, and close every version."""
        end = time.monotonic() + timeout
        await self.abandon()
        await self.current.close(timeout)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=max(0.0, end - time.monotonic()))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._watch.close()
        self.current.runtime.close()

    async def reload(self) -> None:
        """Load the model again, and let the new version answer.

        Raises:
            ReloadRunningError: If it is being loaded already.
            ReloadError: If the new version cannot be loaded, fails its probe, or does not take or give what the old
                one does, which goes on.
        """
        if self._together is not None:
            await self._together()
        else:
            await self.prepare()
            self.commit()

    async def prepare(self) -> Inference:
        """Load the model again, and have the new version ready; it takes no request before :meth:`commit`.

        Returns:
            The new version.

        Raises:
            ReloadRunningError: If it is being loaded already.
            ReloadError: See :meth:`reload`.
        """
        name, old = self._metrics.model, self.current
        if self._life.draining:
            raise ReloadError(STOPPING)
        if self._loading:
            raise ReloadRunningError(f"{name} is being loaded already: ask again when that is over")
        self._loading = True
        _log.info("%s: loading another version beside %s", name, old.versions[-1])
        try:
            self._next = await self._prepared(old.runtime)
        except Exception as error:
            self._loading = False
            self._metrics.reloads["failed"] += 1
            known = isinstance(error, GuardserveError)
            text = str(error) if known else f"{type(error).__name__}; the server's log has the details"
            text = f"{name} was not reloaded, {old.versions[-1]} goes on: {text}"
            _log.error("%s", text, exc_info=error.__cause__ if known else error)
            raise ReloadError(text) from error
        return self._next

    def commit(self) -> None:
        """Let the version that is ready answer."""
        old, new = self.current, self._taken()
        if new is None:
            return
        self._metrics.follow(new.runtime, new.engine, new.versions[-1])
        self._metrics.reloads["done"] += 1
        self._gateway.inference = new
        _log.warning(
            "%s: version %s answers, in the place of %s", self._metrics.model, new.versions[-1], old.versions[-1]
        )
        self._spawn(self._retire(old))

    async def abandon(self) -> None:
        """Close the version that is ready, if there is one."""
        new = self._taken()
        if new is not None:
            self._metrics.reloads["failed"] += 1
            await _discard(new)

    def _taken(self) -> Inference | None:
        """Return the version that is ready; there is none any more."""
        new, self._next = self._next, None
        if new is not None:
            self._loading = False
        return new

    def _begin_to_heed(self) -> None:
        if not self._heeding:
            self._heeding = True
            self._spawn(self._heed())

    async def _heed(self) -> None:
        """Load the model once more for signals that come while it is being loaded: files may be newer than that."""
        try:
            while self._hung_up:
                if self._loading:
                    await asyncio.sleep(POLL)
                    continue
                self._hung_up = False
                with suppress(ReloadError):  # it is in the log
                    await self.reload()
        finally:
            self._heeding = False

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _prepared(self, old: Runtime) -> Inference:
        """Load a version, have it pass its probe, and compare it with the one that answers."""
        if self._load is None:
            raise ReloadError("the server was not told how to load it: start another one")
        runtime = await self._wait_for(_aside(functools.partial(self._load, old)))
        new = self._serve(runtime)
        try:
            _check_passed(await self._wait_for(new.start()))
            _check_same("inputs", old.signature.inputs, runtime.signature.inputs)
            _check_same("outputs", old.signature.outputs, runtime.signature.outputs)
        except BaseException:
            await _discard(new)
            raise
        return new

    async def _wait_for(self, work: asyncio.Future[T]) -> T:
        """Wait for something that may take long or hang, but not for ever, nor when the server stops."""
        end = time.monotonic() + LOAD_TIMEOUT
        while not work.done():
            if self._life.draining or time.monotonic() > end:
                work.cancel()
                why = STOPPING if self._life.draining else f"it took longer than {LOAD_TIMEOUT:g} s"
                raise ReloadError(why)
            await asyncio.wait([work], timeout=POLL)
        return work.result()

    async def _retire(self, old: Inference) -> None:
        """Close a version when everything that it has accepted is answered, and free its memory."""
        model = weakref.ref(old.runtime.guard.module)
        await self._end(old)
        del old
        for wait in FREE_AFTER:
            await asyncio.sleep(wait)
            if self._life.draining or await asyncio.get_running_loop().run_in_executor(None, _free, model):
                return

    async def _end(self, old: Inference) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(None, self._watch.follow, self.current.runtime)
            await old.idle()
            await old.close(CLOSE_TIMEOUT)
        finally:
            await loop.run_in_executor(None, functools.partial(old.runtime.close, save=False))
            await loop.run_in_executor(None, self._metrics.leave, old.runtime)


def _aside(work: Callable[[], T]) -> asyncio.Future[T]:
    """Call a function on a thread of its own, which does not keep the process from ending."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - whoever waits raises it, and is not to end by it
            # a StopIteration is not taken by asyncio, and what is no Exception would end who waits
            plain = isinstance(error, Exception) and not isinstance(error, StopIteration)
            future.set_exception(error if plain else ReloadError(f"it ended by {error!r}"))
        else:
            future.set_result(result)

    future.set_running_or_notify_cancel()
    threading.Thread(target=run, name="guardserve-reload", daemon=True).start()
    return asyncio.wrap_future(future)


async def _discard(version: Inference) -> None:
    """Close a version that has answered nothing."""
    await version.close(0)
    version.runtime.close(save=False)


def _check_passed(failure: GuardserveError | None) -> None:
    if failure is not None:
        raise failure


def _check_same(kind: str, old: Sequence[TensorSpec], new: Sequence[TensorSpec]) -> None:
    """Refuse a version that the clients of the old one could not go on with."""
    if old and old != new:  # the outputs of a model that has failed its probe are not known
        raise ReloadError(
            f"its {kind} are {_shown(new)}, and those that clients know are {_shown(old)}: serve it as another model"
        )


def _shown(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {datatype_name(spec.dtype)} {list(spec.shape)}" for spec in specs)


def _log_start(name: str, started: asyncio.Future[GuardserveError | None]) -> None:
    failure = None if started.cancelled() else started.result()
    if failure is None:
        _log.info("%s is ready", name)
    else:
        _log.error("%s is not ready: %s", name, failure, exc_info=failure.__cause__)


def _free(model: weakref.ref[nn.Module]) -> bool:
    """Free a model that references in a circle keep: what was there at the start is frozen, and not looked through.

    Returns:
        Whether it is gone; a thread that has just ended its work may still have it.
    """
    if model() is None:
        return True
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()
    return model() is None
