"""Every query about where model versions came from."""

import sqlite3
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRecord:
    """One wish to deploy a version, and what became of it. `path` is None for a job's own `model=<name>`."""

    id: int
    model: str
    version: int
    job_id: int | None
    path: str | None
    sha256: str | None
    by_user: str
    requested_at: float
    deployed_at: float | None
    failed_at: float | None
    cause: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A job that succeeded, named a model, and has not deployed it yet."""

    job_id: int
    model: str
    user: str


def candidates(connection: sqlite3.Connection) -> list[Candidate]:
    rows = connection.execute(
        # By the index that holds such jobs only: SQLite itself would look at every job that succeeded.
        "SELECT id, model, user FROM jobs INDEXED BY jobs_by_model WHERE model IS NOT NULL AND state = 'succeeded' "
        "AND NOT EXISTS (SELECT 1 FROM model_versions AS m WHERE m.job_id = jobs.id AND m.path IS NULL) ORDER BY id"
    )
    return [Candidate(job_id=row["id"], model=row["model"], user=row["user"]) for row in rows]


def request(
    connection: sqlite3.Connection,
    *,
    model: str,
    version: int | None,
    above: int,
    job_id: int | None,
    path: str | None,
    user: str,
    now: float,
) -> VersionRecord | None:
    """Note the wish to deploy `version` (None: the next one, higher than `above` and every known one).

    None when that version, or this job's own deployment, is there already.
    """
    if version is None:
        known = connection.execute("SELECT max(version) FROM model_versions WHERE model = ?", (model,)).fetchone()[0]
        version = max(above, known or 0) + 1
    row = connection.execute(
        "INSERT INTO model_versions (model, version, job_id, path, by_user, requested_at) VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT DO NOTHING RETURNING *",
        (model, version, job_id, path, user, now),
    ).fetchone()
    return _record(row) if row else None


def unfinished(connection: sqlite3.Connection) -> list[VersionRecord]:
    """Wishes that are neither deployed nor failed: what a crash interrupted."""
    rows = connection.execute(
        "SELECT * FROM model_versions WHERE deployed_at IS NULL AND failed_at IS NULL ORDER BY id"
    )
    return [_record(row) for row in rows]


def deployed(connection: sqlite3.Connection, record_id: int, sha256: str, *, now: float) -> None:
    connection.execute(
        "UPDATE model_versions SET deployed_at = ?, sha256 = ? WHERE id = ? AND failed_at IS NULL",
        (now, sha256, record_id),
    )


def failed(connection: sqlite3.Connection, record_id: int, cause: str, *, now: float) -> None:
    connection.execute(
        "UPDATE model_versions SET failed_at = ?, cause = ? WHERE id = ? AND deployed_at IS NULL",
        (now, cause, record_id),
    )


def records(connection: sqlite3.Connection) -> list[VersionRecord]:
    """Every version that was ever to be deployed, the first one first."""
    return [_record(row) for row in connection.execute("SELECT * FROM model_versions ORDER BY id")]


def _record(row: sqlite3.Row) -> VersionRecord:
    return VersionRecord(**{column: row[column] for column in row.keys()})  # noqa: SIM118
