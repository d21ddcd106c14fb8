"""What the scheduler asks of an executor: start one attempt, tell how it is, stop it.

An attempt lives in a folder of its own (`<state>/jobs/12/attempt-1`): `lock` (held by the shim as long as it lives),
`started.json` (user code was about to run), `exit.json` (how it ended), `log`, and `shim.log` where a shim had to
complain.
The folder is the truth; an executor keeps nothing in memory that a restart would lose.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Protocol

from msgspec import Meta

from mlbox.jobs import WarnSignal

_Bytes = Annotated[int, Meta(ge=0, le=2**62)]
"""A job can forge its records: what the database could not hold is no record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Everything one attempt needs.

    `folder` exists and is empty or left by an earlier launch of the very same attempt. `cwd` is created when it is
    missing and `code` is set. `env` is complete: nothing is inherited. `key` is random and unique to the attempt;
    it is in `env` as MLBOX_ATTEMPT_KEY, by which stray processes are found. `code` is an archive to unpack into
    `cwd` first. `log_head_bytes + log_tail_bytes` is the log's cap.

    `output` gets a copy of what the job prints, `error` of its stderr where that goes elsewhere; both are relative to
    `cwd`, and `append` keeps what is in them. One that cannot be opened is an `error` of the attempt's end; one that
    takes no more is let go. `cpu_affinity` are the cores that the job should run on (a hint).

    With `ranks` the program is run so many times at once, each with its RANK, LOCAL_RANK, SLURM_PROCID and
    SLURM_LOCALID; they share the log, byte by byte as they write. All have ended, or one has failed and the others
    were stopped: then the attempt has ended.

    With `adopt`, a process (pid, start time in ticks) that runs already is watched instead, and `argv` is not run:
    it is stopped like a job, with all its descendants, but its exit code cannot be known. Its shim may be started
    again when it died.
    """

    handle: str
    key: str
    folder: Path
    argv: tuple[str, ...]
    cwd: Path
    env: Mapping[str, str]
    code: Path | None = None
    log_head_bytes: int = 64 << 20
    log_tail_bytes: int = (1 << 30) - (64 << 20)
    time_limit_s: float | None = None
    grace_s: float = 30.0
    memory_mib: int | None = None
    cpus: int | None = None
    cpu_affinity: tuple[int, ...] = ()
    output: str | None = None
    error: str | None = None
    append: bool = False
    warn_signal: WarnSignal | None = None
    ranks: int | None = None
    adopt: tuple[int, int] | None = None


class Stopped(StrEnum):
    """Why the shim itself stopped the job, where it did."""

    CANCEL = "cancel"
    TIME_LIMIT = "time_limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """`started.json`: user code was about to run. Times are Unix seconds.

    `start_ticks` is when the main process `pid` began, in clock ticks since boot, so that a recycled pid is told
    apart; `cgroup` is the folder of its cgroup, where it has one of its own. With `adopted`, the shim only watches
    `pid`, and `started_at` is since when.
    """

    shim_pid: int
    pid: int
    boot_id: str
    started_at: float
    start_ticks: int | None = None
    cgroup: str | None = None
    adopted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """`exit.json`: how the attempt ended. Exactly one of `exit_code`, `signal`, `error` is set.

    `error` says why user code never ran (program missing, archive refused). `max_rss_mib` is the peak of the cgroup
    where there is one, else of the largest process. `log_bytes` counts all bytes the job wrote, kept or not.
    `rank` is the one that failed first and ended the job; `exit_code` or `signal` is its. `gpu_out_of_memory`: a
    failed job's last output says so. With `adopted`, `exit_code` 0 says only that it ended by itself, and `signal`
    by which it was stopped.
    """

    exit_code: Annotated[int, Meta(ge=0, le=255)] | None = None
    signal: Annotated[int, Meta(ge=1, le=64)] | None = None
    error: str | None = None
    stopped: Stopped | None = None
    out_of_memory: bool = False
    gpu_out_of_memory: bool = False
    rank: Annotated[int, Meta(ge=0, le=2**20)] | None = None
    adopted: bool = False
    started_at: float | None = None
    ended_at: float
    cpu_seconds: float
    max_rss_mib: float
    log_bytes: _Bytes
    log_dropped_bytes: _Bytes = 0


class Liveness(StrEnum):
    ALIVE = "alive"
    """The shim holds the lock."""
    ENDED = "ended"
    """No shim, and `exit.json` says how it ended."""
    VANISHED = "vanished"
    """No shim and no `exit.json`, but user code had started: it is lost."""
    NOT_STARTED = "not_started"
    """User code never ran: the same attempt may be launched again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What an attempt's folder says. `same_boot` is False when `started.json` names another boot of the box."""

    liveness: Liveness
    started: Started | None = None
    exit: Exit | None = None
    same_boot: bool = True


class CouldNotStart(Exception):
    """The executor could not launch the shim at all (fork failed, folder not writable). Nothing runs."""


class Executor(Protocol):
    """Starts and stops attempts. Every method is blocking, short, and safe to call again after a crash.

    Order: `start` at most once per launch decision; then `end_fd` until it becomes readable; then `observe`, which
    says ENDED or VANISHED; after VANISHED `kill_remains` until it returns nothing.
    A second shim of the same attempt finds the lock taken or `started.json` there, and refuses, so a `start` that is
    repeated after a crash never runs user code twice.
    """

    def start(self, launch: Launch) -> None:
        """Start the shim and tell it what to run. Returns at once (a few ms). Raises CouldNotStart."""
        ...

    def end_fd(self, folder: Path) -> int | None:
        """A file descriptor that becomes readable when the attempt's shim has ended; the caller closes it.

        None when no shim is alive now (observe again). Works for shims of an earlier daemon as well.
        """
        ...

    def observe(self, folder: Path) -> Observation:
        """What the folder says now; reaps the shim where it is our child."""
        ...

    def stop(self, folder: Path, *, kill: bool = False) -> None:
        """Ask the shim to end the job: TERM to the whole tree, KILL after the grace period (at once with `kill`).

        Idempotent; does nothing when no shim is alive. Never signals a recycled pid.
        """
        ...

    def processes(self, folder: Path, key: str) -> frozenset[int]:
        """The pids of all live processes of the attempt (cgroup, else tree and MLBOX_ATTEMPT_KEY in environ)."""
        ...

    def kill_remains(self, folder: Path, key: str) -> frozenset[int]:
        """KILL everything that is left of an attempt whose shim is gone; returns the pids still alive."""
        ...
