"""The scheduler's loop: carries out what `placement` decides and what ended attempts mean.

It wakes for a submit, an end (a pidfd), a cancel, a GPU sample or a timer; a slow timer makes up for lost hints.
One tick: reap, stop, release GPUs, order, place, start.

The daemon's own trouble (full disk, locked database, no process to be had) delays jobs and never ends one: whatever
could not be done stays noted and is tried again.
"""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress

from mlbox.database import Database
from mlbox.errors import Unavailable
from mlbox.events import GPUS, JOBS, Events, job_topic
from mlbox.identity import digest, new_token
from mlbox.jobs import ACTIVE, Job, JobState, Reason, handle
from mlbox.scheduler import launching, outcome, placement, queue
from mlbox.scheduler.executors.base import CouldNotStart, Executor, Liveness
from mlbox.scheduler.folders import Folders
from mlbox.scheduler.gpus import GpuInventory
from mlbox.scheduler.launching import Surroundings
from mlbox.scheduler.outcome import Outcome, Step
from mlbox.scheduler.queue import Attempt, Launching, Lease
from mlbox.scheduler.state import Active, SchedulerState, waiting

log = logging.getLogger(__name__)

_LAUNCHES = 3
"""A shim that ends before user code began is launched again so often; then something is wrong with the job itself."""
_TROUBLE_RETRY_S = 1.0
"""How soon a tick that met trouble of the daemon's own is repeated."""


