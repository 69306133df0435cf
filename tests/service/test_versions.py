"""Another version of the model in the place of the one that answers: no request lost, no change if it fails."""

from __future__ import annotations

import functools
import gc
import itertools
import math
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import tritonclient.http as triton
from serving import TIMEOUT, free_port, is_ready, loaded, metric, wait_until
from torch import nn
from tritonclient.utils import InferenceServerException

from guardserve import ReferenceProfile
from guardserve.exceptions import ModelLoadError
from guardserve.fingerprints import fingerprint
from guardserve.loading import load_model
from guardserve.runtime import Runtime
from guardserve.service.access import Access
from guardserve.service.app import create_app
from guardserve.service.background import serve_in_background
from guardserve.service.limits import Limits
from guardserve.service.versions import Versions

INFER = "/v2/models/net/infer"
LOAD = "/v2/repository/models/net/load"

OF_A_VERSION = {"forward", "watchdog", "monitor", "reload", "state"}
"""What the threads do that each version has of its own."""


@pytest.fixture(autouse=True)
def _as_unfrozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave frozen what other tests have left: to look through it takes a second, and these tests' models are not."""
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 0)
    monkeypatch.setattr(gc, "unfreeze", lambda: None)


class Numbered(nn.Module):
    """Says which version it is; waits at its gate for inputs that begin with 77."""

    def __init__(self, number: float, features: int = 1, seconds: float = 0.0) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.register_buffer("number", torch.full((1, features), float(number)))
        self.seconds = seconds
        self.open = threading.Event()
        self.waiting = threading.Event()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the number in each row."""
        time.sleep(self.seconds)
        if (x[:, 0] == 77).any():
            self.waiting.set()
            self.open.wait(30)
        y: torch.Tensor = 0 * self.bn(x).sum(1, keepdim=True) + self.number
        return y


def body(first: float = 1.0) -> dict[str, Any]:
    """Return a request of one row."""
    return {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [first, 1.0, 2.0]}]}


def number(answer: httpx.Response) -> float:
    """Return which version gave an answer."""
    assert answer.status_code == 200, answer.text
    (output,) = answer.json()["outputs"]
    value: float = output["data"][0]
    return value


def loader(*models: Callable[[], nn.Module], **options: Any) -> Callable[[Runtime], Runtime]:
    """Return what loads these models one after the other."""
    following = iter(models)
    return lambda _: Runtime(loaded(next(following)()), **options)


@contextmanager
def serving(
    first: Callable[[], nn.Module], load: Callable[[Runtime], Runtime], *, access: Access | None = None, **options: Any
) -> Iterator[httpx.Client]:
    """Serve a model that can be loaded again; give a client once it is ready or has failed."""
    runtime = Runtime(loaded(first()), **options)
    app = create_app(runtime, load=load, access=access, limits=Limits(max_batch_size=4))
    with serve_in_background(app) as url, httpx.Client(base_url=url, trust_env=False, timeout=TIMEOUT) as client:
        wait_until(functools.partial(settled, runtime))
        del runtime  # a test may want to know who else has it
        yield client


def settled(runtime: Runtime) -> bool:
    """Tell whether a start-up probe has ended, passed or not."""
    return runtime.failure is None or "failed" in runtime.failure


def test_answers_name_the_version_that_gave_them() -> None:
    """By the name that it alone has, under which it can be asked; another version has another."""
    with serving(lambda: Numbered(0), loader(lambda: Numbered(1))) as client:
        names = []
        for expected in (0.0, 1.0):
            answer = client.post(INFER, json=body())
            assert number(answer) == expected
            names.append(answer.json()["model_version"])
            assert number(client.post(f"/v2/models/net/versions/{names[-1]}/infer", json=body())) == expected
            assert client.post("/v2/repository/index").json()[0]["version"] == names[-1]
            assert client.post(LOAD).status_code == (200 if expected == 0 else 422)
        assert names[0] != names[1]
        assert client.post(f"/v2/models/net/versions/{names[0]}/infer", json=body()).status_code == 404


def counted(client: httpx.Client) -> dict[str, float]:
    """Read every counter of the server."""
    lines = client.get("/metrics").text.splitlines()
    samples = [line.rsplit(" ", 1) for line in lines if line.startswith("guardserve_")]
    return {name: float(value) for name, value in samples if "_total{" in name or "_count{" in name}


def test_versions_replace_each_other_under_load_without_a_lost_or_a_mixed_up_answer() -> None:
    """Every request is answered by one version or the next, for each client in their order; every one is counted."""
    versions = [lambda n=n: Numbered(n, seconds=0.002) for n in (1, 2, 3)]
    with serving(lambda: Numbered(0, seconds=0.002), loader(*versions)) as client:
        stop = threading.Event()
        answers: list[list[float]] = [[] for _ in range(6)]

        def ask(mine: list[float], kept: bool) -> None:
            with httpx.Client(base_url=client.base_url, trust_env=False, timeout=TIMEOUT) as asking:
                while not stop.is_set():
                    headers = {} if kept else {"Connection": "close"}
                    mine.append(number(asking.post(INFER, json=body(), headers=headers)))

        def answered(version: float) -> bool:
            return all(each[-1:] == [version] for each in answers)

        with ThreadPoolExecutor(6) as threads:
            try:
                asking = [threads.submit(ask, mine, i % 2 == 0) for i, mine in enumerate(answers)]
                before = counted(client)
                for version, _ in enumerate(versions):
                    wait_until(lambda version=version: answered(version))  # type: ignore[misc]
                    answer = client.post(LOAD, json={})
                    assert answer.status_code == 200, answer.text
                    after = counted(client)
                    assert all(after[name] >= value for name, value in before.items())
                    before = after
                wait_until(lambda: answered(len(versions)))
            finally:
                stop.set()
            for done in asking:
                done.result()
        for each in answers:
            assert each == sorted(each)
            assert set(each) == {0, 1, 2, 3}
        total = sum(map(len, answers))
        wait_until(lambda: metric(client, 'guardserve_samples_total{model="net"}') == total)
        assert metric(client, 'guardserve_requests_total{model="net",status="200"}') == total
        assert metric(client, 'guardserve_reloads_total{model="net",outcome="done"}') == 3
        assert metric(client, 'guardserve_batch_size_sum{model="net"}') == total


def test_what_was_accepted_is_answered_by_its_version_which_is_then_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The new one answers meanwhile; the old model's memory is given back, though what was there is frozen."""
    monkeypatch.undo()
    others, models = set(threading.enumerate()), [Numbered(0)]
    gate, waiting, model = models[0].open, models[0].waiting, weakref.ref(models[0])
    gc.collect()
    gc.freeze()
    try:
        with serving(models.pop, loader(lambda: Numbered(1))) as client, ThreadPoolExecutor(1) as thread:
            old = thread.submit(client.post, INFER, json=body(77))
            assert waiting.wait(TIMEOUT)
            assert client.post(LOAD).status_code == 200
            assert number(client.post(INFER, json=body())) == 1
            assert model() is not None
            assert metric(client, 'guardserve_requests_in_flight{model="net"}') == 1
            gate.set()
            assert number(old.result()) == 0
            wait_until(lambda: model() is None)
            wait_until(lambda: metric(client, 'guardserve_samples_total{model="net"}') == 2)
            wait_until(lambda: alone(others))
    finally:
        gc.freeze()


