"""The metrics that a scrape gives."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from serving import loaded
from torch import nn

from guardserve import ReferenceProfile
from guardserve.identity import MAX_LENGTH, Identity, identified
from guardserve.metrics import CONTENT_TYPE, METRICS, OPENMETRICS, WORST_CHANNELS, Metrics, negotiated
from guardserve.runtime import Runtime
from guardserve.signature import TensorSpec
from guardserve.totals import NO_ENGINE


@pytest.fixture
def metrics() -> Metrics:
    """Return the metrics of a small model that has served a window of samples, one with a NaN activation."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    profile = ReferenceProfile.fit(model, [torch.randn(200, 3)], target_arl=1000)
    runtime = Runtime(loaded(model, TensorSpec("x", torch.float32, (-1, 3))), reference=profile, target_arl=1000)
    runtime.start()
    metrics = Metrics(runtime)
    for _ in range(20):  # one in 16 is timed
        runtime.infer({"x": torch.randn(8, 3)})
        metrics.forward_ended(8, 0.002)
        metrics.request_ended(200, 0.003)
    runtime.infer({"x": torch.randn(8, 3) + 10})  # a shift
    metrics.request_ended(400, 0.001, "malformed")
    return metrics


def test_the_table_is_exactly_what_a_scrape_gives(metrics: Metrics) -> None:
    """Every documented metric is exported with its kind and labels, and nothing else of ours is."""
    families = {
        family.name + ("_total" if family.type == "counter" else ""): family
        for family in text_string_to_metric_families(metrics.render().decode())
        if family.name.startswith("guardserve_")
    }
    assert set(families) == set(METRICS)
    for name, description in METRICS.items():
        family = families[name]
        assert family.type == description.kind
        assert family.documentation == description.help
        assert family.samples, name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(description.labels)


def test_openmetrics_says_the_same_and_names_requests_that_stand_for_others(metrics: Metrics) -> None:
    """The newest of each bucket of durations, and of each output and input that was not finite; nothing else."""
    runtime = metrics.totals.versions[-1].runtime
    metrics.request_ended(200, 0.003, None, Identity({b"x-request-id": b"first"}))
    metrics.request_ended(200, 0.004, None, Identity({b"x-request-id": b"second"}))
    metrics.request_ended(200, 99.0, None, Identity({b"traceparent": b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"}))
    longest = Identity({b"x-request-id": b"x" * MAX_LENGTH, b"traceparent": b"00-%b-%b-00" % (b"c" * 32, b"d" * 16)})
    longest.protocol_id = "not to be told"
    with identified(longest):
        runtime.nonfinite_inputs([torch.full((2, 3), torch.nan)])
    text = metrics.render(OPENMETRICS).decode()
    assert text.endswith("# EOF\n")
    families = {family.name: family for family in openmetrics_families(text)}  # type: ignore[no-untyped-call]
    plain = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    assert {name for name in families if name.startswith("guardserve_")} == {
        name for name in plain if name.startswith("guardserve_")
    }
    samples = [sample for family in families.values() for sample in family.samples if sample.exemplar]
    told = {(s.name, s.labels.get("le", s.labels.get("name"))): s.exemplar for s in samples}
    bucket = "guardserve_request_duration_seconds_bucket"
    assert {key: (one.labels["request_id"], one.value) for key, one in told.items()} == {
        (bucket, "0.005"): ("second", 0.004),
        (bucket, "+Inf"): ("a" * 32, 99.0),
        ("guardserve_nonfinite_samples_total", "x"): ("x" * MAX_LENGTH, 2.0),
    }
    assert told[bucket, "+Inf"].labels["trace_id"] == "a" * 32
    for one in told.values():
        assert abs(float(one.timestamp) - time.time()) < 60
        assert sum(len(name) + len(value) for name, value in one.labels.items()) <= 128, "as OpenMetrics bounds it"


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        (
            "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,*/*;q=0.1",
            True,
        ),
        ("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.2", True),
        ("text/plain;q=0.5, application/openmetrics-text; q=0.9", True),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text;version=0.0.1", False),
        ("application/openmetrics-text;q=0,text/plain", False),
        ("application/openmetrics-text; q=0.00;version=1.0.0", False),
        ("application/openmetrics-texts", False),
        ("text/plain;version=0.0.4", False),
        ("*/*", False),
        ("", False),
    ],
)
def test_a_scrape_gets_openmetrics_if_it_names_it(accept: str, content_type: bool) -> None:
    """As Prometheus 2 and 3 do; a browser or curl gets text."""
    assert negotiated(accept) == (OPENMETRICS if content_type else CONTENT_TYPE)


def test_every_judged_sample_is_in_the_histogram_of_p_values_once(metrics: Metrics) -> None:
    """Scrapes, and looks between them, share what is new; odd samples are in the first bucket."""
    for _ in range(2):
        metrics.take_p_values()
        lines = dict(line.rsplit(" ", 1) for line in metrics.render().decode().splitlines() if "p_value" in line)
        assert float(lines['guardserve_shift_p_value_count{model="net"}']) == 21 * 8
        assert float(lines['guardserve_shift_p_value_bucket{le="0.01",model="net"}']) >= 8
        assert float(lines['guardserve_shift_p_value_bucket{le="1.0",model="net"}']) == 21 * 8


def test_samples_with_nan_in_a_layer_have_the_lowest_p_value() -> None:
    """They are odder than any; without a reference profile there is nothing to count."""
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))
    profile = ReferenceProfile.fit(model, [torch.randn(200, 3)], target_arl=1000)
    for reference in (profile, None):
        runtime = Runtime(loaded(model), reference=reference, target_arl=1000)
        runtime.start()
        metrics = Metrics(runtime)
        runtime.forward([torch.tensor([[0.0, 1.0, 2.0], [torch.nan, 0.0, 0.0]])])
        text = metrics.render().decode()
        assert f'guardserve_shift_p_value_count{{model="net"}} {2.0 * (reference is not None)}\n' in text
        if reference is not None:
            assert 'guardserve_shift_p_value_bucket{le="0.001",model="net"} 1.0' in text
        assert ('guardserve_reference_info{model="net",samples="200",target_arl="1000"} 1.0' in text) is (
            reference is not None
        )
        runtime.close()


