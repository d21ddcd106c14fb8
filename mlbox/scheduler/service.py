"""The door of the scheduler: what users may ask of jobs. Everything is checked here, whoever calls."""

import asyncio
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ParamSpec, TypeVar

from mlbox.database import Database
from mlbox.errors import Conflict, Denied, FieldError, Impossible, Invalid, NotFound, TooMany, Unavailable
from mlbox.events import JOBS, Events, job_topic
from mlbox.identity import Identity, Scope
from mlbox.jobs import ArraySpec, Job, JobSpec, JobState
from mlbox.scheduler import accounting, notices, placement, queue, retention, unpack
from mlbox.scheduler.accounting import UsageReport
from mlbox.scheduler.asking import person, refused, whole
from mlbox.scheduler.explain import Around, explain
from mlbox.scheduler.folders import Folders
from mlbox.scheduler.forecast import with_fewer_gpus
from mlbox.scheduler.forecaster import present
from mlbox.scheduler.gpu_door import GpuDoor
from mlbox.scheduler.gpus import GpuInventory, Nvml
from mlbox.scheduler.launching import array_variables
from mlbox.scheduler.notices import Notice
from mlbox.scheduler.policy import RankParts, Standing, rank_parts
from mlbox.scheduler.queue import Attempt, Settled, Submitter, WaitingQuota
from mlbox.scheduler.state import SchedulerState, follow, waiting
from mlbox.scheduler.timeline import PAST_MAX_S, Scene, Timeline, timeline

P = ParamSpec("P")
T = TypeVar("T")

_FULL_RETRY_S = 30.0


_STANDING_KEPT_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """Why a job waits, in one sentence; its position (1 is tried first; None: it has none).

    `estimated_start` is when it starts with even odds, `estimated_start_p90` by when in nine cases of ten.
    """

    why: str
    position: int | None = None
    estimated_start: float | None = None
    estimated_start_p90: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FewerGpus:
    """With `gpus` a job would probably start at `estimated_start`."""

    gpus: int
    estimated_start: float


