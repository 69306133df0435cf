"""``guardserve serve``."""

from __future__ import annotations

import functools
import gc
import logging
import math
import signal
import socket
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import torch
import uvicorn
from starlette.types import ASGIApp

from guardserve.audit import audit
from guardserve.cli.options import Command, given, load, settings_options
from guardserve.exceptions import GuardserveError, ReferenceMismatchError, SettingsError
from guardserve.loading.imported import ImportedCode
from guardserve.logs import configure_logs
from guardserve.monitor import ReferenceProfile
from guardserve.rpc import RpcServer
from guardserve.runtime import Runtime, fuse_loaded
from guardserve.service.access import Access, is_loopback, read_keys
from guardserve.service.app import Service, create_app
from guardserve.service.limits import Limits
from guardserve.service.server import Server
from guardserve.service.shift import ShiftPolicy
from guardserve.service.versions import Together
from guardserve.settings import ENV_PREFIX, ServeSettings
from guardserve.traces import traced
from guardserve.workers import Link, Pool, StandIn, Supervisor, WorkerServer, bind

_log = logging.getLogger(__name__)


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
    early: list[int] = []
    signal.signal(signal.SIGHUP, lambda number, _: early.append(number))  # it would end the process
    settings = given(options)
    configure_logs(settings.log_level, settings.log_format)
    if settings.workers > 1:
        _supervise(model, settings)
    else:
        app = _application(model, settings, ImportedCode())
        signal.signal(signal.SIGHUP, lambda *_: app.versions.hang_up())
        if early:
            app.versions.hang_up()
        _run(settings, app)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def serve_in_worker(connection: Connection, sockets: list[socket.socket], model: str, settings: ServeSettings) -> None:
    """Serve in a process of several, until a signal or the supervisor's end.

    Args:
        connection: The line to the supervisor.
        sockets: To listen on.
        model: See :func:`serve`.
        settings: What it can be told.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it reaches the supervisor, too, and is for that to pass on
    configure_logs(settings.log_level, settings.log_format)
    code = ImportedCode()
    link = Link(connection, code)
    try:
        app = _application(model, settings, code, link.reload)
        with _traced(settings, app) as served:
            server = WorkerServer(_config(settings, served), app, settings.drain_delay, link)
            server.run(sockets)
    except GuardserveError as error:
        link.fail(str(error))
        raise SystemExit(1) from None


def _supervise(model: str, settings: ServeSettings) -> None:
    """Have several workers serve until a signal.

    Raises:
        GuardserveError: If they do not start, or did not end as they should.
    """
    access = _access(settings)
    reference, learned = _reference(settings)
    if learned is not None or (reference is None and settings.reference_from_traffic is not None):
        raise SettingsError(
            f"--reference-from-traffic does not work with --workers {settings.workers}, of which each sees a share of "
            "the traffic: make the profile with guardserve reference, or serve with --workers 1 until it is there"
        )
    path = None if reference is None else _reference_path(settings)
    pool = Pool(window=settings.shift_window, reference=path, target_arl=settings.target_arl, state=settings.state)
    own = settings.model_copy(
        update={
            "threads": settings.threads or max(1, torch.get_num_threads() // settings.workers),
            "reference": path,
            "reference_from_traffic": None,
            "state": None,  # the pool's, which judges what all workers have seen
            "api_keys": tuple(_keys(settings)),  # as they are now, also for a worker that is started again
            "api_key_file": None,
        }
    )
    sockets = bind(settings.host, settings.port)
    _log.info("%d workers for %s:%d", settings.workers, settings.host, sockets[0].getsockname()[1])
    Supervisor(
        serve_in_worker,
        (model, own),
        sockets=sockets,
        workers=settings.workers,
        pool=pool,
        timeout=settings.drain_delay + 2 * settings.shutdown_timeout,
        stand_in=StandIn(access, sockets, functools.partial(_config, settings), settings.max_connections),
    ).run()


def _application(model: str, settings: ServeSettings, code: ImportedCode, together: Together | None = None) -> Service:
    """Load the model, and make the application that serves it, perhaps together with others."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    access = _access(settings)
    runtime = _runtime(settings, model)
    code.remember()
    app = create_app(
        runtime,
        model_version=settings.model_version,
        limits=Limits(**{field.name: getattr(settings, field.name) for field in fields(Limits)}),
        access=access,
        on_nonfinite=settings.on_nonfinite,
        shift_policy=ShiftPolicy(settings.shift_policy, settings.shift_p_threshold),
        shutdown_timeout=settings.shutdown_timeout,
        load=functools.partial(_again, settings, model, code),
        together=together,
    )
    # what is there now stays: looking through all of torch for garbage again and again would hold requests up
    gc.collect()
    gc.freeze()
    return app


