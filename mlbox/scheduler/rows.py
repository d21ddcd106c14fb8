"""How jobs, attempts and leases are written in the database and read back, in one place."""

import sqlite3
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import msgspec

from mlbox.jobs import (
    After,
    ArrayPlace,
    Dependency,
    Job,
    JobSpec,
    JobState,
    Launcher,
    Reason,
    Usage,
    WarnSignal,
)

JOB = """
    SELECT j.*, a.exit_code, a.signal, a.gpu_uuids, a.log_bytes, a.cpu_seconds, a.max_rss_mib, a.max_gpu_mib,
        a.started_at AS attempt_started_at, a.ended_at AS attempt_ended_at,
        (SELECT json_group_array(json_array(parent_id, after)) FROM dependencies WHERE job_id = j.id) AS depends_on
    FROM jobs AS j LEFT JOIN attempts AS a ON a.job_id = j.id AND a.attempt = j.attempt
"""
_SPEC = (
    "command",
    "script",
    "code",
    "workdir",
    "name",
    "project",
    "gpus",
    "gpu_mem_mib",
    "cpus",
    "mem_mib",
    "time_limit_s",
    "grace_s",
    "priority",
    "retries",
    "launch",
    "model",
    "not_before",
    "output",
    "error",
)
_FLAGS = ("requeue", "hold", "preemptible")
JSON = ("env", "warn_signal", "notify", "notify_on")
_ROW = (
    "id",
    "user",
    "uid",
    "state",
    "submitted_at",
    "retry_of",
    "idempotency_key",
    "array_id",
    "array_index",
    "array_size",
    "array_at_once",
    "eligible_at",
    "adopted",
)
_COLUMNS = (*_SPEC, *_FLAGS, *JSON, *_ROW)
INSERT = f"INSERT INTO jobs ({', '.join(_COLUMNS)}) VALUES ({', '.join(':' + column for column in _COLUMNS)})"  # noqa: S608


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start of a job, as the database knows it."""

    job_id: int
    attempt: int
    key: str
    gpu_uuids: tuple[str, ...]
    created_at: float
    started_at: float | None
    ended_at: float | None
    exit_code: int | None
    signal: int | None
    reason: Reason | None
    cause: str | None
    cpu_seconds: float | None
    max_rss_mib: float | None
    log_bytes: int | None
    charge_rate: float = 0.0
    backfilled: bool = False
    stop_why: str | None = None
    stop_cause: str | None = None
    """Why mlbox itself wants it to end, where it does."""
    adopts: tuple[int, int] | None = None
    """The process that it took in, by pid and start time in clock ticks since boot; no program is run then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A past attempt that held GPUs."""

    job_id: int
    user: str
    name: str
    gpu_uuids: tuple[str, ...]
    started_at: float
    ended_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A GPU, or a share of one, that is not given back yet.

    `share` is 0 for a whole GPU; else it tells the shares of one GPU apart, and `memory_mib` is how much it reserves.
    """

    gpu_uuid: str
    job_id: int
    attempt: int
    key: str
    ended: bool
    """Whether the attempt is over, so that only the GPU's leftovers are waited for."""
    share: int = 0
    memory_mib: int | None = None


def values_of(job: Job, idempotency_key: str | None) -> dict[str, object]:
    spec, array = job.spec, job.array
    values: dict[str, object] = {column: getattr(spec, column) for column in _SPEC}
    values |= {column: int(getattr(spec, column)) for column in _FLAGS}
    values |= {column: text_of(getattr(spec, column)) for column in JSON}
    return values | {
        "id": job.id,
        "user": job.user,
        "uid": job.uid,
        "state": job.state,
        "submitted_at": job.submitted_at,
        "retry_of": job.retry_of,
        "idempotency_key": idempotency_key,
        "array_id": array.id if array else None,
        "array_index": array.index if array else None,
        "array_size": array.size if array else None,
        "array_at_once": array.at_once if array else None,
        "eligible_at": job.eligible_at,
        "adopted": int(job.adopted),
    }


