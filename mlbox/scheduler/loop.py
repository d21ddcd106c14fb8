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
from mlbox.scheduler import placement, queue
from mlbox.scheduler.attempts import Attempts, pause_s
from mlbox.scheduler.executors.base import Executor
from mlbox.scheduler.folders import Folders
from mlbox.scheduler.gpus import GpuInventory
from mlbox.scheduler.launching import Surroundings
from mlbox.scheduler.queue import Attempt, Launching, Lease
from mlbox.scheduler.state import Active, Next, SchedulerState, waiting

log = logging.getLogger(__name__)


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
        async with asyncio.TaskGroup() as group:
            for active in await self._catch_up():
                group.create_task(self._attempts.settle(active), name=f"recover {_name(active)}")
        newest = await self._database.read(queue.listing, limit=1)
        await asyncio.to_thread(self._folders.forget_unknown, newest[0].id if newest else 0)
        taken_up = len(self._state.active)
        log.info("scheduler: %d jobs under way, %d waiting", taken_up, len(self._state.backlog))

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
        await self._release_gpus()
        for active in await self._start():
            self._follow(group, active)

    def _follow(self, group: asyncio.TaskGroup, active: Active) -> None:
        group.create_task(self._attempts.follow(active), name=_name(active))

    async def _sleep(self) -> None:
        """Until something happens, a job's time comes, or lost hints are to be looked for."""
        pause = min(self._repair_at - time.monotonic(), self._state.backlog.next_due - time.time())
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
        state.leases = {lease.gpu_uuid: lease for lease in truth.leases}
        state.drained = truth.drained
        for job_id in truth.to_stop:
            state.active[job_id].stop()
        found = [self._active(job, attempt, Next.LOOK) for job, attempt in truth.unknown]
        state.active |= {active.job.id: active for active in found}
        return found

    def _active(self, job: Job, attempt: Attempt, what_next: Next) -> Active:
        return Active(
            job=job,
            attempt=attempt.attempt,
            key=attempt.key,
            folder=self._folders.attempt(job.id, attempt.attempt),
            gpu_uuids=attempt.gpu_uuids,
            next=what_next,
            stop_wanted=job.cancel_requested_at is not None,
        )

    async def _release_gpus(self) -> None:
        """Give back the GPUs of ended attempts that NVML shows to be clean, and only those."""
        for lease in [lease for lease in self._state.leases.values() if lease.ended]:
            seen_after = self._state.ended_at.get(lease.gpu_uuid, self._began)
            if self._gpus.clean(lease.gpu_uuid, lease.key, seen_after):
                await self._database.write(
                    queue.release, [lease.gpu_uuid], lease.job_id, lease.attempt, now=time.time()
                )
                del self._state.leases[lease.gpu_uuid]
                self._events.publish(GPUS)

    async def _start(self) -> list[Active]:
        """Place waiting jobs and commit the intent to start those that fit; returns their attempts, to be launched."""
        backlog = self._state.backlog
        backlog.admit(time.time())
        plan = placement.place(backlog.gpu_line(), backlog.slot_line(), self._state.box(self._gpus.current()))
        self._state.plan = plan
        if not plan.starts:
            return []
        tokens = {start.job_id: new_token() for start in plan.starts}
        intents = [
            Launching(start=start, key=secrets.token_hex(16), token_sha256=digest(tokens[start.job_id]))
            for start in plan.starts
        ]
        committed = await self._database.write(_commit_starts, intents, time.time())
        # No await from here on: memory follows the commit before anybody else looks at it.
        begun = {job.id for job, _ in committed}
        for start in plan.starts:
            # One that was not started waits no longer, or was held meanwhile: then it waits on, aside.
            known = backlog.get(start.job_id)
            if start.job_id in begun or (known is not None and not known.hold):
                backlog.drop(start.job_id)
        started = [self._active(job, attempt, Next.LAUNCH) for job, attempt in committed]
        for active in started:
            active.token = tokens[active.job.id]
            self._state.active[active.job.id] = active
            for uuid in active.gpu_uuids:
                self._state.leases[uuid] = Lease(
                    gpu_uuid=uuid, job_id=active.job.id, attempt=active.attempt, key=active.key, ended=False
                )
            self._events.publish(job_topic(active.job.id), JOBS, *([GPUS] if active.gpu_uuids else []))
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


def _truth(connection: sqlite3.Connection, known: Collection[int]) -> _Truth:
    """`known` are the ids of the jobs whose attempts memory knows to be under way."""
    under_way = queue.in_states(connection, tuple(ACTIVE))
    return _Truth(
        unknown=_with_attempts(connection, [job for job in under_way if job.id not in known]),
        to_stop=[job.id for job in under_way if job.id in known and job.cancel_requested_at is not None],
        leases=queue.live_leases(connection),
        drained=queue.drained(connection),
    )


def _commit_starts(
    connection: sqlite3.Connection, intents: Sequence[Launching], now: float
) -> list[tuple[Job, Attempt]]:
    attempts = queue.start(connection, intents, now=now)
    return _with_attempts(connection, list(queue.get_many(connection, list(attempts)).values()))


def _with_attempts(connection: sqlite3.Connection, jobs: Sequence[Job]) -> list[tuple[Job, Attempt]]:
    pairs = ((job, queue.attempt_of(connection, job.id, job.attempt)) for job in jobs)
    return [(job, attempt) for job, attempt in pairs if attempt is not None]
