"""The scheduler's loop: carries out what `placement` decides, and gives GPUs back.

It wakes for a submit, an end, a cancel, a GPU sample or a timer; a slow timer makes up for lost hints. One tick:
release GPUs, order, place, commit the intent to start. What happens to an attempt from then on is in `attempts`.

The daemon's own trouble (full disk, locked database) delays jobs and never ends one: the next tick begins anew.
"""

import asyncio
import logging
import secrets
import sqlite3
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

from mlbox.database import Database
from mlbox.errors import Unavailable
from mlbox.events import GPUS, JOBS, Events, job_topic
from mlbox.identity import digest, new_token
from mlbox.jobs import ACTIVE, Job, JobState, handle
from mlbox.scheduler import accounting, gpu_queries, queue
from mlbox.scheduler.attempts import Attempts, pause_s
from mlbox.scheduler.backfill import Preemption, decide
from mlbox.scheduler.executors.base import Executor
from mlbox.scheduler.folders import Folders
from mlbox.scheduler.forecaster import Forecaster
from mlbox.scheduler.gpu_queries import GpuFault
from mlbox.scheduler.gpus import GpuInventory
from mlbox.scheduler.history import kind_of
from mlbox.scheduler.launching import Surroundings
from mlbox.scheduler.outcome import StopWhy
from mlbox.scheduler.placement import Reservation, Start
from mlbox.scheduler.policy import elements_running, standing
from mlbox.scheduler.queue import Attempt, Launching, Lease
from mlbox.scheduler.state import Active, Next, SchedulerState, waiting
from mlbox.scheduler.watch import Watch, WatchRules

log = logging.getLogger(__name__)

_HALF_LIVES = 20
"""Of usage older than so many half-lives less than a millionth is left."""
_RUNS_LEARNED = 5000
"""So many of the newest runs are looked at when a daemon starts."""


