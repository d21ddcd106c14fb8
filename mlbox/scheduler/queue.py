"""Every query about jobs, attempts and leases: plain functions over a connection, rows made values in one place.

Each move of a job is one compare-and-set: the function returns None or False when the row was no longer as the
caller believed, and then nothing was changed.
"""

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from mlbox.jobs import ENDED, Job, JobSpec, JobState, Reason, Usage
from mlbox.scheduler.outcome import Outcome, not_again
from mlbox.scheduler.placement import Start

_JOB = """
    SELECT j.*, a.exit_code, a.signal, a.gpu_uuids, a.log_bytes, a.cpu_seconds, a.max_rss_mib, a.max_gpu_mib,
        a.started_at AS attempt_started_at, a.ended_at AS attempt_ended_at
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
    "cpus",
    "mem_mib",
    "time_limit_s",
    "grace_s",
    "priority",
    "retries",
    "model",
    "not_before",
)
_FLAGS = ("requeue", "hold")
_COLUMNS = (*_SPEC, *_FLAGS, "env", "id", "user", "uid", "state", "submitted_at", "retry_of", "idempotency_key")
_INSERT = f"INSERT INTO jobs ({', '.join(_COLUMNS)}) VALUES ({', '.join(':' + column for column in _COLUMNS)})"  # noqa: S608


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A GPU that is not given back yet."""

    gpu_uuid: str
    job_id: int
    attempt: int
    key: str
    ended: bool
    """Whether the attempt is over, so that only the GPU's leftovers are waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launching:
    """An attempt that was committed and is now to be launched: the random values that only it knows."""

    start: Start
    key: str
    token_sha256: str


# Submitting and reading


def reserve_id(connection: sqlite3.Connection) -> int:
    """Take the next job id, so that its files can be in place before its row is."""
    connection.execute(
        "INSERT INTO sqlite_sequence (name, seq) SELECT 'jobs', 0 "
        "WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'jobs')"
    )
    row = connection.execute("UPDATE sqlite_sequence SET seq = seq + 1 WHERE name = 'jobs' RETURNING seq").fetchone()
    return int(row[0])


def submit(
    connection: sqlite3.Connection,
    spec: JobSpec,
    *,
    user: str,
    uid: int,
    now: float,
    job_id: int | None = None,
    retry_of: int | None = None,
    idempotency_key: str | None = None,
) -> tuple[Job, bool]:
    """Insert a job and return it and True, or the job that this key made before and False."""
    if idempotency_key is not None and (earlier := of_key(connection, uid, idempotency_key)):
        return earlier, False
    values = {column: getattr(spec, column) for column in _SPEC}
    values |= {column: int(getattr(spec, column)) for column in _FLAGS}
    values |= {
        "env": msgspec.json.encode(spec.env).decode(),
        "id": job_id,
        "user": user,
        "uid": uid,
        "state": JobState.QUEUED,
        "submitted_at": now,
        "retry_of": retry_of,
        "idempotency_key": idempotency_key,
    }
    new_id = connection.execute(_INSERT, values).lastrowid
    job = Job(
        id=new_id or 0,
        spec=spec,
        user=user,
        uid=uid,
        state=JobState.QUEUED,
        submitted_at=now,
        retry_of=retry_of,
    )
    return job, True


def of_key(connection: sqlite3.Connection, uid: int, idempotency_key: str) -> Job | None:
    row = connection.execute(_JOB + "WHERE j.uid = ? AND j.idempotency_key = ?", (uid, idempotency_key)).fetchone()
    return _job(row) if row else None


def get(connection: sqlite3.Connection, job_id: int) -> Job | None:
    row = connection.execute(_JOB + "WHERE j.id = ?", (job_id,)).fetchone()
    return _job(row) if row else None


def get_many(connection: sqlite3.Connection, job_ids: Sequence[int]) -> dict[int, Job]:
    """The jobs of these ids, by id; unknown ids are left out."""
    marks = ", ".join("?" * len(job_ids))
    rows = connection.execute(_JOB + f"WHERE j.id IN ({marks})", tuple(job_ids))
    return {row["id"]: _job(row) for row in rows}


def listing(
    connection: sqlite3.Connection,
    *,
    states: Iterable[JobState] = (),
    uid: int | None = None,
    user: str | None = None,
    name: str | None = None,
    project: str | None = None,
    before: int | None = None,
    limit: int = 100,
) -> list[Job]:
    """Jobs, newest first, by keyset: `before` is the last id of the page before."""
    conditions: list[str] = []
    values: list[object] = []
    wanted = frozenset(states)
    if wanted:
        # "+" keeps SQLite from gathering and sorting every ended job before the first of them is returned.
        column = "+j.state" if len(wanted) > 1 and wanted & ENDED else "j.state"
        conditions.append(f"{column} IN ({', '.join('?' * len(wanted))})")
        values += wanted
    for column, value in (("uid", uid), ("user", user), ("name", name), ("project", project)):
        if value is not None:
            conditions.append(f"j.{column} = ?")
            values.append(value)
    if before is not None:
        conditions.append("j.id < ?")
        values.append(before)
    where = "WHERE " + " AND ".join(conditions) if conditions else ""
    rows = connection.execute(_JOB + f"{where} ORDER BY j.id DESC LIMIT ?", (*values, limit))
    return [_job(row) for row in rows]


def counts(connection: sqlite3.Connection) -> dict[JobState, int]:
    return {JobState(row["state"]): row["count"] for row in connection.execute("SELECT state, count FROM job_counts")}


def in_states(connection: sqlite3.Connection, states: Sequence[JobState]) -> list[Job]:
    """Every job in one of `states` (for the few that are not ended), oldest first."""
    marks = ", ".join("?" * len(states))
    rows = connection.execute(_JOB + f"WHERE j.state IN ({marks}) ORDER BY j.id", tuple(states))
    return [_job(row) for row in rows]


def attempts(connection: sqlite3.Connection, job_id: int) -> list[Attempt]:
    rows = connection.execute("SELECT * FROM attempts WHERE job_id = ? ORDER BY attempt", (job_id,))
    return [_attempt(row) for row in rows]


def attempt_of(connection: sqlite3.Connection, job_id: int, attempt: int) -> Attempt | None:
    row = connection.execute("SELECT * FROM attempts WHERE job_id = ? AND attempt = ?", (job_id, attempt)).fetchone()
    return _attempt(row) if row else None


def failures(connection: sqlite3.Connection, job_id: int) -> int:
    return int(connection.execute("SELECT failures FROM jobs WHERE id = ?", (job_id,)).fetchone()[0])


def of_token(connection: sqlite3.Connection, token_sha256: str) -> Job | None:
    """The job under way whose current attempt was given this token."""
    row = connection.execute(
        _JOB + "WHERE a.token_sha256 = ? AND j.state IN ('starting', 'running')", (token_sha256,)
    ).fetchone()
    return _job(row) if row else None


# Moves


def start(connection: sqlite3.Connection, launching: Sequence[Launching], *, now: float) -> dict[int, int]:
    """Commit the intent to start: lease, state and attempt together. Returns the attempt number by job id.

    A job that waits no longer, or was put on hold meanwhile, is left out, and nothing of it is changed.
    """
    started: dict[int, int] = {}
    for one in launching:
        job_id = one.start.job_id
        row = connection.execute(
            "UPDATE jobs SET state = 'starting', attempt = attempt + 1, started_at = NULL, reason = NULL, cause = NULL "
            "WHERE id = ? AND state = 'queued' AND hold = 0 RETURNING attempt",
            (job_id,),
        ).fetchone()
        if row is None:
            continue
        attempt = int(row[0])
        connection.execute(
            "INSERT INTO attempts (job_id, attempt, attempt_key, token_sha256, gpu_uuids, created_at) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (job_id, attempt, one.key, one.token_sha256, ",".join(one.start.gpu_uuids), now),
        )
        connection.executemany(
            "INSERT INTO leases (gpu_uuid, job_id, attempt, leased_at) VALUES (?, ?, ?, ?)",
            [(uuid, job_id, attempt, now) for uuid in one.start.gpu_uuids],
        )
        started[job_id] = attempt
    return started


def renew_token(connection: sqlite3.Connection, job_id: int, attempt: int, token_sha256: str) -> None:
    """Give an attempt that is launched again another token: the first was never written down."""
    connection.execute(
        "UPDATE attempts SET token_sha256 = ? WHERE job_id = ? AND attempt = ?", (token_sha256, job_id, attempt)
    )


def running(connection: sqlite3.Connection, launched: Sequence[tuple[int, int]], *, now: float) -> list[Job]:
    """Move launched (job, attempt) pairs that are still STARTING to RUNNING; returns all their jobs as they now are."""
    jobs: list[Job] = []
    for job_id, attempt in launched:
        changed = connection.execute(
            "UPDATE jobs SET state = 'running', started_at = ? WHERE id = ? AND attempt = ? AND state = 'starting'",
            (now, job_id, attempt),
        ).rowcount
        if changed:
            connection.execute(
                "UPDATE attempts SET started_at = ? WHERE job_id = ? AND attempt = ?", (now, job_id, attempt)
            )
        job = get(connection, job_id)
        if job is not None:
            jobs.append(job)
    return jobs


def finish(connection: sqlite3.Connection, job_id: int, attempt: int, outcome: Outcome, *, now: float) -> Job | None:
    """Record how an attempt ended and move its job on. None when the attempt was already recorded.

    A wish to cancel that came after `outcome` was judged still prevents another attempt. The times of the attempt's
    own record are taken over: the daemon may have been away. GPU leases stay until the GPU is seen to be clean.
    """
    row = connection.execute(
        "SELECT cancel_requested_at, started_at FROM jobs "
        "WHERE id = ? AND attempt = ? AND state IN ('starting', 'running')",
        (job_id, attempt),
    ).fetchone()
    if row is None:
        return None
    if row["cancel_requested_at"] is not None:
        outcome = not_again(outcome)
    end = outcome.exit
    started_at, ended_at = (end.started_at, end.ended_at) if end else (row["started_at"], now)
    connection.execute(
        "UPDATE jobs SET state = ?, reason = ?, cause = ?, started_at = ?, ended_at = ?, failures = failures + ? "
        "WHERE id = ?",
        (
            outcome.state,
            outcome.reason,
            outcome.cause,
            started_at,
            ended_at if outcome.state in ENDED else None,
            int(outcome.failed),
            job_id,
        ),
    )
    connection.execute(
        "UPDATE attempts SET started_at = ?, ended_at = ?, reason = ?, cause = ?, exit_code = ?, signal = ?, "
        "cpu_seconds = ?, max_rss_mib = ?, log_bytes = ? WHERE job_id = ? AND attempt = ?",
        (
            started_at,
            ended_at,
            outcome.reason,
            outcome.cause,
            *((end.exit_code, end.signal, end.cpu_seconds, end.max_rss_mib, end.log_bytes) if end else (None,) * 5),
            job_id,
            attempt,
        ),
    )
    return get(connection, job_id)


def request_cancel(connection: sqlite3.Connection, job_id: int, *, user: str, now: float) -> Job | None:
    """End a waiting job at once, or note the wish on one under way. Returns the job as it then is."""
    connection.execute(
        "UPDATE jobs SET state = 'cancelled', reason = 'user', cause = ?, ended_at = ?, cancel_requested_at = ? "
        "WHERE id = ? AND state = 'queued'",
        (f"cancelled by {user} while it waited", now, now, job_id),
    )
    connection.execute(
        "UPDATE jobs SET cancel_requested_at = ? "
        "WHERE id = ? AND state IN ('starting', 'running') AND cancel_requested_at IS NULL",
        (now, job_id),
    )
    return get(connection, job_id)


def fail_waiting(connection: sqlite3.Connection, job_id: int, cause: str, *, now: float) -> bool:
    """End a waiting job that can never start."""
    return bool(
        connection.execute(
            "UPDATE jobs SET state = 'failed', reason = 'could_not_start', cause = ?, ended_at = ? "
            "WHERE id = ? AND state = 'queued'",
            (cause, now, job_id),
        ).rowcount
    )


def change(connection: sqlite3.Connection, job_id: int, values: Mapping[str, object]) -> Job | None:
    """Set columns of a job that waits (`priority`, `time_limit_s`, `hold`); None when it waits no longer."""
    allowed = {"priority", "time_limit_s", "hold"}
    if not values.keys() <= allowed:
        raise ValueError(f"only {sorted(allowed)} can be changed, not {sorted(values)}")
    assignments = ", ".join(f"{column} = :{column}" for column in values)
    changed = connection.execute(
        f"UPDATE jobs SET {assignments} WHERE id = :id AND state = 'queued'",  # noqa: S608
        {**values, "id": job_id},
    ).rowcount
    return get(connection, job_id) if changed else None


def mark_removed(connection: sqlite3.Connection, job_id: int, *, now: float) -> bool:
    """Note that an ended job's files are gone; False when it has not ended."""
    return bool(
        connection.execute(
            "UPDATE jobs SET removed_at = coalesce(removed_at, ?) WHERE id = ? AND ended_at IS NOT NULL", (now, job_id)
        ).rowcount
    )


