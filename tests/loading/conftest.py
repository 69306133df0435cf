"""Real tiny models with BatchNorm, their saved programs, and projects to load factories from."""

from __future__ import annotations

import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

_serial = count()


class TinyNet(nn.Module):
    """A convolution, a BatchNorm and a linear head: RGB images of any size to two logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, kernel_size=3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch of images."""
        logits: torch.Tensor = self.head(torch.relu(self.norm(self.conv(image))).mean((2, 3)))
        return logits


def build_tiny() -> TinyNet:
    """Build the net in eval mode, always with the same weights and with running statistics of its own."""
    torch.manual_seed(0)
    model = TinyNet()
    model(torch.randn(8, 3, 8, 8))  # one train-mode forward moves the running statistics
    return model.eval()


@pytest.fixture
def tiny() -> nn.Module:
    """Give a fresh net."""
    return build_tiny()


@pytest.fixture(scope="session")
def exported_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Export the net once, with a free batch dimension."""
    path = tmp_path_factory.mktemp("export") / "tiny.pt2"
    program = torch.export.export(build_tiny(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes={"image": {0: Dim("batch")}})
    torch.export.save(program, path)
    return path.read_bytes()


@pytest.fixture
def exported(exported_bytes: bytes, tmp_path: Path) -> Path:
    """Give a file with the exported net."""
    path = tmp_path / "tiny.pt2"
    path.write_bytes(exported_bytes)
    return path


@pytest.fixture
def scripted(tiny: nn.Module, tmp_path: Path) -> Path:
    """Give a file with the scripted net."""
    path = tmp_path / "tiny.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript itself
        torch.jit.save(torch.jit.script(tiny), path)
    return path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Write a module into the working directory, and return its name, by which it can be imported from there."""
    monkeypatch.chdir(tmp_path)
    names: list[str] = []

    def write(source: str) -> str:
        name = f"project{next(_serial)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        names.append(name)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)


TINY_MODULE = """
    import torch
    from torch import nn
    from guardserve.loading import example_input

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, kernel_size=3)
            self.norm = nn.BatchNorm2d(4)
            self.head = nn.Linear(4, 2)

        def forward(self, image):
            return self.head(torch.relu(self.norm(self.conv(image))).mean((2, 3)))

    @example_input(torch.zeros(1, 3, 8, 8))
    def net():
        return Net()
"""


@pytest.fixture
def tiny_reference(project: Callable[[str], str]) -> str:
    """Give the source of a factory of the net, which declares its example input."""
    return f"{project(TINY_MODULE)}:net"
