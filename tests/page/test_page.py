"""The page in a real browser: what it says of a model that is well, shifted, broken or gone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
import torch
from serving import TIMEOUT, free_port, loaded, wait_until
from torch import nn

from guardserve import ReferenceProfile
from guardserve.audit import audit
from guardserve.page.endpoints import HEADERS, STREAMS
from guardserve.runtime import Runtime
from guardserve.service.app import create_app
from guardserve.service.background import serve_in_background

sync_api = pytest.importorskip("playwright.sync_api", reason="the page's tests need Playwright")

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

sync_api.expect.set_options(timeout=1000 * TIMEOUT)

OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")


class Net(nn.Module):
    """Two normalised layers, which a marked input makes divide by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(3)
        self.linear = nn.Linear(3, 3)
        self.second = nn.BatchNorm1d(3)
        self.linear.weight.data = torch.eye(3)
        self.linear.bias.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it."""
        y: torch.Tensor = self.second(self.linear(self.first(x)))
        return y / (x[:, :1] != -100).float()


@contextmanager
def served(
    module: nn.Module, port: int = 0, reference: ReferenceProfile | None = None
) -> Iterator[tuple[str, Runtime]]:
    """Serve a module; give its URL."""
    runtime = Runtime(
        loaded(module.eval()), shift_window=64, shift_min_samples=16, reference=reference, target_arl=1000
    )
    with serve_in_background(create_app(runtime), port=port) as url:
        wait_until(lambda: runtime.failure is None)
        yield url, runtime


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what the server sees shown soon."""
    monkeypatch.setattr("guardserve.watch.LOOK_INTERVAL", 0.2)


@pytest.fixture(scope="module")
def browser(require_program: Callable[[str], str]) -> Iterator[Any]:
    """Start Chromium."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=require_program("chromium"), args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """Open a page that must not log an error of its own."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(1000 * TIMEOUT)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Content Security" in message.text else None)
    yield page
    context.close()
    assert faults == []


def expect(page: Any, selector: str) -> Any:
    """Return what Playwright can wait for."""
    return sync_api.expect(page.locator(selector), None)


def send(runtime: Runtime, shift: float = 0.0, batches: int = 16) -> None:
    """Have the model see samples."""
    for seed in range(batches):
        runtime.guard(torch.randn(16, 3, generator=torch.Generator().manual_seed(seed)) + shift)


def test_it_says_what_it_does_not_know_then_that_all_is_well(page: Any) -> None:
    """Before there are samples nothing is claimed; after clean ones the model serves normally."""
    with served(Net()) as (url, runtime):
        page.goto(f"{url}/ui")
        expect(page, "#title").to_have_text("Serving, not judged yet")
        expect(page, "#heat-note").to_contain_text("No layer has been judged yet")
        expect(page, "#note").to_contain_text("No reference profile")
        expect(page, "#heat-said").to_contain_text("Distance of each layer from training")
        expect(page, "#traffic-said").to_have_text("No requests yet.")
        send(runtime)
        expect(page, "#title").to_have_text("Serving normally")
        assert page.title() == "● Serving normally - net"
        assert page.locator("#layers [role=option]").all_inner_texts() == ["first", "second"]
        expect(page, "#findings").to_contain_text("No hazard was found")


def test_a_shift_shows_without_a_reload_with_its_layer_direction_and_time(page: Any) -> None:
    """The headline, the lead layer, its channels and the alarm: all from the stream."""
    with served(Net()) as (url, runtime):
        send(runtime)
        page.goto(f"{url}/ui")
        expect(page, "#title").to_have_text("Serving normally")
        send(runtime, shift=3.0)
        expect(page, "#title").to_have_text("Shift, strongest at first")
        expect(page, "#since").to_contain_text("Since ")
        expect(page, "#detail").to_contain_text("mean +")
        expect(page, "#layers .lead").to_have_text("first")
        expect(page, "#channels tbody tr").to_have_count(3)
        expect(page, "#channels tbody tr >> nth=0").to_contain_text("+")
        expect(page, "#events").to_contain_text("shift at first")
        assert page.evaluate("getComputedStyle(document.querySelector('h1')).color") == "rgb(179, 38, 30)"


def test_with_a_reference_layers_show_their_evidence(page: Any) -> None:
    """As shares of the threshold, with the detector's own verdict above them."""
    model = Net().eval()
    torch.manual_seed(0)
    profile = ReferenceProfile.fit(model, [torch.randn(1000, 3)], target_arl=1000)
    with served(model, reference=profile) as (url, runtime):
        send(runtime)
        page.goto(f"{url}/ui")
        expect(page, "#heat-said").to_contain_text("Evidence of each layer")
        send(runtime, shift=3.0, batches=4)
        expect(page, "#title").to_have_text("Shift, first seen at first")
        expect(page, "#layers .lead").to_have_text("first")
        evidence = pytest.approx(list(runtime.monitor.verdict().layers.values()), rel=0.01)
        assert max(evidence.expected) > 1

        def shown() -> Any:
            state = httpx.get(f"{url}/ui/state", trust_env=False).json()
            return [point["layers"] for point in state["memories"][0]["points"][-1:]]

        wait_until(lambda: shown() == [evidence])


