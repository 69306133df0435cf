"""``guardserve serve``."""

from __future__ import annotations

import gc
import math
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import torch
import uvicorn
from starlette.types import ASGIApp

from guardserve.audit import audit
from guardserve.cli.options import Command, given, load, settings_options
from guardserve.exceptions import GuardserveError, SettingsError
from guardserve.loading import LoadedModel
from guardserve.logs import configure_logs
from guardserve.monitor import ReferenceProfile
from guardserve.rpc import RpcServer
from guardserve.runtime import Runtime, fuse_loaded
from guardserve.service.access import Access, is_loopback, read_keys
from guardserve.service.app import Service, create_app
from guardserve.service.limits import Limits
from guardserve.service.server import Server
from guardserve.service.shift import ShiftPolicy
from guardserve.settings import ENV_PREFIX, ServeSettings
from guardserve.traces import traced


@click.command(cls=Command)
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
    settings = given(options)
    configure_logs(settings.log_level, settings.log_format)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    access = _access(settings)
    loaded = load(model, settings, name=settings.name, image_preprocessing=settings.image_preprocessing)
    findings = audit(loaded.module, ignore=["BN001"]).findings  # the guard holds it in eval mode, whatever it says
    reference, learned = _reference(settings)
    app = create_app(
        _runtime(settings, loaded, reference, learned),
        model_version=settings.model_version,
        limits=Limits(**{field.name: getattr(settings, field.name) for field in fields(Limits)}),
        access=access,
        on_nonfinite=settings.on_nonfinite,
        shift_policy=_shift_policy(settings, reference),
        shutdown_timeout=settings.shutdown_timeout,
        findings=findings,
    )
    # what is there now stays: looking through all of torch for garbage again and again would hold requests up
    gc.collect()
    gc.freeze()
    _run(settings, app)


def _runtime(
    settings: ServeSettings, loaded: LoadedModel, reference: ReferenceProfile | None, learned: Path | None
) -> Runtime:
    """Put the model behind its safeguards."""
    return Runtime(
        fuse_loaded(loaded) if settings.fuse else loaded,
        on_hazard=settings.on_hazard,
        shift_window=settings.shift_window,
        shift_min_samples=settings.shift_min_samples,
        shift_threshold=settings.shift_threshold,
        reference=reference,
        target_arl=settings.target_arl,
        learn=settings.reference_from_traffic,
        learned=learned,
        state=settings.state,
        monitor_values=None if settings.monitor_values == "all" else settings.monitor_values,
        monitor_budget=settings.monitor_budget,
        compile_for=settings.max_batch_size if settings.compile else None,
    )


def _run(settings: ServeSettings, app: Service) -> None:
    """Serve until a signal.

    Raises:
        GuardserveError: If the server does not start.
    """
    with traced(app) if settings.traces else nullcontext(app) as served:
        config = uvicorn.Config(
            served,
            host=settings.host,
            port=settings.port,
            log_level=settings.log_level,
            log_config=None,
            access_log=False,
            proxy_headers=False,
            timeout_graceful_shutdown=settings.shutdown_timeout,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )
        server = Server(config, app.life, settings.drain_delay, _rpc(settings, served, app))
        server.run()
    if not server.started:
        raise GuardserveError(f"the server did not start on {settings.host}:{settings.port}")


def _rpc(settings: ServeSettings, served: ASGIApp, app: Service) -> RpcServer | None:
    """Return the gRPC server, if there is to be one."""
    if settings.grpc_port is None:
        return None
    certificate = None if settings.ssl_certfile is None else (settings.ssl_certfile, settings.ssl_keyfile)
    _, gateway = app.inference
    return RpcServer(
        served,
        gateway,
        settings.host,
        settings.grpc_port,
        max_message_size=settings.max_body_size,
        max_calls=settings.max_connections,
        grace=settings.shutdown_timeout,
        certificate=certificate,
    )


def _reference(settings: ServeSettings) -> tuple[ReferenceProfile | None, Path | None]:
    """Load the reference profile; if it is to be made of what is served, say where to save it."""
    path = settings.reference
    if settings.reference_from_traffic is not None:
        if path is None and settings.state is not None:
            path = settings.state.with_name(f"{settings.state.name}.profile")
        if path is None or not path.exists():
            return None, path
    return None if path is None else ReferenceProfile.load(path), None


def _shift_policy(settings: ServeSettings, reference: ReferenceProfile | None) -> ShiftPolicy:
    """Refuse a threshold that the p-values of so few reference samples cannot reach."""
    samples = (settings.reference_from_traffic or 0) if reference is None else len(reference.scores)
    threshold = settings.shift_p_threshold
    if settings.shift_policy != "observe" and 1 / (samples + 1) > threshold:
        raise SettingsError(
            f"--shift-p-threshold {threshold:g} cannot be reached: {samples} reference samples give p-values from "
            f"{1 / (samples + 1):.2g} on; give {math.ceil(1 / threshold) - 1} samples or more, or a larger threshold"
        )
    return ShiftPolicy(settings.shift_policy, threshold)


def _access(settings: ServeSettings) -> Access:
    """Read the API keys, and insist on some where others can reach the server."""
    keys = [*settings.api_keys, *(read_keys(settings.api_key_file) if settings.api_key_file is not None else ())]
    if not keys and not settings.allow_anonymous and not is_loopback(settings.host):
        raise SettingsError(
            f"--host {settings.host} can be reached from other machines, and there is no API key: give --api-key-file "
            f"(or {ENV_PREFIX}API_KEYS), or say --allow-anonymous"
        )
    return Access(keys, protect_metrics=settings.protect_metrics, protect_health=settings.protect_health)
