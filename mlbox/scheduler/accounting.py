"""What was used and by whom: every query over past attempts, and the report that is made of them."""

import json
import math
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

_HOUR_S = 3600.0

_GPUS = "CASE a.gpu_uuids WHEN '' THEN 0 ELSE 1 + length(a.gpu_uuids) - length(replace(a.gpu_uuids, ',', '')) END"


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What an ended attempt cost in the fair share: `rate` each second from `started_at` to `ended_at`, on `gpus`."""

    uid: int
    user: str
    project: str
    started_at: float
    ended_at: float
    rate: float
    gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration:
    """How long an attempt that succeeded took. `command` is None for a script."""

    uid: int
    user: str
    project: str
    name: str
    command: str | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageLine:
    """What one user or project had. Shared GPUs count by the part of their memory.

    `gpu_hours_idle` are those in which the GPUs did nothing. `cpu_hours` are measured, which is done when an attempt
    ends. `jobs` counts those that ran; the waits are of those that first started in the window, in seconds from when
    only the queue kept them; None where none did.
    """

    name: str
    gpu_hours: float = 0.0
    gpu_hours_idle: float = 0.0
    cpu_hours: float = 0.0
    jobs: int = 0
    wait_mean_s: float | None = None
    wait_p95_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageReport:
    """What was used from `since` to `until` (Unix seconds), who used most first."""

    since: float
    until: float
    total: UsageLine
    users: tuple[UsageLine, ...]
    projects: tuple[UsageLine, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What one user had in one project, in seconds."""

    user: str
    project: str
    gpu_s: float
    idle_s: float
    cpu_s: float
    jobs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wait:
    user: str
    project: str
    seconds: float


def charges(connection: sqlite3.Connection, since: float) -> list[Charge]:
    """Every attempt that ended after `since` and was charged, the oldest end first."""
    rows = connection.execute(
        f"SELECT j.uid, j.user, j.project, a.started_at, a.ended_at, a.charge_rate, {_GPUS} AS gpus "  # noqa: S608
        "FROM attempts AS a JOIN jobs AS j ON j.id = a.job_id "
        "WHERE a.ended_at > ? AND a.started_at < a.ended_at AND a.charge_rate > 0 "
        "ORDER BY a.ended_at",
        (since,),
    )
    return [
        Charge(
            uid=row["uid"],
            user=row["user"],
            project=row["project"],
            started_at=row["started_at"],
            ended_at=row["ended_at"],
            rate=row["charge_rate"],
            gpus=row["gpus"],
        )
        for row in rows
    ]


def durations(connection: sqlite3.Connection, limit: int) -> list[Duration]:
    """How long the newest attempts that succeeded took, the oldest of them first: what run times are learned from."""
    rows = connection.execute(
        "SELECT j.uid, j.user, j.project, j.name, j.command, a.ended_at - a.started_at AS seconds FROM attempts AS a "
        "JOIN jobs AS j ON j.id = a.job_id AND j.attempt = a.attempt "
        "WHERE a.ended_at IS NOT NULL AND a.ended_at >= a.started_at AND j.state = 'succeeded' AND j.adopted = 0 "
        "ORDER BY a.ended_at DESC LIMIT ?",
        (limit,),
    ).fetchall()
    return [
        Duration(
            uid=row["uid"],
            user=row["user"],
            project=row["project"],
            name=row["name"],
            command=row["command"],
            seconds=row["seconds"],
        )
        for row in reversed(rows)
    ]


def usage(
    connection: sqlite3.Connection, *, since: float, until: float, gpu_memory_mib: Mapping[str, int]
) -> UsageReport:
    """What was used between two times; attempts that cross them, or still run, count with the part between.

    `gpu_memory_mib` is each GPU's memory by UUID: a share of a GPU that is not named counts as a whole one.
    """
    parts = _parts(connection, since, until, gpu_memory_mib)
    waits = _waits(connection, since, until)
    return UsageReport(
        since=since,
        until=until,
        total=_line("", parts, waits),
        users=_lines(parts, waits, lambda one: one.user),
        projects=_lines(parts, waits, lambda one: one.project),
    )


