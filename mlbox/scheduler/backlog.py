"""The waiting jobs in memory, in order: an index over the database's `queued` rows, kept in step by the service.

A pass over 10,000 rows of SQLite for every job that ends would cost more than starting the next one.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

from mlbox.scheduler.policy import Rank, WaitingJob, barred, rank


class Backlog:
    """Waiting jobs in two lines by rank, one for GPUs and one for CPU slots, and aside those that may not start yet.

    Adding, removing and finding a position take logarithmic time and a short move.
    """

    def __init__(self) -> None:
        self._jobs: dict[int, WaitingJob] = {}
        self._gpu_line: list[Rank] = []
        self._slot_line: list[Rank] = []
        self._aside: set[int] = set()
        self._next_due = math.inf

    def __len__(self) -> int:
        return len(self._jobs)

    def get(self, job_id: int) -> WaitingJob | None:
        return self._jobs.get(job_id)

    def put(self, job: WaitingJob, now: float) -> None:
        """Add `job`, or replace what was known of it."""
        self.drop(job.id)
        self._jobs[job.id] = job
        if barred(job, now):
            self._set_aside(job)
        else:
            insort(self._line(job), rank(job))

    def drop(self, job_id: int) -> None:
        """Forget a job that waits no longer; nothing happens when it is not there."""
        job = self._jobs.pop(job_id, None)
        if job is None:
            return
        if job_id in self._aside:
            self._aside.discard(job_id)
        else:
            line = self._line(job)
            del line[bisect_left(line, rank(job))]

    def replace_all(self, jobs: Iterable[WaitingJob], now: float) -> None:
        """Start anew from the database's truth."""
        self._jobs = {job.id: job for job in jobs}
        self._aside.clear()
        self._next_due = math.inf
        ready: list[WaitingJob] = []
        for job in self._jobs.values():
            if barred(job, now):
                self._set_aside(job)
            else:
                ready.append(job)
        self._gpu_line = sorted(rank(job) for job in ready if job.gpus)
        self._slot_line = sorted(rank(job) for job in ready if not job.gpus)

    def admit(self, now: float) -> None:
        """Let the jobs whose time has come into their line."""
        if now < self._next_due:
            return
        aside = [self._jobs[job_id] for job_id in self._aside]
        self._next_due = math.inf
        for job in aside:
            self.put(job, now)

    @property
    def next_due(self) -> float:
        """When the next job's `not_before` comes, in Unix seconds; infinity when none waits for a time."""
        return self._next_due

    def gpu_line(self) -> Iterator[WaitingJob]:
        """The jobs that want GPUs and may start, first to be tried first."""
        return (self._jobs[job_id] for _, job_id in self._gpu_line)

    def slot_line(self) -> Iterator[WaitingJob]:
        """The jobs that want CPU slots only and may start, first to be tried first."""
        return (self._jobs[job_id] for _, job_id in self._slot_line)

    def ordered(self, limit: int) -> list[WaitingJob]:
        """The first `limit` waiting jobs in one order; those set aside come last."""
        first = sorted(self._gpu_line[:limit] + self._slot_line[:limit])[:limit]
        aside = sorted(self._aside)[: limit - len(first)]
        return [self._jobs[job_id] for _, job_id in first] + [self._jobs[job_id] for job_id in aside]

    def ahead(self, job: WaitingJob) -> int:
        """How many jobs of its own line come before `job`."""
        return bisect_left(self._line(job), rank(job))

    def position(self, job: WaitingJob) -> int | None:
        """1 for the job that is tried first of all; None for one that may not start yet."""
        if job.id in self._aside:
            return None
        key = rank(job)
        return bisect_left(self._gpu_line, key) + bisect_left(self._slot_line, key) + 1

    def _set_aside(self, job: WaitingJob) -> None:
        self._aside.add(job.id)
        if job.not_before is not None and not job.hold:
            self._next_due = min(self._next_due, job.not_before)

    def _line(self, job: WaitingJob) -> list[Rank]:
        return self._gpu_line if job.gpus else self._slot_line
