"""What a worker has loaded, part by part, which is the same in all that answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from guardserve.loading.imported import ImportedCode
from guardserve.service.inference import Inference

Contents: TypeAlias = Mapping[str, str]
"""What tells each part from others: a version or a digest."""

MODEL = "the model"
PROFILE = "the reference profile"
PREPROCESSING = "the image preprocessing"

RELOADED = frozenset({MODEL, PROFILE, PREPROCESSING})
"""What another load brings up to date; the rest is code, which no process imports twice."""


def contents(inference: Inference, code: ImportedCode) -> Contents:
    """Return what makes up a version of the model: a worker that loads the same files has the same."""
    runtime = inference.runtime
    profile = runtime.monitor.reference
    return {
        **code.known,
        MODEL: inference.versions[-1],
        PROFILE: "" if profile is None else profile.digest,
        PREPROCESSING: str(runtime.preprocessing),
    }


def differences(mine: Contents, others: Contents) -> dict[str, str]:
    """Return the parts in which two workers differ, with a word on each; code that only one has imported may wait."""
    differing = sorted(part for part in mine.keys() & others.keys() if mine[part] != others[part])
    return {part: f"{part} ({mine[part]}, not {others[part]})" if part == MODEL else part for part in differing}
