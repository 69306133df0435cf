"""Writing a file whole or not at all, and knowing that it is still what was written."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

CHECKSUM = "checksum"
"""The fact that holds the checksum of the other facts and of the arrays."""

Arrays = Mapping[str, npt.NDArray[Any]]


def write_whole(path: str | PathLike[str], data: bytes) -> None:
    """Replace a file by new contents that are on the disk before the old ones go.

    A reader, and whoever comes after a crash, finds all of the old file or all of the new one. A link stays, and what
    it leads to is replaced.

    Raises:
        OSError: If it cannot be written, or the path is that of something else than a file, which stays as it is.
    """
    target = writable(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except BaseException:
        with suppress(OSError):
            Path(temporary).unlink()
        raise
    with suppress(OSError):  # a file system that cannot open a folder keeps the new name in its own time
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sealed(facts: Mapping[str, Any], arrays: Arrays) -> str:
    """Return facts as JSON, with the checksum of them and of the arrays that go with them."""
    return json.dumps({**facts, CHECKSUM: _checksum(facts, arrays)})


def check_seal(facts: Mapping[str, Any], arrays: Arrays) -> None:
    """Refuse facts and arrays that are not those of :func:`sealed`.

    Raises:
        ValueError: They are not, or have no checksum.
    """
    if CHECKSUM not in facts:
        raise ValueError("it has no checksum, as it was written by an older guardserve")
    if facts[CHECKSUM] != _checksum({name: fact for name, fact in facts.items() if name != CHECKSUM}, arrays):
        raise ValueError("its contents do not have its checksum")


def _checksum(facts: Mapping[str, Any], arrays: Arrays) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def writable(path: str | PathLike[str]) -> Path:
    """Return the file that a path leads to, which need not be there yet.

    Raises:
        OSError: If there is something else than a file, such as a folder or a device, which nobody wants replaced.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not target.is_file():
        kind = "a folder" if target.is_dir() else "no regular file"
        raise OSError(f"{path} is {kind}: give the path of a file")
    return target
