"""Every query about jobs, attempts and leases: plain functions over a connection, rows made values in one place.

Each move of a job is one compare-and-set: the function returns None or False when the row was no longer as the
caller believed, and then nothing was changed.
"""

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from mlbox.errors import TooMany
from mlbox.jobs import ENDED, ArrayPlace, ArraySpec, Dependency, Job, JobSpec, JobState, Reason
from mlbox.scheduler import dependencies
from mlbox.scheduler.outcome import Outcome, not_again
from mlbox.scheduler.placement import Start
from mlbox.scheduler.rows import (
    INSERT,
    JOB,
    JSON,
    Attempt,
    Held,
    Lease,
    attempt_from,
    job_from,
    lease_from,
    text_of,
    values_of,
)

_FULL_RETRY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Launching:
    """An attempt that was committed and is now to be launched: the random values that only it knows."""

    start: Start
    key: str
    token_sha256: str
    charge_rate: float = 0.0
    """What each second costs its user in the fair share: GPUs by weight and share, or CPU slots by theirs."""
    backfilled: bool = False
    """Whether a job before it was blocked when it started."""
    adopts: tuple[int, int] | None = None
    """The process that is taken in (pid, start time in clock ticks since boot) instead of a program run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingQuota:
    """How many jobs may wait at once: of the user, of everybody in the project, of all. None: no bound."""

    user: int | None = None
    project: int | None = None
    box: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitter:
    """Who submits, and what of. `sees_all`: whether others' jobs may be waited for."""

    user: str
    uid: int
    sees_all: bool = False
    quota: WaitingQuota = WaitingQuota()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """Who moved because another job ended: `eligible` wait for nothing but the queue now, `cancelled` in vain."""

    eligible: tuple[Job, ...] = ()
    cancelled: tuple[int, ...] = ()


# Submitting and reading


def reserve_id(connection: sqlite3.Connection, count: int = 1) -> int:
    """Take the next `count` job ids and return the first, so that a job's files can be in place before its row is."""
    connection.execute(
        "INSERT INTO sqlite_sequence (name, seq) SELECT 'jobs', 0 "
        "WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'jobs')"
    )
    row = connection.execute(
        "UPDATE sqlite_sequence SET seq = seq + ? WHERE name = 'jobs' RETURNING seq", (count,)
    ).fetchone()
    return int(row[0]) - count + 1


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
    who = Submitter(user=user, uid=uid)
    jobs, made = submit_all(
        connection, spec, None, who, now=now, job_id=job_id, retry_of=retry_of, idempotency_key=idempotency_key
    )
    return jobs[0], made


def submit_all(
    connection: sqlite3.Connection,
    spec: JobSpec,
    array: ArraySpec | None,
    who: Submitter,
    *,
    now: float,
    job_id: int | None = None,
    retry_of: int | None = None,
    idempotency_key: str | None = None,
    adopted: bool = False,
) -> tuple[Sequence[Job], bool]:
    """Insert a job, or every element of an array, and return them and True; or what the key made before and False.

    The ids of an array are consecutive; `job_id` is the first of them where they were reserved. Of an array that a
    key made before only the first element is returned. Raises TooMany, and Invalid or Impossible for a dependency.
    """
    if idempotency_key is not None and (earlier := of_key(connection, who.uid, idempotency_key)):
        return [earlier], False
    size = len(array.elements) if array else 1
    _check_quota(connection, spec.project, who, size)
    first = reserve_id(connection, size) if job_id is None else job_id
    uid = None if who.sees_all else who.uid
    on = dependencies.parents(connection, spec.depends_on, uid=uid, before=first, jobs=size)
    waits_for = tuple(Dependency(job_id=parent_id, after=after) for parent_id, after in sorted(on))
    spec = replace(spec, depends_on=waits_for)
    eligible_at = now if all(parent.state in ENDED for parent in on.values()) else None
    one = Job(
        id=first,
        spec=spec,
        user=who.user,
        uid=who.uid,
        state=JobState.QUEUED,
        submitted_at=now,
        retry_of=retry_of,
        eligible_at=eligible_at,
        adopted=adopted,
    )
    jobs = _elements(one, array) if array else [one]
    connection.executemany(INSERT, (values_of(job, idempotency_key if job.id == first else None) for job in jobs))
    dependencies.record(connection, [job.id for job in jobs], on, now=now)
    return jobs, True


