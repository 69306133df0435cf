"""The command line: ``guardserve serve`` and its siblings."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click
import torch
import uvicorn
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.progress import Progress

from guardserve import __version__
from guardserve.audit.engine import audit_subject
from guardserve.audit.formats import FORMATS
from guardserve.audit.pages import explain
from guardserve.audit.report import Severity
from guardserve.audit.sources import load_source
from guardserve.demo.traffic import run_demo
from guardserve.exceptions import GuardserveError, ReferenceProfileError
from guardserve.loading import load_model
from guardserve.loading.arrays import load_batches
from guardserve.monitor import ReferenceProfile, ReferenceWarning
from guardserve.monitor.reference import CARRIED
from guardserve.runtime import Runtime, fuse_loaded
from guardserve.service.app import create_app
from guardserve.settings import ENV_PREFIX, ServeSettings, load_settings


class Command(click.Command):
    """A command whose expected errors are one line, not a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run it."""
        try:
            return super().invoke(ctx)
        except GuardserveError as error:
            raise click.ClickException(str(error)) from error


def settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each setting."""
    for name, field in reversed(ServeSettings.model_fields.items()):
        command = _option(name, field)(command)
    return command


def _option(name: str, field: FieldInfo) -> Callable[[Callable[..., None]], Callable[..., None]]:
    flag = "--" + name.replace("_", "-")
    kind = field.annotation
    if get_origin(kind) in (Union, UnionType):
        kind = next(arg for arg in get_args(kind) if arg is not NoneType)
    default = "" if field.default in (None, (), False) else f"default: {field.default}; "
    text = f"{field.description} [{default}env: {ENV_PREFIX}{name.upper()}]"
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
    if get_origin(kind) is tuple:
        return click.option(flag, name, multiple=True, help=text)
    if get_origin(kind) is Literal:
        return click.option(flag, name, type=click.Choice(get_args(kind)), help=text)
    metavar = {int: "N", float: "X"}.get(kind, "TEXT") if isinstance(kind, type) else "TEXT"
    return click.option(flag, name, metavar=metavar, help=text)  # pydantic checks the value, and says what is wrong


@click.group(context_settings={"max_content_width": 110})
@click.version_option(__version__, prog_name="guardserve")
def main() -> None:
    """Safeguards for PyTorch models with BatchNorm."""


@main.command(cls=Command)
@click.argument("model")
@settings_options
def serve(model: str, **options: Any) -> None:
    """Serve MODEL over HTTP, in eval mode whatever its flags say, with its BatchNorm layers watched.

    MODEL is one of

    \b
      package.module:factory  a function or class that returns the model (with --weights FILE)
      model.pt2               a program saved by torch.export
      model.pt                a TorchScript archive
      demo                    the embedded model of handwritten digits

    \b
    Examples:
      guardserve serve demo
      guardserve serve shop.models:resnet --weights resnet.safetensors --input-shape 3,224,224
      guardserve serve scripted.pt --name defects --input-shape 1,64,64 --port 9000

    Input names, shapes and types come from the factory's @guardserve.example_input, from the exported
    program, or from --input-shape and --input-dtype.

    The server speaks the Open Inference Protocol V2 (/v2/models/NAME/infer), shows its metrics to Prometheus
    (/metrics) and its documentation to you (/docs). It is ready (/v2/health/ready) once a forward at batch
    size 1 has passed through the model.

    Every option may also be set in the environment; an option beats its variable.
    """  # noqa: D301 - click reads the escape, it is not a literal backslash
    settings = load_settings(**{name: value for name, value in options.items() if value not in (None, ())})
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    loaded = load_model(
        model,
        weights=settings.weights,
        device=settings.device,
        allow_pickle=settings.allow_pickle,
        input_shapes=settings.input_shape,
        input_dtypes=settings.input_dtype,
        name=settings.name,
    )
    if settings.fuse:
        loaded = fuse_loaded(loaded)
    runtime = Runtime(
        loaded,
        on_hazard=settings.on_hazard,
        shift_window=settings.shift_window,
        shift_min_samples=settings.shift_min_samples,
        shift_threshold=settings.shift_threshold,
        reference=None if settings.reference is None else ReferenceProfile.load(settings.reference),
        target_arl=settings.target_arl,
    )
    app = create_app(
        runtime,
        model_version=settings.model_version,
        max_batch_size=settings.max_batch_size,
        max_body_size=settings.max_body_size,
    )
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level,
        access_log=False,
        timeout_graceful_shutdown=settings.shutdown_timeout,
    )


