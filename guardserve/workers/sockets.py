"""Listening sockets that several processes accept connections from."""

from __future__ import annotations

import socket

from guardserve.exceptions import GuardserveError


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind one socket for each address that a host has, as a server of one process does.

    Nobody listens to them yet: until a worker does, connections are refused.

    Args:
        host: Name or address.
        port: Port; 0 takes a free one, the same for all addresses.

    Raises:
        GuardserveError: If the host has no address, or the port is taken.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address[0], sockets[0].getsockname()[1] or port, *address[2:]))
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise GuardserveError(f"the server cannot listen on {host}:{port}: {error}") from error
    return sockets