def _check_quota(connection: sqlite3.Connection, project: str, who: Submitter, size: int) -> None:
    """Raises TooMany when `size` more jobs are more than may wait. In the transaction: no two can both be the last."""
    bounds = (
        (who.quota.box, "SELECT count FROM job_counts WHERE state = 'queued'", (), "jobs wait"),
        (
            who.quota.user,
            "SELECT count(*) FROM jobs WHERE state = 'queued' AND uid = ?",
            (who.uid,),
            f"jobs of {who.user} wait",
        ),
        (
            who.quota.project,
            "SELECT count(*) FROM jobs WHERE state = 'queued' AND project = ?",
            (project,),
            f"jobs of project {project} wait",
        ),
    )
    for most, query, values, what in bounds:
        if most is None:
            continue
        waiting = int(connection.execute(query, values).fetchone()[0])
        if waiting + size > most:
            more = "" if size == 1 else f", these would be {size} more"
            raise TooMany(
                f"{waiting} {what}, and no more than {most} may{more}: submit again when some have ended", _FULL_RETRY_S
            )


def _elements(first: Job, array: ArraySpec) -> list[Job]:
    size = len(array.elements)
    return [
        replace(
            first,
            id=first.id + place,
            spec=replace(first.spec, env={**first.spec.env, **element.env}),
            array=ArrayPlace(id=first.id, index=element.index, size=size, at_once=array.at_once),
        )
        for place, element in enumerate(array.elements)
    ]


def of_key(connection: sqlite3.Connection, uid: int, idempotency_key: str) -> Job | None:
    row = connection.execute(JOB + "WHERE j.uid = ? AND j.idempotency_key = ?", (uid, idempotency_key)).fetchone()
    return job_from(row) if row else None


def get(connection: sqlite3.Connection, job_id: int) -> Job | None:
    row = connection.execute(JOB + "WHERE j.id = ?", (job_id,)).fetchone()
    return job_from(row) if row else None


def get_many(connection: sqlite3.Connection, job_ids: Sequence[int]) -> dict[int, Job]:
    """The jobs of these ids, by id; unknown ids are left out."""
    ids = msgspec.json.encode(job_ids).decode()  # one bound value, however many they are
    rows = connection.execute(JOB + "WHERE j.id IN (SELECT value FROM json_each(?)) ORDER BY j.id", (ids,))  # noqa: S608
    return {row["id"]: job_from(row) for row in rows}


def listing(
    connection: sqlite3.Connection,
    *,
    states: Iterable[JobState] = (),
    uid: int | None = None,
    user: str | None = None,
    name: str | None = None,
    project: str | None = None,
    array: int | None = None,
    before: int | None = None,
    limit: int = 100,
) -> list[Job]:
    """Jobs, newest first, by keyset: `before` is the last id of the page before. `array`: its elements only."""
    conditions: list[str] = []
    values: list[object] = []
    wanted = frozenset(states)
    if wanted:
        # "+" keeps SQLite from gathering and sorting every ended job before the first of them is returned.
        column = "+j.state" if len(wanted) > 1 and wanted & ENDED else "j.state"
        conditions.append(f"{column} IN ({', '.join('?' * len(wanted))})")
        values += wanted
    columns = (("uid", uid), ("user", user), ("name", name), ("project", project), ("array_id", array))
    for column, value in columns:
        if value is not None:
            conditions.append(f"j.{column} = ?")
            values.append(value)
    if before is not None:
        conditions.append("j.id < ?")
        values.append(before)
    where = "WHERE " + " AND ".join(conditions) if conditions else ""
    rows = connection.execute(JOB + f"{where} ORDER BY j.id DESC LIMIT ?", (*values, limit))
    return [job_from(row) for row in rows]


def counts(connection: sqlite3.Connection) -> dict[JobState, int]:
    return {JobState(row["state"]): row["count"] for row in connection.execute("SELECT state, count FROM job_counts")}


def in_states(connection: sqlite3.Connection, states: Sequence[JobState]) -> list[Job]:
    """Every job in one of `states` (for the few that are not ended), oldest first."""
    marks = ", ".join("?" * len(states))
    rows = connection.execute(JOB + f"WHERE j.state IN ({marks}) ORDER BY j.id", tuple(states))
    return [job_from(row) for row in rows]


