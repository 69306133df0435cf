"""The alert chain with the real programs: a served model, Prometheus, Alertmanager and whoever they wake."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml  # type: ignore[import-untyped]
from serving import command, free_port, listening, wait_until

from guardserve import ReferenceProfile
from guardserve.demo.digits import SHIFTS, load_digits
from guardserve.loading import load_model

DOCKER = Path(__file__).parents[1] / "docker"
MODEL = "digits_cnn"

TRACE = "0af7651916cd43dd8448eb211c80319c"
REQUEST = "1-5f:{a}[b]/@=+~!#'"


class Operators(http.server.ThreadingHTTPServer):
    """The webhook that Alertmanager calls."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Message)
        self.alerts: list[dict[str, Any]] = []


class Message(http.server.BaseHTTPRequestHandler):
    """Keeps the alerts of one call."""

    def do_POST(self) -> None:
        """Take the call."""
        assert isinstance(self.server, Operators)
        self.server.alerts += json.loads(self.rfile.read(int(self.headers["Content-Length"])))["alerts"]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Keep the tests' output clean."""


@contextmanager
def program(*arguments: str) -> Iterator[None]:
    """Run a program until the block ends."""
    process = subprocess.Popen(arguments)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def configure(folder: Path, targets: Sequence[str], alertmanager: str, webhook: str) -> None:
    """Write docker/'s configuration with other addresses, and seconds where it has minutes.

    But for targets that cannot be scraped: on a busy machine one may be late for seconds.
    """
    rules, late = (DOCKER / "prometheus" / "rules.yml").read_text(), 'up{job="guardserve"})\n        for: 2'
    assert f"{late}m" in rules
    (folder / "rules.yml").write_text(re.sub(r"\b(\d+)m\b", r"\1s", rules).replace(f"{late}s", f"{late}m"))
    prometheus = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    prometheus["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    prometheus["scrape_configs"][0]["static_configs"] = [{"targets": list(targets)}]
    prometheus["alerting"]["alertmanagers"][0]["static_configs"] = [{"targets": [alertmanager]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(prometheus))
    routing = yaml.safe_load((DOCKER / "alertmanager" / "alertmanager.yml").read_text())
    routing["route"] |= {"group_wait": "1s", "group_interval": "1s"}
    routing["receivers"][0]["webhook_configs"][0]["url"] = webhook
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(routing))


@dataclass
class Chain:
    """What watches a served model.

    Attributes:
        woken: The operators at its end.
        prometheus: Address of Prometheus.
        url: Of the server.
        model: What it serves.
    """

    woken: Operators
    prometheus: str
    url: str
    model: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Ask Prometheus; an empty answer while it starts."""
        try:
            answer = httpx.get(f"http://{self.prometheus}/api/v1/query", params={"query": expression}, trust_env=False)
        except httpx.TransportError:
            return []
        return list(answer.json()["data"]["result"]) if answer.is_success else []

    def scraped(self, metric: str) -> None:
        """Wait until a series has been scraped a few times."""
        found = f'{metric}{{instance="{address(self.url)}"}}[10s]'
        wait_until(lambda: any(len(series["values"]) > 5 for series in self.query(found)))

    def exemplars(self, expression: str) -> list[dict[str, str]]:
        """Ask Prometheus for the ids of the exemplars of a minute."""
        now = time.time()
        parameters: dict[str, Any] = {"query": expression, "start": now - 60, "end": now}
        answer = httpx.get(f"http://{self.prometheus}/api/v1/query_exemplars", params=parameters, trust_env=False)
        return [one["labels"] for series in answer.raise_for_status().json()["data"] for one in series["exemplars"]]

    def firing(self) -> set[str]:
        """Name the alerts about this model that fire."""
        alerts = [alert["metric"] for alert in self.query('ALERTS{alertstate="firing"}')]
        return {labels["alertname"] for labels in alerts if self._is_meant(labels)}

    @property
    def alerts(self) -> list[dict[str, Any]]:
        """What the operators were told of this model."""
        return [alert for alert in list(self.woken.alerts) if self._is_meant(alert["labels"])]

    def told(self, status: str, alert: str) -> dict[str, Any] | None:
        """Find the first message about an alert, ``firing`` or ``resolved``."""
        told = (told for told in self.alerts if told["status"] == status and told["labels"]["alertname"] == alert)
        return next(told, None)

    def wait_for(self, status: str, alert: str) -> dict[str, Any]:
        """Wait until the operators are told."""
        wait_until(lambda: self.told(status, alert))
        told = self.told(status, alert)
        assert told is not None
        return told

    def _is_meant(self, labels: dict[str, str]) -> bool:
        """Tell whether an alert may be about this model; some are of all that have its name."""
        mine = {"instance": address(self.url), "model": self.model}
        return (mine | labels).items() >= mine.items()


def address(url: str) -> str:
    """Return host and port, as Prometheus calls a server."""
    return url.removeprefix("http://")


@contextmanager
def watched(
    folder: Path, urls: Sequence[str], require_program: Callable[[str], str]
) -> Iterator[tuple[Operators, str]]:
    """Have the real Prometheus and the real Alertmanager watch servers; give whom these wake, and where that is."""
    commands = require_program("prometheus"), require_program("prometheus-alertmanager")
    prometheus, alertmanager = (f"127.0.0.1:{free_port()}" for _ in commands)
    with ExitStack() as stack:
        woken = Operators()
        stack.enter_context(listening(woken))
        webhook = f"http://127.0.0.1:{woken.server_port}"
        configure(folder, [address(url) for url in urls], alertmanager, webhook)
        stack.enter_context(
            program(
                commands[1],
                f"--config.file={folder / 'alertmanager.yml'}",
                f"--storage.path={folder / 'alertmanager'}",
                f"--web.listen-address={alertmanager}",
                "--cluster.listen-address=",
                "--log.level=warn",
            )
        )
        stack.enter_context(
            program(
                commands[0],
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'prometheus'}",
                f"--web.listen-address={prometheus}",
                "--enable-feature=exemplar-storage",
                "--log.level=warn",
            )
        )
        yield woken, prometheus


def infer(url: str, model: str, name: str, batch: torch.Tensor) -> httpx.Response:
    """Send a request."""
    tensor = {"name": name, "shape": list(batch.shape), "datatype": "FP32", "data": batch.flatten().tolist()}
    headers = {"X-Request-Id": REQUEST, "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    return httpx.post(f"{url}/v2/models/{model}/infer", json={"inputs": [tensor]}, headers=headers, trust_env=False)


def recognise(url: str, images: torch.Tensor) -> None:
    """Have images recognised, eight in a request."""
    for batch in torch.split(images, 8):
        infer(url, MODEL, "image", batch).raise_for_status()


def digits() -> torch.Tensor:
    """Load clean images."""
    pytest.importorskip("sklearn", reason="the demo's digits need scikit-learn")
    return load_digits().live.images


def shifted(chain: Chain) -> None:
    """Have a model judged by its running statistics shift, and shift back."""
    images = digits()[:128]
    recognise(chain.url, images)
    chain.scraped("guardserve_shift_score")
    assert chain.firing() == set()

    recognise(chain.url, SHIFTS["brighter"](images))
    told = chain.wait_for("firing", "GuardserveDomainShift")
    assert told["labels"]["model"] == MODEL
    says = r" is ([\d.]+) running .*, threshold 0\.30\. Worst layers: blocks\.\d\.norm \(([\d.]+)\)"
    found = re.search(says, told["annotations"]["description"])
    assert found is not None, told["annotations"]["description"]
    assert found[1] == found[2]

    recognise(chain.url, images)
    chain.wait_for("resolved", "GuardserveDomainShift")
    assert {alert["labels"]["alertname"] for alert in chain.alerts} == {"GuardserveDomainShift"}


def shifted_from_reference(chain: Chain) -> None:
    """Have a model judged by a reference shift, and shift back."""
    images = digits()
    recognise(chain.url, images[:200])
    chain.scraped("guardserve_shift_evidence")
    assert chain.firing() == set()

    recognise(chain.url, SHIFTS["brighter"](images[:64]))
    told = chain.wait_for("firing", "GuardserveShiftAlarm")
    lead = re.search(r"left its null is (\S+)\. The evidence is ([\d.]+) times", told["annotations"]["description"])
    assert lead is not None, told["annotations"]["description"]
    assert lead[1] == "blocks.0.norm"

    for _ in range(3):
        recognise(chain.url, images)
    chain.wait_for("resolved", "GuardserveShiftAlarm")


UNSTABLE = """
import torch
from torch import nn
import guardserve

class Unstable(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.ratio = nn.Linear(2, 2)

    def forward(self, x):
        y = self.ratio(self.norm(x))
        return y / (x[:, :1] != 7)

@guardserve.example_input(x=torch.zeros(1, 2))
def model():
    return Unstable().eval()
"""


def unstable(chain: Chain) -> None:
    """Have a model give an output that is no number once, then again and again, and then no more."""
    good, bad = torch.zeros(1, 2), torch.full((1, 2), 7.0)
    increase = 'instance:guardserve_nonfinite_samples:increase5m{origin="output"}'
    chain.scraped("guardserve_nonfinite_samples_total")
    assert infer(chain.url, "model", "x", good).status_code == 200
    assert infer(chain.url, "model", "x", bad).status_code == 500
    wait_until(lambda: chain.query(increase))
    wait_until(lambda: not chain.query(increase))
    assert chain.told("firing", "GuardserveNonFiniteOutputs") is None

    def more() -> bool:
        infer(chain.url, "model", "x", bad)
        return chain.told("firing", "GuardserveNonFiniteOutputs") is not None

    wait_until(more)
    told = chain.wait_for("firing", "GuardserveNonFiniteOutputs")
    assert told["labels"]["origin"] == "output"
    for series in (
        'guardserve_nonfinite_samples_total{origin="output"}',
        "guardserve_request_duration_seconds_bucket",
    ):
        found = chain.exemplars(series)
        assert found
        assert all(labels == {"request_id": REQUEST, "trace_id": TRACE} for labels in found)
    assert chain.exemplars("guardserve_forward_duration_seconds_bucket") == []
    chain.wait_for("resolved", "GuardserveNonFiniteOutputs")


@pytest.fixture(scope="module")
def stories(
    tmp_path_factory: pytest.TempPathFactory, require_program: Callable[[str], str]
) -> Iterator[list[Future[None]]]:
    """Have all three happen at once, to servers that are watched together: most of it is waiting."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "unstable.py").write_text(UNSTABLE)
    digits()
    profile = ReferenceProfile.fit(load_model("demo").module, [load_digits().train.images], target_arl=1000)
    profile.save(folder / "profile.safetensors")
    settings = {"GUARDSERVE_SHIFT_WINDOW": "64", "GUARDSERVE_SHIFT_THRESHOLD": "0.3"}
    options = ("--reference", str(folder / "profile.safetensors"), "--target-arl", "1000")
    with (
        command("serve", "demo", env=os.environ | settings) as plain,
        command("serve", "demo", *options) as judging,
        command("serve", "unstable:model", env=os.environ | {"PYTHONPATH": str(folder)}, cwd=folder) as dividing,
        watched(folder, [plain, judging, dividing], require_program) as watching,
        ThreadPoolExecutor(3) as threads,
    ):
        yield [
            threads.submit(shifted, Chain(*watching, plain, MODEL)),
            threads.submit(shifted_from_reference, Chain(*watching, judging, MODEL)),
            threads.submit(unstable, Chain(*watching, dividing, "model")),
        ]


def test_a_shift_wakes_the_operators_with_its_layers_and_its_end_is_told(stories: list[Future[None]]) -> None:
    """Clean traffic raises nothing; brighter images raise the alert; clean ones again resolve it."""
    stories[0].result()


def test_with_a_reference_the_alert_names_the_layer_where_the_shift_begins(stories: list[Future[None]]) -> None:
    """The detector's own alarm reaches the operators, and its recovery does."""
    stories[1].result()


def test_outputs_that_are_not_numbers_wake_the_operators_until_they_end(stories: list[Future[None]]) -> None:
    """One such answer is no alert; one again and again is, and what fails of it; good answers end both.

    Prometheus knows of a request with such an answer, and of one as long as that, by their ids.
    """
    stories[2].result()
