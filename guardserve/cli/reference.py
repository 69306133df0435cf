"""``guardserve reference``."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from guardserve.cli.options import Command, given, load, loading_options
from guardserve.detection.files import writable
from guardserve.exceptions import ReferenceProfileError
from guardserve.loading import LoadedModel
from guardserve.loading.arrays import ArrayBatches, load_batches
from guardserve.loading.images import ImageBatches, load_images
from guardserve.monitor import ReferenceProfile, ReferenceWarning


@click.command(cls=Command)
@click.argument("model")
@click.option("--data", required=True, type=Path, help="Clean samples: .npy, .npz, .safetensors or a folder of images.")
@click.option("--out", required=True, type=Path, help="The reference profile to write, a .safetensors file.")
@click.option(
    "--target-arl",
    type=click.FloatRange(100, 100_000),
    default=10_000,
    show_default=True,
    help="Samples between false alarms for which to measure; serve may ask for any other.",
)
@click.option("--ordered", is_flag=True, help="The samples are a sequence, such as the frames of a video.")
@click.option("--image-size", type=click.IntRange(1), help="Height and width of images, if the model takes any.")
@click.option("--image-mean", default="", help="Taken off pixels from 0 to 1: a number, or one a channel, with commas.")
@click.option("--image-std", default="", help="What they are then divided by.")
@loading_options
def reference(
    model: str,
    data: Path,
    out: Path,
    target_arl: float,
    ordered: bool,
    **options: Any,
) -> None:
    """Make a reference profile of MODEL from clean samples, for serve --reference.

    The samples are those of production on a good day, prepared as requests are, in an array whose first axis counts
    them, or images; better 1,000 or more. Unless --ordered says otherwise, they are independent of each other. MODEL,
    with one input, is as for guardserve serve. If it declares @guardserve.image_preprocessing, images are prepared so
    unless --image-size, --image-mean or --image-std say otherwise.

    \b
    Examples:
      guardserve reference shop.models:resnet --weights resnet.safetensors --data clean.npy --out profile.safetensors
      guardserve reference shop.models:resnet --weights resnet.safetensors --data photos/ --out profile.safetensors \\
        --image-size 224 --image-mean 0.485,0.456,0.406 --image-std 0.229,0.224,0.225

    The report tells how often the detector was wrong on samples that took no part in making the profile.
    """  # noqa: D301 - click reads the escape, it is not a literal backslash
    images = {name: options.pop(name) for name in ("image_size", "image_mean", "image_std")}
    loaded = load(model, given(options))
    if len(loaded.inputs) != 1:
        raise ReferenceProfileError(
            f"{model} has {len(loaded.inputs)} inputs: use ReferenceProfile.fit, whose loader may give mappings"
        )
    batches = _open(data, loaded, **images)
    _check_arguments(out, target_arl)
    console = Console()
    with Progress(console=console, transient=True) as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore", ReferenceWarning)  # the report says it
        task = progress.add_task("reading", total=len(batches))
        profile = ReferenceProfile.fit(
            loaded.module,
            batches,
            target_arl=target_arl,
            ordered=ordered,
            progress=lambda stage, samples: progress.update(task, description=stage, completed=samples),
        )
    try:
        profile.save(out)
    except OSError as error:
        raise ReferenceProfileError(f"the profile cannot be written: {error}") from error
    console.print(_report(profile, out), soft_wrap=True, highlight=False)


def _check_arguments(out: Path, target_arl: float) -> None:
    """Refuse what would fail only after minutes of reading."""
    if math.isnan(target_arl):  # which click's range lets pass
        raise ReferenceProfileError("--target-arl is nan: give samples between false alarms")
    if not out.parent.is_dir():
        raise ReferenceProfileError(f"{out.parent} is no folder: make it first")
    try:
        writable(out)
    except OSError as error:
        raise ReferenceProfileError(f"--out: {error}") from error


def _open(
    data: Path, loaded: LoadedModel, image_size: int | None, image_mean: str, image_std: str
) -> ArrayBatches | ImageBatches:
    spec = loaded.inputs[0]
    if data.is_dir():
        mean, std = _numbers("mean", image_mean), _numbers("std", image_std)
        return load_images(data, spec, size=image_size, mean=mean, std=std, declared=loaded.preprocessing)
    if image_size is not None or image_mean or image_std:
        raise ReferenceProfileError(
            f"{data} is no folder of images: --image-size, --image-mean and --image-std are for those"
        )
    return load_batches(data, spec)


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if text]
    except ValueError as error:
        raise ReferenceProfileError(f"--image-{name} is {text!r}: give numbers, such as 0.485,0.456,0.406") from error


def _report(profile: ReferenceProfile, path: Path) -> str:
    measured = profile.measured_arl
    sequence = ", taken as a sequence" if profile.ordered else ""
    lines = [
        f"{path}: {profile.samples} samples{sequence}, {len(profile.layers)} BatchNorm layers",
        f"asked for   one false alarm in {profile.target_arl:,.0f} samples",
        f"measured    one in {measured.mean:,.0f} on samples that took no part",
        f"            (95 % interval {measured.low:,.0f} to {measured.high:,.0f})",
    ]
    if profile.nonfinite_samples:
        lines.append(f"left out    {profile.nonfinite_samples} samples with NaN or infinity")
    if profile.repeated_samples:
        lines.append(f"left out    {profile.repeated_samples} repeats: {profile.distinct_samples} samples are distinct")
    lines += [f"[bold yellow]warning[/bold yellow]     {caution}" for caution in profile.cautions(profile.target_arl)]
    return "\n".join(lines)