def attempts(connection: sqlite3.Connection, job_id: int) -> list[Attempt]:
    rows = connection.execute("SELECT * FROM attempts WHERE job_id = ? ORDER BY attempt", (job_id,))
    return [attempt_from(row) for row in rows]


def held_since(connection: sqlite3.Connection, since: float, *, limit: int = 2000) -> list[Held]:
    """The newest attempts on GPUs that ended after `since`."""
    rows = connection.execute(
        "SELECT a.job_id, j.user, j.name, a.gpu_uuids, coalesce(a.started_at, a.created_at) AS started_at, a.ended_at "
        "FROM attempts AS a JOIN jobs AS j ON j.id = a.job_id "
        "WHERE a.ended_at > ? AND a.gpu_uuids <> '' ORDER BY a.ended_at DESC LIMIT ?",
        (since, limit),
    )
    return [
        Held(
            job_id=row["job_id"],
            user=row["user"],
            name=row["name"],
            gpu_uuids=tuple(row["gpu_uuids"].split(",")),
            started_at=row["started_at"],
            ended_at=row["ended_at"],
        )
        for row in rows
    ]


def attempt_of(connection: sqlite3.Connection, job_id: int, attempt: int) -> Attempt | None:
    row = connection.execute("SELECT * FROM attempts WHERE job_id = ? AND attempt = ?", (job_id, attempt)).fetchone()
    return attempt_from(row) if row else None


def failures(connection: sqlite3.Connection, job_id: int) -> int:
    return int(connection.execute("SELECT failures FROM jobs WHERE id = ?", (job_id,)).fetchone()[0])


def of_token(connection: sqlite3.Connection, token_sha256: str) -> Job | None:
    """The job under way whose current attempt was given this token."""
    row = connection.execute(
        JOB + "WHERE a.token_sha256 = ? AND j.state IN ('starting', 'running')", (token_sha256,)
    ).fetchone()
    return job_from(row) if row else None


# Moves


def start(connection: sqlite3.Connection, launching: Sequence[Launching], *, now: float) -> dict[int, int]:
    """Commit the intent to start: lease, state and attempt together. Returns the attempt number by job id.

    A job that waits no longer, was put on hold meanwhile or still depends on another is left out and not changed.
    """
    started: dict[int, int] = {}
    for one in launching:
        job_id = one.start.job_id
        row = connection.execute(
            "UPDATE jobs SET state = 'starting', attempt = attempt + 1, started_at = NULL, reason = NULL, cause = NULL "
            "WHERE id = ? AND state = 'queued' AND hold = 0 AND eligible_at IS NOT NULL RETURNING attempt",
            (job_id,),
        ).fetchone()
        if row is None:
            continue
        attempt = int(row[0])
        connection.execute(
            "INSERT INTO attempts (job_id, attempt, attempt_key, token_sha256, gpu_uuids, created_at, charge_rate, "
            "backfilled, adopted_pid, adopted_ticks) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                job_id,
                attempt,
                one.key,
                one.token_sha256,
                ",".join(one.start.gpu_uuids),
                now,
                one.charge_rate,
                int(one.backfilled),
                *(one.adopts or (None, None)),
            ),
        )
        memory = one.start.memory_mib
        connection.executemany(
            "INSERT INTO leases (gpu_uuid, share, memory_mib, job_id, attempt, leased_at) VALUES (?, ?, ?, ?, ?, ?)",
            [
                (uuid, 0 if memory is None else _free_share(connection, uuid), memory, job_id, attempt, now)
                for uuid in one.start.gpu_uuids
            ],
        )
        started[job_id] = attempt
    return started


def _free_share(connection: sqlite3.Connection, gpu_uuid: str) -> int:
    """The smallest number above 0 that no lease of this GPU has."""
    rows = connection.execute("SELECT share FROM leases WHERE gpu_uuid = ? AND released_at IS NULL", (gpu_uuid,))
    taken = {row["share"] for row in rows}
    return next(number for number in range(1, len(taken) + 2) if number not in taken)