def alone(others: set[threading.Thread]) -> bool:
    """Tell whether the threads beside some others are those of one version."""
    names = [thread.name for thread in threading.enumerate() if thread not in others]
    of_each = Counter(name for name in names if name.removeprefix("guardserve-") in OF_A_VERSION)
    return of_each["guardserve-forward"] == 1 and set(of_each.values()) == {1}


class Raising(nn.Module):
    """Does not work."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Raise."""
        raise ValueError(f"no {len(x)}")


def broken() -> nn.Module:
    """Fail to load, as a program would that is not ours."""
    raise OSError("/secret/path is gone")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (broken, "OSError; the server's log has the details"),
        (Raising, "the start-up probe failed: no 1"),
        (
            lambda: Numbered(1, features=2),
            "its outputs are output FP32 [-1, 2], and those that clients know are output",
        ),
        (lambda: nn.BatchNorm1d(3, track_running_stats=False), "has no running statistics"),
        (lambda: Numbered(math.nan), "output holds 1 non-finite value"),
    ],
    ids=["unloadable", "raising", "other-outputs", "hazard", "nan"],
)
def test_a_version_that_is_wrong_is_refused_with_the_reason_and_the_old_one_goes_on(
    model: Callable[[], nn.Module], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No answer changes, readiness holds, it is counted and logged, and nothing of it stays."""
    others = set(threading.enumerate())
    with serving(lambda: Numbered(0), loader(model, lambda: Numbered(1))) as client:
        assert number(client.post(INFER, json=body())) == 0
        metadata = client.get("/v2/models/net").json()
        answer = client.post(LOAD)
        assert answer.status_code == 422
        assert says in answer.json()["error"]
        assert "secret" not in answer.text
        assert "goes on" in caplog.text
        assert client.get("/v2/models/net").json() == metadata
        assert client.get("/v2/health/ready").status_code == 200
        assert number(client.post(INFER, json=body())) == 0
        assert metric(client, 'guardserve_reloads_total{model="net",outcome="failed"}') == 1
        assert metric(client, 'guardserve_samples_total{model="net"}') == 2
        wait_until(lambda: alone(others))
        assert client.post(LOAD).status_code == 200, "the next one may be right"
        assert number(client.post(INFER, json=body())) == 1


def test_a_model_that_failed_its_first_probe_is_replaced_by_one_that_works() -> None:
    """Whoever has mended the file need not restart the server."""
    with serving(Raising, loader(lambda: Numbered(1))) as client:
        assert client.post(INFER, json=body()).status_code == 503
        (model,) = client.post("/v2/repository/index").json()
        assert (model["state"], "probe failed" in model["reason"]) == ("UNAVAILABLE", True)
        assert client.post(LOAD).json()["state"] == "READY"
        assert number(client.post(INFER, json=body())) == 1
        assert client.get("/v2/health/ready").status_code == 200


def test_while_one_version_is_loaded_another_is_refused_with_409_and_a_stop_does_not_wait_for_it() -> None:
    """One at a time; the server ends although the load hangs."""
    hanging, began = threading.Event(), threading.Event()

    def load(_: Runtime) -> Runtime:
        began.set()
        hanging.wait(60)
        raise OSError

    with ThreadPoolExecutor(1) as thread:
        with serving(lambda: Numbered(0), load) as client:
            first = thread.submit(httpx.post, f"{client.base_url}{LOAD}", trust_env=False, timeout=TIMEOUT)
            assert began.wait(TIMEOUT)
            answer = client.post(LOAD)
            assert answer.status_code == 409
            assert "being loaded already" in answer.json()["error"]
            assert number(client.post(INFER, json=body())) == 0
            stopped = time.monotonic()
        assert time.monotonic() - stopped < 10
        assert "the server is stopping" in first.result().json()["error"]
        hanging.set()


def test_a_version_is_asked_for_by_its_fingerprint_and_by_no_other() -> None:
    """The name that the server was given stays; that of the old weights is unknown once they are gone."""
    with serving(lambda: Numbered(0), loader(lambda: Numbered(1), lambda: Numbered(0))) as client:
        label, old = client.get("/v2/models/net").json()["versions"]
        assert label == "1"
        assert number(client.post(f"/v2/models/net/versions/{old}/infer", json=body())) == 0
        new = client.post(LOAD).json()["version"]
        assert new != old
        assert client.get("/v2/models/net").json()["versions"] == ["1", new]
        assert number(client.post("/v2/models/net/versions/1/infer", json=body())) == 1
        assert number(client.post(f"/v2/models/net/versions/{new}/infer", json=body())) == 1
        for path in (f"/v2/models/net/versions/{old}/infer", f"/v2/models/net/versions/{old}/infer/"):
            assert client.post(path, json=body()).status_code == 404
        info = f'guardserve_model_info{{device="cpu",model="net",model_version="{new}",platform="pytorch_eager"}}'
        assert metric(client, info) == 1
        assert client.post(LOAD).json()["version"] == old, "the same weights have the same fingerprint"


def test_a_request_for_a_version_that_goes_while_its_body_comes_is_not_answered_by_another() -> None:
    """Its headers came in time, its body did not."""
    with serving(lambda: Numbered(0), loader(lambda: Numbered(1))) as client:
        old = client.get("/v2/models/net").json()["versions"][1]
        begun, sent = threading.Event(), threading.Event()
        content = client.build_request("POST", "/", json=body()).content

        def slowly() -> Iterator[bytes]:
            yield content[:10]
            begun.set()
            sent.wait(TIMEOUT)
            yield content[10:]

        with ThreadPoolExecutor(1) as thread:
            late = thread.submit(client.post, f"/v2/models/net/versions/{old}/infer", content=slowly())
            assert begun.wait(TIMEOUT)
            assert httpx.post(f"{client.base_url}{LOAD}", trust_env=False, timeout=TIMEOUT).status_code == 200
            sent.set()
            assert late.result().status_code == 404
            assert "served no more" in late.result().json()["error"]


def test_only_administrators_load_models() -> None:
    """A key is not enough; without keys it takes a client of this machine that is not sent by a web page or a proxy."""
    plain, hashed, admin = "p" * 16, "h" * 16, "a" * 16
    access = Access([plain, "admin:sha256:" + "0" * 64, f"admin:{admin}", hashed])
    with serving(lambda: Numbered(0), loader(lambda: Numbered(1)), access=access) as client:
        assert client.post(LOAD).status_code == 401
        answer = client.post(LOAD, headers={"Authorization": f"Bearer {plain}"})
        assert answer.status_code == 403
        assert "admin:" in answer.json()["error"]
        mine = {"Authorization": f"Bearer {admin}"}
        assert client.post(LOAD, headers=mine).status_code == 200
        assert number(client.post(INFER, json=body(), headers=mine)) == 1
    with serving(lambda: Numbered(0), loader(lambda: Numbered(1))) as client:
        for header in ("Origin", "X-Forwarded-For", "Forwarded"):
            assert client.post(LOAD, headers={header: "somewhere"}).status_code == 403
        assert client.post(LOAD).status_code == 200
    far = Access().no_administrator({"type": "http", "client": ("192.0.2.1", 1), "headers": []})
    assert far is not None
    assert "SIGHUP" in far


@pytest.mark.parametrize(
    ("sent", "status", "says"),
    [
        ({"content": b"{"}, 400, "no JSON"),
        ({"json": [1]}, 400, "list"),
        ({"json": {"parameters": {"config": "{}"}}}, 400, "send no parameters"),
        ({"content": b" " * 70_000}, 413, "65536"),
    ],
)
def test_a_request_to_load_something_else_is_refused(sent: dict[str, Any], status: int, says: str) -> None:
    """What is loaded was said at the start."""
    with serving(lambda: Numbered(0), loader(lambda: Numbered(1))) as client:
        answer = client.post(LOAD, **sent)
        assert answer.status_code == status
        assert says in answer.json()["error"]
        assert client.post("/v2/repository/models/other/load").status_code == 404
        assert number(client.post(INFER, json=body())) == 0


def test_tritons_client_loads_the_model() -> None:
    """And reads the index, and why a load was refused."""
    with serving(lambda: Numbered(0), loader(lambda: Numbered(1), Raising)) as client:
        with triton.InferenceServerClient(f"{client.base_url.host}:{client.base_url.port}") as server:
            server.load_model("net")
            (model,) = server.get_model_repository_index()
            assert (model["name"], model["state"]) == ("net", "READY")
            with pytest.raises(InferenceServerException, match="start-up probe failed"):
                server.load_model("net")
            assert server.is_model_ready("net", model["version"])
        assert number(client.post(INFER, json=body())) == 1


def test_a_server_that_was_not_told_how_has_no_repository() -> None:
    """Nor does SIGHUP mean anything to it."""
    runtime = Runtime(loaded(Numbered(0)))
    with serve_in_background(create_app(runtime)) as url, httpx.Client(base_url=url, trust_env=False) as client:
        assert client.post(LOAD).status_code == 404


def test_alarms_that_a_detector_takes_over_are_counted_once(tmp_path: Path) -> None:
    """It goes on from the state of the last version's; the counter neither goes back nor counts them again."""
    others = set(threading.enumerate())
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 8), nn.BatchNorm1d(8))
    profile = ReferenceProfile.fit(model, [torch.randn(500, 3)], target_arl=1000)
    options: dict[str, Any] = {"reference": profile, "target_arl": 1000, "state": tmp_path / "state"}
    alarms = 'guardserve_shift_alarms_total{model="net"}'
    odd = {"inputs": [{"name": "x", "shape": [4, 3], "datatype": "FP32", "data": [30.0] * 12}]}

    def load(served: Runtime) -> Runtime:
        assert served.keeper is not None
        served.keeper.save()
        return Runtime(loaded(model_again()), **options)

    def model_again() -> nn.Module:
        again = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 8), nn.BatchNorm1d(8))
        again.load_state_dict(model.state_dict())
        return again

    with serving(lambda: model, load, **options) as client:
        for _ in range(3):
            client.post(INFER, json=odd)
        wait_until(lambda: metric(client, alarms) == 1)
        assert client.post(LOAD).status_code == 200
        assert metric(client, alarms) == 1
        assert metric(client, 'guardserve_shift_state{model="net",state="shifted"}') == 1
        assert metric(client, 'guardserve_shift_p_value_count{model="net"}') == 12
        wait_until(lambda: alone(others))
        assert metric(client, alarms) == 1
        client.post(INFER, json=odd)
        assert metric(client, 'guardserve_samples_total{model="net"}') == 16