class Loop:
    """Moves jobs on. `recover` once, then `run` for ever."""

    def __init__(
        self,
        *,
        database: Database,
        events: Events,
        folders: Folders,
        gpus: GpuInventory,
        executor: Executor,
        state: SchedulerState,
        surroundings: Surroundings,
        repair_s: float,
        watch: WatchRules | None = None,
    ) -> None:
        self._database = database
        self._events = events
        self._folders = folders
        self._gpus = gpus
        self._state = state
        self._repair_s = repair_s
        self._attempts = Attempts(
            database=database,
            events=events,
            folders=folders,
            gpus=gpus,
            executor=executor,
            state=state,
            surroundings=surroundings,
            wake=self.wake,
        )
        self._forecaster = Forecaster(events)
        self._watch = Watch(database=database, events=events, gpus=gpus, state=state, rules=watch or WatchRules())
        self._taken_up: list[Active] = []
        self._woken = asyncio.Event()
        self._began = time.monotonic()
        self._repair_at = self._began

    def wake(self) -> None:
        """Have a tick soon. Cheap; any number of calls is one."""
        self._woken.set()

    async def recover(self) -> None:
        """Take up what an earlier daemon left, by the recovery table, before anything new happens.

        What is in the way of a single attempt is left to `run`. Raises Unavailable, OSError when nothing can be read.
        """
        await asyncio.to_thread(self._folders.prepare)
        await self._remember()
        async with asyncio.TaskGroup() as group:
            for active in await self._catch_up():
                group.create_task(self._attempts.settle(active), name=f"recover {_name(active)}")
        newest = await self._database.read(queue.listing, limit=1)
        await asyncio.to_thread(self._folders.forget_unknown, newest[0].id if newest else 0)
        taken_up = len(self._state.active)
        log.info("scheduler: %d jobs under way, %d waiting", taken_up, len(self._state.backlog))

    async def _remember(self) -> None:
        """Learn from past attempts who used how much, and how long jobs take."""
        state, now = self._state, time.time()
        charges = await self._database.read(accounting.charges, now - _HALF_LIVES * state.rules.half_life_s)
        for one in charges:
            state.ledger.add(one.user, one.rate, one.started_at, one.ended_at)
            state.hours.add(one.user, one.project, one.gpus, one.started_at, one.ended_at)
        for one in await self._database.read(accounting.durations, _RUNS_LEARNED):
            state.history.add(one.user, one.project, kind_of(one.command, one.name), one.seconds)

    def take_up(self, job: Job, attempt: Attempt) -> None:
        """Carry on an attempt that somebody else committed, in the next tick. It holds its GPUs whole, from now on."""
        self._state.leases |= {
            (uuid, 0): Lease(gpu_uuid=uuid, job_id=job.id, attempt=attempt.attempt, key=attempt.key, ended=False)
            for uuid in attempt.gpu_uuids
        }
        self._taken_up.append(self._active(job, attempt, Next.LAUNCH))
        self.wake()

    async def run(self) -> None:
        """Tick until cancelled. An error that is not understood ends the daemon; systemd starts it again."""
        tries = 0
        async with asyncio.TaskGroup() as group:
            for active in self._state.active.values():
                self._follow(group, active)
            while True:
                self._woken.clear()
                try:
                    await self._tick(group)
                    tries = 0
                except Unavailable as error:
                    tries += 1
                    log.warning("scheduler: it goes on later: %s", error)
                    await asyncio.sleep(pause_s(tries))  # not woken before: that would be a storm
                    continue
                await self._sleep()

    async def _tick(self, group: asyncio.TaskGroup) -> None:
        if time.monotonic() >= self._repair_at:
            self._repair_at = time.monotonic() + self._repair_s
            for active in await self._catch_up():
                self._follow(group, active)
        await self._watch.look()
        await self._release_gpus()
        while self._taken_up:
            active = self._taken_up.pop()
            if self._state.active.setdefault(active.job.id, active) is active:
                self._follow(group, active)
        for active in await self._act():
            self._follow(group, active)
        self._forecaster.look(group, self._state, self._gpus)

    def _follow(self, group: asyncio.TaskGroup, active: Active) -> None:
        group.create_task(self._attempts.follow(active), name=_name(active))

    async def _sleep(self) -> None:
        """Until something happens, a job's time comes, or lost hints are to be looked for."""
        due = min(self._state.backlog.next_due, self._state.plan.wake_at)
        pause = min(self._repair_at - time.monotonic(), max(0.0, due - time.time()))
        with suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._woken.wait()

    async def _catch_up(self) -> list[Active]:
        """Bring memory in step with the database; returns the attempts under way that were not known."""
        state = self._state
        counts = await self._database.write(queue.counts)
        if counts[JobState.QUEUED] != len(state.backlog):
            queued = await self._database.write(queue.in_states, (JobState.QUEUED,))
            state.backlog.replace_all((waiting(job) for job in queued), time.time())
        truth = await self._database.write(_truth, frozenset(state.active))
        # No await from here on: what is found must not get lost.
        state.leases = {(lease.gpu_uuid, lease.share): lease for lease in truth.leases}
        state.drained = truth.drained
        state.reservations = tuple(truth.reservations)
        state.faults, state.resumed_at = truth.faults, truth.resumed
        for job_id in truth.to_stop:
            state.active[job_id].stop()
        found = [self._active(job, attempt, Next.LOOK) for job, attempt in truth.unknown]
        state.active |= {active.job.id: active for active in found}
        return found

    def _active(self, job: Job, attempt: Attempt, what_next: Next) -> Active:
        if attempt.adopts is not None:
            self._gpus.adopt(*attempt.adopts, attempt.key)
        return Active(
            job=job,
            attempt=attempt.attempt,
            key=attempt.key,
            folder=self._folders.attempt(job.id, attempt.attempt),
            gpu_uuids=attempt.gpu_uuids,
            next=what_next,
            created_at=attempt.created_at,
            rate=attempt.charge_rate,
            backfilled=attempt.backfilled,
            adopts=attempt.adopts,
            stop_wanted=job.cancel_requested_at is not None or attempt.stop_why is not None,
        )

    async def _release_gpus(self) -> None:
        """Give back the GPUs of ended attempts that NVML shows to be clean, and only those."""
        for lease in [lease for lease in self._state.leases.values() if lease.ended]:
            seen_after = self._state.ended_at.get(lease.gpu_uuid, self._began)
            if self._gpus.clean(lease.gpu_uuid, lease.key, seen_after):
                await self._database.write(
                    queue.release, [lease.gpu_uuid], lease.job_id, lease.attempt, now=time.time()
                )
                self._state.leases.pop((lease.gpu_uuid, lease.share), None)
                self._events.publish(GPUS)

    async def _act(self) -> list[Active]:
        """Decide, stop those that give way, and commit the intent to start; returns the attempts to be launched."""
        state = self._state
        now = time.time()
        running = state.running()
        state.backlog.admit(now, elements_running(running))
        state.plan = decide(
            state.backlog,
            running,
            state.box(self._gpus.current()),
            standing(state.ledger, running, state.backlog.users, state.rules, now),
            state.rules,
            now,
            gpu_hours=state.hours.used(running, now),
            estimate=lambda job: state.history.left_s(job, now),
        )
        for preemption in state.plan.preemptions:
            await self._stop(preemption, now)
        return await self._start(state.plan.starts, now)

    async def _stop(self, preemption: Preemption, now: float) -> None:
        """Have a running job give way; it is stopped as by its owner, and goes back into the queue."""
        active = self._state.active.get(preemption.job_id)
        if active is None or active.stop_wanted:
            return
        cause = f"it gave way to job {preemption.for_job_id}"
        stopped = await self._database.write(
            queue.request_stop, active.job.id, active.attempt, StopWhy.PREEMPTED, cause, now=now
        )
        if stopped:
            log.info("job %d: %s", active.job.id, cause)
            active.stop()

    async def _start(self, starts: Sequence[Start], now: float) -> list[Active]:
        """Commit the intent to start; returns the attempts, to be launched."""
        if not starts:
            return []
        backlog = self._state.backlog
        tokens = {start.job_id: new_token() for start in starts}
        intents = [
            Launching(
                start=start,
                key=secrets.token_hex(16),
                token_sha256=digest(tokens[start.job_id]),
                charge_rate=start.rate,
                backfilled=start.backfilled,
            )
            for start in starts
        ]
        committed = await self._database.write(_commit_starts, intents, now)
        # No await from here on: memory follows the commit before anybody else looks at it.
        begun = {job.id for job, _, _ in committed}
        for start in starts:
            # One that was not started waits no longer, or was held meanwhile: then it waits on, aside.
            known = backlog.get(start.job_id)
            if start.job_id in begun or (known is not None and not known.hold):
                backlog.drop(start.job_id)
        started: list[Active] = []
        for job, attempt, leases in committed:
            active = self._active(job, attempt, Next.LAUNCH)
            active.token = tokens[job.id]
            self._state.active[job.id] = active
            self._state.leases |= {(lease.gpu_uuid, lease.share): lease for lease in leases}
            self._events.publish(job_topic(job.id), JOBS, *([GPUS] if active.gpu_uuids else []))
            started.append(active)
        return started


