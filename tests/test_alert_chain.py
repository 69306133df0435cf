"""The alert chain with the real programs: a served model, Prometheus, Alertmanager and whoever they wake."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml  # type: ignore[import-untyped]
from serving import command, free_port, wait_until

from guardserve.demo.digits import SHIFTS, load_digits

DOCKER = Path(__file__).parents[1] / "docker"
MODEL = "digits_cnn"


class Operators(http.server.ThreadingHTTPServer):
    """The webhook that Alertmanager calls."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Message)
        self.alerts: list[dict[str, Any]] = []

    def told(self, status: str, alert: str) -> dict[str, Any] | None:
        """Find the first message about an alert, ``firing`` or ``resolved``."""
        told = (told for told in self.alerts if told["status"] == status and told["labels"]["alertname"] == alert)
        return next(told, None)


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


@contextmanager
def operators() -> Iterator[Operators]:
    """Listen to the alerts."""
    with Operators() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def configure(folder: Path, target: str, alertmanager: str, webhook: str) -> None:
    """Write docker/'s configuration with other addresses, and seconds where it has minutes."""
    rules = (DOCKER / "prometheus" / "rules.yml").read_text()
    (folder / "rules.yml").write_text(re.sub(r"\b(\d+)m\b", r"\1s", rules))
    prometheus = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    prometheus["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    prometheus["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    prometheus["alerting"]["alertmanagers"][0]["static_configs"] = [{"targets": [alertmanager]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(prometheus))
    routing = yaml.safe_load((DOCKER / "alertmanager" / "alertmanager.yml").read_text())
    routing["route"] |= {"group_wait": "1s", "group_interval": "1s"}
    routing["receivers"][0]["webhook_configs"][0]["url"] = webhook
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(routing))


def send(url: str, images: torch.Tensor) -> None:
    """Have images recognised, eight in a request."""
    with httpx.Client(base_url=url) as client:
        for batch in torch.split(images, 8):
            tensor = {"name": "image", "shape": list(batch.shape), "datatype": "FP32", "data": batch.flatten().tolist()}
            client.post(f"/v2/models/{MODEL}/infer", json={"inputs": [tensor]}).raise_for_status()


def test_a_shift_wakes_the_operators_with_its_layers_and_its_end_is_told(
    tmp_path: Path, require_program: Callable[[str], str]
) -> None:
    """Clean traffic raises nothing; brighter images raise the alert; clean ones again resolve it."""
    pytest.importorskip("sklearn", reason="the demo's digits need scikit-learn")
    commands = require_program("prometheus"), require_program("prometheus-alertmanager")
    prometheus, alertmanager = (f"127.0.0.1:{free_port()}" for _ in commands)
    images = load_digits().live.images[:128]
    settings = {"GUARDSERVE_SHIFT_WINDOW": "64", "GUARDSERVE_SHIFT_THRESHOLD": "0.3"}

    def query(expression: str) -> list[dict[str, Any]]:
        try:
            answer = httpx.get(f"http://{prometheus}/api/v1/query", params={"query": expression})
        except httpx.TransportError:
            return []
        return answer.json()["data"]["result"] if answer.is_success else []

    with ExitStack() as stack:
        woken = stack.enter_context(operators())
        url = stack.enter_context(command("serve", "demo", env=os.environ | settings))
        webhook = f"http://127.0.0.1:{woken.server_port}"
        configure(tmp_path, url.removeprefix("http://"), alertmanager, webhook)
        stack.enter_context(
            program(
                commands[1],
                f"--config.file={tmp_path / 'alertmanager.yml'}",
                f"--storage.path={tmp_path / 'alertmanager'}",
                f"--web.listen-address={alertmanager}",
                "--cluster.listen-address=",
                "--log.level=warn",
            )
        )
        stack.enter_context(
            program(
                commands[0],
                f"--config.file={tmp_path / 'prometheus.yml'}",
                f"--storage.tsdb.path={tmp_path / 'prometheus'}",
                f"--web.listen-address={prometheus}",
                "--log.level=warn",
            )
        )
        send(url, images)
        wait_until(lambda: any(len(score["values"]) > 5 for score in query("guardserve_shift_score[10s]")))
        assert query("ALERTS") == []

        send(url, SHIFTS["brighter"](images))
        wait_until(lambda: woken.told("firing", "GuardserveDomainShift"))
        told = woken.told("firing", "GuardserveDomainShift")
        assert told is not None
        assert told["labels"]["model"] == MODEL
        says = r" is ([\d.]+) running .*, threshold 0\.30\. Worst layers: blocks\.\d\.norm \(([\d.]+)\)"
        found = re.search(says, told["annotations"]["description"])
        assert found is not None, told["annotations"]["description"]
        assert found[1] == found[2]

        send(url, images)
        wait_until(lambda: woken.told("resolved", "GuardserveDomainShift"))
        assert {alert["labels"]["alertname"] for alert in woken.alerts} == {"GuardserveDomainShift"}
