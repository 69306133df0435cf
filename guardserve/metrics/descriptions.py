"""Every metric: what it counts, and what its labels say."""

from __future__ import annotations

from typing import NamedTuple

WORST_CHANNELS = 5
"""Channels with a series of their own, over all layers."""

REASONS = (
    "malformed",
    "invalid_input",
    "unlike_reference",
    "unknown_output",
    "too_large",
    "unsupported_encoding",
    "not_found",
    "unauthorized",
    "not_ready",
    "overloaded",
    "slow_body",
    "timeout",
    "nonfinite_output",
    "model_error",
    "out_of_memory",
    "disconnected",
    "internal",
)
"""Every value of the label ``reason``."""


class Description(NamedTuple):
    """A row of the documented table.

    Attributes:
        kind: ``"counter"``, ``"gauge"`` or ``"histogram"``.
        help: What it says, in one sentence.
        labels: Its labels, in order.
        pooled: How a gauge of several workers becomes one: ``"sum"``, ``"max"`` or ``"min"``. Counters and histograms
            add up, and what a monitor says is made anew of what all have seen.
    """

    kind: str
    help: str
    labels: tuple[str, ...]
    pooled: str = "max"


NONFINITE = "guardserve_nonfinite_samples_total"

METRICS: dict[str, Description] = {
    "guardserve_requests_total": Description(
        "counter", "Inference requests ended, by HTTP status.", ("model", "status")
    ),
    "guardserve_request_errors_total": Description(
        "counter", "Inference requests that were refused or failed, by reason.", ("model", "reason")
    ),
    "guardserve_unreadable_requests_total": Description(
        "counter",
        "Requests that could not be read, on any path: no HTTP, a head that is too large or ambiguous, or cut short.",
        ("model",),
    ),
    "guardserve_requests_in_flight": Description("gauge", "Inference requests being worked on.", ("model",), "sum"),
    "guardserve_request_duration_seconds": Description(
        "histogram",
        "Time from a request's headers, or its body if that follows at once, until its answer is ready.",
        ("model",),
    ),
    "guardserve_forward_duration_seconds": Description(
        "histogram", "Time of one forward with its safeguards.", ("model",)
    ),
    "guardserve_batch_size": Description("histogram", "Rows of one forward.", ("model",)),
    "guardserve_queue_size": Description("gauge", "Requests that wait for a forward.", ("model",), "sum"),
    "guardserve_queue_duration_seconds": Description(
        "histogram", "Time that a request waited for its forward to begin.", ("model",)
    ),
    "guardserve_faults_total": Description(
        "counter",
        "Faults met in forwards: a joint batch that failed and was run one by one, memory that did not suffice, "
        "an error of the device, a forward that hung, a self-test that a model which worked did not pass.",
        ("model", "kind"),
    ),
    "guardserve_recoveries_total": Description(
        "counter", "Times that a self-test made the model ready again after a fault.", ("model",)
    ),
    "guardserve_reloads_total": Description(
        "counter",
        "Times that the model was to be loaded again: done, or failed, when the old version went on.",
        ("model", "outcome"),
    ),
    "guardserve_samples_total": Description("counter", "Samples that the monitor has seen.", ("model",)),
    NONFINITE: Description(
        "counter",
        "Samples with NaN or infinity, by where it was met: in an input, what enters a layer, or an output.",
        ("model", "origin", "name"),
    ),
    "guardserve_guard_violations_total": Description(
        "counter", "What the guard had to prevent or could only report, by kind.", ("model", "kind")
    ),
    "guardserve_shift_score": Description(
        "gauge",
        "Largest layer Wasserstein-2 distance in the recent window, in running standard deviations; "
        "absent until the window holds enough samples.",
        ("model",),
    ),
    "guardserve_shift_threshold": Description("gauge", "Score from which on the input counts as shifted.", ("model",)),
    "guardserve_shift_state": Description(
        "gauge", "1 for the state that the monitor is in, 0 for the others.", ("model", "state")
    ),
    "guardserve_shift_evidence": Description(
        "gauge",
        "Largest evidence of the detector's charts after the last sample; only with a reference profile.",
        ("model",),
    ),
    "guardserve_shift_evidence_threshold": Description(
        "gauge", "Evidence from which on there is an alarm; only with a reference profile.", ("model",)
    ),
    "guardserve_shift_alarms_total": Description(
        "counter", "Alarms of the detector; always 0 without a reference profile.", ("model",)
    ),
    "guardserve_shift_lead_layer": Description(
        "gauge",
        "Always 1, while there is a shift; the earliest layer that left its null, or without a reference profile the "
        "one with the largest distance.",
        ("model", "layer"),
    ),
    "guardserve_shift_p_value": Description(
        "histogram",
        "P-values of the samples judged by a reference profile: uniform on clean data, small for odd samples.",
        ("model",),
    ),
    "guardserve_reference_info": Description(
        "gauge",
        "Always 1; the reference profile's samples, and the samples between false alarms that it is used for; only "
        "with one.",
        ("model", "samples", "target_arl"),
    ),
    "guardserve_state_save_failures_total": Description(
        "counter", "Times that the detector's state could not be saved.", ("model",)
    ),
    "guardserve_monitor_share": Description(
        "gauge",
        "Share of the forwards' time that the monitor takes to read; absent before the first is timed.",
        ("model",),
    ),
    "guardserve_layer_evidence": Description(
        "gauge",
        "Evidence of the layer after the last sample, as a share of what raises an alarm; only with a profile.",
        ("model", "layer"),
    ),
    "guardserve_layer_mean_shift": Description(
        "gauge", "Mean shift of the layer's input in the recent window, RMS over channels.", ("model", "layer")
    ),
    "guardserve_layer_log_std_ratio": Description(
        "gauge", "Log ratio of live to running standard deviation, RMS over channels.", ("model", "layer")
    ),
    "guardserve_layer_wasserstein2": Description(
        "gauge", "Normalised Wasserstein-2 distance from the running statistics, RMS over channels.", ("model", "layer")
    ),
    "guardserve_channel_wasserstein2": Description(
        "gauge", f"The same for one channel; the worst {WORST_CHANNELS} of the model.", ("model", "layer", "channel")
    ),
    "guardserve_batchnorm_layers": Description("gauge", "BatchNorm layers of the model.", ("model", "observed")),
    "guardserve_unobservable_channels": Description(
        "gauge",
        "Channels that the monitor leaves out: fusion has scaled away what enters them, "
        "or their statistics are not finite.",
        ("model",),
    ),
    "guardserve_model_ready": Description(
        "gauge", "1 when the model has passed its start-up probe.", ("model",), "min"
    ),
    "guardserve_model_info": Description(
        "gauge", "Always 1; what is served.", ("model", "platform", "device", "model_version")
    ),
    "guardserve_workers": Description(
        "gauge",
        "Processes that serve the model: up while they take connections, held while they may not as they have loaded "
        "something else than those that do, else down.",
        ("state",),
    ),
    "guardserve_worker_restarts_total": Description("counter", "Workers that ended and were started again.", ()),
    "guardserve_build_info": Description("gauge", "Always 1; what serves it.", ("version", "torch", "python")),
}
"""Every metric that guardserve exports, beside the ``process_`` and ``python_`` ones of prometheus_client."""

METRIC_NAMES = frozenset(METRICS)

WORKER_STATES = ("up", "held", "down")
"""Every value of the label ``state`` of workers."""

RELOADS = ("done", "failed")
"""Every value of the label ``outcome``."""
