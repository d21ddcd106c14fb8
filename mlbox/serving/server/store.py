"""The private copy of what is served: content-addressed, read-only, made through file descriptors. Blocking.

onnxruntime maps external data into memory: a file overwritten in place changes the answers of a running session, a
truncated one kills the process. So nothing is ever loaded from the folder that users write to.

A link could name any file that this process may read, and onnxruntime 1.31 follows hard links out of the folder:
only regular files with one name are taken.
"""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import signal
import stat
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mlbox.errors import Invalid, Unavailable
from mlbox.serving.server.files import (
    Facts,
    Fingerprint,
    check_plain,
    facts_of,
    fingerprint,
    open_file,
    open_folder,
    open_model,
    open_parent,
)

SUMS_FILE = "SHA256SUMS"
"""Where it lies beside the model, in sha256sum's format, every file it names must match: the one way to notice a
file that is half old and half new, for ONNX has no checksum and onnxruntime loads such a file."""
_COPY_BYTES = 1 << 20
_LOADING = ".loading-"
_CRASHES_MAX = 3
"""So many times a process may end while it loads the same content; a kill at that moment counts as well."""
_SUM_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


class Unsettled(Exception):
    """The files are being written, or could not be copied now: nothing is wrong with them, look again later."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One version's files in the store. `digest` is the SHA-256 of their names and digests."""

    digest: str
    path: Path


class Store:
    """The folder of copies. One process at a time uses it; what an earlier one left is removed at the start.

    `take` and `release` may be called from any thread.
    """

    def __init__(self, root: Path) -> None:
        """Raises Unavailable when another process uses the folder."""
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._root = root
        self._users: dict[str, int] = {}
        self._mutex = threading.Lock()
        self._lock = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise Unavailable(f"another inference server uses {root}: stop it or name another folder") from error
        for left in root.iterdir():
            if left.name != ".lock" and not left.name.startswith(_LOADING):
                _remove(left)

    def take(self, models: Path, name: str, number: int, expected: Fingerprint) -> Entry:
        """Copy a version that still is what `expected` says, or find that the same content is here already.

        Raises Unsettled, or Invalid for files that are never served. Each `take` wants one `release`.
        """
        if expected.problem is not None:
            raise Invalid(expected.problem)
        temporary = self._root / f".tmp-{secrets.token_hex(8)}"
        try:
            temporary.mkdir(mode=0o700, parents=True)  # the root, too, should somebody have removed it
            sums = self._copy(models, name, number, expected, temporary)
            _check_sums(temporary, sums)
            manifest = "".join(f"{digest}  {path}\n" for path, digest in sorted(sums.items()))
            digest = hashlib.sha256(manifest.encode(errors="surrogateescape")).hexdigest()
            _seal(temporary)
            with self._mutex:
                final = self._root / digest
                if not final.exists():
                    temporary.rename(final)
                self._users[digest] = self._users.get(digest, 0) + 1
            return Entry(digest, final)
        except OSError as error:
            raise Unsettled(f"it could not be copied: {error}") from error
        finally:
            _remove(temporary)

    def release(self, entry: Entry) -> None:
        """Nobody uses this copy any more on behalf of one `take`; the last one removes it."""
        with self._mutex:
            self._users[entry.digest] -= 1
            if self._users[entry.digest] > 0:
                return
            del self._users[entry.digest]
            doomed = self._root / f".tmp-{secrets.token_hex(8)}"
            with suppress(FileNotFoundError):  # somebody else removed it
                entry.path.rename(doomed)
        _remove(doomed)

    @contextmanager
    def loading(self, entry: Entry) -> Generator[None]:
        """Held while a copy is loaded for the first time, which may end the whole process (a crash in a library).

        Raises Invalid, once, for content during whose loading the process ended again and again: without that one bad
        file would keep the server from ever serving the others.
        """
        mark = self._root / f"{_LOADING}{entry.digest}"
        try:
            ends = int(mark.read_text())
        except (OSError, ValueError):
            ends = 0
        if ends >= _CRASHES_MAX:
            mark.unlink()
            raise Invalid(f"the server ended {ends} times while it was loaded: replace it, or ask for it to be loaded")
        mark.write_text(str(ends + 1))
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)

    def _copy(self, models: Path, name: str, number: int, expected: Fingerprint, target: Path) -> dict[str, str]:
        """Copy every visible file; returns path -> SHA-256. Raises Unsettled where it is not as `expected`."""
        sums: dict[str, str] = {}
        with open_model(models, name) as model, open_folder(str(number), model) as version:
            for facts in expected.entries:
                if facts.hidden or facts.path == ".":
                    continue
                if stat.S_ISDIR(facts.mode):
                    (target / facts.path).mkdir(mode=0o700)
                    continue
                check_plain(facts)
                sums[facts.path] = _copy_file(facts, version, target / facts.path)
        if fingerprint(models, name, number) != expected:
            raise Unsettled("its files changed while they were copied")
        return sums


def _copy_file(facts: Facts, version: int, target: Path) -> str:
    with open_parent(facts.path, version) as (parent, name), os.fdopen(open_file(name, parent), "rb", 0) as source:
        if facts_of(facts.path, os.fstat(source.fileno())) != facts:
            raise Unsettled(f"{facts.path} changed before it was copied")
        if _is_open_for_writing(source.fileno()):
            raise Unsettled(f"{facts.path} is still open for writing")
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_COPY_BYTES))
        with target.open("xb", 0) as copy:
            while count := source.readinto(buffer):
                digest.update(buffer[:count])
                rest = buffer[:count]
                while rest:
                    rest = rest[copy.write(rest) :]
            os.fchmod(copy.fileno(), 0o400)
        if facts_of(facts.path, os.fstat(source.fileno())) != facts:
            raise Unsettled(f"{facts.path} changed while it was copied")
    return digest.hexdigest()


def _is_open_for_writing(fd: int) -> bool:
    """Whether some process has this file open for writing: a copy that stalled is as quiet as one that is done.

    The kernel grants a read lease only on a file without writers, to its owner (fcntl(2), F_SETLEASE); where it may
    not be had, the settle time has to do.
    """
    try:
        # Who opens it for writing in the very moment of the lease makes the kernel signal us: by default SIGIO,
        # which would end the process; SIGURG is ignored by default.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    return False


def _check_sums(folder: Path, sums: dict[str, str]) -> None:
    if SUMS_FILE not in sums:
        return
    for line in (folder / SUMS_FILE).read_text(errors="replace").splitlines():
        match = _SUM_LINE.fullmatch(line.strip())
        path = os.path.normpath(match[2]) if match else ""
        if match is None or path not in sums:
            raise Invalid(f"{SUMS_FILE} names what is not here: {line[:100]!r}")
        if sums[path] != match[1].lower() and path != SUMS_FILE:
            raise Invalid(f"{path} is not what {SUMS_FILE} says: half copied, or the sums are of another version")


def _seal(folder: Path) -> None:
    """Nothing in it can be changed from here on."""
    for path, _, _ in os.walk(folder, topdown=False):
        Path(path).chmod(0o500)


def _remove(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for folder, _, _ in os.walk(path):
        with suppress(OSError):
            Path(folder).chmod(0o700)  # a sealed folder does not let go of its files
    shutil.rmtree(path, ignore_errors=True)
