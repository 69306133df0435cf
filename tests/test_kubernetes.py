"""The Kubernetes manifests: valid, and true to the image, the service and the alerts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from guardserve.settings import ENV_PREFIX, ServeSettings

FOLDER = Path(__file__).parents[1] / "docker" / "kubernetes"
VERSION = "1.37"
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


def load(name: str) -> dict[str, Any]:
    """Read a manifest."""
    manifest: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return manifest


DEPLOYMENT, SERVICE, MONITOR = (load(name) for name in ("deployment", "service", "servicemonitor"))
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
ENVIRONMENT = {variable["name"]: variable.get("value", "0" * 32) for variable in CONTAINER["env"]}


@pytest.mark.parametrize("manifest", [DEPLOYMENT, SERVICE], ids=lambda manifest: str(manifest["kind"]))
def test_a_manifest_follows_the_schema_of_kubernetes(manifest: dict[str, Any]) -> None:
    """No unknown field and no wrong type, strictly."""
    validator = pytest.importorskip("kubernetes_validate", reason="the schema is in kubernetes-validate")
    assert validator.validate(manifest, VERSION, strict=True) == VERSION


def test_the_monitor_follows_the_schema_of_the_prometheus_operator() -> None:
    """Every field is one that the operator knows: none gets lost on the way through its model."""
    models = pytest.importorskip("cloudcoil.models.prometheus_operator.v1", reason="it has the operator's schema")
    known = models.ServiceMonitor.model_validate(MONITOR)
    assert known.model_dump(by_alias=True, exclude_none=True, mode="json") == MONITOR


def test_labels_and_ports_lead_from_the_monitor_to_the_container() -> None:
    """The monitor finds the service, the service the pods, and both the port that the server listens on."""
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels == SERVICE["spec"]["selector"]
    assert MONITOR["spec"]["selector"]["matchLabels"] == SERVICE["metadata"]["labels"]
    assert SERVICE["metadata"]["name"] == "guardserve", "the alerts watch the job of this name"
    (port,), (inside,) = SERVICE["spec"]["ports"], CONTAINER["ports"]
    (endpoint,) = MONITOR["spec"]["endpoints"]
    assert endpoint["port"] == port["name"]
    assert port["targetPort"] == inside["name"]
    assert inside["containerPort"] == ServeSettings.model_fields["port"].default
    assert all(CONTAINER[probe]["httpGet"]["port"] == inside["name"] for probe in PROBES)


def test_it_runs_with_no_more_rights_than_the_image_needs() -> None:
    """The image's own user, no privilege, a root file system that cannot be written, and bounds on what it takes."""
    user = next(
        line.split()[1]
        for line in (FOLDER.parents[1] / "Dockerfile").read_text().splitlines()
        if line.startswith("USER ")
    )
    pod, container = POD["securityContext"], CONTAINER["securityContext"]
    assert f"{pod['runAsUser']}:{pod['runAsGroup']}" == user
    assert pod["runAsNonRoot"] is container["readOnlyRootFilesystem"] is True
    assert container["allowPrivilegeEscalation"] is POD["automountServiceAccountToken"] is False
    assert container["capabilities"] == {"drop": ["ALL"]}
    assert set(CONTAINER["resources"]) == {"requests", "limits"}


def test_it_asks_for_a_key_from_a_secret() -> None:
    """Whoever reaches the service must have it: it is not in the manifest, and nothing lets anybody in without."""
    (keys,) = [variable for variable in CONTAINER["env"] if variable["name"] == "GUARDSERVE_API_KEYS"]
    assert set(keys) == {"name", "valueFrom"}
    assert "secretKeyRef" in keys["valueFrom"]
    assert "GUARDSERVE_ALLOW_ANONYMOUS" not in ENVIRONMENT


def test_settings_exist_and_the_drain_fits_into_the_grace_period() -> None:
    """Each variable is one of the service's; Kubernetes waits for as long as the server may take to stop."""
    settings = ServeSettings(**{name.removeprefix(ENV_PREFIX).lower(): value for name, value in ENVIRONMENT.items()})
    assert settings.drain_delay + settings.shutdown_timeout < POD["terminationGracePeriodSeconds"]
