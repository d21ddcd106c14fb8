"""What was used and by whom is summed exactly, clipped to the window asked for."""

import sqlite3
from dataclasses import dataclass

import pytest

from mlbox.database import Database
from mlbox.jobs import JobSpec, JobState, Reason
from mlbox.scheduler import accounting, queue
from mlbox.scheduler.accounting import UsageReport
from mlbox.scheduler.executors.base import Exit
from mlbox.scheduler.outcome import Outcome
from mlbox.scheduler.placement import Start
from mlbox.scheduler.queue import Launching, Submitter

HOUR = 3600.0
MEMORY = {"GPU-a": 80_000, "GPU-b": 80_000}
UIDS = {"ann": 1000, "bob": 1001}


@dataclass(frozen=True, kw_only=True)
class Run:
    """An attempt from hour `start` to hour `end` (None: it still runs) of a job submitted at hour `submit`."""

    user: str
    start: float
    end: float | None
    submit: float = 0.0
    gpus: tuple[str, ...] = ("GPU-a",)
    gpu_mem_mib: int | None = None
    project: str = "p"
    command: str | None = "python train.py"
    cpu_hours: float = 0.0
    idle_hours: float = 0.0
    not_before: float | None = None
    well: bool = True


def carry_out(connection: sqlite3.Connection, run: Run) -> int:
    spec = JobSpec(
        command=run.command,
        script=None if run.command else "#!/bin/sh\n",
        name="n",
        project=run.project,
        gpus=0 if run.gpu_mem_mib else len(run.gpus),
        gpu_mem_mib=run.gpu_mem_mib,
        not_before=run.not_before and run.not_before * HOUR,
    )
    who = Submitter(user=run.user, uid=UIDS[run.user])
    (job,), _ = queue.submit_all(connection, spec, None, who, now=run.submit * HOUR)
    start = Start(job_id=job.id, gpu_uuids=run.gpus, memory_mib=run.gpu_mem_mib)
    intent = Launching(start=start, key=f"k{job.id}", token_sha256=f"t{job.id}", charge_rate=float(len(run.gpus)))
    queue.start(connection, [intent], now=run.start * HOUR)
    queue.running(connection, [(job.id, 1)], now=run.start * HOUR)
    if run.end is None:
        return job.id
    end = Exit(
        exit_code=0 if run.well else 1,
        started_at=run.start * HOUR,
        ended_at=run.end * HOUR,
        cpu_seconds=run.cpu_hours * HOUR,
        max_rss_mib=None,
        log_bytes=None,
    )
    state, reason = (JobState.SUCCEEDED, None) if run.well else (JobState.FAILED, Reason.EXIT_CODE)
    queue.finish(connection, job.id, 1, Outcome(state=state, reason=reason, cause="over", exit=end), now=run.end * HOUR)
    queue.release(connection, run.gpus, job.id, 1, now=run.end * HOUR)
    connection.execute("UPDATE attempts SET idle_gpu_seconds = ? WHERE job_id = ?", (run.idle_hours * HOUR, job.id))
    return job.id


async def usage_of(database: Database, *runs: Run, since: float, until: float) -> UsageReport:
    for run in runs:
        await database.write(carry_out, run)
    return await database.read(accounting.usage, since=since * HOUR, until=until * HOUR, gpu_memory_mib=MEMORY)


async def test_usage_is_clipped_to_the_window_and_counts_what_still_runs(database: Database) -> None:
    report = await usage_of(
        database,
        Run(user="ann", start=0, end=4, gpus=("GPU-a", "GPU-b"), cpu_hours=8, idle_hours=2),
        Run(user="ann", start=5, end=6, project="q"),
        Run(user="bob", start=9, end=None),
        Run(user="bob", start=0, end=1, gpus=(), cpu_hours=7),
        since=2,
        until=10,
    )
    assert [(line.name, line.gpu_hours, line.jobs) for line in report.users] == [("ann", 5.0, 2), ("bob", 1.0, 1)]
    assert [(line.name, line.gpu_hours, line.jobs) for line in report.projects] == [("p", 5.0, 2), ("q", 1.0, 1)]
    assert (report.total.gpu_hours, report.total.jobs) == (6.0, 3)
    ann = report.users[0]
    assert (ann.cpu_hours, ann.gpu_hours_idle) == (pytest.approx(4.0), pytest.approx(1.0))


async def test_a_share_of_a_gpu_counts_by_its_memory(database: Database) -> None:
    report = await usage_of(database, Run(user="ann", start=1, end=3, gpu_mem_mib=20_000), since=0, until=9)
    assert report.total.gpu_hours == pytest.approx(0.5)


async def test_waits_are_of_jobs_that_started_in_the_window(database: Database) -> None:
    runs = [Run(user="ann", submit=1, start=1 + n / 10, end=1 + n / 10, gpus=()) for n in range(1, 21)]
    report = await usage_of(
        database,
        Run(user="ann", submit=0, start=0.9, end=2),
        *runs,
        Run(user="bob", submit=1, start=6, end=7, not_before=5.5),
        since=1,
        until=9,
    )
    ann, bob = sorted(report.users, key=lambda line: line.name)
    assert (ann.wait_mean_s, ann.wait_p95_s) == (pytest.approx(1.05 * HOUR), pytest.approx(1.9 * HOUR))
    assert (bob.wait_mean_s, bob.wait_p95_s) == (pytest.approx(0.5 * HOUR), pytest.approx(0.5 * HOUR))


async def test_nothing_used_is_no_error(database: Database) -> None:
    report = await usage_of(database, since=0, until=1)
    assert (report.users, report.projects, report.total.jobs, report.total.wait_mean_s) == ((), (), 0, None)


async def test_charges_are_of_attempts_that_ended_since(database: Database) -> None:
    for run in (Run(user="ann", start=0, end=1), Run(user="bob", start=1, end=3), Run(user="ann", start=4, end=None)):
        await database.write(carry_out, run)
    found = await database.read(accounting.charges, 1 * HOUR)
    assert [(one.user, one.uid, one.project, one.started_at, one.ended_at, one.rate) for one in found] == [
        ("bob", 1001, "p", HOUR, 3 * HOUR, 1.0)
    ]
    assert len(await database.read(accounting.charges, 0)) == 2


async def test_run_times_are_learned_from_the_newest_that_succeeded(database: Database) -> None:
    for run in (
        Run(user="ann", start=0, end=1),
        Run(user="ann", start=1, end=3, command=None),
        Run(user="bob", start=3, end=7, well=False),
        Run(user="bob", start=7, end=8, project="q"),
    ):
        await database.write(carry_out, run)
    found = await database.read(accounting.durations, 2)
    assert [(one.user, one.project, one.name, one.command, one.seconds) for one in found] == [
        ("ann", "p", "n", None, 2 * HOUR),
        ("bob", "q", "n", "python train.py", 1 * HOUR),
    ]