def job_from(row: sqlite3.Row) -> Job:
    values: dict[str, Any] = {column: row[column] for column in _SPEC}
    values |= {column: bool(row[column]) for column in _FLAGS}
    spec = JobSpec(
        **values,
        env=msgspec.json.decode(row["env"], type=dict[str, str]) if row["env"] != "{}" else {},
        warn_signal=msgspec.json.decode(row["warn_signal"], type=WarnSignal) if row["warn_signal"] else None,
        notify=_list_from(row["notify"]),
        notify_on=_list_from(row["notify_on"]),
        depends_on=_depends_on(row["depends_on"]),
    )
    if spec.launch is not None:
        spec = replace(spec, launch=Launcher(spec.launch))
    uuids = _uuids(row["gpu_uuids"])
    began, ended = row["attempt_started_at"], row["attempt_ended_at"]
    return Job(
        id=row["id"],
        spec=spec,
        user=row["user"],
        uid=row["uid"],
        state=JobState(row["state"]),
        reason=Reason(row["reason"]) if row["reason"] else None,
        cause=row["cause"],
        submitted_at=row["submitted_at"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        cancel_requested_at=row["cancel_requested_at"],
        attempt=row["attempt"],
        exit_code=row["exit_code"],
        signal=row["signal"],
        gpu_uuids=uuids,
        log_bytes=row["log_bytes"],
        files_removed=row["removed_at"] is not None,
        retry_of=row["retry_of"],
        array=_array(row),
        eligible_at=row["eligible_at"],
        adopted=bool(row["adopted"]),
        usage=Usage(
            gpu_seconds=len(uuids) * max(0.0, ended - began) if began and ended else 0.0,
            cpu_seconds=row["cpu_seconds"],
            max_rss_mib=row["max_rss_mib"],
            max_gpu_mib=row["max_gpu_mib"],
        ),
    )


def attempt_from(row: sqlite3.Row) -> Attempt:
    return Attempt(
        job_id=row["job_id"],
        attempt=row["attempt"],
        key=row["attempt_key"],
        gpu_uuids=_uuids(row["gpu_uuids"]),
        created_at=row["created_at"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        exit_code=row["exit_code"],
        signal=row["signal"],
        reason=Reason(row["reason"]) if row["reason"] else None,
        cause=row["cause"],
        cpu_seconds=row["cpu_seconds"],
        max_rss_mib=row["max_rss_mib"],
        log_bytes=row["log_bytes"],
        charge_rate=row["charge_rate"],
        backfilled=bool(row["backfilled"]),
        stop_why=row["stop_why"],
        stop_cause=row["stop_cause"],
        adopts=(row["adopted_pid"], row["adopted_ticks"]) if row["adopted_pid"] is not None else None,
    )


def lease_from(row: sqlite3.Row) -> Lease:
    return Lease(
        gpu_uuid=row["gpu_uuid"],
        job_id=row["job_id"],
        attempt=row["attempt"],
        key=row["attempt_key"],
        ended=row["ended_at"] is not None,
        share=row["share"],
        memory_mib=row["memory_mib"],
    )


def _array(row: sqlite3.Row) -> ArrayPlace | None:
    if row["array_id"] is None:
        return None
    return ArrayPlace(
        id=row["array_id"], index=row["array_index"], size=row["array_size"], at_once=row["array_at_once"]
    )


@lru_cache(maxsize=256)
def _list_from(text: str) -> tuple[str, ...]:
    """A JSON list of text; most rows have the same few."""
    return msgspec.json.decode(text, type=tuple[str, ...])


def _depends_on(text: str) -> tuple[Dependency, ...]:
    if text == "[]":
        return ()
    pairs = msgspec.json.decode(text, type=list[tuple[int, str]])
    return tuple(Dependency(job_id=parent_id, after=After(after)) for parent_id, after in sorted(pairs))


def text_of(value: object) -> str | None:
    """A value as JSON; None stays None."""
    return None if value is None else msgspec.json.encode(value).decode()


def _uuids(text: str | None) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()
