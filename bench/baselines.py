"""First come, first served, and EASY backfill: what `bench.month` holds mlbox against, without any of mlbox's code.

Both count GPUs only. EASY is Lifka's rule (The ANL/IBM SP Scheduling System, 1995): the first job that does not fit
gets a reservation by the time limits of what runs; a later one may start if it ends before it, or takes only GPUs that
are left over then. A job without a limit counts as endless. Neither stops a job for another.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job of a trace, in seconds; `limit_s` infinity: none. `length_s` is how long it runs, unknown to a policy."""

    id: int
    user: str
    submit: float
    gpus: int
    length_s: float
    limit_s: float = math.inf
    preemptible: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A run that came to its end."""

    job: Job
    start: float
    end: float


Pick = Callable[[list[Job], Sequence[Ran], int, float], Job | None]
"""(waiting, running, free GPUs, now) -> the job to start next, or None."""


def fifo(waiting: list[Job], running: Sequence[Ran], free: int, now: float) -> Job | None:
    """The first one, if it fits."""
    return waiting[0] if waiting and waiting[0].gpus <= free else None


def easy(waiting: list[Job], running: Sequence[Ran], free: int, now: float) -> Job | None:
    """The first one, or one that does not delay it."""
    if not waiting or not free or waiting[0].gpus <= free:
        return fifo(waiting, running, free, now)
    shadow, at_shadow = now, free
    for end, gpus in sorted((ran.start + ran.job.limit_s, ran.job.gpus) for ran in running):
        if at_shadow >= waiting[0].gpus and end > shadow:
            break
        shadow, at_shadow = end, at_shadow + gpus
    # Where what runs has no limits the moment is infinity, and any job with a limit ends before it.
    extra = at_shadow - waiting[0].gpus
    for job in waiting[1:]:
        if job.gpus <= free and (math.inf > now + job.limit_s <= shadow or job.gpus <= extra):
            return job
    return None


def replay(jobs: Sequence[Job], gpus: int, pick: Pick) -> list[Ran]:
    """Run all jobs in virtual time."""
    coming = sorted(jobs, key=lambda job: (job.submit, job.id))
    waiting: list[Job] = []
    running: list[Ran] = []
    ends: list[tuple[float, int, Ran]] = []
    done: list[Ran] = []
    free, at = gpus, 0
    while at < len(coming) or ends:
        now = min(coming[at].submit if at < len(coming) else math.inf, ends[0][0] if ends else math.inf)
        while ends and ends[0][0] <= now:
            ran = heappop(ends)[2]
            running.remove(ran)
            done.append(ran)
            free += ran.job.gpus
        while at < len(coming) and coming[at].submit <= now:
            waiting.append(coming[at])
            at += 1
        while (job := pick(waiting, running, free, now)) is not None:
            waiting.remove(job)
            ran = Ran(job=job, start=now, end=now + job.length_s)
            running.append(ran)
            heappush(ends, (ran.end, job.id, ran))
            free -= job.gpus
    return done