# GPUs


def live_leases(connection: sqlite3.Connection) -> list[Lease]:
    rows = connection.execute(
        "SELECT l.gpu_uuid, l.job_id, l.attempt, a.attempt_key, a.ended_at FROM leases AS l "
        "JOIN attempts AS a USING (job_id, attempt) WHERE l.released_at IS NULL ORDER BY l.gpu_uuid"
    )
    return [
        Lease(
            gpu_uuid=row["gpu_uuid"],
            job_id=row["job_id"],
            attempt=row["attempt"],
            key=row["attempt_key"],
            ended=row["ended_at"] is not None,
        )
        for row in rows
    ]


def release(connection: sqlite3.Connection, gpu_uuids: Sequence[str], job_id: int, attempt: int, *, now: float) -> None:
    """Give GPUs back that were seen to be clean."""
    connection.executemany(
        "UPDATE leases SET released_at = max(leased_at, ?) "
        "WHERE gpu_uuid = ? AND job_id = ? AND attempt = ? AND released_at IS NULL",
        [(now, uuid, job_id, attempt) for uuid in gpu_uuids],
    )


def drained(connection: sqlite3.Connection) -> dict[str, str]:
    """GPUs out of service and why, by UUID."""
    rows = connection.execute("SELECT gpu_uuid, by_user, reason FROM drained_gpus")
    return {row["gpu_uuid"]: row["reason"] or f"drained by {row['by_user']}" for row in rows}


