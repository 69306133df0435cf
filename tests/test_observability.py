"""The Dockerfile, what stands in docker/, and the runbook: valid, and true to what the service exports."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml  # type: ignore[import-untyped]
from serving import listening

from guardserve.metrics import METRIC_NAMES, METRICS

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
RULES = DOCKER / "prometheus" / "rules.yml"
TARGET_LABELS = {"job", "instance"}

RequireProgram = Callable[[str], str]


def load(path: Path) -> Any:
    """Read YAML, of which JSON is a part."""
    return yaml.safe_load(path.read_text())


def check(*command: str | Path) -> None:
    """Run a checker, which must find nothing."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


DASHBOARD = load(DOCKER / "grafana" / "dashboards" / "guardserve.json")
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ALL_RULES = [rule for group in load(RULES)["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in ALL_RULES if "alert" in rule}
SERVICES = load(DOCKER / "compose.yaml")["services"]
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text()).splitlines()


def dashboard_queries() -> Iterator[str]:
    """Yield the dashboard's queries with its variables filled in."""
    for query in [target["expr"] for panel in PANELS for target in panel["targets"]] + [
        annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]
    ]:
        yield re.sub(r"\$(model|instance)", ".+", re.sub(r"\$__(rate_interval|range)", "5m", query))


QUERIES = sorted({*dashboard_queries(), *(rule["expr"] for rule in ALL_RULES)})


def selectors(query: str) -> list[promql_parser.VectorSelector]:
    """Parse a query and list its selectors."""
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(query), visit)
    return found


def known_labels(name: str) -> set[str] | None:
    """Give the labels of a series that Prometheus will have, and None for a series that it will not have."""
    if name in ("up", "ALERTS"):
        return {*TARGET_LABELS, "alertname", "alertstate", "model"}
    for rule in ALL_RULES:
        if rule.get("record") == name:
            return set().union(*(known_labels(str(part.name)) or () for part in selectors(rule["expr"])))
    family = re.sub(r"_(bucket|sum|count)$", "", name)
    histogram = family in METRICS and METRICS[family].kind == "histogram"
    if histogram and name != family:
        return {*METRICS[family].labels, *TARGET_LABELS, "le"}
    return {*METRICS[name].labels, *TARGET_LABELS} if name in METRICS and not histogram else None


def test_prometheus_accepts_its_configuration_and_its_rules(require_program: RequireProgram) -> None:
    """Promtool finds neither an error nor anything to lint."""
    promtool = require_program("promtool")
    check(promtool, "check", "config", DOCKER / "prometheus" / "prometheus.yml")
    check(promtool, "check", "rules", "--lint=all", "--lint-fatal", RULES)


def test_every_alert_fires_when_it_must_and_only_then(require_program: RequireProgram) -> None:
    """The unit tests beside the rules pass, and hold for each alert a case that fires and one that does not."""
    unit_tests = DOCKER / "prometheus" / "rules_test.yml"
    cases = [case for test in load(unit_tests)["tests"] for case in test["alert_rule_test"]]
    for fires in (True, False):
        assert {case["alertname"] for case in cases if bool(case["exp_alerts"]) is fires} == set(ALERTS)
    check(require_program("promtool"), "test", "rules", unit_tests)


def test_alertmanager_accepts_its_configuration(require_program: RequireProgram) -> None:
    """Amtool finds no error; a critical alert has somewhere to go, and mere information wakes nobody."""
    amtool = require_program("amtool")
    configuration = DOCKER / "alertmanager" / "alertmanager.yml"
    check(amtool, "check-config", configuration)
    check(
        *(amtool, "config", "routes", "test", f"--config.file={configuration}"),
        *("--verify.receivers=operators", "severity=critical", "alertname=GuardserveTargetDown"),
    )
    check(
        *(amtool, "config", "routes", "test", f"--config.file={configuration}"),
        *("--verify.receivers=nobody", "severity=info", "alertname=GuardserveNoReference"),
    )


