"""What lies in a model's folder, by stat and through descriptors: never through a link. Blocking."""

import errno
import os
import stat
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from mlbox.errors import Invalid
from mlbox.serving.repository import CONFIG_FILE

_DEPTH_MAX = 4
_ENTRIES_MAX = 10_000
_CONFIG_BYTES_MAX = 64 << 10


@dataclass(frozen=True, slots=True)
class Facts:
    """What stat says of one entry; any write, rename or touch changes it."""

    path: str
    mode: int
    inode: int
    device: int
    links: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @property
    def hidden(self) -> bool:
        return any(part.startswith(".") for part in PurePosixPath(self.path).parts)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Everything below a version's folder and the model's config, by stat. Equal: nobody touched anything.

    Hidden entries count (rsync writes to one before it renames it) although they are not copied.
    """

    entries: tuple[Facts, ...]
    config: Facts | None
    problem: str | None = None
    """Why it is never served, whatever its files hold: it is a link, or nested without end."""

    @property
    def changed_ns(self) -> int:
        """When the newest of it changed; Unix nanoseconds."""
        return max((entry.ctime_ns for entry in (*self.entries, *filter(None, [self.config]))), default=0)

    def has(self, name: str) -> bool:
        return any(entry.path == name for entry in self.entries)


def fingerprint(models: Path, name: str, number: int) -> Fingerprint:
    """What is in `<models>/<name>/<number>` now. Raises OSError when it is not there."""
    with open_model(models, name) as model:
        try:
            config = facts_of(CONFIG_FILE, os.stat(CONFIG_FILE, dir_fd=model, follow_symlinks=False))
        except FileNotFoundError:
            config = None
        try:
            with open_folder(str(number), model) as version:
                entries = list(islice(_walk(version, "", 1), _ENTRIES_MAX + 1))
                if len(entries) > _ENTRIES_MAX:
                    raise Invalid(f"it has more than {_ENTRIES_MAX} files")
                entries.sort(key=lambda entry: entry.path)
                return Fingerprint((facts_of(".", os.fstat(version)), *entries), config)
        except Invalid as error:
            return Fingerprint((), config, str(error))
        except PermissionError as error:
            return Fingerprint((), config, f"the inference server may not read it: {error}")


def read_config(models: Path, name: str) -> str | None:
    """The text of the model's config.pbtxt, None where there is none. Raises Invalid, FileNotFoundError."""
    with open_model(models, name) as model:
        try:
            fd = open_file(CONFIG_FILE, model)
        except FileNotFoundError:
            return None
        with os.fdopen(fd, "rb") as file:
            check_plain(facts_of(CONFIG_FILE, os.fstat(file.fileno())))
            text = file.read(_CONFIG_BYTES_MAX + 1)
    if len(text) > _CONFIG_BYTES_MAX:
        raise Invalid(f"{CONFIG_FILE} is larger than {_CONFIG_BYTES_MAX} bytes")
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise Invalid(f"{CONFIG_FILE} is not UTF-8: {error}") from error


def check_plain(facts: Facts) -> None:
    """Raises Invalid for anything but a regular file with a single name."""
    if stat.S_ISLNK(facts.mode):
        raise Invalid(f"{facts.path} is a symbolic link: copy the file here instead")
    if not stat.S_ISREG(facts.mode):
        raise Invalid(f"{facts.path} is not a regular file")
    if facts.links != 1:
        raise Invalid(f"{facts.path} has {facts.links} names (hard links): copy the file instead of linking it")


# Descriptors: every component below the model folder is opened by itself, and never through a link


@contextmanager
def open_model(models: Path, name: str) -> Generator[int]:
    root = os.open(models, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with open_folder(name, root) as folder:
            yield folder
    finally:
        os.close(root)


@contextmanager
def open_folder(name: str, parent: int) -> Generator[int]:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise Invalid(f"{name} is a symbolic link or no folder: copy the folder here instead") from error
        raise
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def open_parent(path: str, version: int) -> Generator[tuple[int, str]]:
    """The folder that holds `path` (relative to the version's folder), and the last part of it."""
    first, slash, rest = path.partition("/")
    if not slash:
        yield version, first
        return
    with open_folder(first, version) as folder, open_parent(rest, folder) as found:
        yield found


def open_file(name: str, parent: int) -> int:
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its writer.
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Invalid(f"{name} is a symbolic link: copy the file here instead") from error
        raise


def _walk(folder: int, prefix: str, depth: int) -> Iterator[Facts]:
    if depth > _DEPTH_MAX:
        raise Invalid(f"its folders are nested deeper than {_DEPTH_MAX}")
    for name in os.listdir(folder):
        try:
            facts = facts_of(prefix + name, os.stat(name, dir_fd=folder, follow_symlinks=False))
            yield facts
            if stat.S_ISDIR(facts.mode) and not name.startswith("."):
                with open_folder(name, folder) as inner:
                    yield from _walk(inner, f"{prefix}{name}/", depth + 1)
        except FileNotFoundError:
            continue  # gone since it was listed; the folder's own time tells


def facts_of(path: str, found: os.stat_result) -> Facts:
    # A folder's link count and size say nothing that its times do not.
    links, size = (1, 0) if stat.S_ISDIR(found.st_mode) else (found.st_nlink, found.st_size)
    return Facts(
        path,
        stat.S_IFMT(found.st_mode),
        found.st_ino,
        found.st_dev,
        links,
        size,
        found.st_mtime_ns,
        found.st_ctime_ns,
    )
