"""What a job is: its states, the moves between them, and the values that describe it. Pure.

`TRANSITIONS` is the whole state machine. The database refuses every other move (a trigger made from the same
pairs), and each move is one compare-and-set `UPDATE ... WHERE state = ?`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class JobState(StrEnum):
    """Where a job is in its life. A wish to cancel is a column (`cancel_requested_at`), not a state."""

    QUEUED = "queued"
    """Waiting for its turn. The scheduler moves it on; a crash of the daemon changes nothing."""
    STARTING = "starting"
    """GPUs are leased, the attempt is being launched. After a crash recovery launches it again or adopts it."""
    RUNNING = "running"
    """User code runs under its shim. It outlives the daemon; recovery adopts it or reads how it ended."""
    SUCCEEDED = "succeeded"
    """Ended with exit code 0. Final."""
    FAILED = "failed"
    """Ended otherwise, see `reason`. Final."""
    CANCELLED = "cancelled"
    """Ended because somebody, or a dependency, said so. Final."""


ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
ACTIVE = frozenset({JobState.STARTING, JobState.RUNNING})

TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.STARTING, JobState.FAILED, JobState.CANCELLED}),
    JobState.STARTING: frozenset(
        {JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
    ),
    JobState.RUNNING: frozenset({JobState.QUEUED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}
"""Every move a job may make. `starting | running -> queued` is the next attempt of the same job."""


class Reason(StrEnum):
    """Why a job ended. A closed list; `cause` is the sentence for people."""

    EXIT_CODE = "exit_code"
    SIGNAL = "signal"
    COULD_NOT_START = "could_not_start"
    OUT_OF_MEMORY = "out_of_memory"
    GPU_OUT_OF_MEMORY = "gpu_out_of_memory"
    TIME_LIMIT = "time_limit"
    STALLED = "stalled"
    LOST = "lost"
    REBOOT = "reboot"
    DEPENDENCY_FAILED = "dependency_failed"
    GPU_FAILED = "gpu_failed"
    USER = "user"


RETRY_REASONS = frozenset({Reason.EXIT_CODE, Reason.SIGNAL})
"""The program failed in a way that another try may mend: `retries=n` gives these another attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What a user asked for, checked and with defaults applied. Exactly one of `command`, `script` is set.

    `gpus` counts whole GPUs, `cpus` cores; `mem_mib` is MiB of host memory; `time_limit_s` and `grace_s` are
    seconds; `not_before` is Unix seconds. `code` is the archive's format where one was sent, else None.
    """

    command: str | None = None
    script: str | None = None
    code: str | None = None
    workdir: str | None = None
    name: str
    project: str = "default"
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    gpus: int = 0
    cpus: int | None = None
    mem_mib: int | None = None
    time_limit_s: float | None = None
    grace_s: float = 30.0
    priority: int = 0
    retries: int = 0
    requeue: bool = False
    model: str | None = None
    hold: bool = False
    not_before: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an attempt has used. Seconds and MiB; None where nobody measured."""

    gpu_seconds: float = 0.0
    cpu_seconds: float | None = None
    max_rss_mib: float | None = None
    max_gpu_mib: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as the database knows it. Times are Unix seconds; `attempt` is 0 before the first start."""

    id: int
    spec: JobSpec
    user: str
    uid: int
    state: JobState
    submitted_at: float
    reason: Reason | None = None
    cause: str | None = None
    started_at: float | None = None
    ended_at: float | None = None
    cancel_requested_at: float | None = None
    attempt: int = 0
    exit_code: int | None = None
    signal: int | None = None
    gpu_uuids: tuple[str, ...] = ()
    log_bytes: int | None = None
    files_removed: bool = False
    retry_of: int | None = None
    usage: Usage = field(default_factory=Usage)

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def handle(job_id: int, attempt: int) -> str:
    """The name of one attempt, chosen before it starts, e.g. `mlbox-job-12-1`; also its cgroup or unit."""
    return f"mlbox-job-{job_id}-{attempt}"
