"""The command line: one module for each command."""

from __future__ import annotations

import click

from guardserve import __version__
from guardserve.cli.audit import audit
from guardserve.cli.demo import demo
from guardserve.cli.reference import reference
from guardserve.cli.serve import serve


@click.group(context_settings={"max_content_width": 110})
@click.version_option(__version__, prog_name="guardserve")
def main() -> None:
    """Safeguards for PyTorch models with BatchNorm."""


for command in (serve, audit, reference, demo):
    main.add_command(command)