PROGRAM = Path(sys.executable).with_name("guardserve")

FACTORY = """
import os
import signal
import time

import torch
from torch import nn

from guardserve import example_input


@example_input(input=torch.zeros(1, 3))
def net():
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))


class Slow(nn.Sequential):
    def forward(self, input):
        time.sleep(0.1)
        return super().forward(input)


@example_input(input=torch.zeros(1, 3))
def slow():
    return Slow(*net())


@example_input(input=torch.zeros(1, 3))
def signalled(already=[]):
    if not already:
        already.append(True)
        os.kill(os.getpid(), signal.SIGHUP)
    return net()


one = net()
"""


def write_weights(path: Path, bias: float, mean: float = 0.0) -> nn.Module:
    """Write weights that give two numbers around a bias, whole at once, as an operator should."""
    torch.manual_seed(0)
    norm, linear = nn.BatchNorm1d(3), nn.Linear(3, 2)
    nn.init.constant_(linear.bias, bias)
    nn.init.constant_(norm.get_buffer("running_mean"), mean)
    model = nn.Sequential(norm, linear)
    torch.save(model.state_dict(), path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    return model


@contextmanager
def command(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """Run ``guardserve serve`` in a folder with a factory; give the process and a client."""
    (folder / "factories.py").write_text(FACTORY)
    port = free_port()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [PROGRAM, "serve", *arguments, "--port", str(port), "--drain-delay", "0"], cwd=folder, stderr=log
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or is_ready(url))
        with httpx.Client(base_url=url, trust_env=False, timeout=TIMEOUT) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()


def reloads(client: httpx.Client) -> tuple[float, float]:
    """Read how often the model was loaded again, and how often not."""
    return (
        metric(client, 'guardserve_reloads_total{model="net",outcome="done"}'),
        metric(client, 'guardserve_reloads_total{model="net",outcome="failed"}'),
    )


def asked(client: httpx.Client) -> Sequence[float]:
    """Send a request to the command's model."""
    data = {"name": "input", "shape": [1, 3], "datatype": "FP32", "data": [0.0, 0.0, 0.0]}
    answer = client.post(INFER, json={"inputs": [data]})
    assert answer.status_code == 200, answer.text
    outputs: Sequence[float] = answer.json()["outputs"][0]["data"]
    return outputs


def test_a_signal_that_comes_while_the_model_is_loaded_has_it_loaded_once_more(tmp_path: Path) -> None:
    """It tells of files that may be newer than those which were read, and nobody could ask again for it."""
    weights = tmp_path / "weights.pt"
    write_weights(weights, bias=10)
    with command(tmp_path, "factories:slow", "--weights", "weights.pt", "--name", "net") as (process, client):
        assert min(asked(client)) > 5
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: "loading another version" in (tmp_path / "log").read_text())
        time.sleep(0.2)
        write_weights(weights, bias=-10)
        for _ in range(2):
            process.send_signal(signal.SIGHUP)
        wait_until(lambda: reloads(client) == (2, 0))
        assert max(asked(client)) < -5
        process.terminate()
        assert process.wait(20) == 0


