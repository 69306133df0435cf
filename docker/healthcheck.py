# ruff: noqa: INP001 (a script, copied into the image)
"""Container health check: exit status 0 when the server says that it is ready.

It runs in the image under the same environment as the server, so it asks the port that the server listens on.
"""

import http.client
import os
import sys


def ready(port: int) -> bool:
    """Tell whether ``GET /v2/health/ready`` on the loopback address answers 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3)  # unlike urllib, ignores proxy settings
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(0 if ready(int(os.environ.get("GUARDSERVE_PORT", "8000"))) else 1)
