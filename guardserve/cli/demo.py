"""``guardserve demo``."""

from __future__ import annotations

import logging

import click
from rich.console import Console

from guardserve.cli.options import Command
from guardserve.demo.traffic import run_demo


@click.command(cls=Command)
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
