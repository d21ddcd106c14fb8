"""The life of an attempt under way: launched, watched, stopped, looked at when its shim is gone, recorded.

Each attempt has a task of its own, so that one whose folder hangs keeps nobody else waiting. What the box cannot do
now (full disk, locked database, no process to be had) is tried again, ever more seldom, and never ends a job.
"""

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace

from mlbox.database import Database
from mlbox.errors import Unavailable
from mlbox.events import GPUS, JOBS, Events, job_topic
from mlbox.identity import digest, new_token
from mlbox.jobs import Job, JobState, Reason, handle
from mlbox.scheduler import gpu_queries, launching, notices, notifier, outcome, queue
from mlbox.scheduler.executors.base import CouldNotStart, Executor
from mlbox.scheduler.folders import Folders
from mlbox.scheduler.gpu_queries import GpuFault
from mlbox.scheduler.gpus import GpuInventory
from mlbox.scheduler.launching import Surroundings
from mlbox.scheduler.outcome import Outcome, Step, Stop, StopWhy
from mlbox.scheduler.queue import Attempt, Settled
from mlbox.scheduler.state import Active, Next, SchedulerState, follow, waiting

log = logging.getLogger(__name__)

_SHORTEST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 10.0
"""Trouble that is over is noticed after at most so long; what is tried costs a commit or the start of a process."""


def pause_s(tries: int) -> float:
    """How long to wait after so many tries in vain."""
    return min(_LONGEST_PAUSE_S, _SHORTEST_PAUSE_S * 2 ** min(tries, 16))


_A_GPU_CAN_CAUSE = frozenset({Reason.EXIT_CODE, Reason.SIGNAL})
"""Failures that count against the GPU they happened on, until a job succeeds there."""


class _NotYet(Exception):
    """The attempt is not as far as it should be; the text says how far."""


