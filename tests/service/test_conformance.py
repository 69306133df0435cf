"""The real tritonclient, sync and async, against the real server, many requests at once."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.http as triton
from serving import metric, serving
from torch import nn
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException

from guardserve.signature import TensorSpec

SPECS = (TensorSpec("x", torch.float32, (-1, 4)), TensorSpec("ids", torch.int64, (-1,)))


class TwoOutputs(nn.Module):
    """Two inputs, a normalised sum and the ids doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tell rows apart by their values."""
        return {"normalised": self.bn(x), "doubled": ids * 2}


def inputs(module: Any, x: Any, ids: Any, *, binary: bool) -> list[Any]:
    """Build both inputs with the client's own classes."""
    first = module.InferInput("x", list(x.shape), "FP32").set_data_from_numpy(x, binary_data=binary)
    second = module.InferInput("ids", list(ids.shape), "INT64").set_data_from_numpy(ids, binary_data=binary)
    return [first, second]


def sample(number: int) -> tuple[Any, Any]:
    """Make a request's rows, one to three of them, that no other request has."""
    rows = number % 3 + 1
    return np.full((rows, 4), number, np.float32), np.arange(rows) + 100 * number


def check(result: Any, number: int, *, wanted: tuple[str, ...]) -> None:
    """Check that an answer is that of its own request: rows, identifier and filter."""
    x, ids = sample(number)
    answer = result.get_response()
    assert answer["id"] == f"request {number}"
    assert [output["name"] for output in answer["outputs"]] == list(wanted)
    if "normalised" in wanted:
        np.testing.assert_allclose(result.as_numpy("normalised"), x, rtol=1e-4)
    if "doubled" in wanted:
        np.testing.assert_array_equal(result.as_numpy("doubled"), 2 * ids)


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_the_sync_client_gets_its_own_answers(binary: bool, compression: str | None) -> None:
    """Every form of body, with and without a version, outputs chosen and in the order chosen."""
    with serving(TwoOutputs(), *SPECS) as client:
        address = f"{client.base_url.host}:{client.base_url.port}"
        with triton.InferenceServerClient(address) as server:
            assert server.is_server_live()
            assert server.is_server_ready()
            assert server.is_model_ready("net", "1")
            assert server.get_server_metadata()["extensions"] == ["binary_tensor_data"]
            assert [tensor["name"] for tensor in server.get_model_metadata("net")["inputs"]] == ["x", "ids"]
            for number, wanted in enumerate([("doubled", "normalised"), ("normalised",), ("normalised", "doubled")]):
                outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in wanted]
                result = server.infer(
                    "net",
                    inputs(triton, *sample(number), binary=binary),
                    model_version="1" if number else "",
                    outputs=outputs,
                    request_id=f"request {number}",
                    request_compression_algorithm=compression,
                    response_compression_algorithm=compression,
                    timeout=10_000_000,
                )
                check(result, number, wanted=wanted)


def test_many_async_requests_at_once_get_their_own_answers_and_share_forwards() -> None:
    """Mixed forms, sizes and filters: identifiers and rows never cross, though requests are joined."""
    count = 120
    order = random.Random(0)
    plans = [(order.random() < 0.5, order.choice([("normalised",), ("doubled", "normalised")])) for _ in range(count)]

    async def run(address: str) -> None:
        async with aio.InferenceServerClient(address) as server:

            async def one(number: int) -> None:
                binary, wanted = plans[number]
                outputs = [aio.InferRequestedOutput(name, binary_data=binary) for name in wanted]
                result = await server.infer(
                    "net",
                    inputs(aio, *sample(number), binary=binary),
                    outputs=outputs,
                    request_id=f"request {number}",
                )
                check(result, number, wanted=wanted)

            await asyncio.gather(*map(one, range(count)))

    with serving(TwoOutputs(), *SPECS) as client:
        asyncio.run(run(f"{client.base_url.host}:{client.base_url.port}"))
        forwards = metric(client, 'guardserve_forward_duration_seconds_count{model="net"}')
        rows = metric(client, 'guardserve_batch_size_sum{model="net"}')
        assert rows == sum(number % 3 + 1 for number in range(count))
        assert forwards < count


def test_the_client_reads_what_the_server_refuses() -> None:
    """The message of the error is the server's own."""
    with serving(TwoOutputs(), *SPECS) as client:
        address = f"{client.base_url.host}:{client.base_url.port}"
        with triton.InferenceServerClient(address) as server:
            with pytest.raises(InferenceServerException, match="unknown model 'other'"):
                server.infer("other", inputs(triton, *sample(1), binary=True))
            with pytest.raises(InferenceServerException, match="missing input 'ids'"):
                server.infer("net", inputs(triton, *sample(1), binary=True)[:1])
            words = triton.InferInput("x", [1, 4], "BYTES").set_data_from_numpy(np.array([[b"a"] * 4], dtype=object))
            with pytest.raises(InferenceServerException, match="takes numbers, not strings"):
                server.infer("net", [words])
