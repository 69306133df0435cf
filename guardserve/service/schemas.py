"""The Open Inference Protocol's JSON bodies, for the OpenAPI document.

Requests are parsed by :mod:`guardserve.service.protocol`, which also takes the binary form.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class Tensor(BaseModel):
    """A tensor of a request or an answer."""

    name: str
    shape: list[int] = Field(description="Sizes, the batch first; authoritative for the order of the data.")
    datatype: str = Field(description="BOOL, UINT8..UINT64, INT8..INT64, FP16, FP32, FP64 or BF16.", examples=["FP32"])
    parameters: dict[str, Any] | None = Field(None, description="binary_data_size where the data follow the JSON.")
    data: list[Any] | None = Field(None, description="Row-major, flat or nested; absent where they follow the JSON.")


class RequestedOutput(BaseModel):
    """An output that the client wants."""

    name: str
    parameters: dict[str, Any] | None = Field(None, description="binary_data: true for its binary form.")


class InferenceRequest(BaseModel):
    """Body of an inference request."""

    id: str | None = Field(None, description="Comes back in the answer.")
    parameters: dict[str, Any] | None = Field(None, description="binary_data_output: true for all outputs in binary.")
    inputs: list[Tensor]
    outputs: list[RequestedOutput] | None = Field(None, description="All outputs when absent.")


class InferenceResponse(BaseModel):
    """Answer to an inference request."""

    model_name: str
    model_version: str | None = None
    id: str | None = None
    parameters: dict[str, Any] | None = None
    outputs: list[Tensor]


class TensorMetadata(BaseModel):
    """An input or output of a model."""

    name: str
    datatype: str
    shape: list[int] = Field(description="-1 for any size.")


class ModelMetadata(BaseModel):
    """What a model takes and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(BaseModel):
    """What the server is."""

    name: str
    version: str
    extensions: list[str]


class LoadRequest(BaseModel):
    """Body of a request to load the model again."""

    parameters: dict[str, Any] | None = Field(None, description="None: it is loaded as when the server started.")


class RepositoryModel(BaseModel):
    """A model of the repository."""

    name: str
    version: str = Field(description="The version that answers, with the fingerprint of its weights and code.")
    state: str = Field(description="READY or UNAVAILABLE.")
    reason: str = Field(description="Why it is unavailable.")


class ErrorBody(BaseModel):
    """Any failure."""

    error: str
