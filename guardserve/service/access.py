"""Who may ask: API keys, kept as hashes and compared in constant time."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from pathlib import Path

from starlette.types import Scope

from guardserve.exceptions import SettingsError

HASHED = "sha256:"
"""Before the hexadecimal hash of a key, where that stands in the key's place."""

MIN_LENGTH = 16
"""Characters that a key must have: shorter ones can be guessed."""

CHALLENGE = ((b"www-authenticate", b"Bearer"), (b"www-authenticate", b'Basic realm="guardserve"'))

HEALTH = "/v2/health/"
METRICS = "/metrics"

ADMINISTRATOR = "admin:"
"""Before a key, or its hash, that may also load models."""

PASSED_ON: frozenset[bytes] = frozenset({b"origin", b"forwarded", b"x-forwarded-for"})
"""Headers of requests that come from elsewhere than the client of the connection: from a web page, or by a proxy."""


class Access:
    """Decides who may ask for what.

    A key is sent as ``Authorization: Bearer KEY``, or as the password of basic authentication, which browsers do.

    Args:
        keys: The keys, or ``sha256:`` and the hexadecimal hash of one; ``admin:`` before it marks an administrator's.
            Without any everybody may ask for everything, but only this machine may administer.
        protect_metrics: Whether ``/metrics`` needs a key too.
        protect_health: Whether the server's health does.

    Raises:
        SettingsError: If a key is too short, or no hash where it says so.
    """

    def __init__(
        self, keys: Iterable[str] = (), *, protect_metrics: bool = False, protect_health: bool = False
    ) -> None:
        given = list(keys)
        self._hashes = [_hash(key.removeprefix(ADMINISTRATOR)) for key in given]
        self._administrators = [_hash(key[len(ADMINISTRATOR) :]) for key in given if key.startswith(ADMINISTRATOR)]
        self._protect_metrics = protect_metrics
        self._protect_health = protect_health

    def allows(self, scope: Scope) -> bool:
        """Tell whether a request may be answered."""
        if not self._hashes:
            return True
        path: str = scope["path"]
        if path == METRICS and not self._protect_metrics:
            return True
        if path.startswith(HEALTH) and not self._protect_health:
            return True
        return _among(scope, self._hashes)

    def no_administrator(self, scope: Scope) -> str | None:
        """Say why a request that may be answered is none of an administrator; None if it is one."""
        if self._hashes:
            if _among(scope, self._administrators):
                return None
            return f"that takes an administrator's API key, one with {ADMINISTRATOR} before it in the server's list"
        client = scope.get("client")
        here = client is not None and is_loopback(client[0])
        if here and not any(name in PASSED_ON for name, _ in scope["headers"]):
            return None
        return "without API keys only a client on the server's own machine may ask for that; or send the process SIGHUP"


def is_open(path: str) -> bool:
    """Tell whether a path is one that operators ask: health or metrics."""
    return path == METRICS or path.startswith(HEALTH)


def read_keys(path: Path) -> list[str]:
    """Read a file of keys, one a line; empty lines and what follows a ``#`` at a line's start do not count.

    Raises:
        SettingsError: If it cannot be read or holds no key.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the file of API keys cannot be read: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise SettingsError(f"{path} holds no API key: write one a line")
    return keys


def is_loopback(host: str) -> bool:
    """Tell whether an address to listen on can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _hash(key: str) -> bytes:
    if key.startswith(HASHED):
        digits = key[len(HASHED) :]
        if not re.fullmatch("[0-9a-fA-F]{64}", digits):
            raise SettingsError(f"an API key begins with {HASHED}, but no SHA-256 hash of 64 digits follows")
        return bytes.fromhex(digits)
    if len(key) < MIN_LENGTH:
        raise SettingsError(f"an API key has {len(key)} characters: use at least {MIN_LENGTH}, at random")
    return hashlib.sha256(key.encode()).digest()


def _among(scope: Scope, hashes: Sequence[bytes]) -> bool:
    """Tell whether a request has one of some keys."""
    given = hashlib.sha256(_key(dict(scope["headers"]).get(b"authorization", b""))).digest()
    return any([hmac.compare_digest(given, known) for known in hashes])  # noqa: C419 - as long for each key


def _key(header: bytes) -> bytes:
    """Return the key in an Authorization header."""
    scheme, _, value = header.strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""
