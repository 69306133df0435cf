"""Who may ask: keys in every form, what stays open, and a server that refuses to stand open unasked."""

from __future__ import annotations

import hashlib
import os
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from serving import command, loaded, metric, wait_until
from torch import nn

from guardserve.cli import main
from guardserve.exceptions import SettingsError
from guardserve.runtime import Runtime
from guardserve.service.access import Access, is_loopback, read_keys
from guardserve.service.app import create_app
from guardserve.service.background import serve_in_background

KEY, OTHER = "a-key-of-a-client-1", "another-key-000-002"
INFER = "/v2/models/net/infer"
BODY = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}


@contextmanager
def protected(access: Access) -> Iterator[httpx.Client]:
    """Serve a small model to those who may ask."""
    runtime = Runtime(loaded(nn.Sequential(nn.BatchNorm1d(3))))
    with (
        serve_in_background(create_app(runtime, access=access)) as url,
        httpx.Client(base_url=url, trust_env=False) as client,
    ):
        wait_until(lambda: runtime.failure is None)
        yield client


def test_every_endpoint_but_health_and_metrics_needs_a_key() -> None:
    """Without one, with a wrong one or in a wrong form: 401 in the protocol's form, and it is not run."""
    with protected(Access([KEY, f"sha256:{hashlib.sha256(OTHER.encode()).hexdigest()}"])) as client:
        for path in ("/v2", "/v2/models/net", "/docs", "/openapi.json", "/ui", "/v2/models/other/infer"):
            assert client.get(path).status_code == 401, path
        for header in ("", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY, "Basic ?", f"Digest {KEY}"):
            answer = client.post(INFER, json=BODY, headers={"Authorization": header})
            assert answer.status_code == 401
            assert "API key" in answer.json()["error"]
            assert answer.headers.get_list("www-authenticate")[0].startswith("Bearer")
        assert metric(client, 'guardserve_requests_total{model="net",status="401"}') == 7
        assert metric(client, 'guardserve_request_errors_total{model="net",reason="unauthorized"}') == 7
        for key in (KEY, OTHER):
            assert client.post(INFER, json=BODY, headers={"Authorization": f"Bearer {key}"}).status_code == 200
            assert client.post(INFER, json=BODY, auth=("anyone", key)).status_code == 200
        assert client.get("/v2/health/ready").status_code == client.get("/v2/health/live").status_code == 200
        wait_until(lambda: metric(client, 'guardserve_samples_total{model="net"}') == 4)


def test_health_and_metrics_are_protected_on_demand() -> None:
    """Each by itself."""
    for options, status in (
        ({"protect_metrics": True}, {"/metrics": 401, "/v2/health/ready": 200}),
        ({"protect_health": True}, {"/metrics": 200, "/v2/health/ready": 401}),
    ):
        with protected(Access([KEY], **options)) as client:
            assert {path: client.get(path).status_code for path in status} == status
            authorised = {path: client.get(path, headers={"Authorization": f"Bearer {KEY}"}) for path in status}
            assert all(answer.status_code == 200 for answer in authorised.values())


@pytest.mark.parametrize(
    ("key", "says"), [("short", "5 characters"), ("sha256:abc", "64 digits"), ("sha256:" + "g" * 64, "64 digits")]
)
def test_a_key_that_is_none_is_refused_without_showing_it(key: str, says: str) -> None:
    """A key that could be guessed, or a hash that is none."""
    with pytest.raises(SettingsError, match=says) as caught:
        Access([key])
    assert key not in str(caught.value)


def test_a_file_of_keys_may_have_comments_and_must_have_a_key(tmp_path: Path) -> None:
    """One a line; a file that cannot be read is named."""
    path = tmp_path / "keys"
    path.write_text(f"# clients\n\n{KEY}\n  {OTHER}  \n")
    assert read_keys(path) == [KEY, OTHER]
    path.write_text("# none\n")
    with pytest.raises(SettingsError, match="holds no API key"):
        read_keys(path)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_keys(tmp_path / "missing")


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),  # noqa: S104 - nothing listens there
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_what_other_machines_can_reach_is_known(host: str, local: bool) -> None:
    """A name that is not known is taken for one that they can."""
    assert is_loopback(host) is local


def test_a_server_does_not_stand_open_to_other_machines_unless_told_to() -> None:
    """The error names both remedies, before the model is loaded."""
    result = CliRunner().invoke(main, ["serve", "no.such:model", "--host", "0.0.0.0"])  # noqa: S104 - it is refused
    assert result.exit_code == 1
    for remedy in ("--api-key-file", "GUARDSERVE_API_KEYS", "--allow-anonymous"):
        assert remedy in result.output
    allowed = ["serve", "no.such:model", "--host", "0.0.0.0", "--allow-anonymous"]  # noqa: S104 - no model, no server
    assert "no module 'no'" in CliRunner().invoke(main, allowed).output


def test_the_command_takes_keys_from_the_environment_and_serves_https(
    tmp_path: Path, require_program: Callable[[str], str]
) -> None:
    """The certificate is the given one, and without a key nothing is answered."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    request = [
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]
    files = ("-out", certificate, "-keyout", key)
    subprocess.run([require_program("openssl"), *request, *files], check=True, capture_output=True)
    context = ssl.create_default_context(cafile=str(certificate))
    arguments = ["serve", "demo", "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--log-level", "error"]
    env = os.environ | {"GUARDSERVE_API_KEYS": f"{KEY} {OTHER}"}
    with (
        command(*arguments, env=env, verify=context) as url,
        httpx.Client(base_url=url, verify=context, trust_env=False) as client,
    ):
        assert url.startswith("https:")
        assert client.get("/v2").status_code == 401
        assert client.get("/v2", headers={"Authorization": f"Bearer {OTHER}"}).status_code == 200
