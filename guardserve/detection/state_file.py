"""The file in which a detector's memory outlives a restart."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from guardserve.detection.detector import Detector
from guardserve.detection.files import check_seal, sealed, write_whole
from guardserve.exceptions import DetectorStateError

KEY = "guardserve_detector"
"""The metadata entry that tells which profile the detector had."""

VERSION = 1


def save_state(path: str | PathLike[str], detector: Detector) -> None:
    """Write what a detector remembers, whole or not at all, and on the disk before it returns."""
    write_whole(path, state_bytes(detector))


def state_bytes(detector: Detector) -> bytes:
    """Return the contents of the file for what a detector remembers now."""
    arrays = {name: np.ascontiguousarray(array) for name, array in detector.state_dict().items()}
    return save(arrays, {KEY: sealed({"version": VERSION, "profile": detector.profile.digest}, arrays)})


def load_state(path: str | PathLike[str], detector: Detector) -> bool:
    """Let a detector go on from where a file says it was; no code of the file runs.

    Returns:
        Whether there was a file; without one the detector stays as it is.

    Raises:
        DetectorStateError: If the file is damaged, something else, or of a detector with another profile. The
            detector stays as it is.
    """
    remedy = "remove it to begin anew"
    if not Path(path).exists():
        return False
    if not Path(path).is_file():
        raise DetectorStateError(f"{path} is no regular file: give the path of one, which need not be there yet")
    try:
        with safe_open(str(path), framework="numpy") as file:
            facts = json.loads((file.metadata() or {}).get(KEY, "null"))
            if not isinstance(facts, dict) or facts.get("version") != VERSION:
                raise DetectorStateError(f"{path} holds no detector's state of version {VERSION}: {remedy}")
            if facts.get("profile") != detector.profile.digest:
                raise DetectorStateError(f"{path} is of a detector with another reference profile: {remedy}")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            check_seal(facts, arrays)
            detector.load_state_dict(arrays)
    except (OSError, SafetensorError, ValueError) as error:
        raise DetectorStateError(f"{path} is damaged or holds no detector's state ({error}): {remedy}") from error
    return True
