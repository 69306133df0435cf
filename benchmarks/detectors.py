"""Shift detectors side by side: what the benchmarks of detection share.

All get what they know of clean samples from the same reference. Their thresholds are set on clean samples of which none
has seen any, so that all raise one false alarm in as many samples; a second such set measures what they then do.

- guardserve: all of it, with the proportions between its charts that its profile has.
- whitened: all features of each BatchNorm layer, whitened without a sketch, one MEWMA chart (lam .05).
- BBSDs + MEWMA, BBSDs + KS: class probabilities (Rabanser et al. 2019), in a chart, and in a window of 50.
- ADWIN, PageHinkley: river's, on the confidence.
- MMD: alibi-detect's online detector on the features before the classifier, window 50.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from guardserve.detection.chart import Chart
from guardserve.detection.encoding import Whitening, shorten
from guardserve.monitor import ReferenceProfile
from guardserve.observation.features import Array, FeatureReader, execution_order
from guardserve.observation.record import Record
from guardserve.observation.taps import Taps

CLEAN_BEFORE, LONGEST, WINDOW = 100, 300, 50
SLOW = ("MMD", "ADWIN", "PageHinkley")
"""Peers that take their samples one by one in Python."""


@dataclass(frozen=True)
class Seen:
    """What the model shows of samples."""

    features: Array
    penultimate: Array
    softmax: Array


def see(model: nn.Module, batches: Iterable[torch.Tensor], classifier: str) -> Seen:
    """Run the model over batches; ``classifier`` names its last module."""
    records: list[Record] = []
    inputs: list[torch.Tensor] = []
    taps = Taps(model, records.append)
    hook = model.get_submodule(classifier).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.inference_mode():
        softmax = torch.cat([model(batch).softmax(1) for batch in batches]).numpy()
    taps.close()
    hook.remove()
    order = execution_order(records[0])
    reader = FeatureReader([taps.points[i] for i in order], order)
    features = np.concatenate([reader.read([record]) for record in records])
    return Seen(features, torch.cat(inputs).numpy(), softmax)


Rows = npt.NDArray[np.intp]
Parts = Sequence[tuple[Seen, Rows]]
Rival = Callable[[Parts], npt.NDArray[np.float64]]
"""Takes parts of streams: samples, and which of them each stream takes at each step, shape ``(steps, streams)``.