def _runtime(settings: ServeSettings, model: str, served: Runtime | None = None) -> Runtime:
    """Load the model, and put it behind its safeguards.

    Args:
        settings: How.
        model: What to load.
        served: The version of it that is served, if it is loaded again.
    """
    loaded = load(
        model,
        settings,
        name=settings.name,
        image_preprocessing=settings.image_preprocessing,
        beside=None if served is None else served.guard.module,
    )
    findings = audit(loaded.module, ignore=["BN001"]).findings  # the guard holds it in eval mode, whatever it says
    reference, learned = _reference(settings)
    _check_threshold(settings, reference)
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
        resume=served is None or _is_judged_by(served, reference),
        monitor_values=None if settings.monitor_values == "all" else settings.monitor_values,
        monitor_budget=settings.monitor_budget,
        compile_for=settings.max_batch_size if settings.compile else None,
        findings=findings,
    )


def _again(settings: ServeSettings, model: str, code: ImportedCode, served: Runtime) -> Runtime:
    """Load the model again; its detector goes on where that of the served version is, if it has the same profile."""
    code.check()
    if served.keeper is not None:
        served.keeper.save()
    try:
        runtime = _runtime(settings, model, served)
    except ReferenceMismatchError as error:
        raise ReferenceMismatchError(f"{error}, put it in the old one's place, and load the model again") from error
    gc.collect()
    gc.freeze()
    return runtime


def _is_judged_by(served: Runtime, reference: ReferenceProfile | None) -> bool:
    profile = served.monitor.reference
    return profile is not None and reference is not None and profile.digest == reference.digest


def _run(settings: ServeSettings, app: Service) -> None:
    """Serve until a signal.

    Raises:
        GuardserveError: If the server does not start.
    """
    with _traced(settings, app) as served:
        server = Server(_config(settings, served), app.life, settings.drain_delay, _rpc(settings, served, app))
        server.run()
    if not server.started:
        raise GuardserveError(f"the server did not start on {settings.host}:{settings.port}")


def _traced(settings: ServeSettings, app: Service) -> AbstractContextManager[ASGIApp]:
    return traced(app) if settings.traces else nullcontext(app)


def _config(settings: ServeSettings, served: ASGIApp) -> uvicorn.Config:
    """Return uvicorn's configuration."""
    return uvicorn.Config(
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


def _rpc(settings: ServeSettings, served: ASGIApp, app: Service) -> RpcServer | None:
    """Return the gRPC server, if there is to be one."""
    if settings.grpc_port is None:
        return None
    certificate = None if settings.ssl_certfile is None else (settings.ssl_certfile, settings.ssl_keyfile)
    return RpcServer(
        served,
        app.gateway,
        settings.host,
        settings.grpc_port,
        max_message_size=settings.max_body_size,
        max_calls=settings.max_connections,
        grace=settings.shutdown_timeout,
        certificate=certificate,
    )


def _reference(settings: ServeSettings) -> tuple[ReferenceProfile | None, Path | None]:
    """Load the reference profile; if it is to be made of what is served, say where to save it."""
    path = _reference_path(settings)
    if settings.reference_from_traffic is not None and (path is None or not path.exists()):
        return None, path
    return None if path is None else ReferenceProfile.load(path), None


def _reference_path(settings: ServeSettings) -> Path | None:
    """Return the file of the reference profile; one that is made of what is served may not be there yet."""
    if settings.reference is None and settings.reference_from_traffic is not None and settings.state is not None:
        return settings.state.with_name(f"{settings.state.name}.profile")
    return settings.reference


def _check_threshold(settings: ServeSettings, reference: ReferenceProfile | None) -> None:
    """Refuse a threshold that the p-values of so few reference samples cannot reach."""
    samples = (settings.reference_from_traffic or 0) if reference is None else len(reference.scores)
    threshold = settings.shift_p_threshold
    if settings.shift_policy != "observe" and 1 / (samples + 1) > threshold:
        raise SettingsError(
            f"--shift-p-threshold {threshold:g} cannot be reached: {samples} reference samples give p-values from "
            f"{1 / (samples + 1):.2g} on; give {math.ceil(1 / threshold) - 1} samples or more, or a larger threshold"
        )


def _keys(settings: ServeSettings) -> list[str]:
    return [*settings.api_keys, *([] if settings.api_key_file is None else read_keys(settings.api_key_file))]


def _access(settings: ServeSettings) -> Access:
    """Read the API keys, and insist on some where others can reach the server."""
    keys = _keys(settings)
    if not keys and not settings.allow_anonymous and not is_loopback(settings.host):
        raise SettingsError(
            f"--host {settings.host} can be reached from other machines, and there is no API key: give --api-key-file "
            f"(or {ENV_PREFIX}API_KEYS), or say --allow-anonymous"
        )
    return Access(keys, protect_metrics=settings.protect_metrics, protect_health=settings.protect_health)
