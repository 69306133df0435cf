"""References that hold samples several times: what tells samples apart, which are kept, and what is said of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from serving import wait_until
from torch import nn

from guardserve import Monitor, ReferenceProfile, ReferenceProfileError, ReferenceWarning
from guardserve.detection.collection import STANDARDISED_BY, Collector, ReferenceData, collect
from guardserve.detection.files import CHECKSUM
from guardserve.detection.profile_file import read_profile, write_profile
from guardserve.detection.repeats import COMMON, without_repeats
from guardserve.observation.keys import sample_keys
from guardserve.observation.record import Record
from guardserve.observation.taps import Taps

Sampler = Callable[..., torch.Tensor]
keys = st.lists(st.integers(0, 6), max_size=80).map(lambda values: np.array(values, np.uint64))


@given(keys, st.booleans())
def test_each_sample_is_kept_once(given_keys: np.ndarray[tuple[int], np.dtype[np.uint64]], ordered: bool) -> None:
    """The first of all equal ones always stays; others do only where a sequence stands still, or are common."""
    kept = without_repeats(given_keys, ordered=ordered)
    stands = np.zeros(len(kept), bool)
    stands[1:] = ordered & (given_keys[1:] == given_keys[:-1])
    heads = given_keys[~stands]
    for key in set(given_keys.tolist()):
        alike = given_keys == key
        assert kept[alike][0]
        if (heads == key).sum() <= COMMON * len(heads) / len(set(heads.tolist())):
            assert (kept & alike & ~stands).sum() == 1
    assert (kept[1:] == kept[:-1])[stands[1:]].all()


def test_a_sample_far_more_common_than_others_keeps_its_share_and_its_places() -> None:
    """Silence is a twentieth of production, and of the reference too, though all else is there four times."""
    silence, rest = np.zeros(80, np.uint64), np.tile(np.arange(1, 381, dtype=np.uint64), 4)
    mixed = np.random.default_rng(0).permutation(np.concatenate([silence, rest]))
    kept = without_repeats(mixed)
    assert (kept & (mixed > 0)).sum() == 380
    assert (kept & (mixed == 0)).sum() == 19  # 20 of 400, but for what silence itself adds to the average
    places = np.flatnonzero(kept & (mixed == 0))
    assert np.histogram(places, bins=2, range=(0, len(mixed)))[0].min() >= 7


def test_keys_are_of_inputs_not_of_batches() -> None:
    """A sample has the same key alone and among others; any bit of any input makes another one."""
    rng = torch.Generator().manual_seed(0)
    image, flag = torch.randn(6, 3, 4, 4, generator=rng), torch.tensor([True, False] * 3)
    shared = [torch.ones(2), torch.tensor(3.0)]
    together = sample_keys([image, flag, *shared], 6)
    assert together is not None
    for row in range(6):
        alone = sample_keys([image[row : row + 1].bfloat16().float(), flag[row : row + 1], *shared], 1)
        assert alone is not None
        assert alone[0] != together[row]
        turned = image.transpose(1, 3).contiguous().transpose(1, 3)
        alone = sample_keys([turned[row : row + 1], flag[row : row + 1], *shared], 1)
        assert alone is not None
        assert alone[0] == together[row]
    flag[4] = False
    other = sample_keys([image, flag, *shared], 6)
    assert other is not None
    assert (other != together).tolist() == [False] * 4 + [True, False]
    assert sample_keys([image.to_sparse(), torch.tensor(1.0), torch.zeros(6, 0)], 6) is None
    assert sample_keys([image[:, 0].bfloat16()], 6) is not None
    threshold = sample_keys([image, flag, torch.ones(2), torch.tensor(4.0)], 6)
    assert threshold is not None
    assert (other != threshold).all()


def test_inputs_that_are_no_plain_memory_are_no_error() -> None:
    """Conjugates and negatives of complex numbers have keys like others."""
    x = torch.randn(3, 2, dtype=torch.complex64)
    for lazy in (x.conj(), x.conj().imag):
        plain, found = sample_keys([lazy.clone().resolve_conj().resolve_neg()], 3), sample_keys([lazy], 3)
        assert plain is not None
        assert found is not None
        assert (plain == found).all()


def test_only_who_learns_hashes_inputs(model: nn.Module, clean: Sampler) -> None:
    """Forwards of a plain monitor cost nothing for it."""
    records: list[Record] = []
    taps = Taps(model.eval(), records.append)
    with torch.inference_mode():
        model(clean(3, seed=1))
        taps.keyed = True
        model(clean(3, seed=1))
    taps.close()
    assert records[0].keys is None
    assert records[1].keys is not None
    assert len(set(records[1].keys.tolist())) == 3


def test_a_reference_that_repeats_samples_is_one_of_the_different_ones(
    model: nn.Module, clean: Sampler, tmp_path: Path
) -> None:
    """Four epochs over 150 samples, in batches of several sizes: 150 count, a warning says so, and so does the file."""
    samples = torch.cat([clean(150, seed=61)] * 4)
    with pytest.warns(ReferenceWarning, match="of 600 samples 150 are distinct: 450 repeats were left out"):
        profile = ReferenceProfile.fit(model, torch.split(samples, 7), target_arl=1000)
    assert (profile.samples, profile.distinct_samples, profile.repeated_samples) == (150, 150, 450)
    assert profile.supported_arl == 1500
    assert len(np.unique(profile.scores)) == len(profile.scores) <= 150
    profile.save(tmp_path / "profile.safetensors")
    loaded = ReferenceProfile.load(tmp_path / "profile.safetensors")
    assert (loaded.distinct_samples, loaded.repeated_samples) == (150, 450)
    with pytest.warns(ReferenceWarning, match="450 repeats were left out"), Monitor(model, reference=loaded):
        pass


def test_too_few_different_samples_are_refused(model: nn.Module, clean: Sampler) -> None:
    """However often they come, in whatever order."""
    samples = clean(60, seed=62)
    for ordered in (False, True):
        with pytest.raises(ReferenceProfileError, match="of the reference's 240 finite samples only 60 are distinct"):
            ReferenceProfile.fit(model, [samples] * 4, ordered=ordered)


def test_traffic_that_repeats_itself_teaches_nothing_and_is_served_on(
    model: nn.Module, clean: Sampler, caplog: pytest.LogCaptureFixture
) -> None:
    """A load test with ten images: one plain line in the log, no traceback, and the running statistics go on."""
    images = clean(10, seed=63)
    with Monitor(model) as monitor, torch.inference_mode(), caplog.at_level(logging.WARNING):
        monitor.learn(120, target_arl=1000)
        for _ in range(13):
            model.eval()(images)
        assert monitor.snapshot().samples == 130
        wait_until(lambda: "no reference profile" in caplog.text)  # it is found in the background
        model(images)
        assert monitor.snapshot().samples == 140
        assert monitor.reference is None
    (record,) = [record for record in caplog.records if "no reference profile" in record.getMessage()]
    assert "120 finite samples only 10 are distinct" in record.getMessage()
    assert record.exc_info is None


def test_a_profile_of_before_repeats_were_counted_is_read(profile: ReferenceProfile, tmp_path: Path) -> None:
    """It has no such counts: all its samples are taken for different ones."""
    profile.save(tmp_path / "new.safetensors")
    facts, arrays = read_profile(tmp_path / "new.safetensors")
    for name in ("distinct_samples", "repeated_samples", CHECKSUM):
        del facts[name]
    write_profile(tmp_path / "old.safetensors", facts, arrays)
    loaded = ReferenceProfile.load(tmp_path / "old.safetensors")
    assert (loaded.distinct_samples, loaded.repeated_samples) == (1200, 0)


@pytest.mark.parametrize("ordered", [False, True])
def test_a_reference_that_begins_with_one_sample_over_and_over_is_that_of_the_rest(
    model: nn.Module, clean: Sampler, ordered: bool
) -> None:
    """Health checks before the first requests: what features are scaled by is taken from different samples."""
    first, rest = clean(1, seed=64), torch.split(clean(700, seed=65), 50)
    often = [first.expand(50, -1, -1, -1)] * (STANDARDISED_BY // 50 + 1)

    def of(batches: Iterable[torch.Tensor]) -> ReferenceData:
        collector = Collector(64, np.random.default_rng(0), ordered=ordered)
        return collect(model, batches, collector, lambda _: None)

    data = of([*often, *rest])
    assert data.distinct_samples == 701
    assert data.repeated_samples + data.samples == 1250
    spread = np.abs(of(rest).sketch.scale).mean()
    assert 0.5 * spread < np.abs(data.sketch.scale).mean() < 1.5 * spread  # less for its share of the samples


def test_one_sample_over_and_over_is_no_reference(model: nn.Module, clean: Sampler) -> None:
    """It is refused with what was seen, whether it is to be held out or to be fitted to."""
    for seed in range(8):
        with pytest.raises(ReferenceProfileError, match=r"600 .*samples"):
            ReferenceProfile.fit(model, [clean(1, seed=66).expand(60, -1, -1, -1)] * 10, seed=seed)