def test_names_follow_the_conventions_as_promtool_knows_them(
    metrics: Metrics, require_program: Callable[[str], str]
) -> None:
    """Promtool's linter has nothing to say."""
    promtool = require_program("promtool")
    done = subprocess.run([promtool, "check", "metrics"], input=metrics.render(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert not done.stderr


def test_label_values_stay_bounded_however_wide_the_model() -> None:
    """Only the worst few channels of the whole model have series of their own."""
    model = nn.Sequential(*(nn.BatchNorm1d(256) for _ in range(10)))
    runtime = Runtime(loaded(model, TensorSpec("x", torch.float32, (-1, 256))))
    runtime.start()
    runtime.infer({"x": torch.randn(128, 256)})
    lines = Metrics(runtime).render().decode().splitlines()
    assert sum(line.startswith("guardserve_channel_wasserstein2{") for line in lines) == WORST_CHANNELS
    assert sum(line.startswith("guardserve_layer_wasserstein2{") for line in lines) == 10


def test_counters_that_can_move_are_there_from_the_start(metrics: Metrics) -> None:
    """A series that appears with its first increment would hide that increment from rate()."""
    text = metrics.render().decode()
    assert 'guardserve_nonfinite_samples_total{model="net",name="output",origin="output"} 0.0' in text
    assert 'guardserve_nonfinite_samples_total{model="net",name="x",origin="input"} 0.0' in text
    assert 'guardserve_nonfinite_samples_total{model="net",name="2",origin="activation"} 0.0' in text
    assert 'guardserve_request_errors_total{model="net",reason="nonfinite_output"} 0.0' in text
    assert 'guardserve_guard_violations_total{kind="training_during_forward",model="net"} 0.0' in text


def test_two_models_metrics_do_not_touch_the_global_registry(metrics: Metrics) -> None:
    """A second server in the same process has its own registry, and the default one stays as it was."""
    from prometheus_client import REGISTRY  # noqa: PLC0415 - only to see that it is untouched

    other = Metrics(Runtime(loaded(nn.BatchNorm1d(3), name="other")))
    assert b'model="net"' not in other.render()
    assert b'model="net"' in metrics.render()
    assert not any(family.name.startswith("guardserve_") for family in REGISTRY.collect())


def test_a_scrape_needs_no_server() -> None:
    """The text format parses for a model that has not started yet."""
    text = Metrics(Runtime(loaded(nn.BatchNorm1d(3)))).render().decode()
    assert 'guardserve_model_ready{model="net"} 0.0' in text


def test_the_state_is_one_of_all_states_and_evidence_comes_with_a_reference_only(metrics: Metrics) -> None:
    """Exactly one state is 1; without a profile there is no evidence to show, and no alarm can be counted."""
    plain = Runtime(loaded(nn.Sequential(nn.BatchNorm1d(3)), TensorSpec("x", torch.float32, (-1, 3))))
    plain.start()
    for text, referenced in ((metrics.render().decode(), True), (Metrics(plain).render().decode(), False)):
        states = [line for line in text.splitlines() if line.startswith("guardserve_shift_state{")]
        assert len(states) == 6
        assert sum(line.endswith(" 1.0") for line in states) == 1
        assert ("\nguardserve_shift_evidence{" in text) is referenced
        assert ("\nguardserve_shift_evidence_threshold{" in text) is referenced
        assert "\nguardserve_shift_alarms_total{" in text


def test_a_large_model_has_few_series_and_a_scrape_of_it_computes_little() -> None:
    """Of 200 layers with 2,048 channels each, only layers and the worst channels are series: four for a layer.

    Once the monitor has been looked at, what is left to a scrape takes under 50 ms of a processor.
    """

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm1d(2048) for _ in range(200))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for norm in self.norms:
                x = norm(x)
            return x[:, :4]

    runtime = Runtime(loaded(Deep().eval(), TensorSpec("x", torch.float32, (-1, 2048))))
    runtime.start()
    try:
        for _ in range(10):
            runtime.infer({"x": torch.randn(8, 2048)})
        metrics = Metrics(runtime)
        text = metrics.render()
        metrics.refresh = lambda: None
        taken = []
        for _ in range(10):
            began = time.thread_time()
            assert metrics.render(OPENMETRICS)
            taken.append(time.thread_time() - began)
        families = text_string_to_metric_families(text.decode())
        samples = [sample.name for family in families for sample in family.samples]
    finally:
        runtime.close()
    assert min(taken) < 0.05
    assert len(samples) < 4 * 200 + 200
    assert samples.count("guardserve_channel_wasserstein2") == WORST_CHANNELS


def test_a_layer_that_other_code_takes_over_counts_as_unobserved() -> None:
    """And no more as observed: together they are all layers."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 8), nn.BatchNorm1d(8))
    runtime = Runtime(loaded(model))
    metrics = Metrics(runtime)
    metrics.follow(runtime, mock.Mock(counts=NO_ENGINE), "1")
    for observed in (2, 1):
        text = metrics.render().decode()
        assert f'guardserve_batchnorm_layers{{model="net",observed="true"}} {observed}.0' in text
        assert f'guardserve_batchnorm_layers{{model="net",observed="false"}} {2 - observed}.0' in text
        vars(model[0])["forward"] = lambda x: x
    runtime.close()
