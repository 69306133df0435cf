"""One inference request, from its bytes to the bytes of its answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from guardserve.exceptions import GuardserveError, InputError, ModelOutputError, NonFiniteOutputError, TrainingModeError
from guardserve.metrics import Metrics
from guardserve.runtime import Runtime
from guardserve.service.protocol import ProtocolError, decompress, parse_request, render_response

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """An answer ready to be sent.

    Attributes:
        status: HTTP status.
        body: Its bytes; for a failure empty, and ``error`` says what went wrong.
        headers: HTTP headers.
        reason: One of :data:`guardserve.metrics.REASONS` for a failure.
        error: What the client is told about it.
    """

    status: int
    body: bytes = b""
    headers: Mapping[str, str] | None = None
    reason: str | None = None
    error: str = ""


class Inference:
    """Answers inference requests on one worker thread, so that the event loop never waits for a forward.

    Args:
        runtime: The model.
        metrics: Where forwards are counted.
        model_version: What answers call the model's version.
        max_batch_size: Most rows that a request may carry.
        max_body_size: Most bytes of its body after decompression.
    """

    def __init__(
        self, runtime: Runtime, metrics: Metrics, *, model_version: str, max_batch_size: int, max_body_size: int
    ) -> None:
        self._runtime = runtime
        self._metrics = metrics
        self._model_version = model_version
        # a model that takes one batch size only takes that, whatever the limit
        self._max_batch_size = max(max_batch_size, runtime.static_batch or 1)
        self._max_body_size = max_body_size
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="guardserve-forward")

    async def start(self) -> None:
        """Probe the model; a failure is logged, and readiness says no."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._worker, self._runtime.start)
        except GuardserveError as error:
            _log.error("%s is not ready: %s", self._runtime.name, error, exc_info=error.__cause__)
        else:
            _log.info("%s is ready", self._runtime.name)

    def close(self) -> None:
        """Finish the work that was accepted, then stop the worker."""
        self._worker.shutdown()

    async def answer(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Answer one request, given its body and its headers with lower-case names."""
        if self._runtime.failure is not None:
            return Answer(503, reason="not_ready", error=f"the model is not ready: {self._runtime.failure}")
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._answer, body, headers)

    def _answer(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        try:
            return self._work(body, headers)
        except ProtocolError as error:
            return Answer(error.status, reason=error.reason, error=str(error))
        except InputError as error:
            return Answer(400, reason="invalid_input", error=str(error))
        except NonFiniteOutputError as error:
            return Answer(500, reason="nonfinite_output", error=f"the model gave a non-finite output: {error}")
        except (ModelOutputError, TrainingModeError) as error:
            return Answer(500, reason="model_error", error=str(error))
        except BaseException as error:  # noqa: BLE001 - a model may raise anything, and the server lives on
            # its message may hold what a client should not see: paths, weights, other clients' data
            _log.exception("the forward of %s failed", self._runtime.name)
            text = f"the model raised {type(error).__name__} on this input; the server's log has the details"
            return Answer(500, reason="model_error", error=text)

    def _work(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        runtime = self._runtime
        body = decompress(body, headers.get("content-encoding"), self._max_body_size)
        request = parse_request(
            body,
            headers.get("inference-header-content-length"),
            runtime.signature,
            max_batch_size=self._max_batch_size,
        )
        rows = len(next(iter(request.inputs.values())))
        outputs = runtime.infer(request.inputs, lambda seconds: self._metrics.forward_ended(rows, seconds))
        rendered, answer_headers = render_response(
            outputs, request, model_name=runtime.name, model_version=self._model_version
        )
        return Answer(200, rendered, answer_headers)
