"""Responses that begin as others did: the same bytes as if each were written anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from unittest import mock

import pytest
import torch

from guardserve.service import response
from guardserve.service.protocol import InferRequest, RequestedOutput, render_response
from guardserve.service.response import ResponseWriter

A, B = RequestedOutput("a"), RequestedOutput("b")

Wanted = Sequence[RequestedOutput] | None


def outputs(rows: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Make two outputs of random values, the second not contiguous."""
    return {"a": torch.randn(rows, 3).to(dtype), "b": torch.randn(4, rows).T}


def asked(wanted: Wanted = None, *, binary: bool = True, name: str | None = None) -> InferRequest:
    """Make a request for outputs, with or without an id."""
    return InferRequest(name, {}, {}, None if wanted is None else tuple(wanted), binary)


def check(
    writer: ResponseWriter,
    given: Mapping[str, torch.Tensor],
    request: InferRequest,
    parameters: Mapping[str, object] | None = None,
) -> None:
    """Compare a response with one written anew."""
    body, headers = writer.write(given, request, parameters or {}, nonfinite_strings=True)
    expected, named = render_response(
        given, request, model_name="net", model_version="3", parameters=parameters or {}, nonfinite_strings=True
    )
    assert body == expected
    assert headers == [(name.encode(), value.encode()) for name, value in named.items()]


def test_responses_of_all_kinds_are_as_if_written_anew() -> None:
    """Those that come again in another order, and whose values differ each time."""
    writer = ResponseWriter("net", "3")
    wanted: list[Wanted] = [
        None,
        (B, A),
        (B,),
        (RequestedOutput("a", binary=False), B),
        (RequestedOutput("b", binary=True),),
    ]
    for _ in range(3):
        for given in (outputs(), outputs(5), outputs(dtype=torch.int64), {"b": torch.zeros(1, 0)}):
            for some in wanted:
                if some is None or len(given) == 2:
                    for binary in (True, False):
                        check(writer, given, asked(some, binary=binary))
                        check(writer, given, asked(some, binary=binary, name="x"))
                        check(writer, given, asked(some, binary=binary), {"guardserve_nonfinite": "told"})
    check(writer, {"a": torch.full((2, 3), torch.nan), "b": torch.randn(2, 4)}, asked())
    check(writer, {"a": torch.full((2, 3), torch.nan), "b": torch.randn(2, 4)}, asked(binary=False))


def test_what_binary_responses_begin_with_is_written_once_for_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more kinds are remembered than allowed."""
    monkeypatch.setattr(response, "KNOWN_HEADS", 4)
    writer = ResponseWriter("net", "3")
    with mock.patch.object(response, "render_response", side_effect=render_response) as anew:
        for _ in range(5):
            writer.write(outputs(), asked(), {}, nonfinite_strings=False)
        assert anew.call_count == 1
        for rows in range(1, 20):
            writer.write(outputs(rows), asked(), {}, nonfinite_strings=False)
            assert len(writer._heads) <= 4
        assert anew.call_count == 19
