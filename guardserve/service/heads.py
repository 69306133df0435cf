"""The heads of requests: which are refused though a parser reads them, and what is said to that."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain

from guardserve.service.answer import Answer, refusal

MAX_HEAD = 64 * 1024
"""Bytes of a request's path and headers, or of what stands between the parts of its body; more are refused with 431."""

NEWEST = "1.1"
"""Version of HTTP that is spoken, besides 1.0."""

_HOST = re.compile(rb"(\[[\w.:%~-]+\]|[\w.~%!$&'()*+,;=-]*)(:[0-9]*)?[ \t]*")

_ONCE = frozenset((b"content-type", b"content-encoding", b"inference-header-content-length"))

MALFORMED = refusal(400, "malformed", "what came is not an HTTP request")
CUT_SHORT = refusal(400, "malformed", "the client has ended its side in the middle of the request")
NO_HOST = refusal(400, "malformed", "the request needs one Host header, with a host and perhaps a port: RFC 9112, 3.2")
REPEATED = refusal(
    400, "malformed", "Content-Type, Content-Encoding and Inference-Header-Content-Length may stand once in a request"
)
CODED = refusal(400, "malformed", "the transfer coding of the request's body is not chunked")
LARGE_HEAD = refusal(431, "too_large", f"the request's path and headers are larger than {MAX_HEAD} bytes")
OTHER_VERSION = refusal(505, "malformed", "this server speaks HTTP/1.1 and HTTP/1.0: send the request in one of them")


class RefusedHeadError(Exception):
    """A request that is refused before anything reads it; its argument is the answer.

    Attributes:
        answer: What is said to that.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


def check_size(size: int) -> None:
    """Refuse so many bytes of a head.

    Raises:
        RefusedHeadError: If they are too many.
    """
    if size > MAX_HEAD:
        raise RefusedHeadError(LARGE_HEAD)


def spoken(version: str) -> str:
    """Return the version of HTTP in which a request is understood, and answered: a later 1.x is 1.1 (RFC 9110, 6.2).

    Args:
        version: The one that it names.

    Raises:
        RefusedHeadError: If that is another protocol.
    """
    if not version.startswith("1."):
        raise RefusedHeadError(OTHER_VERSION)
    return min(version, NEWEST)


def check_head(version: str, url: bytes, headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Refuse a head that could be understood in more than one way.

    Args:
        version: HTTP's, see :func:`spoken`.
        url: The request's target.
        headers: Its headers by their lower-case names.

    Raises:
        RefusedHeadError: If it is to be refused.
    """
    check_size(sum(map(len, chain.from_iterable(headers)), len(url)))
    hosts = [value for name, value in headers if name == b"host"]
    enough = len(hosts) == 1 or (not hosts and version == "1.0")
    if not enough or not all(map(_HOST.fullmatch, hosts)):
        raise RefusedHeadError(NO_HOST)
    single = [name for name, _ in headers if name in _ONCE]
    if len(set(single)) < len(single):
        raise RefusedHeadError(REPEATED)
    codings = [value.strip().lower() for name, value in headers if name == b"transfer-encoding"]
    if codings not in ([], [b"chunked"]):  # the parser would pass a body on in a coding that nobody undoes
        raise RefusedHeadError(CODED)


def answer_to(error: BaseException, version: str) -> Answer:
    """Return what is said to a request that cannot be read.

    Args:
        error: What the parser, or one of the above in its callbacks, has raised.
        version: HTTP's, as far as the parser read it.
    """
    for cause in (error, error.__context__):
        if isinstance(cause, RefusedHeadError):
            return cause.answer
    return MALFORMED if version.startswith("1.") or version == "0.0" else OTHER_VERSION
