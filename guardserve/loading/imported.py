"""The user's code as this process has imported it, which may not be what the files say any more."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from guardserve.exceptions import ModelLoadError

_PACKAGES = ("site-packages", "dist-packages")
_STANDARD = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]
_OWN = Path(__file__).resolve().parents[1]


class ImportedCode:
    """Remembers the source files of modules that are no installed package's, as they are now.

    Python imports a module once. A model that is loaded again is built by the code that was there at the start: with
    new weights, and a factory that was changed as well, it would be a model that nobody has written.
    """

    def __init__(self) -> None:
        self._digests: dict[str, tuple[Path, bytes]] = {}
        self._remember()

    def check(self) -> None:
        """Refuse to go on with code that its files do not hold any more; remember what was imported since.

        Raises:
            ModelLoadError: If there is such code.
        """
        changed = [f"{name} ({path.name})" for name, (path, old) in self._digests.items() if _digest(path) != old]
        if changed:
            raise ModelLoadError(
                f"the code of {', '.join(sorted(changed))} has changed since it was imported, and a running process "
                "does not import it again: start the server again, beside this one to lose no request"
            )
        self._remember()

    def _remember(self) -> None:
        for name, path in _sources():
            if name not in self._digests and (digest := _digest(path)) is not None:
                self._digests[name] = path, digest


def _sources() -> Iterator[tuple[str, Path]]:
    """Yield the modules whose code is the user's, with their source files."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py") or name.startswith("__"):
            continue
        path = Path(file)
        place = path.resolve()  # of links, only what they are called now says whose they are
        if any(part in _PACKAGES for part in place.parts):
            continue
        if not any(place.is_relative_to(other) for other in (*_STANDARD, _OWN)):
            yield name, path


def _digest(path: Path) -> bytes | None:
    """Return a hash of a file; None if it cannot be read."""
    try:
        return hashlib.blake2b(path.read_bytes()).digest()
    except OSError:
        return None
