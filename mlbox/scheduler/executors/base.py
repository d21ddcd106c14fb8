"""What the scheduler asks of an executor: start one attempt, tell how it is, stop it.

An attempt lives in a folder of its own (`<state>/jobs/12/attempt-1`): `launch.json` (what to run), `lock` (held by
the shim as long as it lives), `started.json` (user code was about to run), `exit.json` (how it ended), `log`.
The folder is the truth; an executor keeps nothing in memory that a restart would lose.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Protocol

from msgspec import Meta

_Bytes = Annotated[int, Meta(ge=0, le=2**62)]
"""A job can forge its records: what the database could not hold is no record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Everything one attempt needs.

    `folder` exists and is empty or left by an earlier launch of the very same attempt. `cwd` is created when it is
    missing and `code` is set. `env` is complete: nothing is inherited. `key` is random and unique to the attempt;
    it is in `env` as MLBOX_ATTEMPT_KEY, by which stray processes are found. `code` is an archive to unpack into
    `cwd` first. `log_head_bytes + log_tail_bytes` is the log's cap.
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


class Stopped(StrEnum):
    """Why the shim itself stopped the job, where it did."""

    CANCEL = "cancel"
    TIME_LIMIT = "time_limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """`started.json`: user code was about to run. Times are Unix seconds.

    `start_ticks` is when the main process `pid` began, in clock ticks since boot, so that a recycled pid is told
    apart; `cgroup` is the folder of its cgroup, where it has one of its own.
    """

    shim_pid: int
    pid: int
    boot_id: str
    started_at: float
    start_ticks: int | None = None
    cgroup: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """`exit.json`: how the attempt ended. Exactly one of `exit_code`, `signal`, `error` is set.

    `error` says why user code never ran (program missing, archive refused). `max_rss_mib` is the peak of the cgroup
    where there is one, else of the largest process. `log_bytes` counts all bytes the job wrote, kept or not.
    """

    exit_code: Annotated[int, Meta(ge=0, le=255)] | None = None
    signal: Annotated[int, Meta(ge=1, le=64)] | None = None
    error: str | None = None
    stopped: Stopped | None = None
    out_of_memory: bool = False
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
        """Write `launch.json` and start the shim. Returns at once (a few ms). Raises CouldNotStart."""
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
