"""What all tests share."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# the machines that run the tests are shared: how long an example takes says nothing about the code
settings.register_profile("guardserve", deadline=None)
settings.load_profile("guardserve")


@pytest.fixture(scope="session")
def require_program() -> Callable[[str], str]:
    """Find a program; a test that needs a missing one is skipped, but fails in CI, where all must be installed."""

    def find(name: str) -> str:
        places = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        program = shutil.which(name, path=os.pathsep.join(places))
        if program is None:
            give_up = pytest.fail if os.environ.get("CI") else pytest.skip
            give_up(f"{name} is not installed: run .ci/install-system-packages, or make test for Python's programs")
        return program

    return find


@pytest.fixture(scope="module", autouse=True)
def _settled() -> None:
    """Have the garbage collector pass over the millions of objects that are there before the tests of a module."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Have no test's random numbers depend on which tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Let no test see another's graphs, and no deprecation inside the compiler be an error of ours."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()
