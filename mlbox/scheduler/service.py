"""The door of the scheduler: what users may ask of jobs and GPUs. Everything is checked here, whoever calls."""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from mlbox.database import Database
from mlbox.errors import Conflict, Denied, FieldError, Impossible, Invalid, NotFound, TooMany, Unavailable
from mlbox.events import GPUS, JOBS, Events, job_topic
from mlbox.identity import Identity, Scope
from mlbox.jobs import Job, JobSpec, JobState
from mlbox.scheduler import placement, queue, unpack
from mlbox.scheduler.folders import Folders
from mlbox.scheduler.gpus import GpuInventory, Nvml
from mlbox.scheduler.queue import Attempt
from mlbox.scheduler.state import GpuReport, SchedulerState, waiting

P = ParamSpec("P")
T = TypeVar("T")

_FULL_RETRY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """Why a job waits, in one sentence; its position (1 is tried first; None: it has none)."""

    why: str
    position: int | None
    estimated_start: float | None


class JobService:
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
    ) -> None:
        self._database = database
        self._events = events
        self._folders = folders
        self._gpus = gpus
        self._state = state
        self._wake = wake
        self._waiting_max = waiting_max
        self.incoming_folder = folders.incoming

    async def submit(
        self,
        who: Identity,
        spec: JobSpec,
        *,
        code: Path | None = None,
        idempotency_key: str | None = None,
        retry_of: int | None = None,
    ) -> tuple[Job, bool]:
        """Queue a job and return it and True; or the one that `idempotency_key` made before and False.

        When this returns, the job is on disk for good. `code` is a file in `incoming_folder`; it is moved away.
        Raises Denied, Impossible, TooMany, Unavailable, and Invalid for an archive that would not be unpacked.
        """
        if who.job_id is not None:
            raise Denied(f"the token of job {who.job_id} cannot submit jobs: use a token of your own")
        if idempotency_key and (earlier := await self._database.read(queue.of_key, who.uid, idempotency_key)):
            return earlier, False
        self._admit(who, spec)
        if code is not None and retry_of is None:  # a retried job's archive was checked when it came
            with _disk("the code archive cannot be read"):
                await asyncio.to_thread(_check_archive, code)
        return await _whole(self._submit(who, spec, code, idempotency_key, retry_of))

    async def _submit(
        self, who: Identity, spec: JobSpec, code: Path | None, idempotency_key: str | None, retry_of: int | None
    ) -> tuple[Job, bool]:
        job_id: int | None = None
        made = False
        try:
            if code is not None and spec.code is not None:
                job_id = await self._database.write(queue.reserve_id)
                with _disk("the code archive cannot be stored"):
                    await asyncio.to_thread(self._folders.keep_code, job_id, spec.code, code)
            now = time.time()
            job, made = await self._database.write(
                queue.submit,
                spec,
                user=who.user,
                uid=who.uid,
                now=now,
                job_id=job_id,
                retry_of=retry_of,
                idempotency_key=idempotency_key,
            )
        finally:
            if job_id is not None and not made:
                with suppress(OSError, Conflict):  # what is left lies in nobody's way
                    await asyncio.to_thread(self._folders.remove, job_id)
        if made:
            self._queued(job, now)
        return job, made

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
        return await _whole(self._cancel(who, job_id))

    async def _cancel(self, who: Identity, job_id: int) -> Job:
        job = await self._database.write(queue.request_cancel, job_id, user=who.user, now=time.time())
        if job is None or job.state in (JobState.SUCCEEDED, JobState.FAILED):
            raise Conflict(f"job {job_id} has {job.state if job else 'gone'} already: there is nothing to cancel")
        if job.ended:
            self._state.backlog.drop(job_id)
        elif active := self._state.active.get(job_id):
            active.stop()
        self._changed(job_id)
        return job

    async def retry(self, who: Identity, job_id: int, *, idempotency_key: str | None = None) -> Job:
        """Submit the same job once more, as a new job: an ended one stays as it ended.

        Raises Conflict while the job has not ended, or when its code archive was removed.
        """
        job = await self._own(who, job_id)
        if not job.ended:
            raise Conflict(f"job {job_id} is {job.state}: it can be retried when it has ended")
        code: Path | None = None
        try:
            with _disk(f"the code of job {job_id} cannot be copied"):
                try:
                    code = await asyncio.to_thread(self._folders.copy_code, job)
                except FileNotFoundError:
                    raise Conflict(f"the code of job {job_id} was removed: submit it anew") from None
            spec = replace(job.spec, hold=False, not_before=None)
            again, _ = await self.submit(who, spec, code=code, idempotency_key=idempotency_key, retry_of=job_id)
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
        """Set `priority` or `time_limit_s` of a waiting job. Raises Denied, Conflict."""
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
            return Pending(why=f"it cannot be launched yet: {active.trouble}", position=None, estimated_start=None)
        known = self._state.backlog.get(job.id)
        if known is None:
            return None
        plan = self._state.plan
        ahead = self._state.backlog.ahead(known)
        head = plan.gpu_head if known.gpus else plan.slot_head
        box = self._state.box(self._gpus.current())
        why = self._gpus_unknown(known.gpus) or placement.explain(known, box, ahead, head, time.time())
        return Pending(why=why, position=self._state.backlog.position(known), estimated_start=None)

    async def queue(self, who: Identity, limit: int) -> Sequence[Job]:
        """The waiting jobs of all users in the order in which they are tried.

        Who waits before one is no secret; what others run is: their command, script and variables are left out.
        """
        order = [job.id for job in self._state.backlog.ordered(limit)]
        jobs = await self._database.read(queue.get_many, order)
        return [
            job if self._may_see(who, job) else replace(job, spec=_without_content(job.spec))
            for job_id in order
            if (job := jobs.get(job_id)) and job.state is JobState.QUEUED
        ]

    def under_way(self, job_id: int, attempt: int) -> bool:
        """Whether this attempt is starting or running, so that its log may still grow. From memory."""
        active = self._state.active.get(job_id)
        return active is not None and active.attempt == attempt

    def gpus(self) -> Sequence[GpuReport]:
        """The box's GPUs with state, reason and jobs."""
        return self._state.gpu_reports(self._gpus.current())

    @property
    def slots(self) -> tuple[int, int]:
        """CPU slots for jobs without GPUs: all, free."""
        box = self._state.box(self._gpus.current())
        return box.slots, box.slots_free

    async def drain(self, who: Identity, gpu_uuid: str, reason: str | None) -> None:
        """Start nothing more on a GPU; what runs on it goes on. Raises NotFound."""
        self._known_gpu(gpu_uuid)
        await _whole(self._change_drained(queue.drain, gpu_uuid, user=who.user, reason=reason, now=time.time()))

    async def resume(self, who: Identity, gpu_uuid: str) -> None:
        """Take a drained GPU back into service. Raises NotFound."""
        del who  # the route admits admins only; there is nothing finer to check
        self._known_gpu(gpu_uuid)
        await _whole(self._change_drained(queue.resume, gpu_uuid))

    def attempt_folder(self, job_id: int, attempt: int) -> Path:
        return self._folders.attempt(job_id, attempt)

    def out_folder(self, job_id: int) -> Path:
        return self._folders.out(job_id)

    async def job_of_token(self, token_sha256: str) -> Job | None:
        """The job under way that was given this token."""
        return await self._database.read(queue.of_token, token_sha256)

    def _admit(self, who: Identity, spec: JobSpec) -> None:
        """Raises what speaks against queueing `spec` for `who`."""
        if spec.priority > 0 and not who.admin:
            raise Denied(f"priority {spec.priority} is for admins: ask for 0 or less")
        if spec.model is not None and not who.may(Scope.DEPLOY):
            raise Denied(f"model={spec.model} deploys what the job leaves, and that needs the scope 'deploy'")
        if len(self._state.backlog) >= self._waiting_max:
            raise TooMany(
                f"{len(self._state.backlog)} jobs wait, and no more than {self._waiting_max} may: "
                "submit again when some have ended",
                _FULL_RETRY_S,
            )
        counted = self._gpus.current().nvml in (Nvml.OK, Nvml.ABSENT)
        gpus = spec.gpus if counted else 0
        slots = 0 if spec.gpus else spec.cpus or 1
        if problem := placement.impossible(gpus, slots, self._state.box(self._gpus.current())):
            raise Impossible(problem)

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
        changed = await _whole(self._apply(job_id, values))
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

    def _known_gpu(self, gpu_uuid: str) -> None:
        known = [gpu.uuid for gpu in self._gpus.current().gpus]
        if gpu_uuid not in known:
            raise NotFound(f"there is no GPU {gpu_uuid} here; known: {', '.join(known) or 'none'}")

    async def _change_drained(
        self, change: Callable[Concatenate[sqlite3.Connection, P], object], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        def changed(connection: sqlite3.Connection) -> dict[str, str]:
            change(connection, *args, **kwargs)
            return queue.drained(connection)

        self._state.drained = await self._database.write(changed)
        self._events.publish(GPUS)
        self._wake()


async def _whole(work: Coroutine[Any, Any, T]) -> T:
    """Carry `work` through even where its caller is cancelled: memory must follow what was committed."""
    return await asyncio.shield(asyncio.ensure_future(work))


@contextmanager
def _disk(what: str) -> Generator[None]:
    """Trouble with the disk is told as Unavailable."""
    try:
        yield
    except OSError as error:
        raise Unavailable(f"{what} now: {error}") from error


def _without_content(spec: JobSpec) -> JobSpec:
    return replace(spec, command="", script=None, env={}, workdir=None)


def _check_archive(code: Path) -> None:
    """Raises Invalid when the shim would refuse to unpack `code`. Blocking."""
    try:
        unpack.check(code)
    except unpack.BadArchive as error:
        raise Invalid(f"the code archive was refused: {error}", (FieldError("code", str(error)),)) from error
