"""A reference from the first requests: taken as forwards pass, fitted in the background."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from guardserve import Monitor, ReferenceProfileError
from guardserve.demo.digits import SHIFTS
from guardserve.detection.traffic import TrafficReference
from guardserve.observation.record import Record
from guardserve.observation.taps import Taps

Sampler = Callable[..., torch.Tensor]


def test_the_first_samples_make_a_profile_that_judges_the_next(model: nn.Module, clean: Sampler) -> None:
    """Requests of any size are taken up to the number asked for, no more; poisoned samples do not count."""
    model.eval()
    records: list[Record] = []
    taps = Taps(model, records.append)
    traffic = TrafficReference(400, target_arl=1000)
    images = clean(600, seed=51)
    images[5] = torch.nan
    taken = []
    with torch.inference_mode():
        for batch in torch.split(images, [1, 30, 7, 162, 190, 100, 110]):
            model(batch)
            taken.append((traffic.take(taps.points, records), traffic.samples))
            records.clear()
    taps.close()
    assert taken == [(False, n) for n in (1, 30, 37, 199, 389)] + [(True, 400), (True, 400)]
    assert traffic.full
    profile = traffic.fit_in_background().result(timeout=120)
    assert (profile.samples, profile.nonfinite_samples, profile.ordered) == (400, 1, True)
    with Monitor(model, reference=profile, target_arl=1000) as monitor, torch.inference_mode():
        model(clean(50, seed=56))  # one in twenty such streams alarms by design
        assert monitor.verdict().alarms == 0
        model(SHIFTS["inverted"](clean(4, seed=53)))
        assert monitor.verdict().state == "shifted"


def test_what_is_no_whole_forward_is_left_out(model: nn.Module, clean: Sampler) -> None:
    """A part of the model called by itself has not all layers."""
    records: list[Record] = []
    taps = Taps(model.eval(), records.append)
    with torch.inference_mode():
        model(clean(8, seed=54))
        model.get_submodule("blocks.0")(clean(8, seed=55))
    taps.close()
    traffic = TrafficReference(100)
    assert not traffic.take(taps.points, records)
    assert traffic.samples == 8


def test_too_few_samples_are_refused_before_any_is_taken() -> None:
    """The remedy is known at the start, not after an hour of requests; a failed fit tells whoever waits for it."""
    with pytest.raises(ReferenceProfileError, match="take at least 100"):
        TrafficReference(99)
    with pytest.raises(ValueError, match="target_arl=5"):
        TrafficReference(100, target_arl=5)
    with pytest.raises(ReferenceProfileError, match="no finite sample"):
        TrafficReference(100).fit_in_background().result(timeout=10)