def test_hadolint_finds_nothing_in_the_dockerfile(require_program: RequireProgram) -> None:
    """The Dockerfile follows hadolint's rules, down to style."""
    check(require_program("hadolint"), "--failure-threshold", "style", ROOT / "Dockerfile")


def test_every_alert_says_how_bad_it_is_what_it_means_and_where_to_read_on() -> None:
    """Each alert has a severity, a summary, a description and a section of the runbook, which has no other."""
    sections = re.findall(r"^## (.+)$", RUNBOOK, re.MULTILINE)
    assert sorted(sections) == sorted(ALERTS)
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert "for" in rule
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{name.lower()}"


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_reads_only_series_and_labels_that_exist(query: str) -> None:
    """It parses, and every series in it is exported or recorded with the labels that it selects by."""
    for selector in selectors(query):
        labels = known_labels(str(selector.name))
        assert labels is not None, f"no series {selector.name}"
        assert {matcher.name for matcher in selector.matchers.matchers} <= labels


def test_texts_name_only_metrics_that_exist() -> None:
    """What alerts, the dashboard's variables and the runbook mention is exported or recorded."""
    texts = [RUNBOOK, *(str(rule["annotations"]) for rule in ALERTS.values()), str(DASHBOARD["templating"])]
    known = METRIC_NAMES | {rule["record"] for rule in ALL_RULES if "record" in rule}
    assert set(re.findall(r"\b(?:instance:)?guardserve_\w+(?::\w+)?", " ".join(texts))) <= known


def test_the_dashboard_shows_every_metric() -> None:
    """Whoever adds a metric gives it a place where it is seen."""
    shown = {
        re.sub(r"_(bucket|sum|count)$", "", str(part.name))
        for query in dashboard_queries()
        for part in selectors(query)
    }
    assert shown >= METRIC_NAMES


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: str(panel["title"]))
def test_a_panel_explains_itself(panel: dict[str, Any]) -> None:
    """It has a title, a description, a unit, and a legend for each series."""
    assert panel["title"]
    assert panel["description"]
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert all(target["legendFormat"] for target in panel["targets"]) or panel["type"] == "table"
    assert panel["type"] != "timeseries" or panel["options"]["legend"]["showLegend"]


def test_the_dashboard_asks_the_provisioned_data_source() -> None:
    """Every panel, query, variable and annotation names the data source that Grafana is provisioned with."""
    (source,) = load(DOCKER / "grafana" / "provisioning" / "datasources" / "prometheus.yaml")["datasources"]
    parts = [*PANELS, *(target for panel in PANELS for target in panel["targets"])]
    parts += DASHBOARD["templating"]["list"] + DASHBOARD["annotations"]["list"]
    assert all(part["datasource"] == {"type": source["type"], "uid": source["uid"]} for part in parts)


def test_panels_neither_overlap_nor_share_an_id() -> None:
    """Every panel has cells of the 24 columns to itself."""
    cells: Counter[tuple[int, int]] = Counter()
    for panel in DASHBOARD["panels"]:
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        assert x + w <= 24, panel["title"]
        cells.update(product(range(x, x + w), range(y, y + h)))
    assert cells.most_common(1)[0][1] == 1
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_compose_mounts_what_exists_and_read_only() -> None:
    """Every mounted path is there and cannot be written; every named volume is declared."""
    volumes = load(DOCKER / "compose.yaml")["volumes"]
    for service in SERVICES.values():
        for source, _, mode in (mount.partition(":") for mount in service.get("volumes", ())):
            if source.startswith("."):
                assert (DOCKER / source).exists(), source
                assert mode.endswith(":ro"), source
            else:
                assert source in volumes


def test_compose_pins_images_and_publishes_on_loopback_only() -> None:
    """Each image is built here or has a full version, and no port can be reached from another machine."""
    for name, service in SERVICES.items():
        assert "build" in service or re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert "healthcheck" in service or "build" in service, name


