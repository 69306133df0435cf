"""Noticing that a model's buffers have changed, without keeping a copy of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from guardserve.batchnorm import batchnorm_layers
from guardserve.walks import bit_sum, hold_only

LOOK_INTERVAL = 0.1
"""Seconds between two calls that are looked at: it is a walk through memory that the forward has driven from caches."""

CONTENT_INTERVAL = 1.0
"""Seconds between two looks at the contents of the buffers, which cost a pass over them."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_version = attrgetter("_version")


class _Look:
    """The buffers as they were: themselves, as others may be where they were in memory, and their versions.

    Attributes:
        tensors: All of them.
        versions: The version of each, by its identity; 0 for one that has none.
    """

    def __init__(self, dicts: list[dict[str, torch.Tensor | None]], script: Iterable[torch.Tensor]) -> None:
        self._dicts = dicts
        self._items = tuple(chain.from_iterable(map(dict.values, dicts)))
        self.tensors = [*{id(b): b for b in (*self._items, *script) if b is not None}.values()]
        # a tensor made in inference mode has no counter
        self._counting = [b for b in self.tensors if is_lazy(b) or not b.is_inference()]
        self._counts = [*map(_version, self._counting)]
        self.versions = dict.fromkeys(map(id, self.tensors), 0)
        self.versions.update(zip(map(id, self._counting), self._counts, strict=True))

    def is_current(self) -> bool:
        """Tell whether nothing was replaced or written to."""
        return hold_only(self._dicts, self._items) and [*map(_version, self._counting)] == self._counts

    def contents(self) -> dict[int, int]:
        """Sum the bit patterns of each that has such, by its identity; NaN equals itself this way."""
        sums = zip(self.tensors, map(bit_sum, self.tensors), strict=True)
        each = zip(self.versions, (_bit_sum(b) if found is None else found for b, found in sums), strict=True)
        return {key: value for key, value in each if value is not None}


class BufferWatch:
    """Tells which buffers of a model were written to, replaced or removed.

    Almost every in-place operation on a tensor raises its version counter, and those are compared: for the first call,
    then for one every :data:`LOOK_INTERVAL`, or what came meanwhile in a longer hold, and while they change for each.
    Batch normalisation does not: in training mode it writes running statistics behind the counter's back. So from time
    to time the contents at the beginning of a call and at its end are compared too, by their sums of bit patterns; if
    a call has written running statistics of BatchNorm layers so, the copy that was kept at the last time is put back.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._script: dict[str, torch.Tensor] = {}
        self._dicts: list[dict[str, torch.Tensor | None]] = []
        for name, module in model.named_modules():
            buffers = vars(module).get("_buffers")
            if isinstance(buffers, dict):
                self._dicts.append(buffers)
            elif isinstance(module, torch.jit.ScriptModule):
                # it hands out new Python objects at each access, so what it holds is listed once
                self._script |= {f"{name}.{key}" if name else key: b for key, b in module.named_buffers(recurse=False)}
        self._layers = [layer for _, layer in batchnorm_layers(model)]
        self._statistics: dict[int, torch.Tensor] = {}
        self._kept: dict[int, int] | None = None
        self._stale = True
        self._before: dict[int, int] | None = None
        self._next_look = self._next_content = 0.0
        self._marked = self._changing = False
        self._whole_at = 0.0
        self._lazy = {id(b) for _, b in self._named() if is_lazy(b)}
        self._seen = self._look()
        self.mark()

    def mark(self) -> None:
        """Begin to look for changes, if it is time: take the buffers as they are now for unchanged."""
        now = time.monotonic()
        self._marked, self._whole_at, self._before = now >= self._next_look, 0.0, None
        if not self._marked:
            return
        if not self._seen.is_current():
            self._seen, self._stale = self._look(), True
        if self._changing or now >= self._next_content:
            self._before = self._seen.contents()
            if self._stale:
                self._keep(self._before)

    def changed(self) -> list[str]:
        """Return the qualified names of the buffers that changed since the last look, if it is time, and mark.

        Where they do change, each call is looked at from then on.
        """
        now = time.monotonic()
        if now < self._next_look:
            return []
        if not self._marked:  # somebody was in a call already: what others have changed before is not seen
            self.mark()
            self._whole_at = now + LOOK_INTERVAL
            return []
        before = self._seen
        if not before.is_current():
            self._seen = self._look()
        elif now < self._next_content:
            self._rest(now)
            return []
        if self._became_real():
            return []
        old, new = before.versions, self._seen.versions
        changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
        self._stale |= bool(changed)
        contents = self._seen.contents()
        if self._before is not None:
            behind = {key for key, value in contents.items() if self._before.get(key, value) != value} - changed
            if self._put_back(behind):
                self._seen = self._look()
                contents = self._seen.contents()
            changed |= behind
        if self._before is not None or self._stale:
            self._keep(contents)
        self._before = contents
        self._next_content = time.monotonic() + CONTENT_INTERVAL
        self._changing = bool(changed)
        if not changed:
            self._rest(now)
        return [name for name, buffer in self._named() if id(buffer) in changed] if changed else []

    def _rest(self, now: float) -> None:
        """Look at no calls for a while, after one was looked at from its beginning or for as long."""
        if now >= self._whole_at:
            self._next_look = now + LOOK_INTERVAL

    def _became_real(self) -> bool:
        """Tell whether a lazy buffer got its shape, which also resets its layer's other buffers, and mark if so."""
        lazy = {id(b) for _, b in self._named() if is_lazy(b)} if self._lazy else set()
        if lazy == self._lazy:
            return False
        self._lazy = lazy
        self._keep(self._seen.contents())
        return True

    def _keep(self, contents: dict[int, int]) -> None:
        """Keep a copy of the statistics, unless that of the last time is one of these."""
        stale, self._stale = self._stale, False
        if not stale and contents == self._kept:  # else they may be others of the same sums
            return
        self._kept = contents
        statistics = (b for layer in self._layers for b in (layer.running_mean, layer.running_var))
        self._statistics = {id(b): b.detach().clone() for b in statistics if b is not None and id(b) in contents}

    def _put_back(self, behind: set[int]) -> bool:
        """Write kept statistics over those that were written behind the counter's back."""
        found = [b for _, b in self._named() if id(b) in behind and id(b) in self._statistics]
        for buffer in found:
            with torch.inference_mode(mode=buffer.is_inference()), torch.no_grad():
                buffer.copy_(self._statistics[id(buffer)])
        return bool(found)

    def _look(self) -> _Look:
        return _Look(self._dicts, self._script.values())

    def _named(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._script.items()
        for name, module in self._model.named_modules():
            buffers = vars(module).get("_buffers")
            if isinstance(buffers, dict):
                for key, buffer in buffers.items():
                    if buffer is not None:
                        yield f"{name}.{key}" if name else key, buffer


def _bit_sum(buffer: torch.Tensor) -> int | None:
    """Sum a tensor's bit patterns; None for one that has no plain memory (quantised, nested, sparse, lazy)."""
    try:
        return int(buffer.detach().reshape(-1).view(_INTEGERS[buffer.element_size()]).sum())
    except (RuntimeError, ValueError, KeyError):
        return None
