"""The door of the GPUs: what users may ask of them beside jobs. Everything is checked here, whoever calls."""

import asyncio
import secrets
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from mlbox.database import Database
from mlbox.errors import Conflict, Denied, NotFound
from mlbox.events import GPUS, JOBS, Events, job_topic
from mlbox.identity import Identity, digest, new_token
from mlbox.jobs import Job, JobSpec
from mlbox.scheduler import gpu_queries, queue
from mlbox.scheduler.asking import admin, person, refused, whole
from mlbox.scheduler.executors import processes
from mlbox.scheduler.gpus import Gpu, GpuInventory
from mlbox.scheduler.placement import Reservation, Start
from mlbox.scheduler.queue import Attempt, Launching, Submitter
from mlbox.scheduler.state import GpuReport, SchedulerState

P = ParamSpec("P")
T = TypeVar("T")


class GpuDoor:
    """GPUs as their users see them: their state, service and reservations, and the processes found on them."""

    def __init__(
        self,
        *,
        database: Database,
        events: Events,
        gpus: GpuInventory,
        state: SchedulerState,
        wake: Callable[[], None],
        take_up: Callable[[Job, Attempt], None],
    ) -> None:
        """`take_up` is called with each attempt that was begun here, by an adoption, when it was committed."""
        self._database = database
        self._events = events
        self._gpus = gpus
        self._state = state
        self._wake = wake
        self._take_up = take_up

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
        await whole(self._change_drained(queue.drain, gpu_uuid, user=who.user, reason=reason, now=time.time()))

    async def resume(self, who: Identity, gpu_uuid: str) -> None:
        """Take a drained GPU back into service. Raises NotFound."""
        del who  # the route admits admins only; there is nothing finer to check
        self._known_gpu(gpu_uuid)
        await whole(self._resumed(gpu_uuid, time.time()))

    async def _resumed(self, gpu_uuid: str, now: float) -> None:
        await self._change_drained(_resume, gpu_uuid, now=now)
        self._state.resumed_at[gpu_uuid] = now
        self._state.faults.pop(gpu_uuid, None)

    async def adopt(
        self,
        who: Identity,
        gpu_uuid: str,
        *,
        pid: int | None = None,
        name: str | None = None,
        project: str | None = None,
        time_limit_s: float | None = None,
    ) -> Job:
        """Make a process of the asker's own (an admin: anybody's) that runs on a GPU a job, on all GPUs that it uses.

        Raises NotFound, Denied, and Conflict for a process of a job or a GPU that is leased.
        """
        person(who, "adopt processes")
        gpu = self._known_gpu(gpu_uuid)
        computing = [one for one in gpu.processes or () if one.computes]
        if pid is None and len({one.pid for one in computing}) == 1:
            pid = computing[0].pid
        if pid is None:
            pids = ", ".join(str(one.pid) for one in computing) or "none"
            raise Conflict(f"GPU {gpu.index} has no single process to adopt (there: {pids}): name one with pid")
        process = next((one for one in computing if one.pid == pid), None)
        if process is None:
            raise NotFound(f"no process {pid} computes on GPU {gpu.index}: see its list of processes")
        if process.attempt_key is not None:
            raise Conflict(f"process {pid} is a job's already: there is nothing to adopt")
        found = await asyncio.to_thread(_owner_and_start, pid)
        if found is None:
            raise Conflict(f"process {pid} has just ended: there is nothing to adopt")
        uid, ticks = found
        if uid != who.uid and not who.admin:
            raise Denied(f"process {pid} is {process.user or 'somebody'}'s: only its owner or an admin may adopt it")
        uuids = tuple(
            each.uuid
            for each in self._gpus.current().gpus
            if any(one.pid == pid and one.computes for one in each.processes or ())
        )
        spec = JobSpec(
            command=process.command or f"process {pid}",
            name=name or "adopted",
            project=project or "default",
            gpus=len(uuids),
            time_limit_s=time_limit_s,
        )
        launching = Launching(
            start=Start(job_id=0, gpu_uuids=uuids),
            key=secrets.token_hex(16),
            token_sha256=digest(new_token()),  # the process knows none
            charge_rate=float(len(uuids)),
            adopts=(pid, ticks),
        )
        owner = Submitter(user=who.user if uid == who.uid else process.user or str(uid), uid=uid)
        return await whole(self._adopt(spec, owner, launching))

    async def _adopt(self, spec: JobSpec, owner: Submitter, launching: Launching) -> Job:
        try:
            job, attempt = await self._database.write(queue.adopt, spec, owner, launching, now=time.time())
        except sqlite3.IntegrityError as error:
            raise Conflict(f"a GPU of that process is leased to a job: {error}") from error
        self._take_up(job, attempt)
        self._events.publish(GPUS, JOBS, job_topic(job.id))
        self._wake()
        return job

    async def reservations(self, who: Identity) -> Sequence[Reservation]:
        """Windows in which GPUs are kept for somebody, those that are not over: everybody waits for them."""
        person(who, "see reservations")
        return await self._database.read(gpu_queries.reservations, now=time.time())

    async def reserve(
        self,
        who: Identity,
        *,
        name: str,
        gpu_uuids: Sequence[str],
        starts_at: float,
        ends_at: float,
        for_user: str | None = None,
        for_project: str | None = None,
    ) -> Reservation:
        """Keep GPUs for a user or a project, or for nobody (maintenance). A start that is past is now.

        Raises Denied, Invalid, and Conflict where it overlaps another reservation of one of the GPUs.
        """
        admin(who, "reserve GPUs")
        now = time.time()
        starts_at = max(starts_at, now)
        if not gpu_uuids:
            raise refused("gpu_uuids", "name at least one GPU")
        for uuid in gpu_uuids:
            try:
                self._known_gpu(uuid)
            except NotFound as error:
                raise refused("gpu_uuids", str(error)) from None
        if not starts_at < ends_at:
            raise refused("ends_at", "the window must end in the future, and after its start")
        wanted = Reservation(
            id=0,
            name=name,
            gpu_uuids=tuple(dict.fromkeys(gpu_uuids)),
            starts_at=starts_at,
            ends_at=ends_at,
            for_user=for_user,
            for_project=for_project,
            made_by=who.user,
        )
        return await whole(self._change_reservations(gpu_queries.reserve, wanted, now=now))

    async def cancel_reservation(self, who: Identity, reservation_id: int) -> Reservation:
        """Give reserved GPUs back to everybody; twice is once. Raises Denied, NotFound."""
        admin(who, "cancel reservations")
        if not 0 < reservation_id < 2**63:
            raise NotFound(f"there is no reservation {reservation_id}")
        return await whole(self._change_reservations(gpu_queries.cancel_reservation, reservation_id, now=time.time()))

    async def _change_reservations(
        self, change: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        def changed(connection: sqlite3.Connection) -> tuple[T, list[Reservation]]:
            result = change(connection, *args, **kwargs)
            return result, gpu_queries.reservations(connection, now=time.time())

        result, reservations = await self._database.write(changed)
        self._state.reservations = tuple(reservations)
        self._events.publish(GPUS)
        self._wake()
        return result

    def _known_gpu(self, gpu_uuid: str) -> Gpu:
        known = {gpu.uuid: gpu for gpu in self._gpus.current().gpus}
        if gpu_uuid not in known:
            raise NotFound(f"there is no GPU {gpu_uuid} here; known: {', '.join(known) or 'none'}")
        return known[gpu_uuid]

    async def _change_drained(
        self, change: Callable[Concatenate[sqlite3.Connection, P], object], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        def changed(connection: sqlite3.Connection) -> dict[str, str]:
            change(connection, *args, **kwargs)
            return queue.drained(connection)

        self._state.drained = await self._database.write(changed)
        self._events.publish(GPUS)
        self._wake()


def _resume(connection: sqlite3.Connection, gpu_uuid: str, *, now: float) -> None:
    """Take a GPU back into service; what went wrong with it before counts no more."""
    queue.resume(connection, gpu_uuid)
    gpu_queries.clear_faults(connection, gpu_uuid, now=now)


def _owner_and_start(pid: int) -> tuple[int, int] | None:
    """Whose process it is and when it began (clock ticks since boot); None when it is gone. Blocking."""
    try:
        uid = Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return None
    process = processes.find(pid)
    return (uid, process.ticks) if process is not None and process.alive else None
