"""The state machine in Python, in the schema and on paper is one and the same."""

import itertools
import sqlite3

import pytest

from mlbox.database import Database
from mlbox.jobs import ACTIVE, ENDED, TRANSITIONS, Job, JobSpec, JobState, Reason, handle


async def insert(database: Database, state: JobState) -> int:
    """A job in `state`, brought there by moves that the table allows."""

    def make(connection: sqlite3.Connection) -> int:
        row = connection.execute(
            "INSERT INTO jobs (user, uid, name, project, command, gpus, grace_s, priority, retries, requeue, hold,"
            " state, submitted_at) VALUES ('ann', 1000, 'n', 'p', 'true', 0, 30, 0, 0, 0, 0, 'queued', 1) RETURNING id"
        ).fetchone()
        road = {JobState.RUNNING: [JobState.STARTING, state], JobState.SUCCEEDED: [JobState.STARTING, state]}
        for step in road.get(state, [state]):
            move(connection, row[0], step)
        return int(row[0])

    return await database.write(make)


def move(connection: sqlite3.Connection, job_id: int, state: JobState) -> None:
    ended_at = 2.0 if state in ENDED else None
    reason = Reason.USER if state in (JobState.FAILED, JobState.CANCELLED) else None
    connection.execute(
        "UPDATE jobs SET state = ?, attempt = max(attempt, 1), ended_at = ?, reason = ? WHERE id = ?",
        (state, ended_at, reason, job_id),
    )


async def test_the_schema_knows_the_same_moves(database: Database) -> None:
    rows = await database.read(lambda connection: list(connection.execute("SELECT old, new FROM job_transitions")))
    assert {(row["old"], row["new"]) for row in rows} == {
        (old, new) for old, nexts in TRANSITIONS.items() for new in nexts
    }


@pytest.mark.parametrize(("old", "new"), list(itertools.product(JobState, JobState)))
async def test_the_database_allows_exactly_the_moves_of_the_table(
    database: Database, old: JobState, new: JobState
) -> None:
    job_id = await insert(database, old)
    if new in TRANSITIONS[old] or new is old:
        await database.write(move, job_id, new)
    else:
        with pytest.raises(sqlite3.IntegrityError, match="cannot make this move"):
            await database.write(move, job_id, new)
    now = await database.read(
        lambda connection: connection.execute("SELECT state FROM jobs WHERE id = ?", (job_id,)).fetchone()[0]
    )
    assert now == (new if new in TRANSITIONS[old] else old)


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO jobs (user, uid, name, project, command, gpus, grace_s, priority, retries, requeue, hold, state,"
        " submitted_at, attempt) VALUES ('ann', 1000, 'n', 'p', 'true', 0, 30, 0, 0, 0, 0, 'running', 1, 1)",
        "DELETE FROM jobs",
        "UPDATE jobs SET state = 'failed', ended_at = NULL, reason = 'lost'",
        "UPDATE jobs SET state = 'failed', ended_at = 2, reason = NULL",
        "UPDATE jobs SET state = 'failed', ended_at = 2, reason = 'bad luck'",
        "UPDATE jobs SET ended_at = 2",
        "UPDATE jobs SET state = 'starting', attempt = 0",
        "UPDATE jobs SET cancel_requested_at = 2",
        "UPDATE jobs SET script = '#!/bin/sh'",
        "UPDATE jobs SET priority = 101",
        "UPDATE jobs SET gpus = 'two'",
        "UPDATE job_counts SET count = -1",
        "INSERT INTO jobs (user, uid, name, project, command, gpus, grace_s, priority, retries, requeue, hold, state,"
        " submitted_at, idempotency_key) SELECT user, uid, name, project, command, gpus, grace_s, priority, retries,"
        " requeue, hold, 'queued', 1, 'the same' FROM jobs, (VALUES (1), (2))",
    ],
)
async def test_the_schema_refuses_what_cannot_be(database: Database, sql: str) -> None:
    await insert(database, JobState.QUEUED)
    with pytest.raises(sqlite3.IntegrityError):
        await database.write(lambda connection: connection.execute(sql))


def test_every_state_is_in_the_table_and_only_ended_ones_are_final() -> None:
    assert TRANSITIONS.keys() == set(JobState)
    assert {state for state, nexts in TRANSITIONS.items() if not nexts} == ENDED
    assert {JobState.QUEUED, *ACTIVE, *ENDED} == set(JobState)
    assert all(state not in nexts for state, nexts in TRANSITIONS.items())


def test_a_job_knows_whether_it_has_ended() -> None:
    for state in JobState:
        job = Job(id=1, spec=JobSpec(name="n"), user="ann", uid=1, state=state, submitted_at=1.0)
        assert job.ended == (state in ENDED)


def test_a_handle_names_job_and_attempt() -> None:
    assert handle(12, 3) == "mlbox-job-12-3"
