"""The code that this process has imported, which may not be what the files say any more."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path
from typing import NamedTuple

from guardserve.exceptions import ModelLoadError

_PACKAGES = ("site-packages", "dist-packages")
_STANDARD = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]
_OWN = Path(__file__).resolve().parents[1]
_REMEDY = "a running process does not import code again: start the server again, beside this one to lose no request"


class Installed(NamedTuple):
    """Which build of a package is installed.

    Attributes:
        version: Its version; None if it is not installed.
        files: Hash of the list of its files, which holds a hash of each: it tells builds of one version apart.
    """

    version: str | None
    files: str = ""


class ImportedCode:
    """Remembers the code that was imported: source files as they are now, and for packages which build is installed.

    Python imports a module once. A model that is loaded again is built by the code that was there at the start: with
    new weights, and a factory that was changed as well, it would be a model that nobody has written.
    """

    def __init__(self) -> None:
        self._sources: dict[str, tuple[Path, str]] = {}
        self._packages: dict[str, Installed] = {}
        self.remember()

    @property
    def known(self) -> dict[str, str]:
        """What is remembered: where two processes remember the same thing otherwise, they run different code."""
        return {
            **{f"the code of {name}": digest for name, (_, digest) in self._sources.items()},
            **{f"package {name}": f"{found.version} {found.files}" for name, found in self._packages.items()},
        }

    def check(self) -> None:
        """Refuse to go on with code that is not what the files hold any more; remember what was imported since.

        Raises:
            ModelLoadError: If there is such code.
        """
        changed = [f"{name} ({path.name})" for name, (path, old) in self._sources.items() if _digest(path) != old]
        if changed:
            raise ModelLoadError(
                f"the code of {', '.join(sorted(changed))} has changed since it was imported, and {_REMEDY}"
            )
        replaced = [
            _replaced(name, old, new) for name, old in self._packages.items() if (new := _installed(name)) != old
        ]
        if replaced:
            raise ModelLoadError(f"since it was imported, {', '.join(sorted(replaced))}, and {_REMEDY}")
        self.remember()

    def remember(self) -> None:
        """Remember what was imported since, as it is now."""
        for name, path in _sources():
            if name not in self._sources and (digest := _digest(path)) is not None:
                self._sources[name] = path, digest
        for name in _packages():
            if name not in self._packages:
                self._packages[name] = _installed(name)


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


def _digest(path: Path) -> str | None:
    """Return a hash of a file; None if it cannot be read."""
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return None


def _packages() -> Iterator[str]:
    """Yield the names of the installed packages that modules were imported from.

    Their files tell, not the names of modules: several packages may have theirs in one namespace, such as ``google``.
    """
    imported = _imported()
    for package in distributions():
        files, place = _files(package), Path(str(package.locate_file(""))).absolute().as_posix()
        names = (line.partition(",")[0] for line in files.splitlines())
        if any(f"{place}/{name}" in imported for name in names):
            metadata = package.metadata
            if "Name" in metadata:  # not left over half removed
                yield metadata["Name"]


def _imported() -> set[str]:
    """Return the files of imported modules, and those of top-level ones also as lists without files name them."""
    found = set()
    for name, module in list(sys.modules.items()):
        if isinstance(file := getattr(module, "__file__", None), str):
            path = Path(file)
            found.add(path.as_posix())
            if "." not in name:
                found.add((path.parent if path.stem == "__init__" else path.with_name(name)).as_posix())
    return found


def _installed(name: str) -> Installed:
    """Look up which build of a package is installed now."""
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return Installed(None)
    metadata = package.metadata
    if "Version" not in metadata:
        return Installed(None)
    return Installed(metadata["Version"], hashlib.blake2b(_files(package).encode(), digest_size=16).hexdigest())


def _files(package: Distribution) -> str:
    """Return the list of a package's files, or of its modules where its installer has written none."""
    return package.read_text("RECORD") or package.read_text("top_level.txt") or ""


def _replaced(name: str, old: Installed, new: Installed) -> str:
    """Say what has become of a package."""
    if new.version is None:
        return f"{name} {old.version} was uninstalled"
    if new.version == old.version:
        return f"another build of {name} {old.version} was installed"
    return f"{name} {old.version} was replaced by {new.version}"
