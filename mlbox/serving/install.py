"""From a file to a version's folder: copied whole, checked, and in place by one rename. All of it is blocking.

The server never sees half a version, and a version's folder that is there is complete.
"""

import errno
import hashlib
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path, PurePath

from mlbox.errors import Conflict, Invalid
from mlbox.scheduler.folders import open_plain, sync_folder
from mlbox.scheduler.values import shown
from mlbox.serving.repository import MODEL_FILE

_COPY_BYTES = 1 << 20
_EXTERNAL = (".data", "_data")
"""How exporters name external data beside `name.onnx` (torch: `.data`, onnx: `_data`); the model refers to it so."""
_OF_THE_SOURCE = frozenset({errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENAMETOOLONG})
"""Why a file cannot be opened that is the file's own fault; everything else is the box's, and passes."""


@dataclass(frozen=True, slots=True)
class Source:
    """The file `path` beneath `root`. What lies beneath is whatever a job made of it: no link is followed."""

    root: Path
    path: PurePath


def install(source: Source, models: Path, model: str, version: int) -> str:
    """Copy the source, with external data beside it, to `<models>/<model>/<version>`; returns its SHA-256.

    Raises Invalid when the source cannot be deployed, Conflict when the version is there already, and OSError when
    the copy cannot be written now. For one version only one call may run at a time.
    """
    folder = models / model
    half = _half(folder, version)
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    discard(models, model, version)
    half.mkdir(mode=0o755)
    try:
        digest = _copy(source, half / MODEL_FILE)
        for suffix in _EXTERNAL:
            beside = source.path.with_name(source.path.name + suffix)
            if os.path.lexists(source.root / beside):
                _copy(Source(source.root, beside), half / beside.name)
        sync_folder(half)
        target = folder / str(version)
        if os.path.lexists(target):
            raise Conflict(f"{target} was put there meanwhile: deploy it as another version")
        half.rename(target)
        sync_folder(folder)
    finally:
        discard(models, model, version)
    return digest


def installed(models: Path, model: str, version: int) -> str | None:
    """The SHA-256 of the version's model file; None when no plain file is there."""
    try:
        with os.fdopen(open_plain(models / model / str(version) / MODEL_FILE), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def discard(models: Path, model: str, version: int) -> None:
    """Remove what an interrupted `install` left."""
    shutil.rmtree(_half(models / model, version), ignore_errors=True)


def _half(folder: Path, version: int) -> Path:
    return folder / f".half-{version}"


def _copy(source: Source, target: Path) -> str:
    """Copy a plain file that has no other name; returns its SHA-256. Raises Invalid."""
    name = shown(source.path.name)
    fd = _open(source)
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise Invalid(f"{name} is not a plain file (a folder, a pipe or a device)")
        if facts.st_nlink != 1:
            raise Invalid(f"{name} is a hard link to a file that has another name too: copy it instead")
        if facts.st_size == 0:
            raise Invalid(f"{name} is empty")
        digest = hashlib.sha256()
        with target.open("xb") as copy:
            while block := os.read(fd, _COPY_BYTES):
                digest.update(block)
                copy.write(block)
            copy.flush()
            os.fsync(copy.fileno())
    finally:
        os.close(fd)
    return digest.hexdigest()


def _open(source: Source) -> int:
    """A descriptor of the source, reached through no link. Raises Invalid, or OSError for trouble of the box."""
    *folders, name = source.path.parts
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        at = os.open(source.root, flags | os.O_DIRECTORY)
        try:
            for folder in folders:
                below = os.open(folder, flags | os.O_DIRECTORY, dir_fd=at)
                os.close(at)
                at = below
            return os.open(name, flags | os.O_NONBLOCK, dir_fd=at)  # a pipe without a writer must not hold us
        finally:
            os.close(at)
    except FileNotFoundError:
        raise Invalid(f"there is no {shown(str(source.path))} to deploy (found: {_found(source)})") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise Invalid(f"{shown(str(source.path))} is a symbolic link, or beneath one: copy it instead") from None
        if error.errno in _OF_THE_SOURCE:
            raise Invalid(f"{shown(str(source.path))} cannot be read: {error.strerror}") from None
        raise


def _found(source: Source) -> str:
    """What lies where the source was looked for."""
    try:
        names = sorted(path.name for path in (source.root / source.path).parent.iterdir())
    except OSError:
        names = []
    return ", ".join(shown(name) for name in names[:8]) or "nothing"
