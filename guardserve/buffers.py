"""Noticing that a model's buffers have changed, without keeping a copy of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter

import torch
from torch import nn

CONTENT_INTERVAL = 1.0
"""Seconds between two looks at the contents of the buffers, which cost a pass over them."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_version = attrgetter("_version")


class BufferWatch:
    """Tells which buffers of a model were written to, replaced or removed.

    Almost every in-place operation on a tensor raises its version counter, and those are compared at each
    look. Batch normalisation does not: in training mode it writes running statistics behind the counter's
    back. So from time to time the contents are compared too, by their sums of bit patterns.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._script: dict[str, torch.Tensor] = {}
        self._dicts: list[dict[str, torch.Tensor | None]] = []
        for name, module in model.named_modules():
            buffers = vars(module).get("_buffers")
            if isinstance(buffers, dict):
                if buffers:
                    self._dicts.append(buffers)
            elif isinstance(module, torch.jit.ScriptModule):
                # it hands out new Python objects at each access, so what it holds is listed once
                self._script |= {f"{name}.{key}" if name else key: b for key, b in module.named_buffers(recurse=False)}
        self._content: dict[int, int] | None = None
        self._next_content = 0.0
        self.mark()

    def mark(self) -> None:
        """Take the buffers as they are now for unchanged."""
        self._seen = self._look()
        self._content = self._contents() if time.monotonic() >= self._next_content else None

    def changed(self) -> list[str]:
        """Return the qualified names of the buffers that were seen to change since the last look, and mark."""
        before, self._seen = self._seen, self._look()
        due = time.monotonic() >= self._next_content
        if before == self._seen and not due:
            return []
        old = dict(zip(*before, strict=True))
        new = dict(zip(*self._seen, strict=True))
        changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
        if due:
            contents = self._contents()
            if self._content is not None:
                changed |= {key for key, value in contents.items() if self._content.get(key, value) != value}
            self._content = contents
            self._next_content = time.monotonic() + CONTENT_INTERVAL
        return [name for name, buffer in self._named() if id(buffer) in changed]

    def _look(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the identity and the version of every buffer."""
        buffers = [b for b in chain.from_iterable(map(dict.values, self._dicts)) if b is not None]
        buffers.extend(self._script.values())
        try:
            versions = tuple(map(_version, buffers))
        except RuntimeError:  # a tensor made in inference mode has no counter
            versions = tuple(0 if b.is_inference() else b._version for b in buffers)  # noqa: SLF001
        return tuple(map(id, buffers)), versions

    def _contents(self) -> dict[int, int]:
        """Sum the bit patterns of every plain buffer; NaN equals itself this way."""
        return {
            id(buffer): int(buffer.detach().reshape(-1).view(_INTEGERS[buffer.element_size()]).sum())
            for _, buffer in self._named()
            if buffer.layout is torch.strided and not buffer.is_meta and buffer.element_size() in _INTEGERS
        }

    def _named(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._script.items()
        for name, module in self._model.named_modules():
            buffers = vars(module).get("_buffers")
            if isinstance(buffers, dict):
                for key, buffer in buffers.items():
                    if buffer is not None:
                        yield f"{name}.{key}" if name else key, buffer