def test_a_signal_before_there_is_a_model_or_after_the_last_answer_ends_nothing(tmp_path: Path) -> None:
    """The first has it loaded once more, as files may be newer than what was read."""
    with command(tmp_path, "factories:signalled", "--name", "net") as (process, client):
        wait_until(lambda: reloads(client) == (1, 0))
        process.terminate()
        while process.poll() is None:
            process.send_signal(signal.SIGHUP)
            time.sleep(0.002)
        assert process.returncode == 0
    assert (tmp_path / "log").read_text().count("loading another version") == 1


def test_sighup_loads_the_weights_again_unless_they_or_the_profile_do_not_fit(tmp_path: Path) -> None:
    """A damaged file and a profile of other statistics leave the old version there; the log has the remedy."""
    weights, profile = tmp_path / "weights.pt", tmp_path / "profile"
    model = write_weights(weights, bias=10)
    ReferenceProfile.fit(model, [torch.randn(300, 3)], target_arl=1000).save(profile)
    arguments = ["factories:net", "--weights", "weights.pt", "--reference", "profile", "--state", "state"]
    with command(tmp_path, *arguments, "--target-arl", "1000") as (process, client):
        assert min(asked(client)) > 5
        weights.write_bytes(weights.read_bytes()[:500])
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: reloads(client) == (0, 1))
        write_weights(weights, bias=-10, mean=5)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: reloads(client) == (0, 2))
        assert min(asked(client)) > 5
        write_weights(weights, bias=-10)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: reloads(client) == (1, 2))
        assert max(asked(client)) < -5
        wait_until(lambda: metric(client, 'guardserve_samples_total{model="net"}') == 3)
        process.terminate()
        assert process.wait(20) == 0
    log = (tmp_path / "log").read_text()
    assert "weights.pt is a damaged or truncated" in log or "weights.pt is none of these" in log
    assert "put it in the old one's place, and load the model again" in log


