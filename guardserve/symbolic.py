"""Symbolic tracing of a model while other threads run theirs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.fx import _symbolic_trace
from torch.fx.proxy import Proxy

_TRACING = threading.RLock()

_FLAG = "_is_fx_tracing_flag"


class Tracer(fx.Tracer):
    """torch.fx's tracer, but the forwards of other threads stay what they are.

    While it traces, torch.fx has every module of the process called through the tracer, in whatever thread. A model
    that is served at that moment is none of the tracer's: its request would fail. Nor would a compiled model run, which
    asks a flag of the process whether somebody traces. Two traces at a time would leave
    the first tracer behind in the place of ``nn.Module.__call__``, so they take turns.
    """

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace a model; the arguments are those of torch's."""
        with _TRACING:
            self._thread = threading.get_ident()
            return super().trace(root, concrete_args)

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: dict[str, Any] | tuple[Any, ...] | None = None,
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make the arguments of the model that is traced, the first thing once a trace has begun."""
        setattr(_symbolic_trace, _FLAG, False)  # torch puts it back
        return super().create_args_for_root(root_fn, is_module, concrete_args)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace a call, or just make it."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        """Give a proxy of an attribute, or just the attribute."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)
