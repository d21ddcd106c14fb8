"""Jobs, attempts and leases in the database agree with a simple model, whatever is asked in whatever order."""

import asyncio
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from mlbox.database import Database
from mlbox.errors import Impossible, Invalid, TooMany
from mlbox.jobs import (
    ACTIVE,
    ENDED,
    After,
    ArrayPlace,
    ArraySpec,
    Dependency,
    Element,
    Job,
    JobSpec,
    JobState,
    Launcher,
    Met,
    Reason,
    WarnSignal,
    met,
)
from mlbox.scheduler import queue
from mlbox.scheduler.executors.base import Exit, Stopped
from mlbox.scheduler.outcome import Outcome, of_exit, of_loss
from mlbox.scheduler.placement import Start
from mlbox.scheduler.queue import Launching, Settled, Submitter, WaitingQuota

GPUS = ("GPU-a", "GPU-b", "GPU-c")
SHARED = "GPU-s"
PREEMPTED = Outcome(state=JobState.QUEUED, reason=Reason.PREEMPTED, cause="it gave way to job 7")
EXIT = Exit(exit_code=0, started_at=105.0, ended_at=110.0, cpu_seconds=3.0, max_rss_mib=50.0, log_bytes=7)
FAILURE = Exit(exit_code=1, started_at=105.0, ended_at=110.0, cpu_seconds=3.0, max_rss_mib=50.0, log_bytes=7)
CANCELLED = Exit(signal=15, stopped=Stopped.CANCEL, ended_at=110.0, cpu_seconds=3.0, max_rss_mib=50.0, log_bytes=7)


def spec(**fields: object) -> JobSpec:
    return JobSpec(**({"command": "true", "name": "n"} | fields))


def launching(job_id: int, gpus: tuple[str, ...] = (), mark: str = "") -> Launching:
    return Launching(
        start=Start(job_id=job_id, gpu_uuids=gpus), key=f"key{job_id}{mark}", token_sha256=f"t{job_id}{mark}"
    )