class Attempts:
    """Carries attempts on. `wake` is called whenever one has ended, since something else may start then."""

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
        wake: Callable[[], None],
    ) -> None:
        self._database = database
        self._events = events
        self._folders = folders
        self._gpus = gpus
        self._executor = executor
        self._state = state
        self._surroundings = surroundings
        self._wake = wake
        self._steps = {
            Next.LAUNCH: self._launch,
            Next.WATCH: self._watch,
            Next.LOOK: self._look,
            Next.CLEAR: self._clear,
        }

    async def follow(self, active: Active) -> None:
        """Carry an attempt on until its end is recorded. A task of its own."""
        while active.next is not Next.DONE:
            await self._step(active)
            if active.trouble is not None:
                await self._pause(active)

    async def settle(self, active: Active) -> None:
        """Carry an attempt on until it runs, its end is recorded, or something is in the way."""
        while active.next not in (Next.WATCH, Next.DONE) and active.trouble is None:
            await self._step(active)

    async def _step(self, active: Active) -> None:
        """Do what is next. Trouble of the box's own leaves it as it is, to be done again."""
        try:
            await self._steps[active.next](active)
        except (Unavailable, CouldNotStart, OSError, _NotYet) as error:
            active.tries += 1
            active.trouble = str(error)
            log.warning("job %d: attempt %d goes on later: %s", active.job.id, active.attempt, error)
        else:
            active.trouble = None

    async def _pause(self, active: Active) -> None:
        active.hint.clear()
        # Launches count as well: a shim that ends at once is no reason to start shims as fast as the box can.
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s(max(active.tries, active.launches))):
                await active.hint.wait()

    # What may be next

    async def _launch(self, active: Active) -> None:
        if active.stop_wanted and active.adopts is None:  # what runs already is watched first, and then stopped
            await self._finish(active, lambda job, _failures, stop: outcome.before_start(job, stop))
            return
        if active.token is None:  # committed by an earlier daemon, which took the token with it
            token = new_token()
            await self._database.write(queue.renew_token, active.job.id, active.attempt, digest(token))
            active.token = token
        active.began = time.time()
        await asyncio.to_thread(self._prepare_and_start, active, active.token)
        active.launches += 1
        active.next = Next.WATCH

    def _prepare_and_start(self, active: Active, token: str) -> None:
        launch = launching.prepare(
            active.job,
            active.attempt,
            active.key,
            token,
            active.gpu_uuids,
            self._folders,
            self._surroundings,
            cpu_affinity=self._near(active.gpu_uuids),
            adopt=active.adopts,
        )
        self._executor.start(launch)

    def _near(self, gpu_uuids: Collection[str]) -> tuple[int, ...]:
        """The CPUs next to these GPUs; none where that is all of them, or NVML does not tell."""
        cpus = {cpu for gpu in self._gpus.current().gpus if gpu.uuid in gpu_uuids for cpu in gpu.cpus}
        return tuple(sorted(cpus)) if 0 < len(cpus) < (os.cpu_count() or 1) else ()

    async def _watch(self, active: Active) -> None:
        """Record that it runs, and wait until its shim has ended."""
        shim = await asyncio.to_thread(self._executor.end_fd, active.folder)
        if shim is None:
            active.next = Next.LOOK
            raise _NotYet("its supervisor is gone, or cannot be watched")
        loop = asyncio.get_running_loop()
        ended = stop_sent = False

        def on_end() -> None:
            nonlocal ended
            ended = True
            loop.remove_reader(shim)
            active.hint.set()

        loop.add_reader(shim, on_end)
        try:
            while not ended:
                if active.stop_wanted and not stop_sent:
                    await asyncio.to_thread(self._executor.stop, active.folder)
                    stop_sent = True
                elif active.job.state is JobState.STARTING:
                    await self._mark_running(active)
                else:
                    await active.hint.wait()
                    active.hint.clear()
        finally:
            loop.remove_reader(shim)
            os.close(shim)
        active.next, active.tries = Next.LOOK, 0

    async def _look(self, active: Active) -> None:
        """Do what the recovery table says: it holds after a restart as well as after any end."""
        seen = await asyncio.to_thread(self._executor.observe, active.folder)
        match outcome.recover(seen):
            case Step.ADOPT:
                if active.job.state is JobState.STARTING:
                    active.began = seen.started.started_at if seen.started else active.began
                    await self._mark_running(active)
                active.next = Next.WATCH
            case Step.FINISH:
                end = seen.exit
                assert end is not None, "an attempt that has ended says how"
                await self._finish(active, lambda job, failures, stop: outcome.of_exit(job, end, failures, stop=stop))
            case Step.LOST:
                active.next = Next.CLEAR
            case Step.REBOOT:
                await self._finish(active, lambda job, _failures, stop: outcome.of_loss(job, Reason.REBOOT, stop=stop))
            case Step.LAUNCH:
                active.next = Next.LAUNCH
                if active.launches and not active.stop_wanted:
                    # Whatever a job can do wrong, its shim lives to record; so this is trouble of the box.
                    raise _NotYet(f"its supervisor ended before it began: see {active.folder / 'shim.log'}")

    async def _clear(self, active: Active) -> None:
        """Kill what a dead shim left; the attempt is over when nothing of it is alive."""
        left = await asyncio.to_thread(self._executor.kill_remains, active.folder, active.key)
        if left:
            raise _NotYet(f"its supervisor died, and its processes {sorted(left)} were killed but are still there")
        await self._finish(active, lambda job, _failures, stop: outcome.of_loss(job, Reason.LOST, stop=stop))

    # Records

    async def _mark_running(self, active: Active) -> None:
        pair = (active.job.id, active.attempt)
        (job,) = await self._database.write(_mark_running, pair, now=active.began or time.time())
        active.job, active.tries = job, 0
        if job.cancel_requested_at is not None:
            active.stop()
        numbers = [str(gpu.index) for gpu in self._gpus.current().gpus if gpu.uuid in active.gpu_uuids]
        on_gpus = f" on GPU {','.join(numbers)}" if numbers else ""
        log.info("job %d: started%s (%s)", job.id, on_gpus, handle(job.id, active.attempt))
        self._publish(active)

    async def _finish(self, active: Active, judge: "_Judge") -> None:
        """Record the end and forget the attempt; its GPUs stay leased until they are seen to be clean."""
        now = time.time()
        job, recorded, moved, faults = await self._database.write(_record, active.job.id, active.attempt, judge, now)
        # No await from here on: memory follows the commit before anybody else looks at it.
        active.next = Next.DONE
        del self._state.active[active.job.id]
        for place, lease in self._state.leases.items():
            if lease.key == active.key:
                self._state.leases[place] = replace(lease, ended=True)
                self._state.ended_at[lease.gpu_uuid] = time.monotonic()
        self._gpus.forget(active.key)
        self._state.faults = faults
        if job is not None and recorded is not None:
            self._state.charge(active, recorded, well=job.state is JobState.SUCCEEDED and not job.adopted)
        if active.gpu_uuids:
            self._gpus.refresh()
        if job is not None:
            if job.state is JobState.QUEUED:
                self._state.backlog.put(waiting(job), now)
            log.info("job %d: %s: %s (attempt %d)", job.id, job.state, job.cause, active.attempt)
        follow(moved, self._state, self._events, now)
        self._publish(active)
        self._wake()

    def _publish(self, active: Active) -> None:
        self._events.publish(job_topic(active.job.id), JOBS, *([GPUS] if active.gpu_uuids else []))


_Judge = Callable[[Job, int, Stop | None], Outcome]
"""From a job, how many of its attempts failed and whether mlbox stopped the current one, to what its end means."""


def _mark_running(connection: sqlite3.Connection, pair: tuple[int, int], *, now: float) -> list[Job]:
    jobs = queue.running(connection, [pair], now=now)
    for job in jobs:
        notices.add(connection, notifier.begun(job, now))
    return jobs


def _record(
    connection: sqlite3.Connection, job_id: int, attempt: int, judge: _Judge, now: float
) -> tuple[Job | None, Attempt | None, Settled, dict[str, list[GpuFault]]]:
    job = queue.get(connection, job_id)
    if job is None:
        return None, None, Settled(), gpu_queries.open_faults(connection)
    row = queue.attempt_of(connection, job_id, attempt)
    stop = Stop(why=StopWhy(row.stop_why), cause=row.stop_cause or "") if row and row.stop_why else None
    judged = judge(job, queue.failures(connection, job_id), stop)
    ended, moved = queue.finish(connection, job_id, attempt, judged, now=now)
    uuids = row.gpu_uuids if row else ()
    if ended is not None and judged.state is JobState.SUCCEEDED:
        gpu_queries.clear_failures(connection, uuids, now=now)
    elif ended is not None and judged.reason in _A_GPU_CAN_CAUSE:
        for uuid in uuids:
            fault = GpuFault(gpu_uuid=uuid, at=now, source="job", cause=judged.cause, job_id=job_id, uid=job.uid)
            gpu_queries.add_fault(connection, fault)
    if ended is not None:
        notices.add(connection, notifier.ended(ended, judged.reason, judged.cause, now))
    return ended, queue.attempt_of(connection, job_id, attempt), moved, gpu_queries.open_faults(connection)
