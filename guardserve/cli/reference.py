"""``guardserve reference``."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from guardserve.cli.options import Command, loading_options
from guardserve.exceptions import ReferenceProfileError
from guardserve.loading import load_model
from guardserve.loading.arrays import load_batches
from guardserve.monitor import ReferenceProfile, ReferenceWarning
from guardserve.monitor.reference import CARRIED
from guardserve.settings import load_settings


@click.command(cls=Command)
@click.argument("model")
@click.option("--data", required=True, type=Path, help="Clean samples: .npy, .npz or .safetensors.")
@click.option("--out", required=True, type=Path, help="The reference profile to write, a .safetensors file.")
@click.option(
    "--target-arl",
    type=click.FloatRange(100, 100_000),
    default=10_000,
    show_default=True,
    help="Samples between false alarms for which to measure; serve may ask for any other.",
)
@loading_options
def reference(model: str, data: Path, out: Path, target_arl: float, **options: Any) -> None:
    """Make a reference profile of MODEL from clean samples, for serve --reference.

    The samples are those of production on a good day, prepared as requests are, independent of each other, in an
    array whose first axis counts them; better 1,000 or more. MODEL, with one input, is as for guardserve serve.

    \b
    Example:
      guardserve reference shop.models:resnet --weights resnet.safetensors --data clean.npy --out profile.safetensors

    The report tells how often the detector was wrong on samples that took no part in making the profile.
    """  # noqa: D301 - click reads the escape, it is not a literal backslash
    settings = load_settings(**{name: value for name, value in options.items() if value not in (None, ())})
    loaded = load_model(
        model,
        weights=settings.weights,
        device=settings.device,
        allow_pickle=settings.allow_pickle,
        input_shapes=settings.input_shape,
        input_dtypes=settings.input_dtype,
    )
    if len(loaded.inputs) != 1:
        raise ReferenceProfileError(
            f"{model} has {len(loaded.inputs)} inputs: use ReferenceProfile.fit, whose loader may give mappings"
        )
    batches = load_batches(data, loaded.inputs[0])
    if not out.parent.is_dir():
        raise ReferenceProfileError(f"{out.parent} is no folder: make it first")
    console = Console()
    with Progress(console=console, transient=True) as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore", ReferenceWarning)  # the report says it
        task = progress.add_task("reading", total=len(batches))
        profile = ReferenceProfile.fit(
            loaded.module,
            batches,
            target_arl=target_arl,
            progress=lambda stage, samples: progress.update(task, description=stage, completed=samples),
        )
    profile.save(out)
    console.print(_report(profile, out), soft_wrap=True, highlight=False)


def _report(profile: ReferenceProfile, path: Path) -> str:
    measured = profile.measured_arl
    lines = [
        f"{path}: {profile.samples} samples, {len(profile.layers)} BatchNorm layers",
        f"asked for   one false alarm in {profile.target_arl:,.0f} samples",
        f"measured    one in {measured.mean:,.0f} on samples that took no part",
        f"            (95 % interval {measured.low:,.0f} to {measured.high:,.0f})",
    ]
    if profile.nonfinite_samples:
        lines.append(f"left out    {profile.nonfinite_samples} samples with NaN or infinity")
    if profile.target_arl > profile.supported_arl:
        lines.append(
            f"[bold yellow]warning[/bold yellow]     {profile.samples} samples carry one in "
            f"{profile.supported_arl:,.0f} at most: for this target give {math.ceil(profile.target_arl / CARRIED)}"
        )
    return "\n".join(lines)