class JobService(GpuDoor):
    """Jobs as their owners see them: one's own, or all for an admin; others' do not exist (NotFound)."""

    def __init__(
        self,
        *,
        database: Database,
        events: Events,
        folders: Folders,
        gpus: GpuInventory,
        state: SchedulerState,
        wake: Callable[[], None],
        waiting_max: int,
        waiting_quota: Callable[[str, str], WaitingQuota] = lambda _user, _project: WaitingQuota(),
        take_up: Callable[[Job, Attempt], None] = lambda _job, _attempt: None,
    ) -> None:
        """`waiting_quota(user, project)` bounds how many jobs may wait, besides `waiting_max` for all.

        `take_up` is called with each attempt that was begun here, by an adoption, when it was committed.
        """
        super().__init__(database=database, events=events, gpus=gpus, state=state, wake=wake, take_up=take_up)
        self._folders = folders
        self._waiting_max = waiting_max
        self._waiting_quota = waiting_quota
        self._everybody: tuple[float, Standing | None] = (0.0, None)
        self.incoming_folder = folders.incoming

    async def submit(
        self,
        who: Identity,
        spec: JobSpec,
        *,
        array: ArraySpec | None = None,
        code: Path | None = None,
        idempotency_key: str | None = None,
        retry_of: int | None = None,
    ) -> tuple[Job, bool]:
        """Queue a job and return it and True; or the one that `idempotency_key` made before and False.

        Of an array it is the first job, whose id is the array's. When this returns, the job, or every job of the
        array, is on disk for good. `code` is a file in `incoming_folder`; it is moved away. Raises Denied,
        Impossible, TooMany, Unavailable, and Invalid for an archive that would not be unpacked.
        """
        person(who, "submit jobs")
        if idempotency_key and (earlier := await self._database.read(queue.of_key, who.uid, idempotency_key)):
            return earlier, False
        self._admit(who, spec, array)
        if code is not None and retry_of is None:  # a retried job's archive was checked when it came
            with _disk("the code archive cannot be read"):
                await asyncio.to_thread(_check_archive, code)
        return await whole(self._submit(who, spec, array, code, idempotency_key, retry_of))

    async def _submit(
        self,
        who: Identity,
        spec: JobSpec,
        array: ArraySpec | None,
        code: Path | None,
        idempotency_key: str | None,
        retry_of: int | None,
    ) -> tuple[Job, bool]:
        job_id: int | None = None
        made = False
        size = len(array.elements) if array else 1
        quota = replace(self._waiting_quota(who.user, spec.project), box=self._waiting_max)
        submitter = Submitter(user=who.user, uid=who.uid, sees_all=who.admin, quota=quota)
        try:
            if code is not None and spec.code is not None:
                job_id = await self._database.write(queue.reserve_id, size)
                with _disk("the code archive cannot be stored"):
                    await asyncio.to_thread(self._folders.keep_code, job_id, spec.code, code, size)
            now = time.time()
            jobs, made = await self._database.write(
                queue.submit_all,
                spec,
                array,
                submitter,
                now=now,
                job_id=job_id,
                retry_of=retry_of,
                idempotency_key=idempotency_key,
            )
        finally:
            if job_id is not None and not made:
                for left in range(job_id, job_id + size):
                    with suppress(OSError, Conflict):  # what is left lies in nobody's way
                        await asyncio.to_thread(self._folders.remove, left)
        if made:
            for job in jobs:
                self._state.backlog.put(waiting(job), now)
                self._events.publish(job_topic(job.id), JOBS)
            self._wake()
        return jobs[0], made

    async def get(self, who: Identity, job_id: int) -> Job:
        """The job, if there is one and the asker may know of it. Raises NotFound."""
        job = await self._database.read(queue.get, job_id) if 0 < job_id < 2**63 else None
        if job is None or not self._may_see(who, job):
            raise NotFound(f"there is no job {job_id} that you may see")
        return job

    async def list(
        self,
        who: Identity,
        *,
        states: frozenset[JobState] = frozenset(),
        user: str | None = None,
        name: str | None = None,
        project: str | None = None,
        array: int | None = None,
        limit: int = 100,
        before: int | None = None,
    ) -> Sequence[Job]:
        """Jobs that the asker may see, newest first; `before` is the last id of the page before."""
        if who.job_id is not None:
            return [await self.get(who, who.job_id)]
        return await self._database.read(
            queue.listing,
            states=states,
            uid=None if who.admin else who.uid,
            user=user,
            name=name,
            project=project,
            array=array,
            limit=limit,
            before=before,
        )

    async def counts(self) -> Mapping[JobState, int]:
        """How many jobs of all users are in each state."""
        return await self._database.read(queue.counts)

    async def attempts(self, who: Identity, job_id: int) -> Sequence[Attempt]:
        """Every start of the job, the first one first."""
        await self.get(who, job_id)
        return await self._database.read(queue.attempts, job_id)

    async def wait(self, who: Identity, job_id: int, timeout_s: float) -> Job:
        """The job once it has ended, or as it is when `timeout_s` has passed."""
        with self._events.subscribe(job_topic(job_id)) as changes:
            until = asyncio.get_running_loop().time() + timeout_s
            while True:
                job = await self.get(who, job_id)
                left = until - asyncio.get_running_loop().time()
                if job.ended or left <= 0:
                    return job
                await changes.take(left)

    async def cancel(self, who: Identity, job_id: int) -> Job:
        """End a waiting job at once; ask one under way to end (TERM, after its grace period KILL).

        Asking twice is once. Raises Conflict when it ended otherwise.
        """
        await self._own(who, job_id)
        return await whole(self._cancel(who, job_id))

    async def _cancel(self, who: Identity, job_id: int) -> Job:
        now = time.time()
        job, moved = await self._database.write(queue.request_cancel, job_id, user=who.user, now=now)
        if job is None or job.state in (JobState.SUCCEEDED, JobState.FAILED):
            raise Conflict(f"job {job_id} has {job.state if job else 'gone'} already: there is nothing to cancel")
        self._cancelled([job], moved, now)
        return job

    async def cancel_array(self, who: Identity, array_id: int) -> Sequence[Job]:
        """Cancel every job of an array that has not ended; returns those. Raises NotFound, Conflict."""
        first = await self._own(who, array_id)
        if first.array is None or first.array.id != array_id:
            raise NotFound(f"job {array_id} is not the first of an array: cancel it alone")
        return await whole(self._cancel_array(who, array_id))

    async def _cancel_array(self, who: Identity, array_id: int) -> Sequence[Job]:
        now = time.time()
        jobs, moved = await self._database.write(queue.cancel_array, array_id, user=who.user, now=now)
        if not jobs:
            raise Conflict(f"every job of array {array_id} has ended already: there is nothing to cancel")
        self._cancelled(jobs, moved, now)
        return jobs

    def _cancelled(self, jobs: Sequence[Job], moved: Settled, now: float) -> None:
        """Have memory follow: those that waited are over, those under way are asked to end."""
        for job in jobs:
            if job.ended:
                self._state.backlog.drop(job.id)
            elif active := self._state.active.get(job.id):
                active.stop()
            self._events.publish(job_topic(job.id), JOBS)
        follow(moved, self._state, self._events, now)
        self._wake()

    async def retry(self, who: Identity, job_id: int, *, idempotency_key: str | None = None) -> Job:
        """Submit the same job once more, as a new job that waits for no other: an ended one stays as it ended.

        Raises Conflict while the job has not ended, or when its code archive was removed.
        """
        job = await self._own(who, job_id)
        if not job.ended:
            raise Conflict(f"job {job_id} is {job.state}: it can be retried when it has ended")
        spec = replace(job.spec, hold=False, not_before=None, depends_on=())
        return await self._again(who, job, spec, idempotency_key, retry_of=job_id)

    async def clone(self, who: Identity, job_id: int, *, idempotency_key: str | None = None) -> Job:
        """Submit the same job once more as it was, as a new job, whatever became of the first.

        Of an array's element it is one job. Raises Conflict when its code archive was removed, or when it was adopted
        and cannot be begun.
        """
        job = await self._own(who, job_id)
        if job.adopted:
            raise Conflict(f"job {job_id} was begun outside mlbox, which does not know how: submit it anew")
        return await self._again(who, job, job.spec, idempotency_key, retry_of=None)

    async def _again(
        self, who: Identity, job: Job, spec: JobSpec, idempotency_key: str | None, *, retry_of: int | None
    ) -> Job:
        code: Path | None = None
        try:
            with _disk(f"the code of job {job.id} cannot be copied"):
                try:
                    code = await asyncio.to_thread(self._folders.copy_code, job)
                except FileNotFoundError:
                    raise Conflict(f"the code of job {job.id} was removed: submit it anew") from None
            # A single element of an array is no array, but its program still asks which element it is.
            spec = replace(spec, env={**spec.env, **(array_variables(job.array) if job.array else {})})
            again, _ = await self.submit(who, spec, code=code, idempotency_key=idempotency_key, retry_of=retry_of)
        finally:
            if code is not None:  # where the new job did not take it
                await asyncio.to_thread(code.unlink, missing_ok=True)
        return again

    async def hold(self, who: Identity, job_id: int) -> Job:
        """Keep a waiting job from starting. Raises Conflict when it waits no longer."""
        return await self._change(who, job_id, {"hold": 1})

    async def release(self, who: Identity, job_id: int) -> Job:
        """Let a held job start when it can. Raises Conflict when it waits no longer."""
        return await self._change(who, job_id, {"hold": 0})

    async def change(self, who: Identity, job_id: int, values: Mapping[str, object]) -> Job:
        """Set `priority`, `time_limit_s` or `notify` of a waiting job. Raises Denied, Conflict."""
        priority = values.get("priority")
        if isinstance(priority, int) and priority > 0 and not who.admin:
            raise Denied(f"priority {priority} is for admins: ask for 0 or less")
        return await self._change(who, job_id, values)

    async def remove_files(self, who: Identity, job_id: int) -> Job:
        """Remove an ended job's log, artifacts and code; its row stays. Raises Conflict while it has not ended."""
        job = await self._own(who, job_id)
        if not await self._database.write(queue.mark_removed, job_id, now=time.time()):
            raise Conflict(f"job {job_id} is {job.state}: cancel it first, then remove its files")
        with _disk(f"the files of job {job_id} cannot be removed"):
            await asyncio.to_thread(self._folders.remove, job_id)
        self._events.publish(job_topic(job_id), JOBS)
        return await self.get(who, job_id)

    def pending(self, job: Job) -> Pending | None:
        """Why the job waits; None when it does not. From memory, cheap."""
        active = self._state.active.get(job.id)
        if active is not None and job.state is JobState.STARTING and active.trouble is not None:
            return Pending(why=f"it cannot be launched yet: {active.trouble}")
        known = self._state.backlog.get(job.id)
        if known is None:
            return None
        now = time.time()
        state, weights = self._state, self._state.rules.weights
        everybody = self._standing(now)
        line = state.backlog.gpu_line if known.wants_gpu else state.backlog.slot_line
        around = Around(
            box=state.box(self._gpus.current()),
            plan=state.plan,
            rules=state.rules,
            ahead=line.ahead(known, everybody, weights, now),
            now=now,
            capped=state.backlog.is_capped(known),
            depends_on=job.spec.depends_on,
        )
        return Pending(
            why=self._gpus_unknown(known.gpus) or explain(known, around),
            position=state.backlog.position(known, everybody, weights, now),
            estimated_start=state.forecast.p50.get(job.id),
            estimated_start_p90=state.forecast.p90.get(job.id),
        )

    async def fewer_gpus(self, job: Job) -> FewerGpus | None:
        """With how many GPUs less a waiting job would probably start sooner, and when; None: with none."""
        known = self._state.backlog.get(job.id)
        start = self._state.forecast.p50.get(job.id)
        if known is None or known.gpus < 2 or start is None:
            return None
        found = await asyncio.to_thread(with_fewer_gpus, present(self._state, self._gpus), known, start)
        return None if found is None else FewerGpus(gpus=found[0], estimated_start=found[1])

    async def rank(self, who: Identity, job_id: int) -> RankParts:
        """The parts of a waiting job's rank. Raises NotFound, and Conflict when it waits no longer."""
        job = await self.get(who, job_id)
        known = self._state.backlog.get(job_id)
        if known is None:
            raise Conflict(f"job {job_id} is {job.state}: only a waiting job has a rank")
        now = time.time()
        weights, everybody = self._state.rules.weights, self._standing(now)
        return rank_parts(known, everybody, weights, now, self._state.backlog.position(known, everybody, weights, now))

    def _standing(self, now: float) -> Standing:
        """Where everybody stands, computed once for all the jobs of a page."""
        at, known = self._everybody
        if known is None or now - at > _STANDING_KEPT_S or now < at:
            known = self._state.standing(now)
            self._everybody = (now, known)
        return known

    async def queue(self, who: Identity, limit: int) -> Sequence[Job]:
        """The waiting jobs of all users in the order in which they are tried.

        Who waits before one is no secret; what others run is: their command, script and variables are left out.
        """
        now = time.time()
        first = self._state.backlog.ordered(limit, self._standing(now), self._state.rules.weights, now)
        order = [job.id for job in first]
        jobs = await self._database.read(queue.get_many, order)
        return [
            job if self._may_see(who, job) else replace(job, spec=_without_content(job.spec))
            for job_id in order
            if (job := jobs.get(job_id)) and job.state is JobState.QUEUED
        ]

    async def plan(self, who: Identity) -> Timeline:
        """What ran, runs and probably will run on each GPU: everybody's to see, as the queue is. Raises Denied."""
        person(who, "see the plan")
        now = time.time()
        state, reports = self._state, self.gpus()
        planned = [bar.job_id for bar in state.forecast.bars if state.backlog.get(bar.job_id) is not None]
        past = await self._database.read(queue.held_since, now - PAST_MAX_S) if reports else []
        waiting_jobs = await self._database.read(queue.get_many, planned) if planned else {}
        names = {job_id: job.spec.name for job_id, job in waiting_jobs.items()}
        names |= {job_id: active.job.spec.name for job_id, active in state.active.items()}
        return timeline(
            Scene(
                gpus=reports,
                past=past,
                running=state.running(),
                forecast=state.forecast,
                history=state.history,
                reservations=state.reservations,
                names=names,
                now=now,
            )
        )

    def under_way(self, job_id: int, attempt: int) -> bool:
        """Whether this attempt is starting or running, so that its log may still grow. From memory."""
        active = self._state.active.get(job_id)
        return active is not None and active.attempt == attempt

    async def usage(self, who: Identity, since: float, now: float) -> UsageReport:
        """What each user and project used from `since` to `now`: sums are everybody's to see. Raises Denied."""
        person(who, "see what others use")
        memory = {gpu.uuid: gpu.memory_mib for gpu in self._gpus.current().gpus if gpu.memory_mib}
        return await self._database.read(accounting.usage, since=since, until=now, gpu_memory_mib=memory)

    async def notices(self, who: Identity, *, limit: int = 50) -> Sequence[Notice]:
        """What the asker was told of their jobs, the newest first. Raises Denied."""
        person(who, "read notices")
        return await self._database.read(notices.for_user, who.uid, limit=limit)

    async def prune(self, now: float, *, keep_days: float | None, keep_bytes: int | None) -> Sequence[int]:
        """Remove the files of the jobs that ended first, by age and by total size; returns the ids of those jobs."""
        removed = await retention.prune(
            self._database, self._folders, now=now, keep_days=keep_days, keep_bytes=keep_bytes
        )
        if removed:
            self._events.publish(JOBS, *(job_topic(job_id) for job_id in removed))
        return removed

    def attempt_folder(self, job_id: int, attempt: int) -> Path:
        return self._folders.attempt(job_id, attempt)

    def out_folder(self, job_id: int) -> Path:
        return self._folders.out(job_id)

    async def job_of_token(self, token_sha256: str) -> Job | None:
        """The job under way that was given this token."""
        return await self._database.read(queue.of_token, token_sha256)

    def _admit(self, who: Identity, spec: JobSpec, array: ArraySpec | None) -> None:
        """Raises what speaks against queueing `spec` for `who`."""
        if spec.priority > 0 and not who.admin:
            raise Denied(f"priority {spec.priority} is for admins: ask for 0 or less")
        if spec.model is not None and not who.may(Scope.DEPLOY):
            raise Denied(f"model={spec.model} deploys what the job leaves, and that needs the scope 'deploy'")
        if spec.model is not None and array is not None:
            raise refused("model", "an array leaves as many models as it has jobs: submit the one to deploy alone")
        if array is not None and not array.elements:
            raise refused("array", "it has no elements: name at least one")
        size = len(array.elements) if array else 1
        waiting_now = len(self._state.backlog)
        if waiting_now + size > self._waiting_max:  # exact in the transaction; here before an archive is looked at
            more = f", these would be {size} more" if array else ""
            raise TooMany(
                f"{waiting_now} jobs wait, and no more than {self._waiting_max} may{more}: "
                "submit again when some have ended",
                _FULL_RETRY_S,
            )
        self._check_size(spec)

    def _check_size(self, spec: JobSpec) -> None:
        """Raises Impossible for a job that this box can never hold."""
        inventory = self._gpus.current()
        counted = inventory.nvml in (Nvml.OK, Nvml.ABSENT)
        gpus = (1 if spec.gpu_mem_mib else spec.gpus) if counted else 0
        if problem := placement.impossible(gpus, spec.slots, self._state.box(inventory)):
            raise Impossible(problem)
        largest = max((gpu.memory_mib or 0 for gpu in inventory.gpus), default=0)
        if spec.gpu_mem_mib and largest and spec.gpu_mem_mib > largest:
            raise Impossible(
                f"the job asks {spec.gpu_mem_mib} MiB of one GPU's memory; the largest here has {largest} MiB: "
                f"ask for {largest} MiB or less, or for whole GPUs with gpus"
            )

    def _gpus_unknown(self, gpus: int) -> str | None:
        """Why nobody can say when a job with GPUs starts, where that is so."""
        inventory = self._gpus.current()
        if gpus and not inventory.gpus and inventory.nvml is not Nvml.OK:
            return f"it needs {gpus} GPU{'' if gpus == 1 else 's'}: {inventory.message}"
        return None

    def _may_see(self, who: Identity, job: Job) -> bool:
        if who.job_id is not None:
            return job.id == who.job_id
        return who.admin or job.uid == who.uid

    async def _own(self, who: Identity, job_id: int) -> Job:
        """The job, if the asker may change it. Raises NotFound, Denied."""
        job = await self.get(who, job_id)
        if who.job_id is not None:
            raise Denied(f"a job's own token cannot change job {job_id}: use a token of your own")
        return job

    async def _change(self, who: Identity, job_id: int, values: Mapping[str, object]) -> Job:
        job = await self._own(who, job_id)
        changed = await whole(self._apply(job_id, values))
        if changed is None:
            raise Conflict(f"job {job_id} is {job.state}: only a waiting job can be changed")
        return changed

    async def _apply(self, job_id: int, values: Mapping[str, object]) -> Job | None:
        changed = await self._database.write(queue.change, job_id, values)
        if changed is not None:
            self._queued(changed, time.time())
        return changed

    def _queued(self, job: Job, now: float) -> None:
        self._state.backlog.put(waiting(job), now)
        self._changed(job.id)

    def _changed(self, job_id: int) -> None:
        self._events.publish(job_topic(job_id), JOBS)
        self._wake()


@contextmanager
def _disk(what: str) -> Generator[None]:
    """Trouble with the disk is told as Unavailable."""
    try:
        yield
    except OSError as error:
        raise Unavailable(f"{what} now: {error}") from error


def _without_content(spec: JobSpec) -> JobSpec:
    return replace(
        spec, command="", script=None, env={}, workdir=None, output=None, error=None, notify=(), depends_on=()
    )


def _check_archive(code: Path) -> None:
    """Raises Invalid when the shim would refuse to unpack `code`. Blocking."""
    try:
        unpack.check(code)
    except unpack.BadArchive as error:
        raise Invalid(f"the code archive was refused: {error}", (FieldError("code", str(error)),)) from error
