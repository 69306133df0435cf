"""What the commands share: how they fail, and options made from the service's settings."""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from guardserve.exceptions import GuardserveError
from guardserve.loading import LoadedModel, load_model
from guardserve.settings import ENV_PREFIX, ServeSettings, load_settings

LOADING = ("weights", "device", "allow_pickle", "input_shape", "input_dtype")
"""Settings that say how to load a model."""


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


def loading_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say how to load its model."""
    for name in reversed(LOADING):
        command = _option(name, ServeSettings.model_fields[name])(command)
    return command


def given(options: dict[str, Any]) -> ServeSettings:
    """Combine the options that were given with the environment.

    Raises:
        SettingsError: If a value cannot be used.
    """
    return load_settings(**{name: value for name, value in options.items() if value not in (None, ())})


def load(model: str, settings: ServeSettings, **more: Any) -> LoadedModel:
    """Load a model as the settings that are :data:`LOADING` say, and further arguments of :func:`load_model`.

    Raises:
        ModelLoadError: If it cannot be loaded.
    """
    return load_model(
        model,
        weights=settings.weights,
        device=settings.device,
        allow_pickle=settings.allow_pickle,
        input_shapes=settings.input_shape,
        input_dtypes=settings.input_dtype,
        **more,
    )


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
