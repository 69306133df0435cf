"""The file of a reference profile: arrays in safetensors, facts as JSON in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from guardserve.detection.calibration import ARLS
from guardserve.detection.chart import SHARES
from guardserve.detection.files import check_seal, sealed, write_whole
from guardserve.exceptions import ReferenceProfileError

KEY = "guardserve_reference"
"""The metadata entry that holds the facts."""

VERSION = 4

FACTS: Mapping[str, type | tuple[type, ...]] = {
    "layers": list,
    "channels": list,
    "fingerprint": str,
    "samples": int,
    "nonfinite_samples": int,
    "target_arl": (int, float),
    "measured_arl": list,
    "ordered": bool,
}

Arrays = dict[str, npt.NDArray[Any]]


def write_profile(path: str | PathLike[str], facts: Mapping[str, Any], arrays: Arrays) -> None:
    """Write a profile, whole or not at all: a reader never meets half a file."""
    metadata = {KEY: sealed({"version": VERSION, **facts}, arrays)}
    write_whole(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata))


def read_profile(path: str | PathLike[str]) -> tuple[dict[str, Any], Arrays]:
    """Read a profile's facts and arrays, and check that they fit together.

    Raises:
        ReferenceProfileError: If the file is missing, damaged or something else.
    """
    remedy = "make it anew with guardserve reference"
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                raise ReferenceProfileError(f"{path} is a safetensors file, but not a reference profile: {remedy}")
            facts = json.loads(metadata[KEY])
            _check_facts(facts)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            _check_arrays(facts, arrays)
            check_seal(facts, arrays)
    except OSError as error:
        raise ReferenceProfileError(f"{path} cannot be read: {error}") from error
    except (SafetensorError, ValueError) as error:
        raise ReferenceProfileError(f"{path} is damaged or not a reference profile ({error}): {remedy}") from error
    return facts, arrays


def _check_facts(facts: object) -> None:
    if not isinstance(facts, dict):
        raise ValueError("its metadata is not a JSON object")  # noqa: TRY004 - of the file, not of a caller
    if facts.get("version") != VERSION:
        raise ValueError(f"its version is {facts.get('version')!r}, this guardserve reads {VERSION}")
    for name, kind in FACTS.items():
        if not isinstance(facts.get(name), kind):
            raise ValueError(f"its {name} is {facts.get(name)!r}")  # noqa: TRY004 - of the file, too
    layers, channels, measured = facts["layers"], facts["channels"], facts["measured_arl"]
    if not layers or not all(isinstance(name, str) for name in layers):
        raise ValueError(f"its layers are {layers!r}")
    if len(channels) != len(layers) or not all(isinstance(size, int) and size > 0 for size in channels):
        raise ValueError(f"its channels are {channels!r} for {len(layers)} layers")
    if len(measured) != 3 or not all(isinstance(value, (int, float)) for value in measured):  # noqa: PLR2004
        raise ValueError(f"its measured_arl is {measured!r}")


def _check_arrays(facts: Mapping[str, Any], arrays: Arrays) -> None:
    layers, features = len(facts["layers"]), 2 * sum(facts["channels"])
    mean = arrays.get("mean")
    width = mean.shape[-1] if mean is not None and mean.ndim == 2 else 0  # noqa: PLR2004
    scores = arrays.get("scores")
    shapes: dict[str, tuple[int, ...]] = {
        "centre": (features,),
        "scale": (features,),
        "mean": (layers, width),
        "matrix": (layers, width, width),
        "median": (len(SHARES), layers),
        "high": (len(SHARES), layers),
        "thresholds": (len(SHARES), len(ARLS)),
        "odd_centre": (layers,),
        "odd_spread": (layers,),
        "odd_slopes": (layers, width),
        "scores": (len(scores) if scores is not None and scores.ndim == 1 else 0,),
    }
    for name, shape in shapes.items():
        array = arrays.get(name)
        if array is None or array.shape != shape or 0 in shape:
            raise ValueError(f"its {name} has shape {None if array is None else array.shape}, not {shape}")
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ValueError(f"its {name} holds something else than finite numbers")
    positive = (arrays["odd_spread"], arrays["high"] - arrays["median"], arrays["thresholds"])
    if not arrays["scale"].all() or any((array <= 0).any() for array in positive):
        raise ValueError("its scales are not positive")
