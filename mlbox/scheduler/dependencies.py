"""Every query about who waits for whom: what may be waited for, and what an end lets start or can never let start."""

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlbox.errors import FieldError, Impossible, Invalid
from mlbox.jobs import ENDED, After, Dependency, JobState, Met, met

_FIELD = "depends_on"
_MOST = 200_000
"""Rows that one submit may add (jobs of the array times jobs waited for): about a second of the one writer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """A job that is waited for."""

    id: int
    state: JobState


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Ids of jobs that an end moved: `eligible` wait for nothing but the queue now, `cancelled` waited in vain."""

    eligible: tuple[int, ...] = ()
    cancelled: tuple[int, ...] = ()


def parents(
    connection: sqlite3.Connection, wanted: Sequence[Dependency], *, uid: int | None, before: int, jobs: int = 1
) -> dict[tuple[int, After], Parent]:
    """The jobs that `wanted` means, for `jobs` jobs, the first with id `before`, that wait for them.

    The id of an array means all of it, as in Slurm.
    `uid` is whose jobs may be named; None: everybody's. Raises Invalid for a job that is not there or not to be seen,
    Impossible for one that ended against it.
    """
    if not wanted:
        return {}
    rows = connection.execute(
        "SELECT id, id AS asked, 0 AS whole, state, uid FROM jobs WHERE id IN (SELECT value FROM json_each(?)) "
        "UNION ALL SELECT id, array_id, 1, state, uid FROM jobs WHERE array_id IN (SELECT value FROM json_each(?))",
        (_ids(one.job_id for one in wanted), _ids(one.job_id for one in wanted)),
    ).fetchall()
    alone: dict[int, list[Parent]] = {}
    arrays: dict[int, list[Parent]] = {}
    for row in rows:
        if (uid is None or row["uid"] == uid) and row["id"] < before:
            found = arrays if row["whole"] else alone
            found.setdefault(row["asked"], []).append(Parent(id=row["id"], state=JobState(row["state"])))
    answer: dict[tuple[int, After], Parent] = {}
    for one in wanted:
        meant = arrays.get(one.job_id) or alone.get(one.job_id)
        if not meant:
            raise _invalid(Invalid, f"there is no job {one.job_id} that you may see")
        answer |= {(parent.id, one.after): parent for parent in meant}
    for (job_id, after), parent in answer.items():
        if met(after, parent.state) is Met.NEVER:
            raise _invalid(Impossible, never(after, job_id, parent.state))
    if len(answer) * jobs > _MOST:
        raise _invalid(
            Impossible, f"{jobs} jobs that each wait for {len(answer)} are more than {_MOST} pairs: wait for fewer"
        )
    return answer


def record(
    connection: sqlite3.Connection, job_ids: Iterable[int], on: Mapping[tuple[int, After], Parent], *, now: float
) -> None:
    """Note what new jobs wait for; what is met already is noted as met."""
    connection.executemany(
        "INSERT INTO dependencies (job_id, parent_id, after, met_at) VALUES (?, ?, ?, ?)",
        (
            (job_id, parent_id, after, now if parent.state in ENDED else None)
            for job_id in job_ids
            for (parent_id, after), parent in on.items()
        ),
    )


def settle(connection: sqlite3.Connection, ended: Sequence[int], state: JobState, *, now: float) -> Moved:
    """Let the jobs `ended`, now in the ended state `state`, count for whoever waits for them, and so on down.

    One round for each generation of cancelled jobs, whatever their number.
    """
    eligible: list[int] = []
    cancelled: list[int] = []
    while ended:
        ids = _ids(ended)
        words = {wanted: _words(after for after in After if met(after, state) is wanted) for wanted in Met}
        waiting = connection.execute(
            "UPDATE dependencies SET met_at = ? WHERE met_at IS NULL AND parent_id IN (SELECT value FROM json_each(?)) "
            "AND after IN (SELECT value FROM json_each(?)) RETURNING job_id",
            (now, ids, words[Met.YES]),
        ).fetchall()
        if waiting:
            rows = connection.execute(
                "UPDATE jobs SET eligible_at = ? WHERE id IN (SELECT value FROM json_each(?)) AND state = 'queued' "
                "AND eligible_at IS NULL "
                "AND NOT EXISTS (SELECT 1 FROM dependencies WHERE job_id = jobs.id AND met_at IS NULL) RETURNING id",
                (now, _ids({row["job_id"] for row in waiting})),
            )
            eligible += [row["id"] for row in rows.fetchall()]
        in_vain = connection.execute(
            # CROSS JOIN keeps SQLite from going through every waiting job.
            "SELECT job_id, after, parent_id FROM dependencies AS d CROSS JOIN jobs ON id = job_id "
            "WHERE met_at IS NULL AND parent_id IN (SELECT value FROM json_each(?)) "
            "AND after IN (SELECT value FROM json_each(?)) AND state = 'queued' ORDER BY job_id, parent_id",
            (ids, words[Met.NEVER]),
        ).fetchall()
        causes = {
            int(row["job_id"]): never(After(row["after"]), row["parent_id"], state)
            for row in reversed(in_vain)  # the first one is named
        }
        connection.executemany(
            "UPDATE jobs SET state = 'cancelled', reason = 'dependency_failed', cause = ?, ended_at = ? "
            "WHERE id = ? AND state = 'queued'",
            ((cause, now, job_id) for job_id, cause in causes.items()),
        )
        ended, state = list(causes), JobState.CANCELLED
        cancelled += ended
    return Moved(eligible=tuple(sorted(eligible)), cancelled=tuple(sorted(cancelled)))


def never(after: After, job_id: int, state: JobState) -> str:
    """The sentence for a dependency on a job that ended in `state` against it."""
    how = "was cancelled" if state is JobState.CANCELLED else state
    return f"{after}:{job_id} can never be met: job {job_id} {how}"


def _invalid(kind: type[Invalid], why: str) -> Invalid:
    return kind(f"{_FIELD}: {why}", (FieldError(_FIELD, why),))


def _ids(ids: Iterable[int]) -> str:
    return json.dumps(list(ids))


def _words(words: Iterable[After]) -> str:
    return json.dumps([str(word) for word in words])