Returns what raises the alarm where it is large, for every step of the last part, same shape.
"""


def remembered(encode: Callable[[Seen], list[Array]]) -> Callable[[Seen], list[Array]]:
    """Encode samples once."""
    known: dict[int, tuple[Seen, list[Array]]] = {}

    def encoded(seen: Seen) -> list[Array]:
        if id(seen) not in known:
            known[id(seen)] = (seen, encode(seen))
        return known[id(seen)][1]

    return encoded


def guardserve(profile: ReferenceProfile, arl: float) -> Rival:
    """All charts, each relative to the threshold that the profile gives it."""
    thresholds, levels = profile.threshold(arl), profile.levels

    @remembered
    def encode(seen: Seen) -> list[Array]:
        _, vectors, length = profile.encode(seen.features)
        return [shorten(vectors, levels.radius, length), levels.oddness(length).max(1)]

    def run(parts: Parts) -> npt.NDArray[np.float64]:
        chart = Chart(parts[0][1].shape[1], profile.sketch.dimensions, profile.sketch.width)
        out: list[Array] = []
        for seen, rows in parts:
            vectors, oddness = encode(seen)
            out = []
            for row in rows:
                evidence = levels.evidence(chart.step(vectors[row])).max(2)
                out.append((np.concatenate([evidence, oddness[row][:, None]], axis=1) / thresholds).max(1))
        return np.array(out, np.float64)

    return run


def mewma(encode: Callable[[Seen], list[Array]], lam: float = 0.05) -> Rival:
    """One MEWMA chart for each of several layers, whitened; the largest of them counts."""
    encode = remembered(encode)

    def run(parts: Parts) -> npt.NDArray[np.float64]:
        states = [np.zeros((parts[0][1].shape[1], x.shape[1]), np.float32) for x in encode(parts[0][0])]
        for seen, rows in parts:
            out = np.full(rows.shape, -np.inf)
            for x, state in zip(encode(seen), states, strict=True):
                width = x.shape[1]
                for step, row in enumerate(rows):
                    np.add(state, np.float32(lam) * (x[row] - state), out=state)
                    square = np.einsum("sd,sd->s", state, state) * (2 - lam) / lam
                    np.maximum(out[step], (square - width) / math.sqrt(2 * width), out=out[step])
        return out

    return run


def whitened_layers(reference: Seen, channels: Sequence[int]) -> Callable[[Seen], list[Array]]:
    """Whiten all features of each layer by the reference."""
    centre, spread = reference.features.mean(0), np.maximum(reference.features.std(0), 1e-3)
    offsets, total = np.cumsum([0, *channels]), sum(channels)

    def layers(seen: Seen) -> Iterator[Array]:
        z = np.clip((seen.features - centre) / spread, -8, 8)
        for start, count in zip(offsets, channels, strict=False):
            yield np.concatenate([z[:, start : start + count], z[:, total + start : total + start + count]], axis=1)

    whitenings = [Whitening.fit(x[:, None], [x.shape[1]]) for x in layers(reference)]
    return lambda seen: [w.apply(x[:, None])[:, 0] for w, x in zip(whitenings, layers(seen), strict=True)]


def whitened_softmax(reference: Seen) -> Callable[[Seen], list[Array]]:
    """Whiten the class probabilities by the reference."""
    scale = 1 / np.maximum(reference.softmax.std(0), 1e-6)
    whitening = Whitening.fit((reference.softmax * scale)[:, None], [reference.softmax.shape[1]])
    return lambda seen: [whitening.apply((seen.softmax * scale)[:, None])[:, 0]]


def kolmogorov_smirnov(reference: Seen, classes: int = 100) -> Rival:
    """The largest distance, over the classes that vary most, of a window's distribution from the reference's."""
    chosen = np.argsort(-reference.softmax.var(0))[:classes]
    ordered = np.sort(reference.softmax[:, chosen], axis=0)

    @remembered
    def ranks(seen: Seen) -> list[Array]:
        columns = [np.searchsorted(ordered[:, i], seen.softmax[:, c]) for i, c in enumerate(chosen)]
        return [(np.stack(columns, axis=1) / len(ordered)).astype(np.float32)]

    grid = (np.arange(WINDOW, dtype=np.float32)[:, None] + 0.5) / WINDOW

    def run(parts: Parts) -> npt.NDArray[np.float64]:
        history = np.concatenate([ranks(seen)[0][rows] for seen, rows in parts])
        steps = len(parts[-1][1])
        out = np.zeros(parts[-1][1].shape)
        for step in range(steps):
            end = len(history) - steps + step + 1
            if end >= WINDOW:
                window = np.sort(history[end - WINDOW : end], axis=0)
                out[step] = np.abs(window - grid[:, None]).max((0, 2))
        return out

    return run


def maximum_mean_discrepancy(reference: Seen, arl: float) -> Rival:
    """alibi-detect's online detector: its statistic, whose thresholds are set as all others' are.

    Its own, which are found by minutes of permutations, only choose a start that does not alarm.
    """
    from alibi_detect.cd import MMDDriftOnline  # noqa: PLC0415 - it may not be installed

    detector = MMDDriftOnline(
        reference.penultimate,
        ert=arl,
        window_size=WINDOW,
        backend="pytorch",
        n_bootstraps=round(2 * arl),
        verbose=False,
    )

    def run(parts: Parts) -> npt.NDArray[np.float64]:
        out = np.zeros(parts[-1][1].shape)
        for stream in range(out.shape[1]):
            detector.reset_state()
            for seen, rows in parts:
                for step, row in enumerate(rows[:, stream]):
                    answer = detector.predict(seen.penultimate[row], return_test_stat=True)["data"]
                    if seen is parts[-1][0]:
                        out[step, stream] = answer["test_stat"]
        return out

    return run


def river(make: Callable[[float], object], levels: Sequence[float]) -> Rival:
    """River's detector with each of several parameters, from sensitive to strict; the strictest to alarm counts."""

    def run(parts: Parts) -> npt.NDArray[np.float64]:
        out = np.zeros(parts[-1][1].shape)
        for stream in range(out.shape[1]):
            for strictness, level in enumerate(levels, start=1):
                detector = make(level)
                for seen, rows in parts:
                    confidence = seen.softmax.max(1)
                    for step, row in enumerate(rows[:, stream]):
                        detector.update(float(confidence[row]))  # type: ignore[attr-defined]
                        if detector.drift_detected and seen is parts[-1][0]:  # type: ignore[attr-defined]
                            out[step, stream] = strictness
        return out

    return run