def test_requests_and_failures_are_counted_and_named(page: Any) -> None:
    """NaN in the outputs is what the page says first; the requests that failed of it are drawn."""
    with served(Net()) as (url, _):
        page.goto(f"{url}/ui")
        tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [-100.0, 0.0, 0.0]}
        for _ in range(5):
            answer = httpx.post(f"{url}/v2/models/net/infer", json={"inputs": [tensor]}, trust_env=False)
            assert answer.status_code == 500
        expect(page, "#title").to_have_text("Outputs are not numbers")
        expect(page, "#detail").to_contain_text("NaN or infinity")
        expect(page, "#traffic-said").to_contain_text("requests")
        expect(page, "#events").to_contain_text("outputs with NaN or infinity")


def test_it_tells_when_the_server_is_gone_and_finds_it_again(page: Any) -> None:
    """What it showed stays, marked as old; a server that is back is shown afresh."""
    port = free_port()
    with served(Net(), port) as (url, runtime):
        send(runtime)
        page.goto(f"{url}/ui")
        expect(page, "#title").to_have_text("Serving normally")
    expect(page, "#gone").to_contain_text("Server gone since")
    assert "server gone" in page.title()
    with served(Net(), port):
        expect(page, "#gone").to_be_hidden()
        expect(page, "#title").to_have_text("Serving, not judged yet")


def test_it_works_with_the_keyboard(page: Any) -> None:
    """Tab reaches the layers, arrows choose one, and its channels are shown."""
    with served(Net()) as (url, runtime):
        send(runtime)
        page.goto(f"{url}/ui")
        expect(page, "#title").to_have_text("Serving normally")
        for _ in range(5):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == "layers":
                break
        page.keyboard.press("Home")
        expect(page, "#layer-said").to_contain_text("first: the 3 channels")
        page.keyboard.press("ArrowDown")
        expect(page, "#layer-said").to_contain_text("second: the 3 channels")
        assert page.evaluate("document.activeElement.getAttribute('aria-activedescendant')") == "layer-1"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_sideways_scrolling(browser: Any, scheme: str) -> None:
    """In either colour scheme everything fits the width, and the text stands out from the ground."""
    with served(Net()) as (url, runtime), ExitStack() as stack:
        send(runtime)
        context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
        stack.callback(context.close)
        page = context.new_page()
        page.goto(f"{url}/ui")
        expect(page, "#title").to_have_text("Serving normally")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        ground, ink = (
            sum(int(part) for part in page.evaluate(f"getComputedStyle(document.body).{part}")[4:-1].split(","))
            for part in ("backgroundColor", "color")
        )
        assert (ground > ink) is (scheme == "light")


def test_findings_of_the_audit_are_shown(page: Any) -> None:
    """A hazard of the model's layers has its code, its place and its remedy."""
    model = Net()
    model.first.running_var = torch.tensor([1.0, -1.0, 1.0])
    expected = audit(model).findings
    assert expected
    runtime = Runtime(loaded(model), findings=expected)
    with serve_in_background(create_app(runtime)) as url:
        page.goto(f"{url}/ui")
        expect(page, "#findings li >> nth=0").to_contain_text(expected[0].code)
        expect(page, "#findings").to_contain_text(expected[0].remedy)
        expect(page, "#title").to_have_text("Not ready")


def test_every_answer_of_the_page_has_the_security_headers() -> None:
    """No script but its own, no frame, no guessing of types; an unknown file is no other."""
    with served(Net()) as (url, _), httpx.Client(base_url=url, trust_env=False) as client:
        for path in ("/ui", "/ui/page.css", "/ui/page.js", "/ui/state", "/ui/layer?name=none", "/ui/page.map"):
            answer = client.get(path)
            assert answer.status_code == (404 if "none" in path or "map" in path else 200)
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS


def test_streams_are_limited_and_end_with_the_server() -> None:
    """One too many is refused with the reason; the server stops although some are open."""
    with ExitStack() as server, ExitStack() as streams:
        url, _ = server.enter_context(served(Net()))
        client = streams.enter_context(httpx.Client(base_url=url, trust_env=False, timeout=30))
        followed = []
        for _ in range(STREAMS):
            lines = streams.enter_context(client.stream("GET", "/ui/events")).iter_lines()
            assert next(lines).startswith("data: {")
            followed.append(lines)
        assert client.get("/ui/events").status_code == 503
        stopping = threading.Thread(target=server.close)
        stopping.start()
        stopping.join(20)
        assert not stopping.is_alive()
        assert all(list(lines)[-1:] in ([""], []) for lines in followed), "each has ended properly"
