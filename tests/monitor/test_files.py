"""Writing a file whole: what is replaced, and what is left alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from guardserve.detection.files import write_whole


@pytest.mark.parametrize("there", [True, False])
def test_a_file_is_replaced_or_made(tmp_path: Path, there: bool) -> None:
    """Nothing else is left behind."""
    path = tmp_path / "file"
    if there:
        path.write_bytes(b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path, there: bool) -> None:
    """Also where it leads to nothing yet, and over another link, as a mounted volume's do."""
    folder = tmp_path / "volume"
    folder.mkdir()
    if there:
        (folder / "file").write_bytes(b"old")
    (folder / "link").symlink_to("file")
    (tmp_path / "link").symlink_to(folder / "link")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (folder / "link").is_symlink()
    assert not (folder / "file").is_symlink()
    assert (folder / "file").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("make", "kind"),
    [(os.mkfifo, "no regular file"), (os.mkdir, "a folder"), (lambda path: path.symlink_to(path.name), "no regular")],
    ids=["fifo", "folder", "loop"],
)
def test_what_is_no_file_is_refused_and_stays(tmp_path: Path, make: Callable[[Path], object], kind: str) -> None:
    """A device that was replaced by a file would be missed; a link to one is refused, too."""
    path, link = tmp_path / "thing", tmp_path / "link"
    make(path)
    link.symlink_to(path)
    before = path.lstat()
    for given in (path, link):
        with pytest.raises(OSError, match=kind):
            write_whole(given, b"new")
    assert path.lstat().st_ino == before.st_ino
    assert sorted(tmp_path.iterdir()) == [link, path]
