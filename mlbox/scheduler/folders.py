"""Where the scheduler keeps files beneath the state folder, and the blocking work on them."""

import contextlib
import os
import shutil
from pathlib import Path

from mlbox.jobs import Job


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
            left.unlink()

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

    def keep_code(self, job_id: int, form: str, upload: Path) -> None:
        """Move an upload to where job `job_id` will look for it, and make that durable. Blocking.

        The id was just reserved, so whatever lies in its folder is left from a submit that was never acknowledged.
        """
        folder = self.job(job_id)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        with upload.open("rb") as file:
            os.fsync(file.fileno())
        upload.rename(folder / f"code.{form}")
        _sync_folder(folder)
        _sync_folder(self.jobs)

    def copy_code(self, job: Job) -> Path | None:
        """Another name for the job's archive in the incoming folder, for a job made from it. Blocking."""
        source = self.code(job)
        if source is None:
            return None
        copy = self.incoming / f"again-{job.id}-{os.urandom(8).hex()}"
        try:
            copy.hardlink_to(source)
        except FileNotFoundError:
            raise
        except OSError:  # a file system without hard links
            shutil.copyfile(source, copy)
        return copy

    def forget_unknown(self, highest_id: int) -> None:
        """Remove folders of ids that were reserved but never became a job. Blocking."""
        for folder in self.jobs.iterdir():
            if folder.name.isdigit() and int(folder.name) > highest_id:
                shutil.rmtree(folder, ignore_errors=True)

    def remove(self, job_id: int) -> None:
        """Remove everything a job left on disk. Blocking."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.job(job_id))


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
