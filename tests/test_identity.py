"""The ids of requests: which are taken, and whose request it is that code works on."""

from __future__ import annotations

import re
import threading
from contextlib import suppress

import pytest

from guardserve.identity import MAX_LENGTH, Identity, current, identified

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


def identity(**headers: str) -> Identity:
    """Make one of headers, whose names have underscores here."""
    return Identity({name.replace("_", "-").encode(): value.encode("latin-1") for name, value in headers.items()})


def test_a_request_is_called_what_its_client_calls_it() -> None:
    """Its own id before the trace's, which is kept beside it."""
    both = identity(x_request_id="order-7", traceparent=PARENT)
    assert both.labels() == {"request_id": "order-7", "trace_id": TRACE}
    assert both.header == (b"x-request-id", b"order-7")
    assert identity(traceparent=PARENT).labels() == {"request_id": TRACE, "trace_id": TRACE}
    assert identity(x_request_id="1-5f:{a}[b]/@=+~!#'").request_id == "1-5f:{a}[b]/@=+~!#'"
    assert identity(x_request_id="x" * MAX_LENGTH).request_id == "x" * MAX_LENGTH


@pytest.mark.parametrize(
    "given",
    ["", "two words", "line\nbreak", "tab\t", "x" * (MAX_LENGTH + 1), "caf\xe9", "\x7f", "\x00", '"', "\\"],
    ids=repr,
)
def test_what_no_log_should_hold_is_not_taken_for_an_id(given: str) -> None:
    """Another is made instead, as it is for a request without any."""
    made = identity(x_request_id=given)
    assert re.fullmatch("[0-9a-f]{32}", made.request_id)
    assert made.request_id != identity().request_id


@pytest.mark.parametrize(
    "parent",
    [
        "",
        TRACE,
        f"ff-{TRACE}-b7ad6b7169203331-01",
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-b7ad6b7169203331-01",
        f"00-{TRACE}-b7ad6b7169203331",
        f"00-{TRACE}-b7ad6b7169203331-01\n",
    ],
)
def test_an_invalid_traceparent_is_no_trace(parent: str) -> None:
    """As W3C Trace Context says."""
    made = identity(traceparent=parent)
    assert made.trace_id is None
    assert made.request_id != TRACE


def test_a_later_version_of_traceparent_may_say_more() -> None:
    """What is known of it is taken."""
    assert identity(traceparent=f"01-{TRACE}-b7ad6b7169203331-01-more").trace_id == TRACE


def test_code_knows_whose_request_it_works_on_and_only_there() -> None:
    """Blocks nest, end with an error too, and are their own thread's."""
    outer, inner, seen = identity(), identity(), []
    with identified(outer):
        with suppress(RuntimeError), identified(inner):
            assert current() is inner
            raise RuntimeError
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
        assert current() is outer
    assert current() is None
    assert seen == [None]
