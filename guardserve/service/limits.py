"""What a client may ask of the server, in numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from guardserve.loading.preprocessing import MAX_PIXELS

MIB = 2**20

Hold: TypeAlias = Callable[[int], None]
"""Told of bytes before they are allocated for a request; it raises if there is no room for them.

It is told of 0 bytes now and then by what takes long: others may go first, and it raises if nobody waits any more.
"""


def unlimited(size: int) -> None:
    """Hold any number of bytes."""


@dataclass(frozen=True)
class Limits:
    """How much is accepted, and how long it may take; each is an option of ``guardserve serve``.

    Attributes:
        max_batch_size: Most rows of one forward, and of one request.
        max_queue_size: Most requests that wait for a forward; more are refused with 503.
        max_queue_delay: Seconds that a request may wait for others to share its forward when the model is idle.
        max_body_size: Most bytes of a request body, after decompression.
        max_image_pixels: Most pixels of an image in a request.
        max_pending_size: Most bytes of all requests that are held at once, as they came, decompressed, and as tensors;
            more are refused with 503.
        max_connections: Most connections; what more ask for, but health and metrics, is refused with 503.
        request_timeout: Seconds until a request that has no answer yet gets 504; None for none.
        body_timeout: Seconds that the body of a request may take to arrive.
        forward_timeout: Seconds after which a forward counts as hanging; None for never.
        self_test_interval: Seconds between two self-tests of a model that works; 0 for none.
    """

    max_batch_size: int = 64
    max_queue_size: int = 256
    max_queue_delay: float = 0.0
    max_body_size: int = 64 * MIB
    max_image_pixels: int = MAX_PIXELS
    max_pending_size: int = 512 * MIB
    max_connections: int = 1024
    request_timeout: float | None = 60.0
    body_timeout: float = 30.0
    forward_timeout: float | None = 60.0
    self_test_interval: float = 60.0