@dataclass
class Model:
    """A job as it should be."""

    spec: JobSpec
    uid: int
    state: JobState = JobState.QUEUED
    attempt: int = 0
    hold: bool = False
    cancel: bool = False
    failures: int = 0
    ended_attempts: set[int] = field(default_factory=set)
    depends_on: dict[int, After] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class Queue(RuleBasedStateMachine):
    """Random calls of every function of the queue, each a transaction of its own, with crashes in between."""

    jobs = Bundle("jobs")
    seen = Bundle("seen")
    """Jobs under way as somebody read them, perhaps long ago."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.runner = asyncio.Runner()
        self.database = self.open()
        self.model: dict[int, Model] = {}
        self.keys: dict[tuple[int, str], int] = {}
        self.leases: dict[str, tuple[int, int]] = {}
        """Who holds each whole GPU."""
        self.shares: dict[tuple[int, int], int] = {}
        """Who holds a share of SHARED, and of what size."""
        self.marks = 0
        self.steps = 0

    def open(self) -> Database:
        return self.runner.run(Database.open(self.folder / "mlbox.db", readers=1))

    def teardown(self) -> None:
        self.runner.run(self.database.close())
        self.runner.close()
        shutil.rmtree(self.folder)

    def write(self, function, *args, **kwargs):
        return self.runner.run(self.database.write(function, *args, **kwargs))

    def read(self, function, *args, **kwargs):
        return self.runner.run(self.database.read(function, *args, **kwargs))

    @rule(
        target=jobs,
        uid=st.sampled_from([1000, 1001]),
        key=st.none() | st.sampled_from(["k1", "k2"]),
        retries=st.integers(0, 2),
        requeue=st.booleans(),
        hold=st.sampled_from([False, False, True]),
        reserve=st.booleans(),
    )
    @precondition(lambda self: len(self.model) < 8)
    def submit(self, uid: int, key: str | None, retries: int, requeue: bool, hold: bool, reserve: bool):
        asked = spec(retries=retries, requeue=requeue, hold=hold, env={"A": "ü"})
        job_id = self.write(queue.reserve_id) if reserve else None
        job, made = self.write(queue.submit, asked, user="ann", uid=uid, now=100.0, job_id=job_id, idempotency_key=key)
        if key is not None and (uid, key) in self.keys:
            assert (made, job.id) == (False, self.keys[uid, key])
            return multiple()
        assert made
        assert job == self.read(queue.get, job.id)
        assert job.id not in self.model
        assert job_id in (None, job.id)
        if key is not None:
            self.keys[uid, key] = job.id
        self.model[job.id] = Model(asked, uid, hold=hold)
        return job.id

    @rule(
        target=jobs,
        parents=st.dictionaries(jobs, st.sampled_from(After), min_size=1, max_size=2),
        size=st.sampled_from([None, None, 2]),
    )
    @precondition(lambda self: len(self.model) < 8)
    def submit_dependent(self, parents: dict[int, After], size: int | None):
        """A job, or an array, that waits for others; refused when one of those ended against it."""
        asked = spec(depends_on=tuple(Dependency(job_id=parent, after=how) for parent, how in parents.items()))
        intake = (queue.submit_all, asked, array_of(size) if size else None, Submitter(user="r", uid=0, sees_all=True))
        if any(met(how, self.model[parent].state) is Met.NEVER for parent, how in parents.items()):
            with pytest.raises(Impossible):
                self.write(*intake, now=100.0)
            return multiple()
        made, _ = self.write(*intake, now=100.0)
        for job in made:
            assert job == self.read(queue.get, job.id)
            self.model[job.id] = Model(asked, 0, depends_on=parents)
        return multiple(*(job.id for job in made))

    @rule(target=seen, job_ids=st.lists(jobs, max_size=3, unique=True), gpus=st.sampled_from([0, 0, 1, 2]))
    def start(self, job_ids: list[int], gpus: int):
        free = [uuid for uuid in GPUS if uuid not in self.leases]
        self.marks += 1
        intents = [
            launching(job_id, tuple(free[place * gpus : (place + 1) * gpus]), f".{self.marks}")
            for place, job_id in enumerate(job_ids)
        ]
        started = self.write(queue.start, intents, now=101.0)
        for intent in intents:
            job = self.model[intent.start.job_id]
            may = self.may_start(job)
            assert (intent.start.job_id in started) == may
            if may:
                job.state, job.attempt = JobState.STARTING, job.attempt + 1
                assert started[intent.start.job_id] == job.attempt
                self.leases |= dict.fromkeys(intent.start.gpu_uuids, (intent.start.job_id, job.attempt))
        return multiple(*(self.read(queue.get, job_id) for job_id in started))

    @rule(job_id=jobs, gpu=st.sampled_from(GPUS))
    def start_on_a_gpu_that_is_taken(self, job_id: int, gpu: str) -> None:
        job = self.model[job_id]
        if gpu not in self.leases or not self.may_start(job):
            return
        self.marks += 1
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
            self.write(queue.start, [launching(job_id, (gpu,), f".{self.marks}")], now=101.0)

    @rule(target=seen, job_id=jobs, memory_mib=st.integers(1, 9))
    def start_on_a_share(self, job_id: int, memory_mib: int):
        job = self.model[job_id]
        self.marks += 1
        start = Start(job_id=job_id, gpu_uuids=(SHARED,), memory_mib=memory_mib)
        mark = f"{job_id}.{self.marks}"
        started = self.write(queue.start, [Launching(start=start, key=mark, token_sha256=mark)], now=101.0)
        assert (job_id in started) == self.may_start(job)
        if not started:
            return multiple()
        job.state, job.attempt = JobState.STARTING, job.attempt + 1
        self.shares[job_id, job.attempt] = memory_mib
        return self.read(queue.get, job_id)

    @rule(job_id=jobs)
    def start_whole_beside_shares(self, job_id: int) -> None:
        if not self.shares or not self.may_start(self.model[job_id]):
            return
        with pytest.raises(sqlite3.IntegrityError, match="whole or in shares"):
            self.write(queue.start, [launching(job_id, (SHARED,), ".whole")], now=101.0)

    @rule()
    def release_shares(self) -> None:
        for (job_id, attempt), _ in sorted(self.shares.items())[::2]:
            self.write(queue.release, [SHARED], job_id, attempt, now=121.0)
            del self.shares[job_id, attempt]

    def may_start(self, job: Model) -> bool:
        return job.state is JobState.QUEUED and not job.hold and not self.unmet(job)

    def unmet(self, job: Model) -> list[int]:
        return [parent for parent, how in job.depends_on.items() if met(how, self.model[parent].state) is not Met.YES]

    def settle(self, moved: Settled) -> None:
        """What an end must have moved, found anew from the whole model."""
        cancelled: set[int] = set()
        waiting = {job_id for job_id, job in self.model.items() if job.state is JobState.QUEUED}
        while in_vain := {
            job_id
            for job_id in waiting - cancelled
            if any(met(how, self.model[p].state) is Met.NEVER for p, how in self.model[job_id].depends_on.items())
        }:
            for job_id in in_vain:
                self.model[job_id].state = JobState.CANCELLED
            cancelled |= in_vain
        assert set(moved.cancelled) == cancelled
        for job in moved.eligible:
            assert job.state is JobState.QUEUED
            assert not self.unmet(self.model[job.id])

    @rule(target=seen, job_id=jobs, stale=st.integers(0, 1))
    def running(self, job_id: int, stale: int):
        job = self.model[job_id]
        (now,) = self.write(queue.running, [(job_id, job.attempt - stale)], now=102.0)
        if job.state is JobState.STARTING and not stale:
            job.state = JobState.RUNNING
        assert now.state is job.state
        return now if now.state in ACTIVE else multiple()

    @rule(job=consumes(seen), how=st.sampled_from([EXIT, FAILURE, FAILURE, CANCELLED, Reason.LOST, PREEMPTED]))
    def finish(self, job: Job, how: Exit | Outcome | Reason) -> None:
        """End an attempt as judged from what was read of it, perhaps before a cancel, perhaps for a second time."""
        model = self.model[job.id]
        if isinstance(how, Exit):
            outcome = of_exit(job, how, model.failures)
        else:
            outcome = how if isinstance(how, Outcome) else of_loss(job, how)
        found, moved = self.write(queue.finish, job.id, job.attempt, outcome, now=120.0)
        if model.state not in ACTIVE or job.attempt != model.attempt:
            assert (found, moved) == (None, Settled())
            return
        model.ended_attempts.add(job.attempt)
        if model.cancel and outcome.state is JobState.QUEUED:
            model.state = JobState.CANCELLED
        else:
            model.state = outcome.state
            model.failures += outcome.failed
        assert found.state is model.state
        assert found.reason is not Reason.PREEMPTED
        self.settle(moved)

    @rule(job_id=jobs)
    @precondition(lambda self: self.steps % 3 == 0)
    def cancel(self, job_id: int) -> None:
        model = self.model[job_id]
        found, moved = self.write(queue.request_cancel, job_id, user="ann", now=103.0)
        if model.state is JobState.QUEUED:
            model.state, model.cancel = JobState.CANCELLED, True
        elif model.state in ACTIVE:
            model.cancel = True
        assert found.state is model.state
        self.settle(moved)

    @rule(job_id=jobs, hold=st.booleans())
    def change(self, job_id: int, hold: bool) -> None:
        model = self.model[job_id]
        found = self.write(queue.change, job_id, {"hold": int(hold), "priority": 3})
        if model.state is JobState.QUEUED:
            model.hold = hold
            assert (found.spec.hold, found.spec.priority) == (hold, 3)
        else:
            assert found is None

    @rule(job_id=jobs)
    @precondition(lambda self: self.steps % 5 == 0)
    def fail_waiting(self, job_id: int) -> None:
        model = self.model[job_id]
        settled = self.write(queue.fail_waiting, job_id, "it asks 9 GPUs", now=104.0)
        assert (settled is not None) == (model.state is JobState.QUEUED)
        if model.state is JobState.QUEUED:
            model.state = JobState.FAILED
            self.settle(settled)

    @rule(job_id=jobs)
    def remove_files(self, job_id: int) -> None:
        assert self.write(queue.mark_removed, job_id, now=130.0) == (self.model[job_id].state in ENDED)

    @rule(gpu=st.sampled_from(GPUS), of_another=st.booleans())
    def release(self, gpu: str, of_another: bool) -> None:
        """Give a GPU back; asked in the name of another attempt, nothing happens."""
        job_id, attempt = self.leases.get(gpu, (1, 1))
        self.write(queue.release, [gpu], job_id, attempt + of_another, now=99.0)
        if not of_another:
            self.leases.pop(gpu, None)

    @rule()
    def crash(self) -> None:
        self.runner.run(self.database.close())
        self.database = self.open()

    @invariant()
    def the_database_agrees(self) -> None:
        self.steps += 1
        found = {job.id: job for job in self.read(queue.listing, limit=1000)}
        assert found.keys() == self.model.keys()
        for job_id, model in self.model.items():
            job = found[job_id]
            assert (job.state, job.attempt, job.spec.hold) == (model.state, model.attempt, model.hold)
            assert (job.cancel_requested_at is not None) == model.cancel
            assert (job.ended_at is not None) == (model.state in ENDED)
            assert self.read(queue.failures, job_id) == model.failures
            attempts = self.read(queue.attempts, job_id)
            assert [attempt.attempt for attempt in attempts] == list(range(1, model.attempt + 1))
            assert {attempt.attempt for attempt in attempts if attempt.ended_at is not None} == model.ended_attempts
            under_way = {model.attempt} if model.state in ACTIVE else set()
            assert model.ended_attempts | under_way == set(range(1, model.attempt + 1))

    @invariant()
    def nothing_is_stranded(self) -> None:
        """Whoever is not eligible waits for a job that has not ended."""
        for job_id, model in self.model.items():
            if model.state is JobState.QUEUED:
                unmet = self.unmet(model)
                assert (self.read(queue.get, job_id).eligible_at is None) == bool(unmet)
                assert all(not self.model[parent].ended for parent in unmet)

    @invariant()
    def the_counters_are_right(self) -> None:
        states = [model.state for model in self.model.values()]
        assert self.read(queue.counts) == {state: states.count(state) for state in JobState}

    @invariant()
    def each_gpu_has_one_holder(self) -> None:
        leases = self.read(queue.live_leases)
        shared = [lease for lease in leases if lease.gpu_uuid == SHARED]
        assert {(lease.job_id, lease.attempt): lease.memory_mib for lease in shared} == self.shares
        assert len({lease.share for lease in shared}) == len(shared)
        assert all(lease.share > 0 for lease in shared)
        leases = [lease for lease in leases if lease.gpu_uuid != SHARED]
        assert all((lease.share, lease.memory_mib) == (0, None) for lease in leases)
        assert {lease.gpu_uuid: (lease.job_id, lease.attempt) for lease in leases} == self.leases
        assert len(leases) == len(self.leases)
        for lease in leases:
            assert lease.ended == (lease.attempt in self.model[lease.job_id].ended_attempts)


Queue.TestCase.settings = settings(
    max_examples=12, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


class TestQueue(Queue.TestCase):
    """Runs the machine."""


# What the machine does not look at


async def started(database: Database, gpus: tuple[str, ...] = (), **fields: object) -> Job:
    job, _ = await database.write(queue.submit, spec(**fields), user="ann", uid=1000, now=100.0)
    await database.write(queue.start, [launching(job.id, gpus)], now=101.0)
    (job,) = await database.write(queue.running, [(job.id, 1)], now=102.0)
    return job


async def test_a_job_comes_back_as_it_was_submitted(database: Database) -> None:
    asked = JobSpec(
        script="#!/bin/sh\necho ü\n",
        code="tar.gz",
        workdir=None,
        name="n",
        project="p",
        env={"A": "1\n2", "B": ""},
        gpus=2,
        cpus=3,
        mem_mib=4,
        time_limit_s=5.5,
        grace_s=6.0,
        priority=-7,
        retries=8,
        requeue=True,
        model="m",
        hold=True,
        not_before=9.5,
        preemptible=True,
        launch=Launcher.TORCHRUN,
        output="logs/out-%j.txt",
        error="err",
        warn_signal=WarnSignal(number=10, before_s=120.0, main_only=True),
        notify=("ann@example.org", "ü"),
        notify_on=("begin",),
    )
    first, _ = await database.write(queue.submit, asked, user="ann", uid=1000, now=100.0)
    again, _ = await database.write(queue.submit, asked, user="bob", uid=1001, now=100.5, retry_of=first.id)
    for job in (first, again):
        assert await database.read(queue.get, job.id) == job
        assert job.spec == asked
    shared, _ = await database.write(queue.submit, spec(gpu_mem_mib=2000), user="ann", uid=1000, now=100.0)
    assert await database.read(queue.get, shared.id) == shared
    assert (again.retry_of, again.user, again.uid, again.submitted_at) == (first.id, "bob", 1001, 100.5)


async def test_a_hundred_submits_with_one_key_make_one_job(database: Database) -> None:
    answers = await asyncio.gather(
        *(
            database.write(queue.submit, spec(), user="ann", uid=1000, now=100.0, idempotency_key="k")
            for _ in range(100)
        )
    )
    assert [made for _, made in answers].count(True) == 1
    assert {job.id for job, _ in answers} == {1}
    other, made = await database.write(queue.submit, spec(), user="bob", uid=1001, now=100.0, idempotency_key="k")
    assert (other.id, made) == (2, True)


async def test_a_reserved_id_is_never_given_to_another(database: Database) -> None:
    reserved = await database.write(queue.reserve_id)
    other, _ = await database.write(queue.submit, spec(), user="ann", uid=1000, now=100.0)
    mine, _ = await database.write(queue.submit, spec(), user="ann", uid=1000, now=100.0, job_id=reserved)
    later, _ = await database.write(queue.submit, spec(), user="ann", uid=1000, now=100.0)
    assert [reserved, other.id, mine.id, later.id] == [1, 2, 1, 3]


async def test_an_end_takes_over_what_the_shim_recorded(database: Database) -> None:
    job = await started(database, ("GPU-a", "GPU-b"))
    ended, _ = await database.write(queue.finish, job.id, 1, of_exit(job, EXIT, 0), now=99_999.0)
    assert ended is not None
    assert (ended.state, ended.started_at, ended.ended_at) == (JobState.SUCCEEDED, 105.0, 110.0)
    assert (ended.exit_code, ended.signal, ended.log_bytes) == (0, None, 7)
    assert ended.gpu_uuids == ("GPU-a", "GPU-b")
    assert (ended.usage.gpu_seconds, ended.usage.cpu_seconds, ended.usage.max_rss_mib) == (10.0, 3.0, 50.0)


async def test_an_end_without_a_record_is_now(database: Database) -> None:
    job = await started(database)
    ended, _ = await database.write(queue.finish, job.id, 1, of_loss(job, Reason.LOST), now=200.0)
    assert ended is not None
    assert (ended.state, ended.reason, ended.started_at, ended.ended_at) == (JobState.FAILED, Reason.LOST, 102.0, 200.0)


async def test_a_job_that_was_never_marked_running_ends_with_its_own_times(database: Database) -> None:
    job, _ = await database.write(queue.submit, spec(), user="ann", uid=1000, now=100.0)
    await database.write(queue.start, [launching(job.id)], now=101.0)
    ended, _ = await database.write(queue.finish, job.id, 1, of_exit(job, EXIT, 0), now=500.0)
    assert ended is not None
    assert (ended.started_at, ended.ended_at) == (105.0, 110.0)


async def test_another_attempt_forgets_how_the_one_before_ended(database: Database) -> None:
    job = await started(database, retries=1)
    waits, _ = await database.write(queue.finish, job.id, 1, of_exit(job, FAILURE, 0), now=120.0)
    assert waits is not None
    assert (waits.state, waits.ended_at, waits.reason) == (JobState.QUEUED, None, Reason.EXIT_CODE)
    assert "tried again" in str(waits.cause)
    await database.write(queue.start, [launching(job.id, mark="b")], now=130.0)
    second = await database.read(queue.get, job.id)
    assert second is not None
    assert (second.attempt, second.started_at, second.reason, second.cause) == (2, None, None, None)
    assert (second.exit_code, second.usage.cpu_seconds) == (None, None)
    first = await database.read(queue.attempt_of, job.id, 1)
    assert first is not None
    assert (first.exit_code, first.ended_at, first.reason) == (1, 110.0, Reason.EXIT_CODE)


async def test_a_cancel_between_judgement_and_record_is_kept(database: Database) -> None:
    job = await started(database, retries=5)
    again = of_exit(job, FAILURE, 0)
    assert again.state is JobState.QUEUED
    await database.write(queue.request_cancel, job.id, user="ann", now=111.0)
    ended, _ = await database.write(queue.finish, job.id, 1, again, now=120.0)
    assert ended is not None
    assert (ended.state, ended.reason, ended.exit_code) == (JobState.CANCELLED, Reason.USER, 1)


async def test_an_earlier_attempt_is_not_taken_for_the_present_one(database: Database) -> None:
    job = await started(database, ("GPU-a",), retries=2)
    await database.write(queue.finish, job.id, 1, of_exit(job, FAILURE, 0), now=120.0)
    assert await database.read(queue.failures, job.id) == 1
    await database.write(queue.release, ["GPU-a"], job.id, 1, now=121.0)
    await database.write(queue.start, [launching(job.id, ("GPU-a",), mark="b")], now=130.0)
    (still,) = await database.write(queue.running, [(job.id, 1)], now=131.0)
    assert still.state is JobState.STARTING
    assert await database.write(queue.finish, job.id, 1, of_exit(job, EXIT, 0), now=132.0) == (None, Settled())
    await database.write(queue.release, ["GPU-a"], job.id, 1, now=133.0)
    found = await database.read(queue.get, job.id)
    assert found is not None
    assert (found.state, found.attempt) == (JobState.STARTING, 2)
    (lease,) = await database.read(queue.live_leases)
    assert (lease.attempt, lease.ended, lease.key) == (2, False, f"key{job.id}b")


async def test_a_token_is_good_for_the_attempt_under_way_only(database: Database) -> None:
    job = await started(database, retries=1)
    found = await database.read(queue.of_token, f"t{job.id}")
    assert found is not None
    assert found.id == job.id
    await database.write(queue.renew_token, job.id, 1, "new")
    assert await database.read(queue.of_token, f"t{job.id}") is None
    assert await database.read(queue.of_token, "new") is not None
    await database.write(queue.finish, job.id, 1, of_exit(job, FAILURE, 0), now=120.0)
    assert await database.read(queue.of_token, "new") is None
    await database.write(queue.start, [launching(job.id, mark="b")], now=130.0)
    assert await database.read(queue.of_token, "new") is None
    assert await database.read(queue.of_token, f"t{job.id}b") is not None


async def test_a_start_that_cannot_be_whole_is_not_at_all(database: Database) -> None:
    await started(database, ("GPU-a",))
    for _ in range(2):
        await database.write(queue.submit, spec(), user="ann", uid=1000, now=100.0)
    with pytest.raises(sqlite3.IntegrityError):
        await database.write(queue.start, [launching(2, ("GPU-b",)), launching(3, ("GPU-b", "GPU-a"))], now=101.0)
    assert [job.id for job in await database.read(queue.in_states, [JobState.QUEUED])] == [2, 3]
    assert [lease.gpu_uuid for lease in await database.read(queue.live_leases)] == ["GPU-a"]


async def test_lists_are_filtered_and_paged_from_the_newest(database: Database) -> None:
    for number in range(1, 31):
        uid = 1000 + number % 2
        fields = spec(name="odd" if number % 2 else "even", project="a" if number <= 15 else "b")
        await database.write(queue.submit, fields, user=f"u{uid}", uid=uid, now=100.0)
    for number in range(1, 11):
        await database.write(queue.request_cancel, number, user="ann", now=101.0)
    await database.write(queue.fail_waiting, 11, "never", now=101.0)

    async def ids(**conditions: object) -> list[int]:
        return [job.id for job in await database.read(queue.listing, **conditions)]

    assert await ids() == list(range(30, 0, -1))
    assert await ids(limit=3) == [30, 29, 28]
    assert await ids(limit=3, before=28) == [27, 26, 25]
    assert await ids(uid=1000, before=5) == [4, 2]
    assert await ids(user="u1001", limit=2) == [29, 27]
    assert await ids(name="odd", project="a", before=6) == [5, 3, 1]
    assert await ids(states=[JobState.CANCELLED]) == list(range(10, 0, -1))
    assert await ids(states=[JobState.CANCELLED, JobState.FAILED], before=12) == list(range(11, 0, -1))
    assert await ids(states=[JobState.QUEUED, JobState.RUNNING], uid=1000, before=17) == [16, 14, 12]
    assert await ids(name="none") == []
    assert (await database.read(queue.get_many, [3, 99, 1])).keys() == {1, 3}
    assert await database.read(queue.get_many, []) == {}


async def test_only_what_may_change_changes(database: Database) -> None:
    job, _ = await database.write(queue.submit, spec(), user="ann", uid=1000, now=100.0)
    changed = await database.write(queue.change, job.id, {"time_limit_s": 60.0, "priority": -3})
    assert changed is not None
    assert (changed.spec.time_limit_s, changed.spec.priority) == (60.0, -3)
    with pytest.raises(ValueError, match="state"):
        await database.write(queue.change, job.id, {"state": "succeeded"})
    assert await database.read(queue.get, 99) is None
    assert await database.write(queue.change, 99, {"hold": 1}) is None
    assert await database.write(queue.request_cancel, 99, user="ann", now=1.0) == (None, Settled())


async def test_files_are_removed_of_ended_jobs_only(database: Database) -> None:
    job = await started(database)
    assert not await database.write(queue.mark_removed, job.id, now=1.0)
    await database.write(queue.finish, job.id, 1, of_exit(job, EXIT, 0), now=120.0)
    assert await database.write(queue.mark_removed, job.id, now=130.0)
    found = await database.read(queue.get, job.id)
    assert found is not None
    assert found.files_removed


async def test_gpus_are_drained_once_and_resumed(database: Database) -> None:
    await database.write(queue.drain, "GPU-a", user="root", reason=None, now=1.0)
    assert await database.read(queue.drained) == {"GPU-a": "drained by root"}
    await database.write(queue.drain, "GPU-a", user="eve", reason="fan", now=2.0)
    await database.write(queue.drain, "GPU-a", user="eve", reason=None, now=2.0)
    assert await database.read(queue.drained) == {"GPU-a": "fan"}
    assert await database.write(queue.resume, "GPU-a")
    assert not await database.write(queue.resume, "GPU-a")
    assert await database.read(queue.drained) == {}


async def test_a_clock_that_went_back_does_not_stop_a_lease_from_being_released(database: Database) -> None:
    job = await started(database, ("GPU-a",))
    await database.write(queue.finish, job.id, 1, of_exit(job, EXIT, 0), now=5.0)
    await database.write(queue.release, ["GPU-a"], job.id, 1, now=6.0)
    assert await database.read(queue.live_leases) == []


# Dependencies

ANN = Submitter(user="ann", uid=1000)


def after(*parents: int, how: After = After.OK, whole_array: bool = False) -> tuple[Dependency, ...]:
    return tuple(Dependency(job_id=parent, after=how, whole_array=whole_array) for parent in parents)


async def submitted(database: Database, who: Submitter = ANN, array: ArraySpec | None = None, **fields: object) -> int:
    """The id of a new job, or of the first of an array."""
    jobs, _ = await database.write(queue.submit_all, spec(**fields), array, who, now=100.0)
    for job in jobs:
        assert await database.read(queue.get, job.id) == job
    return jobs[0].id


async def job_of(database: Database, job_id: int) -> Job:
    job = await database.read(queue.get, job_id)
    assert job is not None
    return job


async def ended(database: Database, job_id: int, how: Exit, now: float = 120.0) -> Settled:
    """Start the waiting job `job_id` and let it end."""
    started = await database.write(queue.start, [launching(job_id, mark=f"at{now}")], now=now - 1)
    outcome = of_exit(await job_of(database, job_id), how, await database.read(queue.failures, job_id))
    _, moved = await database.write(queue.finish, job_id, started[job_id], outcome, now=now)
    return moved


async def test_a_failed_job_cancels_who_needs_it_and_lets_the_others_run(database: Database) -> None:
    a = await submitted(database)
    b = await submitted(database, depends_on=after(a))
    c = await submitted(database, depends_on=after(b))
    d = await submitted(database, depends_on=after(a, how=After.ANY))
    e = await submitted(database, depends_on=after(a, how=After.NOT_OK))
    assert await database.write(queue.start, [launching(job_id) for job_id in (b, c, d, e)], now=101.0) == {}
    moved = await ended(database, a, FAILURE)
    assert ([job.id for job in moved.eligible], moved.cancelled) == ([d, e], (b, c))
    for job_id, parent, how in ((b, a, "failed"), (c, b, "was cancelled")):
        job = await job_of(database, job_id)
        assert (job.state, job.reason, job.ended_at) == (JobState.CANCELLED, Reason.DEPENDENCY_FAILED, 120.0)
        assert job.cause == f"afterok:{parent} can never be met: job {parent} {how}"
    assert [job.eligible_at for job in moved.eligible] == [120.0, 120.0]
    assert (await database.write(queue.start, [launching(d), launching(e)], now=121.0)).keys() == {d, e}


async def test_a_job_waits_while_the_other_has_tries_left(database: Database) -> None:
    a = await submitted(database, retries=1)
    b = await submitted(database, depends_on=after(a))
    assert await ended(database, a, FAILURE) == Settled()
    assert (await job_of(database, b)).eligible_at is None
    moved = await ended(database, a, EXIT, now=130.0)
    assert [job.id for job in moved.eligible] == [b]


async def test_a_job_waits_for_the_last_of_several(database: Database) -> None:
    a, b = await submitted(database), await submitted(database)
    c = await submitted(database, depends_on=after(a, b))
    assert await ended(database, a, EXIT) == Settled()
    assert [job.id for job in (await ended(database, b, EXIT)).eligible] == [c]


async def test_a_cancel_settles_who_waits_for_it(database: Database) -> None:
    a = await submitted(database)
    b = await submitted(database, depends_on=after(a))
    c = await submitted(database, depends_on=after(b, how=After.NOT_OK))
    _, moved = await database.write(queue.request_cancel, a, user="ann", now=103.0)
    assert (moved.cancelled, [job.id for job in moved.eligible]) == ((b,), [c])
    assert await database.write(queue.request_cancel, a, user="ann", now=104.0) == (
        await job_of(database, a),
        Settled(),
    )


def work_of_a_cancel(connection: sqlite3.Connection, count: int, steps: list[int]) -> None:
    """Count what SQLite does to cancel a job for which `count` jobs wait, beside as many that do not."""
    who = Submitter(user="ann", uid=1000)
    (parent,), _ = queue.submit_all(connection, spec(), None, who, now=100.0)
    for depends_on in (after(parent.id), ()):
        for _ in range(count):
            queue.submit_all(connection, spec(depends_on=depends_on), None, who, now=100.0)
    connection.set_progress_handler(lambda: steps.append(1), 100)
    _, moved = queue.request_cancel(connection, parent.id, user="ann", now=101.0)
    connection.set_progress_handler(None, 100)
    assert len(moved.cancelled) == count


async def test_many_dependents_are_settled_in_linear_time(database: Database) -> None:
    few: list[int] = []
    many: list[int] = []
    await database.write(undone, work_of_a_cancel, 100, few)
    await database.write(undone, work_of_a_cancel, 400, many)
    assert len(many) < 6 * len(few)


async def test_what_can_never_be_met_is_refused_and_what_is_met_holds_nothing_up(database: Database) -> None:
    a, b = await submitted(database), await submitted(database)
    await ended(database, a, FAILURE)
    await ended(database, b, EXIT)
    for parent, how, told in ((a, After.OK, "failed"), (b, After.NOT_OK, "succeeded")):
        with pytest.raises(Impossible, match=f"{how}:{parent} can never be met: job {parent} {told}"):
            await submitted(database, depends_on=after(parent, how=how))
    met = await job_of(database, await submitted(database, depends_on=(*after(a, how=After.NOT_OK), *after(b))))
    assert met.eligible_at == 100.0
    assert (await database.write(queue.start, [launching(met.id)], now=101.0)).keys() == {met.id}


def strand_nothing(connection: sqlite3.Connection, chance: random.Random) -> None:
    """Submit and end jobs in a random order; whatever is left at last can start or is waited for in vain by nobody."""
    who = Submitter(user="ann", uid=1000)
    alive: list[int] = []
    made: list[int] = []
    while len(made) < 12 or alive:
        if len(made) < 12 and (not alive or chance.random() < 0.6):
            parents = chance.sample(made, k=min(len(made), chance.randint(0, 2)))
            wanted = tuple(Dependency(job_id=parent, after=chance.choice(list(After))) for parent in parents)
            try:
                (job,), _ = queue.submit_all(connection, spec(depends_on=wanted), None, who, now=100.0)
            except Impossible:
                continue
            made.append(job.id)
            alive.append(job.id)
            continue
        ready = [job_id for job_id in alive if (job := queue.get(connection, job_id)) and job.eligible_at is not None]
        assert ready, "every job waits for another: nothing will ever move"
        job_id = chance.choice(ready)
        if chance.random() < 0.2:
            _, moved = queue.request_cancel(connection, job_id, user="ann", now=101.0)
        else:
            queue.start(connection, [launching(job_id)], now=101.0)
            state, reason = chance.choice([(JobState.SUCCEEDED, None), (JobState.FAILED, Reason.EXIT_CODE)])
            _, moved = queue.finish(connection, job_id, 1, Outcome(state=state, reason=reason, cause="over"), now=102.0)
        alive = [left for left in alive if left != job_id and left not in moved.cancelled]
        for left in alive:
            job = queue.get(connection, left)
            assert job is not None
            assert job.state is JobState.QUEUED
    assert all(job is not None and job.ended for job in (queue.get(connection, job_id) for job_id in made))


@pytest.mark.slow
async def test_a_thousand_random_orders_of_submits_and_ends_strand_nothing(database: Database) -> None:
    for seed in range(1000):
        await database.write(undone, strand_nothing, random.Random(seed))


def undone(connection: sqlite3.Connection, function: Callable[..., None], *values: object) -> None:
    """Call `function` and take back all that it did."""
    connection.execute("SAVEPOINT undone")
    try:
        function(connection, *values)
    finally:
        connection.execute("ROLLBACK TO undone")
        connection.execute("RELEASE undone")


async def test_only_jobs_that_one_may_see_can_be_waited_for(database: Database) -> None:
    a = await submitted(database)
    bob = Submitter(user="bob", uid=1001)
    for parent in (a, 99):
        with pytest.raises(Invalid, match=f"there is no job {parent} that you may see") as refused:
            await submitted(database, bob, depends_on=after(parent))
        assert [error.field for error in refused.value.errors] == ["depends_on"]
    reserved = await database.write(queue.reserve_id)
    later = await submitted(database)
    waits = spec(depends_on=after(later))
    with pytest.raises(Invalid, match=f"there is no job {later}"):
        await database.write(queue.submit_all, waits, None, ANN, now=100.0, job_id=reserved)
    await submitted(database, Submitter(user="root", uid=0, sees_all=True), depends_on=after(a))


# Arrays


def array_of(count: int, at_once: int | None = None) -> ArraySpec:
    return ArraySpec(elements=tuple(Element(index=2 * n, env={"N": str(n)}) for n in range(count)), at_once=at_once)


async def test_an_array_is_jobs_with_consecutive_ids_made_at_once(database: Database) -> None:
    await submitted(database)
    first = await submitted(database, array=array_of(3, at_once=2), env={"A": "1", "N": "-"})
    jobs = [await job_of(database, first + place) for place in range(3)]
    assert [job.array for job in jobs] == [ArrayPlace(id=first, index=index, size=3, at_once=2) for index in (0, 2, 4)]
    assert [job.spec.env for job in jobs] == [{"A": "1", "N": str(n)} for n in range(3)]
    reserved = await database.write(queue.reserve_id, 2)
    later = await submitted(database)
    made, _ = await database.write(queue.submit_all, spec(), array_of(2), ANN, now=100.0, job_id=reserved)
    assert ([job.id for job in made], later) == ([reserved, reserved + 1], reserved + 2)


async def test_a_key_makes_an_array_once(database: Database) -> None:
    for expected in (True, False):
        jobs, made = await database.write(queue.submit_all, spec(), array_of(3), ANN, now=100.0, idempotency_key="k")
        assert (made, jobs[0].id) == (expected, 1)
    assert (await database.read(queue.counts))[JobState.QUEUED] == 3


async def parents_of(database: Database, job_id: int) -> list[int]:
    return [one.job_id for one in (await job_of(database, job_id)).spec.depends_on]


async def test_a_whole_array_is_waited_for_and_cancelled(database: Database) -> None:
    first = await submitted(database, array=array_of(3))
    whole = await submitted(database, depends_on=after(first, how=After.ANY, whole_array=True))
    assert await parents_of(database, whole) == [first, first + 1, first + 2]
    one = await submitted(database, depends_on=after(first, how=After.ANY))
    assert await parents_of(database, one) == [first, first + 1, first + 2], "an array's id means all of it"
    await database.write(queue.request_cancel, one, user="ann", now=100.0)
    assert (await ended(database, first, EXIT)).eligible == ()
    await database.write(queue.start, [launching(first + 1)], now=101.0)
    jobs, moved = await database.write(queue.cancel_array, first, user="ann", now=102.0)
    assert [(job.id, job.state, job.cancel_requested_at) for job in jobs] == [
        (first + 1, JobState.STARTING, 102.0),
        (first + 2, JobState.CANCELLED, 102.0),
    ]
    assert moved == Settled()
    job = await job_of(database, first + 1)
    _, moved = await database.write(queue.finish, job.id, 1, of_exit(job, CANCELLED, 0), now=103.0)
    assert [job.id for job in moved.eligible] == [whole]
    assert await database.write(queue.cancel_array, first, user="ann", now=104.0) == ([], Settled())


async def test_an_array_counts_as_its_size_against_what_may_wait(database: Database) -> None:
    quota = WaitingQuota(user=3, project=5, box=6)
    ann, bob, eve = (Submitter(user=name, uid=uid, quota=quota) for name, uid in (("ann", 1), ("bob", 2), ("eve", 3)))
    await submitted(database, ann, array_of(2))
    with pytest.raises(TooMany, match="2 jobs of ann wait, and no more than 3 may, these would be 2 more"):
        await submitted(database, ann, array_of(2))
    await submitted(database, bob, array_of(3))
    with pytest.raises(TooMany, match="5 jobs of project default wait, and no more than 5 may"):
        await submitted(database, ann)
    with pytest.raises(TooMany, match="5 jobs wait, and no more than 6 may"):
        await submitted(database, eve, array_of(2), project="other")
    await submitted(database, eve, project="other")


async def test_a_hundred_submits_at_once_never_make_more_than_may_wait(database: Database) -> None:
    who = Submitter(user="ann", uid=1000, quota=WaitingQuota(user=30))
    answers = await asyncio.gather(
        *(database.write(queue.submit_all, spec(), None, who, now=100.0) for _ in range(100)), return_exceptions=True
    )
    assert [type(answer) for answer in answers].count(TooMany) == 70
    assert (await database.read(queue.counts))[JobState.QUEUED] == 30


# Shares and preemption


def sharing(job_id: int, memory_mib: int, mark: str = "") -> Launching:
    start = Start(job_id=job_id, gpu_uuids=("GPU-a",), memory_mib=memory_mib)
    return Launching(start=start, key=f"key{job_id}{mark}", token_sha256=f"t{job_id}{mark}")


async def test_shares_of_a_gpu_are_numbered_from_one_and_never_lie_beside_a_whole_one(database: Database) -> None:
    jobs = [await submitted(database) for _ in range(4)]
    await database.write(queue.start, [sharing(job, 100 * job) for job in jobs[:3]], now=101.0)
    leases = await database.read(queue.live_leases)
    assert [(lease.job_id, lease.share, lease.memory_mib) for lease in leases] == [
        (1, 1, 100),
        (2, 2, 200),
        (3, 3, 300),
    ]
    await database.write(queue.release, ["GPU-a"], jobs[1], 1, now=102.0)
    with pytest.raises(sqlite3.IntegrityError, match="whole or in shares"):
        await database.write(queue.start, [launching(jobs[3], ("GPU-a",))], now=102.0)
    await database.write(queue.start, [sharing(jobs[3], 50)], now=103.0)
    leases = await database.read(queue.live_leases)
    assert [(lease.job_id, lease.share) for lease in leases] == [(1, 1), (4, 2), (3, 3)]
    await database.write(queue.start, [launching(await submitted(database), ("GPU-b",))], now=104.0)
    start = Start(job_id=await submitted(database), gpu_uuids=("GPU-b",), memory_mib=5)
    with pytest.raises(sqlite3.IntegrityError, match="whole or in shares"):
        await database.write(queue.start, [Launching(start=start, key="k", token_sha256="t")], now=105.0)


async def test_a_preempted_job_waits_again_as_if_nothing_had_happened(database: Database) -> None:
    job_id = await submitted(database, retries=1, preemptible=True)
    intent = Launching(
        start=Start(job_id=job_id, gpu_uuids=("GPU-a",)), key="k", token_sha256="t", charge_rate=0.5, backfilled=True
    )
    await database.write(queue.start, [intent], now=101.0)
    stop = (queue.request_stop, job_id, 1)
    assert await database.write(*stop, "preempted", "job 7 needs its GPU", now=102.0)
    assert not await database.write(*stop, "idle", "it did nothing", now=103.0)
    outcome = Outcome(state=JobState.QUEUED, reason=Reason.PREEMPTED, cause="job 7 needed its GPU")
    job, moved = await database.write(queue.finish, job_id, 1, outcome, now=110.0)
    assert job is not None
    assert (job.state, job.reason, job.submitted_at, moved) == (JobState.QUEUED, None, 100.0, Settled())
    assert await database.read(queue.failures, job_id) == 0
    (attempt,) = await database.read(queue.attempts, job_id)
    assert (attempt.reason, attempt.charge_rate, attempt.backfilled) == (Reason.PREEMPTED, 0.5, True)
    assert (attempt.stop_why, attempt.stop_cause) == ("preempted", "job 7 needs its GPU")
    assert not await database.write(*stop, "idle", "it did nothing", now=111.0)
