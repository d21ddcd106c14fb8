"""The files that a job left, opened so that no name leads out of its folder. Blocking.

The folder belongs to the job, which may change it at any moment: every step of a path is opened relative to the one
before, never through a link, and what was opened is judged, not what was seen before.
"""

import errno
import os
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mlbox.errors import Conflict, Invalid, NotFound, Unavailable

LIST_MAX = 10_000
_DEPTH_MAX = 32
_NAME_BYTES = 255
"""NAME_MAX of Linux file systems (limits.h)."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # O_NONBLOCK: a FIFO must not hold us

_NO_FOLDER = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file that a job left: its path within the folder, bytes, and when it was written (Unix seconds)."""

    path: str
    size: int
    modified_at: float


def listing(folder: Path) -> list[Artifact]:
    """Every plain file, by path; at most LIST_MAX. Links, devices and files of other owners are left out."""
    with _root(folder) as (root, owner):
        return sorted(_walk(root, owner, "", []), key=lambda artifact: artifact.path) if root >= 0 else []


def open_file(folder: Path, path: str) -> tuple[int, int]:
    """(descriptor, size) of one file; the caller closes it. Raises NotFound, Invalid."""
    *folders, name = _names(path)
    with _root(folder) as (root, owner):
        at = root
        try:
            for step in folders:
                at = _descend(at, step, root)
            fd = os.open(name, _FILE, dir_fd=at)
        except (OSError, ValueError):
            raise NotFound(f"the job left no file {path[:200]!r}") from None
        finally:
            _close(at, root)
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != owner:
        os.close(fd)
        raise NotFound(f"{path[:200]!r} is no plain file of the job")
    return fd, facts.st_size


def store(folder: Path, path: str, upload: Path) -> None:
    """Move `upload` to `path` within the folder, in place of a file that is there. Raises Invalid, Conflict."""
    *folders, name = _names(path)
    with suppress(FileExistsError, NotADirectoryError):  # judged when it is opened
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _root(folder) as (root, _):
        if root < 0:
            raise Conflict("the job's folder of artifacts is a link or a file by now: nothing can be added to it")
        at = root
        try:
            for step in folders:
                with suppress(FileExistsError):
                    os.mkdir(step, 0o700, dir_fd=at)
                at = _descend(at, step, root)
            os.replace(upload, name, dst_dir_fd=at)
        except (NotADirectoryError, IsADirectoryError) as error:
            raise Conflict(
                f"{path[:200]!r} cannot be written: {error.strerror}: a file or folder is in its way"
            ) from None
        except OSError as error:
            raise Unavailable(f"{path[:200]!r} cannot be written now: {error.strerror}") from error
        finally:
            _close(at, root)


def _names(path: str) -> list[str]:
    """The steps of a path. Raises Invalid for one that could lead anywhere but down."""
    names = path.split("/")
    for name in names:
        if name in ("", ".", "..") or "\0" in name:
            raise Invalid(f"{path[:200]!r} is no path of an artifact: write it as folder/file")
        if len(name.encode(errors="replace")) > _NAME_BYTES:
            raise Invalid(f"a name in the path is longer than {_NAME_BYTES} bytes")
    if len(names) > _DEPTH_MAX:
        raise Invalid(f"the path is deeper than {_DEPTH_MAX} folders")
    return names


@contextmanager
def _root(folder: Path) -> Generator[tuple[int, int]]:
    """(descriptor, owner's uid) of the folder itself; the descriptor is -1 where there is none, or none any more."""
    try:
        root = os.open(folder, _FOLDER)
    except OSError as error:
        if error.errno not in _NO_FOLDER:
            raise
        yield -1, -1
        return
    try:
        yield root, os.fstat(root).st_uid
    finally:
        os.close(root)


def _descend(at: int, step: str, root: int) -> int:
    below = os.open(step, _FOLDER, dir_fd=at)
    _close(at, root)
    return below


def _close(fd: int, root: int) -> None:
    if fd != root:
        os.close(fd)


def _walk(folder: int, owner: int, prefix: str, found: list[Artifact]) -> list[Artifact]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if len(found) >= LIST_MAX:
                break
            with suppress(OSError):  # gone since, or not to be seen
                facts = entry.stat(follow_symlinks=False)
                path = prefix + os.fsencode(entry.name).decode(errors="replace")
                if stat.S_ISREG(facts.st_mode) and facts.st_uid == owner:
                    found.append(Artifact(path, facts.st_size, facts.st_mtime))
                elif stat.S_ISDIR(facts.st_mode) and path.count("/") < _DEPTH_MAX - 1:
                    below = os.open(entry.name, _FOLDER, dir_fd=folder)
                    try:
                        _walk(below, owner, path + "/", found)
                    finally:
                        os.close(below)
    return found
