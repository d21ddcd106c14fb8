"""Where the scheduler keeps files beneath the state folder, and the blocking work on them."""

import contextlib
import errno
import os
import shutil
import stat
from pathlib import Path

from mlbox.errors import Conflict
from mlbox.jobs import Job

_PLAIN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # O_NONBLOCK: a FIFO must not hold us
_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENODEV})
"""What open(2) and lstat(2) say of a name whose owner put something else there; all else is trouble of the box."""


class Folders:
    """Paths beneath `<state>/jobs`, and `<state>/incoming` where uploads are staged."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.jobs = state / "jobs"
        self.incoming = state / "incoming"

    def prepare(self) -> None:
        """Make the folders, and forget uploads that an earlier daemon did not finish. Blocking."""
        for folder in (self.state, self.jobs, self.incoming):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in self.incoming.iterdir():
            with contextlib.suppress(OSError):  # what cannot be removed is in nobody's way
                _remove(left)

    def job(self, job_id: int) -> Path:
        return self.jobs / str(job_id)

    def attempt(self, job_id: int, attempt: int) -> Path:
        return self.job(job_id) / f"attempt-{attempt}"

    def out(self, job_id: int) -> Path:
        """What a job leaves here is kept as its artifacts."""
        return self.job(job_id) / "out"

    def metrics(self, job_id: int) -> Path:
        return self.job(job_id) / "metrics.jsonl"

    def code(self, job: Job) -> Path | None:
        """The archive that came with the submit."""
        return self.job(job.id) / f"code.{job.spec.code}" if job.spec.code else None

    def keep_code(self, job_id: int, form: str, upload: Path, count: int = 1) -> None:
        """Move an upload to where job `job_id` will look for it, and make that durable. Blocking.

        `count` jobs from `job_id` on get the same archive (an array's), under names of their own. Their ids were just
        reserved, so whatever lies in their folders is left from a submit that was never acknowledged.
        """
        with upload.open("rb") as file:
            os.fsync(file.fileno())
        for each in range(job_id + count - 1, job_id - 1, -1):  # the first one last: it takes the upload itself
            folder = self.job(each)
            _remove(folder)
            folder.mkdir(mode=0o700)
            target = folder / f"code.{form}"
            if each == job_id:
                upload.rename(target)
            else:
                _same_file(upload, target)
            sync_folder(folder)
        sync_folder(self.jobs)

    def copy_code(self, job: Job) -> Path | None:
        """Another name for the job's archive in the incoming folder, for a job made from it. Blocking.

        Raises FileNotFoundError when the archive was removed.
        """
        source = self.code(job)
        if source is None:
            return None
        copy = self.incoming / f"again-{job.id}-{os.urandom(8).hex()}"
        _same_file(source, copy)
        return copy

    def forget_unknown(self, highest_id: int) -> None:
        """Remove folders of ids that were reserved but never became a job. Blocking."""
        for folder in self.jobs.iterdir():
            if folder.name.isdecimal() and int(folder.name) > highest_id:
                with contextlib.suppress(OSError):
                    _remove(folder)

    def sizes(self) -> dict[int, int]:
        """Bytes on disk of each job's folder, by job id; a file with several names counts once. Blocking, and slow."""
        linked: set[tuple[int, int]] = set()
        return {
            int(folder.name): _bytes_of(folder, linked) for folder in self.jobs.iterdir() if folder.name.isdecimal()
        }

    def remove(self, job_id: int) -> None:
        """Remove everything a job left on disk. Blocking. Raises Conflict where somebody else owns a part of it."""
        try:
            _remove(self.job(job_id))
        except PermissionError as error:
            raise Conflict(
                f"job {job_id} left files that mlbox may not remove ({error.filename}): remove them by hand"
            ) from error


def _bytes_of(folder: Path, linked: set[tuple[int, int]]) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # a running job removes files meanwhile
                facts = os.lstat(os.path.join(parent, name))  # noqa: PTH118  # Path would cost more than the lstat
                if facts.st_nlink > 1:
                    if (facts.st_dev, facts.st_ino) in linked:
                        continue
                    linked.add((facts.st_dev, facts.st_ino))
                total += facts.st_blocks * 512  # stat(2): in units of 512 bytes, holes not counted
    return total


def _same_file(source: Path, copy: Path) -> None:
    """Another name for a file."""
    try:
        copy.hardlink_to(source)
    except OSError:  # a file system without hard links, or no such file: then this says so
        shutil.copyfile(source, copy)


def _remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, also what a program left read-only (as Go's cache does)."""
    if path.is_dir() and not path.is_symlink():
        for parent, folders, _ in os.walk(path):
            for folder in (Path(parent, name) for name in folders):
                with contextlib.suppress(OSError):
                    if not folder.is_symlink():
                        folder.chmod(0o700)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def open_plain(path: Path) -> int:
    """A descriptor to read a plain file that a job may have replaced by anything. Never waits, follows no link there.

    Raises FileNotFoundError for all that is no plain file of ours to read, OSError for trouble of the box.
    """
    try:
        fd = os.open(path, _PLAIN)
    except OSError as error:
        if error.errno in _NOT_THERE:
            raise _missing(path) from None
        raise
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise _missing(path)


def read_plain(path: Path, limit: int) -> bytes:
    """The first `limit` bytes of a file. Raises as `open_plain` does."""
    with os.fdopen(open_plain(path), "rb") as file:
        return file.read(limit)


def facts_of(path: Path, kind: int) -> os.stat_result:
    """What lstat(2) says of a file of the `kind` (`stat.S_IFREG`, ...). Raises as `open_plain` does."""
    try:
        facts = path.lstat()
    except OSError as error:
        if error.errno in _NOT_THERE:
            raise _missing(path) from None
        raise
    if stat.S_IFMT(facts.st_mode) != kind:
        raise _missing(path)
    return facts


def _missing(path: Path) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename alone does not survive a power loss. Blocking."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