def orders(size: int, steps: int, streams: int, seed: int) -> Rows:
    """Let each stream take samples in random order, none twice before all have been taken."""
    rng = np.random.default_rng(seed)
    rounds = math.ceil(steps / size)
    return np.stack([np.concatenate([rng.permutation(size) for _ in range(rounds)])[:steps] for _ in range(streams)], 1)


@dataclass(frozen=True)
class Row:
    """What one detector did: its measured run length, and the median delay for each shift."""

    run_length: float
    delays: dict[str, float]


def measure(rival: Rival, clean: tuple[Seen, Seen], shifted: dict[str, Seen], arl: float, streams: int) -> Row:
    """Set a detector's threshold for one false alarm in ``arl`` samples, then measure."""
    steps = round(arl)
    largest = [
        rival([(seen, orders(len(seen.features), steps, streams * 2, seed))]).max(0) for seed, seen in enumerate(clean)
    ]
    threshold = float(np.quantile(largest[0], math.exp(-1), method="higher"))
    alarms = int((largest[1] > threshold).sum())
    run_length = -steps / math.log1p(-(alarms + 0.5) / (len(largest[1]) + 1))
    before = orders(len(clean[1].features), CLEAN_BEFORE, streams, 2)
    delays = {}
    for name, seen in shifted.items():
        values = rival([(clean[1], before), (seen, orders(len(seen.features), LONGEST, streams, 3))])
        alarmed = values > threshold
        first = np.where(alarmed.any(0), alarmed.argmax(0) + 1.0, math.inf)
        delays[name] = float(np.median(first))
    return Row(run_length, delays)


def peers(reference: Seen, arl: float) -> Iterator[tuple[str, Rival]]:
    """Yield what is installed."""
    yield "BBSDs + MEWMA", mewma(whitened_softmax(reference))
    yield "BBSDs + KS", kolmogorov_smirnov(reference)
    try:
        from river.drift import ADWIN, PageHinkley  # noqa: PLC0415

        yield "ADWIN", river(lambda level: ADWIN(delta=level), np.geomspace(0.5, 1e-6, 6).tolist())
        yield "PageHinkley", river(lambda level: PageHinkley(threshold=level), np.geomspace(1, 60, 6).tolist())
    except ImportError:
        print("river is not installed: no ADWIN, no PageHinkley")
    try:
        yield "MMD", maximum_mean_discrepancy(reference, arl)
    except ImportError as error:
        print(f"alibi-detect is not installed ({error}): no MMD")


def compare(
    rivals: dict[str, Rival], clean: tuple[Seen, Seen], shifted: dict[str, Seen], arl: float, streams: int
) -> dict[str, Row]:
    """Measure each detector, the slow ones on fewer streams."""
    rows = {}
    for name, rival in rivals.items():
        started = time.monotonic()
        rows[name] = measure(rival, clean, shifted, arl, max(4, streams // 6) if name in SLOW else streams)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    return rows


def show(rows: dict[str, Row], shifts: Sequence[str], arl: float) -> None:
    """Print the table, and what it amounts to."""
    print(f"\nmedian samples until the alarm, one false alarm in {arl:.0f}; - is none in {LONGEST}\n")
    print("| | " + " | ".join(rows) + " |\n|---|" + "---|" * len(rows))
    print("| clean: one false alarm in | " + " | ".join(f"{row.run_length:.0f}" for row in rows.values()) + " |")
    for shift in shifts:
        delays = [row.delays[shift] for row in rows.values()]
        print(f"| {shift.replace('_', ' ')} | " + " | ".join(f"{d:g}" if d < math.inf else "-" for d in delays) + " |")
    own, others = rows["guardserve"].delays, {name: row.delays for name, row in rows.items() if name != "guardserve"}
    seen = [s for s in shifts if any(row[s] < math.inf for name, row in others.items() if name != "whitened")]
    print(f"\nover the {len(seen)} shifts that any peer saw, times longer than guardserve (none counts as {LONGEST}):")
    for name, delays in others.items():
        ratios = [min(delays[s], LONGEST) / min(own[s], LONGEST) for s in seen]
        print(f"  {name}: {math.exp(np.log(ratios).mean()):.1f}" if ratios else f"  {name}: none")
    worse = [s for s in shifts if own[s] > others["whitened"][s]]
    print(f"shifts that the whitened charts see sooner: {', '.join(worse) or 'none'}")