def drain(connection: sqlite3.Connection, gpu_uuid: str, *, user: str, reason: str | None, now: float) -> None:
    connection.execute(
        "INSERT INTO drained_gpus (gpu_uuid, since, by_user, reason) VALUES (?, ?, ?, ?) "
        "ON CONFLICT DO UPDATE SET reason = coalesce(excluded.reason, reason)",
        (gpu_uuid, now, user, reason),
    )


def resume(connection: sqlite3.Connection, gpu_uuid: str) -> bool:
    return bool(connection.execute("DELETE FROM drained_gpus WHERE gpu_uuid = ?", (gpu_uuid,)).rowcount)


# Rows to values


def _job(row: sqlite3.Row) -> Job:
    values: dict[str, Any] = {column: row[column] for column in _SPEC}
    values |= {column: bool(row[column]) for column in _FLAGS}
    spec = JobSpec(env=msgspec.json.decode(row["env"], type=dict[str, str]), **values)
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
        usage=Usage(
            gpu_seconds=len(uuids) * max(0.0, ended - began) if began and ended else 0.0,
            cpu_seconds=row["cpu_seconds"],
            max_rss_mib=row["max_rss_mib"],
            max_gpu_mib=row["max_gpu_mib"],
        ),
    )


def _attempt(row: sqlite3.Row) -> Attempt:
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
    )


def _uuids(text: str | None) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()