class Loop:
    """The one task that moves jobs on. `recover` once, then `run` for ever."""

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
        self._executor = executor
        self._state = state
        self._surroundings = surroundings
        self._repair_s = repair_s
        self._woken = asyncio.Event()
        self._ended: set[int] = set()
        self._lost: set[int] = set()
        self._to_launch: set[int] = set()
        self._to_mark: set[int] = set()
        self._trouble = False
        self._repair_at = 0.0
        self._began = time.monotonic()
        self._ended_at: dict[str, float] = {}
        """When the last attempt on a GPU ended: only a later sample can show that it is clean."""

    def wake(self) -> None:
        """Have a tick soon. Cheap; any number of calls is one."""
        self._woken.set()

    async def recover(self) -> None:
        """Take up what an earlier daemon left, by the recovery table, before anything new happens."""
        now = time.time()
        await asyncio.to_thread(self._folders.prepare)
        await self._read_queue()
        self._state.drained = await self._database.read(queue.drained)
        self._state.leases = {lease.gpu_uuid: lease for lease in await self._database.read(queue.live_leases)}
        for job in await self._database.read(queue.in_states, tuple(ACTIVE)):
            attempt = await self._database.read(queue.attempt_of, job.id, job.attempt)
            if attempt is not None:
                await self._recover_one(job, attempt, now)
        newest = await self._database.read(queue.listing, limit=1)
        await asyncio.to_thread(self._folders.forget_unknown, newest[0].id if newest else 0)

    async def run(self) -> None:
        """Tick until cancelled. An error that is not understood ends the daemon; systemd starts it again."""
        try:
            while True:
                self._woken.clear()
                self._trouble = False
                await self.tick()
                await self._sleep()
        finally:
            for active in self._state.active.values():
                self._unwatch(active)

    async def tick(self) -> None:
        """One pass: reap, stop, release GPUs, order, place, start."""
        await self._guarded(self._reap, sorted(self._ended))
        await self._guarded(self._clear_away, sorted(self._lost))
        await self._guarded(self._stop, [job_id for job_id, active in self._state.active.items() if active.stop_wanted])
        await self._guarded(self._launch, sorted(self._to_launch))
        await self._mark_running()
        await self._release_gpus()
        await self._start()

    # Recovery

    async def _read_queue(self) -> None:
        queued = await self._database.read(queue.in_states, (JobState.QUEUED,))
        self._state.backlog.replace_all((waiting(job) for job in queued), time.time())

    async def _recover_one(self, job: Job, attempt: Attempt, now: float) -> None:
        active = Active(
            job=job,
            attempt=attempt.attempt,
            key=attempt.key,
            folder=self._folders.attempt(job.id, attempt.attempt),
            gpu_uuids=attempt.gpu_uuids,
            stop_wanted=job.cancel_requested_at is not None,
        )
        self._state.active[job.id] = active
        seen = await asyncio.to_thread(self._executor.observe, active.folder)
        step = outcome.recover(seen)
        log.info("job %d: recovery: %s (attempt %d)", job.id, step, attempt.attempt)
        match step:
            case Step.ADOPT:
                if job.state is JobState.STARTING:
                    await self._database.write(queue.running, [(job.id, attempt.attempt)], now=now)
                self._watch(active)
            case Step.FINISH:
                self._ended.add(job.id)
            case Step.LOST:
                self._lost.add(job.id)
            case Step.REBOOT:
                await self._finish(active, outcome.of_loss(job, Reason.REBOOT))
            case Step.LAUNCH:
                self._to_launch.add(job.id)

    # Ends

    def _watch(self, active: Active) -> None:
        """Have the end of the attempt's shim wake the loop; an end that came before counts at once."""
        fd = self._executor.end_fd(active.folder)
        if fd is None:
            self._on_end(active)
            return
        active.end_fd = fd
        asyncio.get_running_loop().add_reader(fd, self._on_end, active)

    def _on_end(self, active: Active) -> None:
        self._unwatch(active)
        if self._state.active.get(active.job.id) is active:
            self._ended.add(active.job.id)
            self.wake()

    def _unwatch(self, active: Active) -> None:
        if active.end_fd is not None:
            asyncio.get_running_loop().remove_reader(active.end_fd)
            os.close(active.end_fd)
            active.end_fd = None

    async def _reap(self, job_id: int) -> None:
        """Look at an attempt whose shim is gone and do what its folder says."""
        active = self._state.active[job_id]
        seen = await asyncio.to_thread(self._executor.observe, active.folder)
        if seen.liveness is Liveness.ALIVE:
            self._ended.discard(job_id)
            self._watch(active)
        elif seen.liveness is Liveness.VANISHED:
            self._ended.discard(job_id)
            self._lost.add(job_id)
            await self._clear_away(job_id)
        elif seen.exit is None:
            self._ended.discard(job_id)
            await self._launch_again(active)
        else:
            tried = await self._database.read(queue.failures, job_id)
            job = await self._database.read(queue.get, job_id) or active.job
            await self._finish(active, outcome.of_exit(job, seen.exit, tried))

    async def _clear_away(self, job_id: int) -> None:
        """Kill what a dead shim left; the attempt is over when nothing of it is alive."""
        active = self._state.active[job_id]
        left = await asyncio.to_thread(self._executor.kill_remains, active.folder, active.key)
        if left:
            log.warning("job %d: its supervisor died; processes %s are being killed", job_id, sorted(left))
            self._trouble = True
            return
        job = await self._database.read(queue.get, job_id) or active.job
        await self._finish(active, outcome.of_loss(job, Reason.LOST))

    async def _finish(self, active: Active, end: Outcome) -> None:
        """Record the end, then forget the attempt; its GPUs stay leased until they are seen to be clean."""
        now = time.time()
        job_id = active.job.id
        job = await self._database.write(queue.finish, job_id, active.attempt, end, now=now)
        self._unwatch(active)
        del self._state.active[job_id]
        for pending in (self._ended, self._lost, self._to_launch, self._to_mark):
            pending.discard(job_id)
        if active.gpu_uuids:
            self._state.leases = {lease.gpu_uuid: lease for lease in await self._database.read(queue.live_leases)}
            self._ended_at |= dict.fromkeys(active.gpu_uuids, time.monotonic())
            self._gpus.refresh()
        if job is not None and job.state is JobState.QUEUED:
            self._state.backlog.put(waiting(job), now)
        log.info("job %d: %s: %s (attempt %d)", job_id, end.state, end.cause, active.attempt)
        self._events.publish(job_topic(job_id), JOBS, *([GPUS] if active.gpu_uuids else []))

    async def _stop(self, job_id: int) -> None:
        active = self._state.active[job_id]
        if job_id in self._to_launch:
            # User code never ran and now never will.
            await self._finish(active, _CANCELLED_EARLY)
        elif not active.stop_sent:
            await asyncio.to_thread(self._executor.stop, active.folder)
            active.stop_sent = True

    # GPUs

    async def _release_gpus(self) -> None:
        """Give back the GPUs of ended attempts that NVML shows to be clean, and only those."""
        now = time.time()
        for lease in [lease for lease in self._state.leases.values() if lease.ended]:
            seen_after = self._ended_at.get(lease.gpu_uuid, self._began)
            if self._gpus.clean(lease.gpu_uuid, lease.key, seen_after):
                with suppress(Unavailable):
                    await self._database.write(queue.release, [lease.gpu_uuid], lease.job_id, lease.attempt, now=now)
                    del self._state.leases[lease.gpu_uuid]
                    self._events.publish(GPUS)

    # Starts

    async def _start(self) -> None:
        """Place waiting jobs and start those that fit; the intent is committed before anything is launched."""
        backlog = self._state.backlog
        backlog.admit(time.time())
        plan = placement.place(backlog.gpu_line(), backlog.slot_line(), self._state.box(self._gpus.current()))
        self._state.plan = plan
        if not plan.starts:
            return
        tokens = {start.job_id: new_token() for start in plan.starts}
        intents = [
            Launching(start=start, key=secrets.token_hex(16), token_sha256=digest(tokens[start.job_id]))
            for start in plan.starts
        ]
        try:
            attempts = await self._database.write(queue.start, intents, now=time.time())
            jobs = await self._database.read(queue.get_many, list(attempts))
        except Unavailable as error:
            self._note_trouble("starting jobs", error)
            return
        for intent in intents:
            job_id, uuids = intent.start.job_id, intent.start.gpu_uuids
            backlog.drop(job_id)  # also where it waits no longer, and so was not started
            if job_id not in attempts:
                continue
            attempt = attempts[job_id]
            self._state.active[job_id] = Active(
                job=jobs[job_id],
                attempt=attempt,
                key=intent.key,
                folder=self._folders.attempt(job_id, attempt),
                gpu_uuids=uuids,
                token=tokens[job_id],
            )
            for uuid in uuids:
                self._state.leases[uuid] = Lease(
                    gpu_uuid=uuid, job_id=job_id, attempt=attempt, key=intent.key, ended=False
                )
        self._to_launch |= attempts.keys()
        await self._guarded(self._launch, list(attempts))
        await self._mark_running()

    async def _launch(self, job_id: int) -> None:
        """Start the shim of a committed attempt; where that fails for now, it is tried again."""
        active = self._state.active[job_id]
        if active.token is None:
            token = new_token()
            await self._database.write(queue.renew_token, job_id, active.attempt, digest(token))
            active.token = token
        try:
            await asyncio.to_thread(self._prepare_and_start, active, active.token)
        except (CouldNotStart, OSError) as error:
            self._note_trouble(f"job {job_id}: launching it", error)
            return
        active.launches += 1
        self._to_launch.discard(job_id)
        self._to_mark.add(job_id)
        self._watch(active)

    def _prepare_and_start(self, active: Active, token: str) -> None:
        launch = launching.prepare(
            active.job, active.attempt, active.key, token, active.gpu_uuids, self._folders, self._surroundings
        )
        self._executor.start(launch)

    async def _launch_again(self, active: Active) -> None:
        """The shim ended before user code began: the same attempt may be launched again, but not for ever."""
        job_id = active.job.id
        if active.stop_wanted:
            await self._finish(active, _CANCELLED_EARLY)
        elif active.launches >= _LAUNCHES:
            why = f"its supervisor ended {_LAUNCHES} times before it began; see {active.folder / 'shim.log'}"
            await self._finish(active, outcome.of_refusal(why))
        else:
            self._to_launch.add(job_id)
            await self._launch(job_id)

    async def _mark_running(self) -> None:
        """Record what was launched; the launched run on whether or not that succeeds now."""
        marked = {job_id: self._state.active[job_id] for job_id in self._to_mark if job_id in self._state.active}
        self._to_mark.intersection_update(marked)
        if not marked:
            return
        pairs = [(job_id, active.attempt) for job_id, active in marked.items()]
        try:
            jobs = await self._database.write(queue.running, pairs, now=time.time())
        except Unavailable as error:
            self._note_trouble("recording started jobs", error)
            return
        self._to_mark.clear()
        for job in jobs:
            active = marked[job.id]
            active.job = job
            if job.cancel_requested_at is not None:
                active.stop_wanted = True
                self.wake()
            log.info("job %d: started%s (%s)", job.id, self._on_gpus(active), handle(job.id, active.attempt))
            self._events.publish(job_topic(job.id), JOBS, *([GPUS] if active.gpu_uuids else []))

    def _on_gpus(self, active: Active) -> str:
        numbers = [str(gpu.index) for gpu in self._gpus.current().gpus if gpu.uuid in active.gpu_uuids]
        return f" on GPU {','.join(numbers)}" if numbers else ""

    # Trouble of the daemon's own

    async def _guarded(self, step: Callable[[int], Awaitable[None]], job_ids: Iterable[int]) -> None:
        """Run `step` for each job, side by side; what the box cannot do now is noted and tried again."""
        results = await asyncio.gather(*(step(job_id) for job_id in job_ids), return_exceptions=True)
        for result in results:
            if isinstance(result, (Unavailable, OSError)):
                self._note_trouble("carrying on with jobs", result)
            elif isinstance(result, BaseException):
                raise result

    def _note_trouble(self, doing: str, error: Exception) -> None:
        log.warning("%s did not work now and is tried again: %s", doing, error)
        self._trouble = True

    async def _sleep(self) -> None:
        """Until something happens; when nothing does for `repair_s`, look for hints that got lost."""
        pause = min(self._repair_s, max(0.0, self._state.backlog.next_due - time.time()))
        with suppress(TimeoutError):
            async with asyncio.timeout(_TROUBLE_RETRY_S if self._trouble else pause):
                await self._woken.wait()
        if time.monotonic() >= self._repair_at:
            with suppress(Unavailable):
                await self._repair()

    async def _repair(self) -> None:
        """Make up for hints that got lost: unwatched ends, unheard cancels, a backlog out of step."""
        self._repair_at = time.monotonic() + self._repair_s
        counts = await self._database.read(queue.counts)
        if counts[JobState.QUEUED] != len(self._state.backlog):
            await self._read_queue()
        for job in await self._database.read(queue.in_states, tuple(ACTIVE)):
            active = self._state.active.get(job.id)
            if active is not None and job.cancel_requested_at is not None:
                active.stop_wanted = True
        for job_id, active in self._state.active.items():
            if active.end_fd is None and job_id not in self._to_launch | self._lost:
                self._ended.add(job_id)


_CANCELLED_EARLY = Outcome(state=JobState.CANCELLED, reason=Reason.USER, cause="cancelled before it began")