def _name(active: Active) -> str:
    return handle(active.job.id, active.attempt)


# What is read and written in one transaction. Reads that memory is to agree with are made on the writing connection
# as well: answers come in the order of the commits, so nothing that was committed before is missing in memory.


@dataclass(frozen=True, slots=True, kw_only=True)
class _Truth:
    """What memory must agree with, beside the waiting jobs."""

    unknown: Sequence[tuple[Job, Attempt]]
    to_stop: Sequence[int]
    leases: Sequence[Lease]
    drained: dict[str, str]
    reservations: Sequence[Reservation]
    faults: dict[str, list[GpuFault]]
    resumed: dict[str, float]


def _truth(connection: sqlite3.Connection, known: Collection[int]) -> _Truth:
    """`known` are the ids of the jobs whose attempts memory knows to be under way."""
    under_way = queue.in_states(connection, tuple(ACTIVE))
    return _Truth(
        unknown=_with_attempts(connection, [job for job in under_way if job.id not in known]),
        to_stop=[job.id for job in under_way if job.id in known and job.cancel_requested_at is not None],
        leases=queue.live_leases(connection),
        drained=queue.drained(connection),
        reservations=gpu_queries.reservations(connection, now=time.time()),
        faults=gpu_queries.open_faults(connection),
        resumed=gpu_queries.resumed(connection),
    )


def _commit_starts(
    connection: sqlite3.Connection, intents: Sequence[Launching], now: float
) -> list[tuple[Job, Attempt, list[Lease]]]:
    attempts = queue.start(connection, intents, now=now)
    jobs = queue.get_many(connection, list(attempts))
    return [
        (job, attempt, queue.leases_of(connection, attempt) if attempt.gpu_uuids else [])
        for job, attempt in _with_attempts(connection, list(jobs.values()))
    ]


def _with_attempts(connection: sqlite3.Connection, jobs: Sequence[Job]) -> list[tuple[Job, Attempt]]:
    pairs = ((job, queue.attempt_of(connection, job.id, job.attempt)) for job in jobs)
    return [(job, attempt) for job, attempt in pairs if attempt is not None]
