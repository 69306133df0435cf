"""A symbolic trace leaves the forwards of other threads alone."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx._symbolic_trace import is_fx_tracing

from guardserve import fuse
from guardserve.audit import audit
from guardserve.symbolic import Tracer

CALL, GET = nn.Module.__call__, nn.Module.__getattr__


class Served(nn.Module):
    """Reads a parameter and a buffer of its own and calls a module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.BatchNorm1d(3), nn.Parameter(torch.full((3,), 2.0))
        self.register_buffer("offset", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features, shape ``(N, 3)``."""
        y: torch.Tensor = self.norm(x) * self.scale + self.offset
        return y


class Waits(nn.Module):
    """Runs a function in the midst of its forward, which a trace passes too."""

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__()
        self._function = function
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features, shape ``(N, 3)``."""
        self._function()
        y: torch.Tensor = self.layer(x)
        return y


@pytest.mark.parametrize("buffers", [False, True])
def test_a_forward_of_another_thread_is_what_it_is_during_a_trace(buffers: bool) -> None:
    """Of a model that is being served, and of the one that is traced."""
    served, x = Served().eval(), torch.randn(2, 3)
    expected = served(x)
    found: list[torch.Tensor] = []

    def beside() -> None:
        others = [
            threading.Thread(target=lambda model=model: found.append(model(x))) for model in (served, traced.layer)
        ]
        for other in others:
            other.start()
            other.join()

    traced = Waits(beside)
    tracer = Tracer()
    tracer.proxy_buffer_attributes = buffers
    graph = tracer.trace(traced)
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], traced.layer(x))
    assert (nn.Module.__call__, nn.Module.__getattr__) == (CALL, GET)


def test_a_compiled_model_runs_in_another_thread_during_a_trace(fresh_compiler: None) -> None:
    """It asks torch whether anybody traces, whoever that is."""
    del fresh_compiler
    served, x = Served().eval(), torch.randn(2, 3)
    compiled = torch.compile(served, backend="eager")
    found = [compiled(x)]

    def beside() -> None:
        other = threading.Thread(target=lambda: found.append(compiled(x)))
        other.start()
        other.join()

    Tracer().trace(Waits(beside))
    torch.testing.assert_close(found, [served(x)] * 2)
    assert not is_fx_tracing()


def test_traces_of_several_threads_take_turns() -> None:
    """Audits and fusions beside forwards; afterwards torch's own calls are back in their place."""
    served, x = Served().eval(), torch.randn(2, 3)
    expected, over = served(x), threading.Event()
    faults: list[Exception] = []

    def serve() -> None:
        try:
            while not over.is_set():
                torch.testing.assert_close(served(x), expected)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a fault
            faults.append(error)

    def look() -> None:
        for _ in range(3):
            model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
            audit(model)
            fuse(model)

    serving, looking = threading.Thread(target=serve), [threading.Thread(target=look) for _ in range(2)]
    serving.start()
    for thread in looking:
        thread.start()
    for thread in looking:
        thread.join()
    over.set()
    serving.join()
    assert not faults
    assert (nn.Module.__call__, nn.Module.__getattr__) == (CALL, GET)
