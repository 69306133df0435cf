"""What a model file is, judged by its content; its suffix is only what somebody called it."""

from __future__ import annotations

import enum
import zipfile
from pathlib import Path

from guardserve.exceptions import ModelLoadError

# every torch.save file of before the zip format starts with this pickled number
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


class FileKind(enum.Enum):
    """The kinds of model file, each named as a user would."""

    EXPORT = "torch.export archive"
    TORCHSCRIPT = "TorchScript program"
    CHECKPOINT = "torch.save file"
    SAFETENSORS = "safetensors file"


def file_kind(path: Path) -> FileKind:
    """Tell what a model file is.

    Raises:
        ModelLoadError: It is missing, empty, unreadable, damaged, or of a kind that cannot be loaded.
    """
    try:
        kind = _sniff(path)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror or error}") from error
    if kind is not None:
        return kind
    if path.suffix == ".onnx":
        raise ModelLoadError(f"{path}: an ONNX model can be audited (guardserve audit {path}), but not served")
    kinds = ", ".join(kind.value for kind in FileKind)
    raise ModelLoadError(f"{path} is none of these: {kinds}; if it should be one, it is truncated or damaged")


def reason(error: BaseException) -> str:
    """Give the first cause of an error in a library in one short line; what they raise can fill a screen."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = str(error).strip().partition("\n")[0]
    return f"{line:.300}" if line else type(error).__name__


def _sniff(path: Path) -> FileKind | None:
    if path.is_dir():
        raise ModelLoadError(f"{path} is a directory: name the model file in it")
    if not path.is_file():
        raise ModelLoadError(f"there is no file {str(path)!r}; a model is a file, package.module:factory or demo")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(len(_LEGACY_MAGIC))
    if not size:
        raise ModelLoadError(f"{path} is empty")
    if head == _LEGACY_MAGIC:
        return FileKind.CHECKPOINT
    # safetensors: the length of a JSON header, then the header
    if path.suffix == ".safetensors" or (head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size):
        return FileKind.SAFETENSORS
    return _sniff_zip(path) if head.startswith(b"PK") else None


def _sniff_zip(path: Path) -> FileKind | None:
    try:
        with zipfile.ZipFile(path) as archive:
            # torch puts every record under a folder named after the file
            names = {name.partition("/")[2] or name for name in archive.namelist()}
    except Exception as error:  # a damaged directory makes zipfile raise anything
        raise ModelLoadError(f"{path} is a damaged or truncated zip archive: {reason(error)}") from error
    if "serialized_exported_program.json" in names:
        raise ModelLoadError(
            f"{path} is in the torch.export format of torch 2.7 and before, which is no longer read: "
            "export the model again with torch 2.8 or newer"
        )
    if any(name.startswith("data/aotinductor/") for name in names):
        raise ModelLoadError(
            f"{path} is an AOTInductor package, that is compiled code without a graph to guard or watch: "
            "serve the program it was compiled from, saved with torch.export.save"
        )
    if "archive_format" in names:
        return FileKind.EXPORT
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        return FileKind.TORCHSCRIPT
    return FileKind.CHECKPOINT if "data.pkl" in names else None
