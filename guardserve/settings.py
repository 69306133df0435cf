"""The service's settings: the only reader of the environment.

Each field is a command-line option (``--max-batch-size``) and an environment variable
(``GUARDSERVE_MAX_BATCH_SIZE``); an option beats the variable, and an empty variable counts as none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from guardserve.exceptions import SettingsError

ENV_PREFIX = "GUARDSERVE_"

MIB = 2**20


class ServeSettings(BaseSettings):
    """What ``guardserve serve`` can be told."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    grpc_port: int | None = Field(
        None, ge=0, le=65535, description="Port to speak the protocol over gRPC on, too; needs the extra grpc."
    )
    name: str | None = Field(
        None, description="The model's name in URLs and metrics; by default the factory's or file's."
    )
    model_version: str = Field("1", pattern=r"^[A-Za-z0-9._-]+$", description="The model's version in URLs.")
    weights: Path | None = Field(
        None, description="State dict for a factory's model: .safetensors, or a torch.save file."
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    input_shape: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Shape of an input without the batch: 3,240,240 or NAME=3,240,240; -1 for any size. Repeatable."
    )
    input_dtype: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Element type of an input: float32 or NAME=int64. Repeatable."
    )
    image_preprocessing: str | None = Field(
        None,
        description="How JPEG and PNG images become the only input, as 'resize=256 crop=224 mean=0.485,0.456,0.406 "
        "std=0.229,0.224,0.225'; by default as the factory declares it. Needs the extra images.",
    )
    allow_pickle: bool = Field(
        default=False, description="Load files that run pickled code. Only for files you trust as you trust a program."
    )
    fuse: bool = Field(
        default=False,
        description="Fuse BatchNorm layers into the layers that they follow; the monitor still sees them.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the model at the start, for any batch size up to --max-batch-size; the monitor still sees "
        "its layers. Needs a C++ compiler.",
    )
    on_hazard: Literal["raise", "warn"] = Field(
        "raise", description="Refuse a model that eval mode cannot fix, or warn, count it and go on."
    )
    on_nonfinite: Literal["error", "flag"] = Field(
        "error",
        description="Answer NaN or infinity in an output with an error, or send it and say so in the answer's "
        "parameters. A request's parameter guardserve_on_nonfinite overrides it.",
    )
    api_key_file: Path | None = Field(
        None, description="File of API keys, one a line: each a key or sha256: and its hexadecimal hash."
    )
    api_keys: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="API keys; in the environment, where other users cannot see them, separated by spaces."
    )
    allow_anonymous: bool = Field(
        default=False, description="Serve without API keys also where other machines can reach the server."
    )
    protect_metrics: bool = Field(default=False, description="Ask for an API key at /metrics too.")
    protect_health: bool = Field(default=False, description="Ask for an API key at /v2/health too.")
    ssl_certfile: Path | None = Field(None, description="Certificate to serve HTTPS with, in PEM form.")
    ssl_keyfile: Path | None = Field(None, description="The certificate's private key, if it is in another file.")
    max_batch_size: int = Field(64, ge=1, description="Most rows of one forward, and of one request.")
    max_queue_size: int = Field(
        256, ge=1, description="Most requests that wait for a forward; more are refused at once with 503."
    )
    max_queue_delay: float = Field(
        0.0,
        ge=0,
        le=10,
        description="Seconds that a request may wait for others to share its forward when the model is idle. "
        "Requests that are there together share one in any case.",
    )
    max_body_size: int = Field(64 * MIB, ge=1, description="Most bytes of a request body, after decompression.")
    max_image_pixels: int = Field(
        2**25, ge=1, description="Most pixels of an image in a request, told by its header before it is decoded."
    )
    max_pending_size: int = Field(
        512 * MIB,
        ge=1,
        description="Most bytes of all requests held at once, as they came, decompressed and as tensors; more are "
        "refused with 503.",
    )
    max_connections: int = Field(
        1024, ge=1, description="Most connections; what more ask for, but health and metrics, is refused with 503."
    )
    request_timeout: float | None = Field(
        60.0,
        gt=0,
        description="Seconds until a request without an answer gets 504; its parameter timeout, in microseconds, may "
        "ask for fewer.",
    )
    body_timeout: float = Field(30.0, gt=0, description="Seconds that the body of a request may take to arrive.")
    forward_timeout: float | None = Field(
        60.0, gt=0, description="Seconds after which a forward counts as hanging: 504, and not ready until it recovers."
    )
    self_test_interval: float = Field(
        60.0,
        ge=0,
        description="Seconds between two self-tests of a model that works, each a forward of one known example: not "
        "ready until it gives what it gave at the start. 0 for none.",
    )
    shift_window: int = Field(256, ge=1, description="Samples in the recent window that the shift score judges.")
    shift_min_samples: int = Field(64, ge=1, description="Samples that the window must hold before it is judged.")
    shift_threshold: float = Field(
        0.5, gt=0, description="Shift score, in running standard deviations, from which on the input counts as shifted."
    )
    reference: Path | None = Field(
        None, description="Reference profile made by guardserve reference, to judge samples by: calibrated alarms."
    )
    target_arl: float = Field(
        10_000, ge=100, le=100_000, description="With --reference, samples between false alarms, on average."
    )
    reference_from_traffic: int | None = Field(
        None,
        ge=100,
        description="Make the reference profile of the first so many samples served, taken for clean, and save it to "
        "--reference, or beside --state as FILE.profile. If that file is there already, it is used instead.",
    )
    state: Path | None = Field(
        None,
        description="With a reference profile, file that the detector's memory is loaded from at the start, if it is "
        "there, and saved to every minute and at the end.",
    )
    shift_policy: Literal["observe", "flag", "reject"] = Field(
        "observe",
        description="With a reference profile, what to do about a request with a sample unlike it: nothing, say so in "
        "the answer's parameters, or refuse it with 422.",
    )
    shift_p_threshold: float = Field(
        0.001,
        gt=0,
        lt=1,
        description="With --shift-policy, the p-value up to which a sample is unlike the reference: the share of clean "
        "samples that this hits too.",
    )
    monitor_values: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        8192,
        description="Values that the monitor reads of each sample at each layer, about: N or all. With --reference, as "
        "many as that was made with.",
    )
    monitor_budget: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of a forward's time that the monitor may take, such as 0.02: it then reads as much as that "
        "allows. With a reference profile the share is only measured.",
    )
    drain_delay: float = Field(
        1.0,
        ge=0,
        description="Seconds between SIGTERM, when readiness fails, and the end of new connections.",
    )
    shutdown_timeout: int = Field(
        30,
        ge=1,
        description="Seconds to finish accepted requests in after SIGTERM; what is not done by then is dropped.",
    )
    threads: int | None = Field(
        None, ge=1, description="Threads of one forward on the CPU; by default torch's choice, shared among --workers."
    )
    workers: int = Field(
        1,
        ge=1,
        le=256,
        description="Processes that serve the port, each with the model and limits of its own; /metrics shows them as "
        "one. One that dies is started again.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe log to write.")
    log_format: Literal["text", "json"] = Field("text", description="Lines for people, or one JSON object each.")
    traces: bool = Field(
        default=False,
        description="Send OpenTelemetry traces, as its own OTEL_ environment variables say; needs the extra otel.",
    )

    @field_validator("input_shape", "input_dtype", "api_keys", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """In the environment several values are separated by spaces."""
        return tuple(value.split()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _window_holds_what_it_is_judged_on(self) -> ServeSettings:
        if self.shift_min_samples > self.shift_window:
            raise ValueError(
                f"--shift-min-samples {self.shift_min_samples} is more than --shift-window {self.shift_window} can "
                "hold: lower the one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _several_workers_can_do_it(self) -> ServeSettings:
        if self.workers > 1 and self.grpc_port is not None:
            raise ValueError(
                f"--grpc-port does not work with --workers {self.workers}, which share the port of HTTP only: "
                "serve gRPC with --workers 1"
            )
        return self

    @model_validator(mode="after")
    def _what_needs_a_reference_has_one(self) -> ServeSettings:
        if self.reference is None and self.reference_from_traffic is None:
            wanting = "--state" if self.state is not None else f"--shift-policy {self.shift_policy}"
            if self.state is not None or self.shift_policy != "observe":
                raise ValueError(
                    f"{wanting} needs a reference profile: make one with guardserve reference and give --reference, or "
                    "give --reference-from-traffic"
                )
        return self


def load_settings(**given: Any) -> ServeSettings:
    """Combine given values with the environment.

    Raises:
        SettingsError: If a value cannot be used; the message names each setting, its value and what is wrong.
    """
    try:
        return ServeSettings(**given)
    except ValidationError as error:
        faults = []
        for fault in error.errors(include_url=False):
            if not fault["loc"]:
                faults.append(str(fault["ctx"]["error"]))
                continue
            field = str(fault["loc"][0])
            option = "--" + field.replace("_", "-")
            faults.append(f"{option} (or {ENV_PREFIX}{field.upper()}) is {fault['input']!r}: {fault['msg']}")
        raise SettingsError("; ".join(faults)) from None
