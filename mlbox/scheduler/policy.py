"""In which order waiting jobs are tried. Pure: time is a parameter."""

from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingJob:
    """What deciding about a waiting job needs. `slots` counts CPU slots and is 0 for a job that asks GPUs."""

    id: int
    uid: int
    user: str
    priority: int
    submitted_at: float
    gpus: int
    slots: int
    hold: bool = False
    not_before: float | None = None


Rank = tuple[int, int]


def rank(job: WaitingJob) -> Rank:
    """The key by which jobs are sorted, first to be tried first: priority, then order of submit."""
    return (-job.priority, job.id)


def barred(job: WaitingJob, now: float) -> str | None:
    """Why `job` may not start yet, whatever is free; None when it may."""
    if job.hold:
        return "it is held: release it when it may start"
    if job.not_before is not None and job.not_before > now:
        return f"it may not start before {datetime.fromtimestamp(job.not_before, UTC):%Y-%m-%d %H:%M:%S} UTC"
    return None