def _parts(
    connection: sqlite3.Connection, since: float, until: float, gpu_memory_mib: Mapping[str, int]
) -> list[_Part]:
    rows = connection.execute(
        f"""
        WITH ran AS (
            SELECT j.user, j.project, a.job_id,
                {_GPUS} * min(1.0, coalesce(1.0 * j.gpu_mem_mib / memory.value, 1.0)) AS gpus,
                max(0.0, min(coalesce(a.ended_at, :until), :until) - max(a.started_at, :since)) AS seconds,
                max(1e-9, coalesce(a.ended_at, :until) - a.started_at) AS whole_seconds,
                a.idle_gpu_seconds AS idle, coalesce(a.cpu_seconds, 0.0) AS cpu
            FROM attempts AS a JOIN jobs AS j ON j.id = a.job_id
                LEFT JOIN json_each(:memory) AS memory ON memory.key = a.gpu_uuids
            WHERE (a.ended_at > :since OR a.ended_at IS NULL) AND a.started_at < :until
        )
        SELECT user, project, sum(gpus * seconds) AS gpu_s, count(DISTINCT job_id) AS jobs,
            sum(min(idle * seconds / whole_seconds, gpus * seconds)) AS idle_s,
            sum(cpu * seconds / whole_seconds) AS cpu_s
        FROM ran GROUP BY user, project
        """,  # noqa: S608  # _GPUS is ours
        {"since": since, "until": until, "memory": json.dumps(dict(gpu_memory_mib))},
    )
    return [
        _Part(
            user=row["user"],
            project=row["project"],
            gpu_s=row["gpu_s"],
            idle_s=row["idle_s"],
            cpu_s=row["cpu_s"],
            jobs=row["jobs"],
        )
        for row in rows
    ]


def _waits(connection: sqlite3.Connection, since: float, until: float) -> list[_Wait]:
    rows = connection.execute(
        "SELECT j.user, j.project, max(0.0, a.started_at - max(coalesce(j.eligible_at, j.submitted_at), "
        "coalesce(j.not_before, 0))) AS seconds FROM attempts AS a JOIN jobs AS j ON j.id = a.job_id "
        "WHERE (a.ended_at > :since OR a.ended_at IS NULL) AND a.started_at BETWEEN :since AND :until "
        "AND a.attempt = 1 AND j.adopted = 0",
        {"since": since, "until": until},
    )
    return [_Wait(user=row["user"], project=row["project"], seconds=row["seconds"]) for row in rows]


def _lines(
    parts: Sequence[_Part], waits: Sequence[_Wait], name_of: Callable[[_Part | _Wait], str]
) -> tuple[UsageLine, ...]:
    parts_of: dict[str, list[_Part]] = {}
    waits_of: dict[str, list[_Wait]] = {}
    for part in parts:
        parts_of.setdefault(name_of(part), []).append(part)
    for wait in waits:
        waits_of.setdefault(name_of(wait), []).append(wait)
    lines = (_line(name, own, waits_of.get(name, ())) for name, own in parts_of.items())
    return tuple(sorted(lines, key=lambda line: (-line.gpu_hours, -line.cpu_hours, line.name)))


def _line(name: str, parts: Sequence[_Part], waits: Sequence[_Wait]) -> UsageLine:
    seconds = sorted(wait.seconds for wait in waits)
    return UsageLine(
        name=name,
        gpu_hours=sum(part.gpu_s for part in parts) / _HOUR_S,
        gpu_hours_idle=sum(part.idle_s for part in parts) / _HOUR_S,
        cpu_hours=sum(part.cpu_s for part in parts) / _HOUR_S,
        jobs=sum(part.jobs for part in parts),
        wait_mean_s=fmean(seconds) if seconds else None,
        wait_p95_s=seconds[math.ceil(0.95 * len(seconds)) - 1] if seconds else None,  # nearest rank
    )
