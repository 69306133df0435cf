"""What a reference profile has to say against itself."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from guardserve.detection.calibration import prudence
from guardserve.detection.chart import SHARES
from guardserve.detection.collection import HELD_OUT

if TYPE_CHECKING:
    from guardserve.detection.reference import ReferenceProfile

CARRIED = 10
"""A profile of N samples carries a target of this many times N samples between false alarms."""

BAND = (0.5, 3.0)
"""Between these multiples of the target a measured run length is what a profile promises."""

REPEATED = 0.01
"""Share of repeats in a reference from which on they are worth a warning."""


def cautions(profile: ReferenceProfile, target_arl: float) -> list[str]:
    """Say in a sentence each what is wrong with a profile that is to raise one false alarm in ``target_arl``."""
    found = (_few(profile, target_arl), _repeats(profile), _far_off(profile))
    return [caution for caution in found if caution]


def _few(profile: ReferenceProfile, target_arl: float) -> str:
    if target_arl <= profile.supported_arl:
        return ""
    return (
        f"target_arl={target_arl:g} is more than a reference of {profile.distinct_samples} samples carries "
        f"({profile.supported_arl:g}): give at least {math.ceil(target_arl / CARRIED)} samples"
    )


def _repeats(profile: ReferenceProfile) -> str:
    read = profile.samples + profile.repeated_samples
    if profile.repeated_samples <= REPEATED * read:
        return ""
    return (
        f"of {read} samples {profile.distinct_samples} are distinct: {profile.repeated_samples} repeats were left out, "
        "which say nothing new of clean data; give each sample once, and look at what repeats them"
    )


def _far_off(profile: ReferenceProfile) -> str:
    """Speak of a measured run length that is nowhere near the target, by all of its interval.

    Small references aim at longer ones, and are to be forgiven that much.
    """
    measured, target = profile.measured_arl, profile.target_arl
    aimed = target / float((SHARES / prudence(round((1 - HELD_OUT) * profile.samples))).sum())
    low, high = BAND[0] * target, BAND[1] * aimed
    seen = (
        f"samples that took no part gave one false alarm in {measured.mean:.0f} "
        f"({measured.low:.0f} to {measured.high:.0f}), where {target:g} was asked for: "
    )
    if measured.high < low:
        return seen + (
            "false alarms will come that often; the samples come in groups that differ, or there are too few: "
            "shuffle them, say that they are ordered if they are, or give more"
        )
    if measured.low > high:
        return seen + (
            "weak shifts will be seen late or not at all; a few samples are far odder than the others, "
            "or there are too few: leave out what is no part of production, or give more"
        )
    return ""
