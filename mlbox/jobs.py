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
    PREEMPTED = "preempted"
    """Of an attempt only: its job is queued again, and never ends so."""


RETRY_REASONS = frozenset({Reason.EXIT_CODE, Reason.SIGNAL})
"""The program failed in a way that another try may mend: `retries=n` gives these another attempt."""


class After(StrEnum):
    """What a job waits for in the end of another one (Slurm's words, sbatch(1), --dependency)."""

    OK = "afterok"
    """That it succeeded."""
    ANY = "afterany"
    """That it ended, however."""
    NOT_OK = "afternotok"
    """That it failed or was cancelled."""


class Met(StrEnum):
    """How a dependency stands."""

    NOT_YET = "not_yet"
    YES = "yes"
    NEVER = "never"
    """The other job ended otherwise, and ended states are final: whoever waits for it is cancelled."""


def met(after: After, parent: JobState) -> Met:
    """How a dependency on a job in state `parent` stands. A job with tries left is not ended, and is waited for."""
    if parent not in ENDED:
        return Met.NOT_YET
    wanted = after is After.ANY or (after is After.OK) == (parent is JobState.SUCCEEDED)
    return Met.YES if wanted else Met.NEVER


@dataclass(frozen=True, slots=True, kw_only=True)
class Dependency:
    """One job that another waits for. `whole_array`: `job_id` is an array's, and every element of it is meant."""

    job_id: int
    after: After = After.OK
    whole_array: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayPlace:
    """Where a job stands in its array: `id` is the id of the array's first job, `index` what the user numbered it.

    `size` counts the elements; at most `at_once` of them hold resources at one time (None: no cap).
    """

    id: int
    index: int
    size: int
    at_once: int | None = None


class Launcher(StrEnum):
    """How a job on several GPUs is started. The variables of torch.distributed are set for both."""

    PLAIN = "plain"
    """The program once; it makes its ranks itself."""
    TORCHRUN = "torchrun"
    """The command once for each GPU, as torchrun does; one rank that dies ends the job, and is named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarnSignal:
    """A signal sent `before_s` seconds before the time limit, to the main process only or to the whole tree."""

    number: int
    before_s: float
    main_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What a user asked for, checked and with defaults applied. Exactly one of `command`, `script` is set.

    `gpus` counts whole GPUs, `cpus` cores; `mem_mib` is MiB of host memory; `time_limit_s` and `grace_s` are
    seconds; `not_before` is Unix seconds. `code` is the archive's format where one was sent, else None.
    `gpu_mem_mib` is set instead of `gpus` and asks a share of one GPU. `output`, `error` are files that get a copy of
    what the job prints (Slurm's patterns expanded), relative to its folder. `notify_on` are Slurm's words of
    --mail-type in lower case (`begin`, `end`, `fail`, `requeue`, `time_limit`).
    """

    command: str | None = None
    script: str | None = None
    code: str | None = None
    workdir: str | None = None
    name: str
    project: str = "default"
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    gpus: int = 0
    gpu_mem_mib: int | None = None
    cpus: int | None = None
    mem_mib: int | None = None
    time_limit_s: float | None = None
    grace_s: float = 30.0
    warn_signal: WarnSignal | None = None
    priority: int = 0
    preemptible: bool = False
    depends_on: tuple[Dependency, ...] = ()
    retries: int = 0
    requeue: bool = False
    launch: Launcher | None = None
    model: str | None = None
    hold: bool = False
    not_before: float | None = None
    output: str | None = None
    error: str | None = None
    notify: tuple[str, ...] = ()
    notify_on: tuple[str, ...] = ("end", "fail")

    @property
    def wants_gpu(self) -> bool:
        """Whether it needs a GPU, whole or in part."""
        return self.gpus > 0 or self.gpu_mem_mib is not None

    @property
    def slots(self) -> int:
        """CPU slots that it takes: its cores where it asks no GPU, else none."""
        return 0 if self.wants_gpu else self.cpus or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """One element of an array as it was asked for: its number, and the variables of a matrix."""

    index: int
    env: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """An array as it was asked for: its elements in the order of submit, and how many may run at once."""

    elements: tuple[Element, ...]
    at_once: int | None = None


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
    array: ArrayPlace | None = None
    eligible_at: float | None = None
    """Since when nothing but the queue keeps it waiting (its dependencies are met); None while it depends."""
    adopted: bool = False
    """Whether it was begun outside mlbox and taken in while it ran."""
    usage: Usage = field(default_factory=Usage)

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def handle(job_id: int, attempt: int) -> str:
    """The name of one attempt, chosen before it starts, e.g. `mlbox-job-12-1`; also its cgroup or unit."""
    return f"mlbox-job-{job_id}-{attempt}"
