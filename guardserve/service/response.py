"""Responses to inference requests, of which most of one kind begin with the same bytes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import NamedTuple

import torch

from guardserve.service.datatypes import encode_binary
from guardserve.service.protocol import HEADER_LENGTH, InferRequest, RequestedOutput, render_response

KNOWN_HEADS = 64
"""Kinds of responses that are remembered."""

Headers = list[tuple[bytes, bytes]]


class _Head(NamedTuple):
    """What responses of a kind begin with.

    Attributes:
        json: The JSON before the binary tensors.
        headers: The HTTP headers.
        names: The outputs behind it.
    """

    json: bytes
    headers: Headers
    names: tuple[str, ...]


class ResponseWriter:
    """Writes the responses of one version of a model.

    Responses to requests of one client mostly differ in their binary tensors alone: what stands before these is
    written once.

    Args:
        model_name: What they call the model.
        model_version: What they call its version.
    """

    def __init__(self, model_name: str, model_version: str) -> None:
        self._model_name = model_name
        self._model_version = model_version
        self._heads: dict[Hashable, _Head] = {}

    def write(
        self,
        outputs: Mapping[str, torch.Tensor],
        request: InferRequest,
        parameters: Mapping[str, object],
        *,
        nonfinite_strings: bool,
    ) -> tuple[bytes, Headers]:
        """Write the response to a request, as :func:`render_response` does; return its body and its HTTP headers."""
        kind = None
        if request.id is None and not parameters:
            layout = [(name, tensor.dtype, tensor.shape) for name, tensor in outputs.items()]
            kind = request.binary_output, request.outputs, *layout
            head = self._heads.get(kind)
            if head is not None:
                return b"".join([head.json, *[encode_binary(outputs[name]) for name in head.names]]), head.headers
        body, named = render_response(
            outputs,
            request,
            model_name=self._model_name,
            model_version=self._model_version,
            parameters=parameters,
            nonfinite_strings=nonfinite_strings,
        )
        headers = [(name.encode(), value.encode()) for name, value in named.items()]
        if kind is not None and HEADER_LENGTH in named:
            self._remember(kind, body[: int(named[HEADER_LENGTH])], headers, outputs, request)
        return body, headers

    def _remember(
        self, kind: Hashable, json: bytes, headers: Headers, outputs: Mapping[str, torch.Tensor], request: InferRequest
    ) -> None:
        """Remember what a response begins with, if all of its outputs are behind that."""
        wanted = request.outputs or [RequestedOutput(name) for name in outputs]
        if all(request.binary_output if output.binary is None else output.binary for output in wanted):
            if len(self._heads) >= KNOWN_HEADS:
                self._heads.clear()
            self._heads[kind] = _Head(json, headers, tuple([output.name for output in wanted]))