def adopt(
    connection: sqlite3.Connection, spec: JobSpec, who: Submitter, launching: Launching, *, now: float
) -> tuple[Job, Attempt]:
    """Insert a job that runs already, with its attempt and its leases (the job id in `launching` is filled in)."""
    (job,), _ = submit_all(connection, spec, None, who, now=now, adopted=True)
    begins = replace(launching, start=replace(launching.start, job_id=job.id))
    start(connection, [begins], now=now)
    begun, attempt = get(connection, job.id), attempt_of(connection, job.id, 1)
    assert begun is not None, "it was just inserted"
    assert attempt is not None, "it was just inserted"
    return begun, attempt


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


def request_stop(
    connection: sqlite3.Connection, job_id: int, attempt: int, why: str, cause: str, *, now: float
) -> bool:
    """Note that mlbox itself wants an attempt to end. False when it has ended or was asked before: the first counts."""
    return bool(
        connection.execute(
            "UPDATE attempts SET stop_requested_at = ?, stop_why = ?, stop_cause = ? "
            "WHERE job_id = ? AND attempt = ? AND ended_at IS NULL AND stop_requested_at IS NULL",
            (now, why, cause, job_id, attempt),
        ).rowcount
    )


def finish(
    connection: sqlite3.Connection, job_id: int, attempt: int, outcome: Outcome, *, now: float
) -> tuple[Job | None, Settled]:
    """Record how an attempt ended, move its job on, and settle who waits for it. No job: it was recorded already.

    A wish to cancel that came after `outcome` was judged still prevents another attempt. The times of the attempt's
    own record are taken over: the daemon may have been away. GPU leases stay until the GPU is seen to be clean.
    """
    row = connection.execute(
        "SELECT cancel_requested_at, started_at FROM jobs "
        "WHERE id = ? AND attempt = ? AND state IN ('starting', 'running')",
        (job_id, attempt),
    ).fetchone()
    if row is None:
        return None, Settled()
    if row["cancel_requested_at"] is not None:
        outcome = not_again(outcome)
    end = outcome.exit
    started_at, ended_at = (end.started_at, end.ended_at) if end else (row["started_at"], now)
    connection.execute(
        "UPDATE jobs SET state = ?, reason = ?, cause = ?, started_at = ?, ended_at = ?, failures = failures + ? "
        "WHERE id = ?",
        (
            outcome.state,
            None if outcome.reason is Reason.PREEMPTED else outcome.reason,  # of an attempt only
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
    moved = _settle(connection, [job_id], outcome.state, now=now) if outcome.state in ENDED else Settled()
    return get(connection, job_id), moved


def request_cancel(connection: sqlite3.Connection, job_id: int, *, user: str, now: float) -> tuple[Job | None, Settled]:
    """End a waiting job at once, or note the wish on one under way. Returns the job as it then is."""
    _, moved = _cancel(connection, [job_id], user=user, now=now)
    return get(connection, job_id), moved


def cancel_array(connection: sqlite3.Connection, array_id: int, *, user: str, now: float) -> tuple[list[Job], Settled]:
    """Cancel every element that has not ended. Returns those, as they then are; none when the array is over."""
    rows = connection.execute(
        "SELECT id FROM jobs WHERE array_id = ? AND ended_at IS NULL ORDER BY id", (array_id,)
    ).fetchall()
    ids = [int(row["id"]) for row in rows]
    _, moved = _cancel(connection, ids, user=user, now=now)
    return list(get_many(connection, ids).values()), moved


def _cancel(
    connection: sqlite3.Connection, job_ids: Sequence[int], *, user: str, now: float
) -> tuple[Sequence[int], Settled]:
    """End those that wait and note the wish on those under way; returns who waited."""
    ids = msgspec.json.encode(job_ids).decode()
    rows = connection.execute(
        "UPDATE jobs SET state = 'cancelled', reason = 'user', cause = ?, ended_at = ?, cancel_requested_at = ? "
        "WHERE id IN (SELECT value FROM json_each(?)) AND state = 'queued' RETURNING id",
        (f"cancelled by {user} while it waited", now, now, ids),
    ).fetchall()
    connection.execute(
        "UPDATE jobs SET cancel_requested_at = ? WHERE id IN (SELECT value FROM json_each(?)) "
        "AND state IN ('starting', 'running') AND cancel_requested_at IS NULL",
        (now, ids),
    )
    waited = [int(row["id"]) for row in rows]
    return waited, _settle(connection, waited, JobState.CANCELLED, now=now)


def fail_waiting(connection: sqlite3.Connection, job_id: int, cause: str, *, now: float) -> Settled | None:
    """End a waiting job that can never start, and settle who waits for it. None when it waits no longer."""
    failed = connection.execute(
        "UPDATE jobs SET state = 'failed', reason = 'could_not_start', cause = ?, ended_at = ? "
        "WHERE id = ? AND state = 'queued'",
        (cause, now, job_id),
    ).rowcount
    return _settle(connection, [job_id], JobState.FAILED, now=now) if failed else None


def _settle(connection: sqlite3.Connection, ended: Sequence[int], state: JobState, *, now: float) -> Settled:
    moved = dependencies.settle(connection, ended, state, now=now)
    if not moved.eligible:
        return Settled(cancelled=moved.cancelled)
    eligible = get_many(connection, moved.eligible)
    return Settled(eligible=tuple(eligible.values()), cancelled=moved.cancelled)


def change(connection: sqlite3.Connection, job_id: int, values: Mapping[str, object]) -> Job | None:
    """Set columns of a job that waits (`priority`, `time_limit_s`, `hold`, `notify`); None when it waits no longer."""
    allowed = {"priority", "time_limit_s", "hold", "notify"}
    if not values.keys() <= allowed:
        raise ValueError(f"only {sorted(allowed)} can be changed, not {sorted(values)}")
    assignments = ", ".join(f"{column} = :{column}" for column in values)
    changed = connection.execute(
        f"UPDATE jobs SET {assignments} WHERE id = :id AND state = 'queued'",  # noqa: S608
        {**{column: text_of(value) if column in JSON else value for column, value in values.items()}, "id": job_id},
    ).rowcount
    return get(connection, job_id) if changed else None


def mark_removed(connection: sqlite3.Connection, job_id: int, *, now: float) -> bool:
    """Note that an ended job's files are gone; False when it has not ended."""
    return bool(
        connection.execute(
            "UPDATE jobs SET removed_at = coalesce(removed_at, ?) WHERE id = ? AND ended_at IS NOT NULL", (now, job_id)
        ).rowcount
    )


def with_files(connection: sqlite3.Connection) -> list[tuple[int, float]]:
    """Ended jobs whose files are still there, and when they ended, the first first.

    One whose files are still to become a model's version is left out.
    """
    rows = connection.execute(
        "SELECT id, ended_at FROM jobs WHERE ended_at IS NOT NULL AND removed_at IS NULL AND id NOT IN "
        "(SELECT job_id FROM model_versions WHERE job_id > 0 AND deployed_at IS NULL AND failed_at IS NULL) AND "
        "(model IS NULL OR state <> 'succeeded' OR id IN (SELECT job_id FROM model_versions WHERE job_id > 0)) "
        "ORDER BY ended_at"
    )
    return [(row["id"], row["ended_at"]) for row in rows]


# GPUs


def live_leases(connection: sqlite3.Connection) -> list[Lease]:
    rows = connection.execute(
        "SELECT l.gpu_uuid, l.share, l.memory_mib, l.job_id, l.attempt, a.attempt_key, a.ended_at FROM leases AS l "
        "JOIN attempts AS a USING (job_id, attempt) WHERE l.released_at IS NULL ORDER BY l.gpu_uuid, l.share"
    )
    return [lease_from(row) for row in rows]


def leases_of(connection: sqlite3.Connection, attempt: Attempt) -> list[Lease]:
    """What an attempt holds."""
    rows = connection.execute(
        "SELECT gpu_uuid, share, memory_mib FROM leases WHERE job_id = ? AND attempt = ? AND released_at IS NULL",
        (attempt.job_id, attempt.attempt),
    )
    return [
        Lease(
            gpu_uuid=row["gpu_uuid"],
            job_id=attempt.job_id,
            attempt=attempt.attempt,
            key=attempt.key,
            ended=attempt.ended_at is not None,
            share=row["share"],
            memory_mib=row["memory_mib"],
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


def add_idle(connection: sqlite3.Connection, idle: Sequence[tuple[int, int, float]]) -> None:
    """Add GPU-seconds in which (job, attempt) did nothing with its GPUs."""
    connection.executemany(
        "UPDATE attempts SET idle_gpu_seconds = idle_gpu_seconds + ? WHERE job_id = ? AND attempt = ?",
        [(seconds, job_id, attempt) for job_id, attempt, seconds in idle],
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