def test_a_factory_that_gives_the_same_module_again_is_refused_before_it_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights loaded into the module that answers would change its answers at once."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "same_factories.py").write_text(FACTORY)
    weights = tmp_path / "weights.pt"
    write_weights(weights, bias=10)
    served = load_model("same_factories:one", weights=weights, input_shapes=["3"]).module
    before = fingerprint(served)
    write_weights(weights, bias=-10)
    with pytest.raises(ModelLoadError, match="gives the same module each time"):
        load_model("same_factories:one", weights=weights, input_shapes=["3"], beside=served)
    assert fingerprint(served) == before
    again = load_model("same_factories:net", weights=weights, beside=served)
    assert fingerprint(again.module) != before


def test_loading_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What hangs, as a file of a server that is gone, does not keep the next from coming."""
    monkeypatch.setattr("guardserve.service.versions.LOAD_TIMEOUT", 0.3)
    hanging = threading.Event()
    turns = itertools.count()

    def load(_: Runtime) -> Runtime:
        if next(turns) == 0:
            hanging.wait(60)
        return Runtime(loaded(Numbered(1)))

    with serving(lambda: Numbered(0), load) as client:
        answer = client.post(LOAD)
        assert answer.status_code == 422
        assert "took longer than 0.3 s" in answer.json()["error"]
        monkeypatch.setattr("guardserve.service.versions.LOAD_TIMEOUT", 60)
        assert client.post(LOAD).status_code == 200
        hanging.set()
        assert number(client.post(INFER, json=body())) == 1


def test_versions_is_documented_in_the_openapi_document() -> None:
    """Both calls, and every status that they may have."""
    with serving(lambda: Numbered(0), loader()) as client:
        paths = client.get("/openapi.json").json()["paths"]
        assert {"200", "403", "409", "422"} <= set(paths["/v2/repository/models/{model}/load"]["post"]["responses"])
        assert "/v2/repository/index" in paths
        assert Versions.reload.__doc__