class CouldNotRunError(click.ClickException):
    """What keeps an audit from running."""

    exit_code = 2


class AuditCommand(Command):
    """A command whose exit status 1 means findings, so that whatever keeps it from running is 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run it."""
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            raise CouldNotRunError(error.message) from error
        except (click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            raise CouldNotRunError(f"{type(error).__name__}: {error}") from error


def _explain(context: click.Context, parameter: click.Parameter, code: str | None) -> None:
    if code is not None:
        try:
            click.echo(explain(code))
        except GuardserveError as error:
            raise click.BadParameter(str(error), context, parameter) from error
        context.exit()


@main.command(cls=AuditCommand)
@click.argument("model")
@click.option("--weights", metavar="FILE", help="State dict for a factory's model.")
@click.option("--example", metavar="FILE", help="Example inputs: .npy, .npz or .safetensors, by input name.")
@click.option(
    "--input-shape",
    "input_shapes",
    multiple=True,
    metavar="TEXT",
    help="Make up an example: 3,224,224 or NAME=3,224,224.",
)
@click.option(
    "--input-dtype", "input_dtypes", multiple=True, metavar="TEXT", help="Its element type: float32 or NAME=int64."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--allow-pickle", is_flag=True, help="Load files that run pickled code. Only for files you trust.")
@click.option("--format", "style", type=click.Choice(tuple(FORMATS)), default="text", show_default=True)
@click.option(
    "--select", multiple=True, metavar="CODES", help="Check these rules only: BN003,BN1 (BN1 is BN101-BN106)."
)
@click.option("--ignore", multiple=True, metavar="CODES", help="Do not check these.")
@click.option("--fail-on", type=click.Choice(("error", "warning")), default="error", show_default=True)
@click.option(
    "--explain", metavar="CODE", is_eager=True, expose_value=False, callback=_explain, help="Show a rule's page."
)
@click.pass_context
def audit(
    context: click.Context,
    /,
    model: str,
    *,
    style: str,
    fail_on: Severity,
    select: tuple[str, ...],
    ignore: tuple[str, ...],
    **options: Any,
) -> None:
    """Look for everything that can make MODEL answer wrongly in production, without altering it.

    MODEL is what serve takes, with its flags as the factory leaves them, or a state_dict (.safetensors, torch.save),
    or an .onnx file.

    \b
    Examples:
      guardserve audit demo
      guardserve audit shop.models:resnet --weights resnet.safetensors --example photos.npy
      guardserve audit weights.safetensors --format sarif
      guardserve audit --explain BN102

    With an example input the model also runs a few times: --example with eight rows of real data shows the most,
    --input-shape makes up noise. Exit status: 0 clean, 1 findings, 2 it could not run.
    """  # noqa: D301 - click reads the escape, it is not a literal backslash
    source = load_source(model, **options)
    chosen, left_out = (
        tuple(code for entry in entries for code in entry.replace(" ", "").split(",") if code)
        for entries in (select, ignore)
    )
    report = audit_subject(source.subject, select=chosen, ignore=left_out)
    click.echo(FORMATS[style](report, source), nl=False)
    if report.reaches(fail_on):
        context.exit(1)
    if source.subject.refusal is not None:
        raise click.ClickException(f"no probe could run: {source.subject.refusal}")


LOADING = ("weights", "device", "allow_pickle", "input_shape", "input_dtype")


def loading_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say how to load its model."""
    for name in reversed(LOADING):
        command = _option(name, ServeSettings.model_fields[name])(command)
    return command


@main.command(cls=Command)
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


@main.command(cls=Command)
@click.option("--once", is_flag=True, help="End after the traffic, with status 0 if the shift was noticed.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
def demo(host: str, port: int, *, once: bool) -> None:
    """Serve the embedded model, send it clean and then shifted traffic, and watch the monitor notice.

    The digits come from scikit-learn: pip install "guardserve[demo]".
    """
    logging.basicConfig(level=logging.ERROR)
    if not run_demo(host, port, once=once, console=Console()):
        raise click.ClickException("the monitor's alarms were not as they should be; see the table")
