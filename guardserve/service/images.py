"""Inference requests whose body is an image as it is: JPEG or PNG."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as shown

from guardserve.exceptions import MissingExtraError
from guardserve.loading import ImagePreprocessing
from guardserve.loading.preprocessing import TooLargeImageError, read_image
from guardserve.service.body import ProtocolError
from guardserve.service.limits import Hold, unlimited
from guardserve.service.request import InferRequest
from guardserve.signature import Signature

FORMATS = {"image/jpeg": "JPEG", "image/png": "PNG"}
"""What is taken, and Pillow's name of it."""

BINARY = b"application/octet-stream"


def is_image(headers: Mapping[bytes, bytes]) -> bool:
    """Tell whether a request says that its body is an image."""
    return headers.get(b"content-type", b"")[:6].lower() == b"image/"


def read_image_request(
    body: bytes,
    headers: Mapping[bytes, bytes],
    signature: Signature,
    preprocessing: ImagePreprocessing | None,
    max_pixels: int,
    *,
    hold: Hold = unlimited,
) -> InferRequest:
    """Read a request for one sample, an image. The answer is JSON unless the client accepts binary outputs.

    Args:
        body: The image, already decompressed.
        headers: The request's headers by their lower-case names.
        signature: What the model takes.
        preprocessing: How images become its only input, if that is declared.
        max_pixels: Most pixels that are decoded.
        hold: Told of the bytes that its pixels take, before they are decoded.

    Raises:
        ProtocolError: 415 if the model takes no images, or none of this kind; 413 if it has too many pixels.
        InputError: If it cannot be read, or does not fit the model.
    """
    content_type = headers[b"content-type"].decode("latin-1").partition(";")[0].strip().lower()
    if preprocessing is None:
        raise _unsupported("this model declares no image preprocessing: send tensors")
    if content_type not in FORMATS:
        raise _unsupported(f"Content-Type {shown(content_type)} is not supported: send {' or '.join(FORMATS)}")
    (spec,) = signature.inputs
    try:
        tensor = read_image(body, FORMATS[content_type], preprocessing, spec, max_pixels, hold=hold)
    except MissingExtraError as error:
        raise _unsupported(f"this server cannot read images: {error}") from error
    except TooLargeImageError as error:
        raise ProtocolError(str(error), "too_large", status=413) from error
    binary = BINARY in headers.get(b"accept", b"")
    return InferRequest(id=None, parameters={}, inputs={spec.name: tensor}, outputs=None, binary_output=binary)


def _unsupported(text: str) -> ProtocolError:
    return ProtocolError(text, "unsupported_encoding", status=415)