def test_the_services_find_each_other() -> None:
    """Addresses in the configuration are services of the compose file, each at the port that it publishes."""
    prometheus = load(DOCKER / "prometheus" / "prometheus.yml")
    (scrape,) = prometheus["scrape_configs"]
    grafana = DOCKER / "grafana" / "provisioning"
    addresses = [
        *scrape["static_configs"][0]["targets"],
        *prometheus["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"],
        load(grafana / "datasources" / "prometheus.yaml")["datasources"][0]["url"].removeprefix("http://"),
    ]
    assert len(addresses) == 3
    for host, port in (address.split(":") for address in addresses):
        assert SERVICES[host]["ports"][0].endswith(f":{port}")
    folder = load(grafana / "dashboards" / "guardserve.yaml")["providers"][0]["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in SERVICES["grafana"]["volumes"]
    assert SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"].startswith(folder)


def test_what_the_dockerfile_copies_reaches_the_builder() -> None:
    """Each copied path exists and .dockerignore, which leaves out everything else, lets it through."""
    allowed = re.findall(r"^!(.+?)/?$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    copied = [line.split()[1:-1] for line in DOCKERFILE if line.startswith("COPY ") and "--from" not in line]
    sources = {source for sources in copied for source in sources}
    assert sources == set(allowed)
    assert all((ROOT / source).exists() for source in sources)


def test_the_image_runs_the_server_as_a_numeric_user() -> None:
    """Its last stage is not root, installs nothing, and starts the demo in exec form unless told otherwise."""
    last = DOCKERFILE[max(i for i, line in enumerate(DOCKERFILE) if line.startswith("FROM ")) :]
    settings = dict(line.split(maxsplit=1) for line in last if re.match("[A-Z]+ ", line))
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", settings["USER"])
    assert json.loads(settings["ENTRYPOINT"]) == ["guardserve"]
    assert json.loads(settings["CMD"]) == ["serve", "demo", "--allow-anonymous"]
    assert settings["STOPSIGNAL"] == "SIGTERM"
    assert "/healthcheck.py" in settings["HEALTHCHECK"]
    assert not any(re.search(r"\b(pip|apt|apt-get) ", line) for line in last if line.startswith("RUN "))


def test_a_change_of_code_does_not_install_torch_again() -> None:
    """In the build the code is copied only after torch and the other dependencies are installed."""
    code = next(i for i, line in enumerate(DOCKERFILE) if line.startswith("COPY guardserve "))
    installs = [i for i, line in enumerate(DOCKERFILE) if " install " in line and "--no-deps" not in line]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in DOCKERFILE[i] for i in installs)
    assert max(installs) < code


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers 200 to the readiness question of a ready server and 503 otherwise."""

    def do_GET(self) -> None:
        """Answer."""
        ready = isinstance(self.server, ReadyServer) and self.path == "/v2/health/ready"
        self.send_response(200 if ready else 503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Keep the tests' output clean."""


class ReadyServer(http.server.HTTPServer):
    """A server that is ready."""


@pytest.mark.parametrize(("server", "status"), [(ReadyServer, 0), (http.server.HTTPServer, 1)])
def test_the_health_check_succeeds_only_when_the_server_is_ready(
    server: type[http.server.HTTPServer], status: int
) -> None:
    """Its exit status is 0 for a 200 and 1 for a 503 or no server, whatever proxy the environment names."""
    running = server(("127.0.0.1", 0), Answer)
    environment = os.environ | {"GUARDSERVE_PORT": str(running.server_port), "http_proxy": "http://127.0.0.1:1"}
    command = [sys.executable, str(DOCKER / "healthcheck.py")]
    with listening(running):
        assert subprocess.run(command, env=environment, timeout=30, check=False).returncode == status
    assert subprocess.run(command, env=environment, timeout=30, check=False).returncode == 1
