"""What the scheduler does about reality: broken GPUs, leftovers of ended jobs, jobs over their share, idle holders.

Called once for each tick of the loop. What it decides is written down in one transaction; only then is anything
stopped. The driver's own trouble never ends a job: a GPU that breaks takes nothing new.
"""

import asyncio
import logging
import os
import signal
import sqlite3
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from mlbox.database import Database
from mlbox.events import GPUS, Events
from mlbox.scheduler import gpu_faults, gpu_queries, notices, queue
from mlbox.scheduler.executors import processes
from mlbox.scheduler.gpu_queries import GpuFault
from mlbox.scheduler.gpu_state import Gpu, described, leftovers, over_share
from mlbox.scheduler.gpus import GpuInventory
from mlbox.scheduler.notices import Notice
from mlbox.scheduler.outcome import StopWhy
from mlbox.scheduler.state import Active, SchedulerState

log = logging.getLogger(__name__)

BY = "mlbox"
"""Who drains a GPU that broke, where the record names somebody."""

_IDLE_WRITTEN_S = 30.0
"""How often idle time is added up: a write each sample would keep an idle disk awake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchRules:
    """What is done about jobs that use more, or less, than they hold. Seconds; 0 switches a step off.

    A job that shares a GPU and uses more memory than it asked is told after `over_share_s`, and stopped then where
    `over_share_stops`. One whose GPUs do nothing is told after `idle_notice_s`, gives way like one of the lowest
    priority after `idle_lower_s`, and is stopped after `idle_stop_s`. `suspects`: whether a GPU on which three jobs of
    two users failed in a row is drained.
    """

    over_share_s: float = 60.0
    over_share_stops: bool = False
    idle_notice_s: float = 1800.0
    idle_lower_s: float = 0.0
    idle_stop_s: float = 0.0
    suspects: bool = True


@dataclass(slots=True)
class _Seen:
    """What was seen of one attempt, and what was done about it. Times are Unix seconds."""

    over_since: float | None = None
    over_told: bool = False
    idle_told: bool = False
    looked_at: float | None = None


@dataclass(slots=True)
class _Findings:
    """What is to be written down, and whom it concerns."""

    drains: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    faults: list[GpuFault] = field(default_factory=list[GpuFault])
    notices: list[Notice] = field(default_factory=list[Notice])
    stops: list[tuple[Active, StopWhy, str]] = field(default_factory=list["tuple[Active, StopWhy, str]"])
    idle: list[tuple[int, int, float]] = field(default_factory=list[tuple[int, int, float]])

    def __bool__(self) -> bool:
        return bool(self.drains or self.faults or self.notices or self.stops or self.idle)


class Watch:
    """Looks at the GPUs after every sample; keeps what it saw in memory only, and begins anew with the daemon."""

    def __init__(
        self, *, database: Database, events: Events, gpus: GpuInventory, state: SchedulerState, rules: WatchRules
    ) -> None:
        self._database = database
        self._events = events
        self._gpus = gpus
        self._state = state
        self._rules = rules
        self._seen: dict[tuple[int, int], _Seen] = {}
        self._killed: set[tuple[int, int]] = set()

    async def look(self) -> None:
        """Find out what is wrong, write it down, act on it. Raises Unavailable when it cannot be written down."""
        gpus = self._gpus.current().gpus
        if not gpus:
            return
        now = time.time()
        found = _Findings()
        self._broken(gpus, found, now)
        self._over_share(gpus, found, now)
        self._idle(gpus, found, now)
        alive = {(active.job.id, active.attempt) for active in self._state.active.values()}
        self._seen = {key: seen for key, seen in self._seen.items() if key in alive}
        if found:
            await self._write(found, now)
        await self._clear_up(gpus)

    async def _write(self, found: _Findings, now: float) -> None:
        drained = await self._database.write(_record, found, now)
        self._state.drained = drained
        for uuid, sentence in found.drains:
            log.warning("GPU %s: drained: %s", uuid, sentence)
        for active, _, cause in found.stops:
            log.warning("job %d: it is stopped: %s", active.job.id, cause)
            active.stop()
        if found.drains:
            self._events.publish(GPUS)

    def _broken(self, gpus: Sequence[Gpu], found: _Findings, now: float) -> None:
        """GPUs that the driver says are broken, once each: an admin resumes them."""
        for gpu in gpus:
            if gpu.uuid in self._state.drained or gpu.error is not None:
                continue  # one that does not answer takes nothing anyway, and may come back
            verdict = gpu_faults.judge(gpu, self._state.resumed_at.get(gpu.uuid, 0.0))
            if verdict is not None and verdict.drain:
                found.drains.append((gpu.uuid, verdict.sentence))
                source = "recovery_action" if gpu.recovery_action else "nvml" if gpu.error_code else "xid"
                code = gpu.recovery_action or gpu.error_code or (gpu.xids[-1].xid if gpu.xids else None)
                found.faults.append(
                    GpuFault(gpu_uuid=gpu.uuid, at=now, source=source, code=code, cause=verdict.sentence)
                )
            elif self._rules.suspects and (sentence := gpu_faults.suspect(self._state.failed_on(gpu.uuid), now)):
                found.drains.append((gpu.uuid, f"it is suspect: {sentence}"))

    def _over_share(self, gpus: Sequence[Gpu], found: _Findings, now: float) -> None:
        """Jobs that use more of a shared GPU than they asked for."""
        for gpu in gpus:
            declared = {
                lease.key: lease.memory_mib
                for lease in self._state.leases.values()
                if lease.gpu_uuid == gpu.uuid and lease.memory_mib is not None
            }
            over = {key: (used, asked) for key, used, asked in over_share(gpu, declared)} if declared else {}
            for active in self._state.active.values():
                if active.key not in declared:
                    continue
                seen = self._of(active)
                if active.key not in over:
                    seen.over_since = None
                    continue
                seen.over_since = seen.over_since or now
                if seen.over_told or now - seen.over_since < self._rules.over_share_s:
                    continue
                seen.over_told = True
                used, asked = over[active.key]
                text = f"it uses {used} MiB of GPU {gpu.label}, and asked for {asked} MiB"
                found.notices.append(_notice(active, "over_share", text, now))
                if self._rules.over_share_stops and not active.stop_wanted:
                    found.stops.append((active, StopWhy.OVER_SHARE, text))

    def _idle(self, gpus: Sequence[Gpu], found: _Findings, now: float) -> None:
        """Jobs that hold GPUs and do nothing with them."""
        unused = {gpu.uuid: gpu.unused_since for gpu in gpus}
        for active in self._state.active.values():
            if not active.gpu_uuids or active.job.started_at is None:
                continue
            seen = self._of(active)
            since = [unused.get(uuid) for uuid in active.gpu_uuids]
            idle = sum(1 for moment in since if moment is not None)
            if seen.looked_at is not None and idle and now - seen.looked_at >= _IDLE_WRITTEN_S:
                found.idle.append((active.job.id, active.attempt, idle * (now - seen.looked_at)))
            if seen.looked_at is None or now - seen.looked_at >= _IDLE_WRITTEN_S:
                seen.looked_at = now
            known = [max(moment, active.job.started_at) for moment in since if moment is not None]
            if len(known) < len(since):
                seen.idle_told = active.lowered = False
                continue
            idle_s = now - max(known)
            active.lowered = bool(self._rules.idle_lower_s) and idle_s >= self._rules.idle_lower_s
            if self._rules.idle_notice_s and idle_s >= self._rules.idle_notice_s and not seen.idle_told:
                seen.idle_told = True
                text = f"it holds {len(since)} GPU{'s' * (len(since) > 1)} that did nothing for {idle_s / 60:.0f} min"
                found.notices.append(_notice(active, "idle", text, now))
            if self._rules.idle_stop_s and idle_s >= self._rules.idle_stop_s and not active.stop_wanted:
                cause = f"its GPUs did nothing for {idle_s / 60:.0f} min, and are given to others"
                found.stops.append((active, StopWhy.IDLE, cause))

    async def _clear_up(self, gpus: Sequence[Gpu]) -> None:
        """KILL what ended attempts left on their GPUs: they are theirs by their environment, pid and start."""
        left = [
            (lease, process)
            for lease in self._state.leases.values()
            if lease.ended
            for gpu in gpus
            if gpu.uuid == lease.gpu_uuid
            for process in leftovers(gpu, lease.key)
        ]
        new = [(lease, one) for lease, one in left if (one.pid, one.start_ticks or 0) not in self._killed]
        self._killed = {(process.pid, process.start_ticks or 0) for _, process in left}
        if not new:
            return
        log.warning("job %d: killing what it left on a GPU: %s", new[0][0].job_id, described([one for _, one in new]))
        await asyncio.to_thread(_kill, [(one.pid, one.start_ticks or 0) for _, one in new])
        self._gpus.refresh()

    def _of(self, active: Active) -> _Seen:
        return self._seen.setdefault((active.job.id, active.attempt), _Seen())


def _notice(active: Active, kind: str, text: str, now: float) -> Notice:
    job = active.job
    return Notice(
        user=job.user, uid=job.uid, at=now, kind=kind, text=f"job {job.id} ({job.spec.name}): {text}", job_id=job.id
    )


def _kill(pids: Sequence[tuple[int, int]]) -> None:
    """KILL processes by pid and start; one that is another's, or gone, is left alone. Blocking."""
    for pid, ticks in pids:
        process = processes.open_process(pid, ticks)
        if process is None:
            continue
        with suppress(OSError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)


def _record(connection: sqlite3.Connection, found: _Findings, now: float) -> dict[str, str]:
    """Write everything down at once; returns the GPUs that are drained."""
    for uuid, sentence in found.drains:
        queue.drain(connection, uuid, user=BY, reason=sentence, now=now)
    for fault in found.faults:
        gpu_queries.add_fault(connection, fault)
    notices.add(connection, found.notices)
    for active, why, cause in found.stops:
        queue.request_stop(connection, active.job.id, active.attempt, why, cause, now=now)
    queue.add_idle(connection, found.idle)
    return queue.drained(connection)
