"""``guardserve audit``."""

from __future__ import annotations

from typing import Any

import click

from guardserve.audit.engine import audit_subject
from guardserve.audit.formats import FORMATS
from guardserve.audit.pages import explain
from guardserve.audit.report import Severity
from guardserve.audit.sources import load_source
from guardserve.cli.options import Command
from guardserve.exceptions import GuardserveError


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


@click.command(cls=AuditCommand)
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
    if report.refusal is not None:
        raise click.ClickException(f"no probe could run: {report.refusal}")
