"""Running a function of any kind inside a context manager, but never its pauses."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any, ParamSpec

P = ParamSpec("P")
Check = Callable[[Any], object]

LAZY = (map, filter, zip)
"""Iterators that a function may return and that do its work only later."""


def decorate(function: Callable[P, Any], manager: AbstractContextManager[object], check: Check) -> Callable[P, Any]:
    """Run a function inside a context manager, and check what it returns or yields.

    A generator, coroutine or asynchronous generator is inside while it runs, and outside while it is suspended.

    Args:
        function: The function or method.
        manager: Entered for each call, or for each step; it must be re-enterable.
        check: Called with each result.
    """
    if inspect.iscoroutinefunction(function):
        return functools.wraps(function)(_coroutine(function, manager, check))
    if inspect.isasyncgenfunction(function):
        return functools.wraps(function)(_async_generator(function, manager, check))
    if inspect.isgeneratorfunction(function):
        return functools.wraps(function)(_generator(function, manager, check))

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> Any:
        with manager:
            output = function(*args, **kwargs)
        if inspect.isgenerator(output) or isinstance(output, LAZY):
            return _steps(_sendable(output), manager, check)
        if inspect.iscoroutine(output):
            return _awaited(output, manager, check)
        check(output)
        return output

    return plain


def _generator(function: Callable[..., Any], manager: AbstractContextManager[object], check: Check) -> Any:
    def generator(*args: Any, **kwargs: Any) -> Any:
        return (yield from _steps(function(*args, **kwargs), manager, check))

    return generator


def _coroutine(function: Callable[..., Any], manager: AbstractContextManager[object], check: Check) -> Any:
    async def coroutine(*args: Any, **kwargs: Any) -> Any:
        return await _awaited(function(*args, **kwargs), manager, check)

    return coroutine


def _async_generator(function: Callable[..., Any], manager: AbstractContextManager[object], check: Check) -> Any:
    async def async_generator(*args: Any, **kwargs: Any) -> Any:
        inner = function(*args, **kwargs)
        step = inner.asend(None)
        try:
            while True:
                try:
                    item = await _awaited(step, manager)
                except StopAsyncIteration:
                    return
                check(item)
                try:
                    step = inner.asend((yield item))
                except GeneratorExit:
                    raise
                except BaseException as error:  # noqa: BLE001 - what is thrown in is for the inner one
                    step = inner.athrow(error)
        finally:
            await inner.aclose()

    return async_generator


@types.coroutine
def _awaited(
    awaitable: Any, manager: AbstractContextManager[object], check: Check = lambda _: None
) -> Generator[Any, Any, Any]:
    output = yield from _steps(awaitable, manager)
    check(output)
    return output


def _sendable(items: Any) -> Any:
    """Return an iterator as something that can be sent to and closed."""
    return items if inspect.isgenerator(items) else (item for item in items)


def _steps(
    inner: Any, manager: AbstractContextManager[object], check: Check = lambda _: None
) -> Generator[Any, Any, Any]:
    """Drive a generator or coroutine, inside the manager at each step and not in the pauses between them."""
    resume: Callable[[], Any] = functools.partial(inner.send, None)
    while True:
        try:
            with manager:
                item = resume()
        except StopIteration as stop:
            return stop.value
        check(item)
        try:
            sent = yield item
        except GeneratorExit:
            with manager:
                inner.close()
            raise
        except BaseException as error:  # noqa: BLE001 - what is thrown in is for the inner one
            resume = functools.partial(inner.throw, error)
        else:
            resume = functools.partial(inner.send, sent)
