"""Jobs, attempts and leases in the database agree with a simple model, whatever is asked in whatever order."""

import asyncio
import shutil
import sqlite3
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from mlbox.database import Database
from mlbox.jobs import ACTIVE, ENDED, Job, JobSpec, JobState, Reason
from mlbox.scheduler import queue
from mlbox.scheduler.executors.base import Exit, Stopped
from mlbox.scheduler.outcome import of_exit, of_loss
from mlbox.scheduler.placement import Start
from mlbox.scheduler.queue import Launching

GPUS = ("GPU-a", "GPU-b", "GPU-c")
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
    @precondition(lambda self: len(self.model) < 5)
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
            may = job.state is JobState.QUEUED and not job.hold
            assert (intent.start.job_id in started) == may
            if may:
                job.state, job.attempt = JobState.STARTING, job.attempt + 1
                assert started[intent.start.job_id] == job.attempt
                self.leases |= dict.fromkeys(intent.start.gpu_uuids, (intent.start.job_id, job.attempt))
        return multiple(*(self.read(queue.get, job_id) for job_id in started))

    @rule(job_id=jobs, gpu=st.sampled_from(GPUS))
    def start_on_a_gpu_that_is_taken(self, job_id: int, gpu: str) -> None:
        job = self.model[job_id]
        if gpu not in self.leases or job.state is not JobState.QUEUED or job.hold:
            return
        self.marks += 1
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
            self.write(queue.start, [launching(job_id, (gpu,), f".{self.marks}")], now=101.0)

    @rule(target=seen, job_id=jobs, stale=st.integers(0, 1))
    def running(self, job_id: int, stale: int):
        job = self.model[job_id]
        (now,) = self.write(queue.running, [(job_id, job.attempt - stale)], now=102.0)
        if job.state is JobState.STARTING and not stale:
            job.state = JobState.RUNNING
        assert now.state is job.state
        return now if now.state in ACTIVE else multiple()

    @rule(job=consumes(seen), how=st.sampled_from([EXIT, FAILURE, FAILURE, CANCELLED, Reason.LOST, Reason.REBOOT]))
    def finish(self, job: Job, how: Exit | Reason) -> None:
        """End an attempt as judged from what was read of it, perhaps before a cancel, perhaps for a second time."""
        model = self.model[job.id]
        outcome = of_exit(job, how, model.failures) if isinstance(how, Exit) else of_loss(job, how)
        found = self.write(queue.finish, job.id, job.attempt, outcome, now=120.0)
        if model.state not in ACTIVE or job.attempt != model.attempt:
            assert found is None
            return
        model.ended_attempts.add(job.attempt)
        if model.cancel and outcome.state is JobState.QUEUED:
            model.state = JobState.CANCELLED
        else:
            model.state = outcome.state
            model.failures += outcome.failed
        assert found.state is model.state

    @rule(job_id=jobs)
    @precondition(lambda self: self.steps % 3 == 0)
    def cancel(self, job_id: int) -> None:
        model = self.model[job_id]
        found = self.write(queue.request_cancel, job_id, user="ann", now=103.0)
        if model.state is JobState.QUEUED:
            model.state, model.cancel = JobState.CANCELLED, True
        elif model.state in ACTIVE:
            model.cancel = True
        assert found.state is model.state

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
        assert self.write(queue.fail_waiting, job_id, "it asks 9 GPUs", now=104.0) == (model.state is JobState.QUEUED)
        if model.state is JobState.QUEUED:
            model.state = JobState.FAILED

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
    def the_counters_are_right(self) -> None:
        states = [model.state for model in self.model.values()]
        assert self.read(queue.counts) == {state: states.count(state) for state in JobState}

    @invariant()
    def each_gpu_has_one_holder(self) -> None:
        leases = self.read(queue.live_leases)
        assert {lease.gpu_uuid: (lease.job_id, lease.attempt) for lease in leases} == self.leases
        assert len(leases) == len(self.leases)
        for lease in leases:
            assert lease.ended == (lease.attempt in self.model[lease.job_id].ended_attempts)


Queue.TestCase.settings = settings(
    max_examples=15, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
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
    )
    first, _ = await database.write(queue.submit, asked, user="ann", uid=1000, now=100.0)
    again, _ = await database.write(queue.submit, asked, user="bob", uid=1001, now=100.5, retry_of=first.id)
    for job in (first, again):
        assert await database.read(queue.get, job.id) == job
        assert job.spec == asked
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
    ended = await database.write(queue.finish, job.id, 1, of_exit(job, EXIT, 0), now=99_999.0)
    assert ended is not None
    assert (ended.state, ended.started_at, ended.ended_at) == (JobState.SUCCEEDED, 105.0, 110.0)
    assert (ended.exit_code, ended.signal, ended.log_bytes) == (0, None, 7)
    assert ended.gpu_uuids == ("GPU-a", "GPU-b")
    assert (ended.usage.gpu_seconds, ended.usage.cpu_seconds, ended.usage.max_rss_mib) == (10.0, 3.0, 50.0)


async def test_an_end_without_a_record_is_now(database: Database) -> None:
    job = await started(database)
    ended = await database.write(queue.finish, job.id, 1, of_loss(job, Reason.LOST), now=200.0)
    assert ended is not None
    assert (ended.state, ended.reason, ended.started_at, ended.ended_at) == (JobState.FAILED, Reason.LOST, 102.0, 200.0)


async def test_a_job_that_was_never_marked_running_ends_with_its_own_times(database: Database) -> None:
    job, _ = await database.write(queue.submit, spec(), user="ann", uid=1000, now=100.0)
    await database.write(queue.start, [launching(job.id)], now=101.0)
    ended = await database.write(queue.finish, job.id, 1, of_exit(job, EXIT, 0), now=500.0)
    assert ended is not None
    assert (ended.started_at, ended.ended_at) == (105.0, 110.0)


async def test_another_attempt_forgets_how_the_one_before_ended(database: Database) -> None:
    job = await started(database, retries=1)
    waits = await database.write(queue.finish, job.id, 1, of_exit(job, FAILURE, 0), now=120.0)
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
    ended = await database.write(queue.finish, job.id, 1, again, now=120.0)
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
    assert await database.write(queue.finish, job.id, 1, of_exit(job, EXIT, 0), now=132.0) is None
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
    assert await database.write(queue.request_cancel, 99, user="ann", now=1.0) is None


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
