"""What the scheduler knows in memory, all of it rebuilt from the database and the attempts' folders at a start."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from mlbox.events import JOBS, Events, job_topic
from mlbox.jobs import Job
from mlbox.scheduler.backfill import Plan
from mlbox.scheduler.backlog import Backlog
from mlbox.scheduler.forecast import Forecast
from mlbox.scheduler.gpu_queries import GpuFault
from mlbox.scheduler.gpu_state import Gpu, GpuState, Viewpoint, effective_free_mib, state_of
from mlbox.scheduler.gpus import Inventory
from mlbox.scheduler.history import History, kind_of
from mlbox.scheduler.placement import Box, GpuView, Reservation, Scores, pair_score, score_matrix
from mlbox.scheduler.policy import Hours, Ledger, Rules, RunningJob, Standing, WaitingJob, standing
from mlbox.scheduler.queue import Attempt, Lease, Settled

LeaseKey = tuple[str, int]
"""A GPU's UUID and the number of the share (0: the whole GPU)."""
_CLEARS_S = 5.0
"""How soon a GPU is thought to be given back after the end of what ran on it."""


class Next(StrEnum):
    """What is to be done about an attempt under way."""

    LAUNCH = "launch"
    """Start its shim: it was committed, and its user code never ran."""
    WATCH = "watch"
    """Wait for the end of its shim, and stop it when somebody wishes."""
    LOOK = "look"
    """See what its folder says: its shim is gone, or nobody knows of it yet."""
    CLEAR = "clear"
    """Kill what its shim left when it died."""
    DONE = "done"
    """Nothing: its end is recorded."""


@dataclass(slots=True, kw_only=True)
class Active:
    """An attempt under way. `began` is when it was launched (Unix seconds).

    `trouble` is what is in the way now, `tries` how often something was since it last got on.
    """

    job: Job
    attempt: int
    key: str
    folder: Path
    gpu_uuids: tuple[str, ...]
    next: Next
    created_at: float
    """When it was committed (Unix seconds); from then on it is charged."""
    rate: float = 0.0
    """What it is charged each second, in weighted GPUs."""
    backfilled: bool = False
    lowered: bool = False
    """Whether it gives way like one of the lowest priority, since its GPUs do nothing."""
    adopts: tuple[int, int] | None = None
    """Pid and start time of the process that it is, where it was begun outside mlbox."""
    began: float | None = None
    stop_wanted: bool = False
    launches: int = 0
    tries: int = 0
    trouble: str | None = None
    token: str | None = None
    """The job's own token in clear, from the commit of the attempt to its launch; kept nowhere else."""
    hint: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when its task should look at the attempt at once."""

    @property
    def slots(self) -> int:
        return self.job.spec.slots

    def view(self) -> RunningJob:
        """The attempt as the policy sees it."""
        job = self.job
        return RunningJob(
            id=job.id,
            user=job.user,
            project=job.spec.project,
            priority=-100 if self.lowered else job.spec.priority,
            started_at=job.started_at or self.created_at,
            gpu_uuids=self.gpu_uuids,
            gpu_mem_mib=job.spec.gpu_mem_mib,
            slots=self.slots,
            time_limit_s=job.spec.time_limit_s,
            preemptible=job.spec.preemptible,
            backfilled=self.backfilled,
            stopping=self.stop_wanted,
            array_id=job.array.id if job.array else None,
            rate=self.rate,
            kind=kind_of(job.spec.command, job.spec.name),
            name=job.spec.name,
        )

    def stop(self) -> None:
        """Have the attempt ended, whatever it is at."""
        self.stop_wanted = True
        self.hint.set()


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReport:
    """A GPU as users see it: what NVML says, its state, why in words, and the jobs that hold a lease on it."""

    gpu: Gpu
    state: GpuState
    why: str
    job_ids: tuple[int, ...]
    job_ids_live: tuple[int, ...] = ()
    """Those of them that have not ended."""
    shared_free_mib: int | None = None
    """What further shares may take, where jobs hold shares of it."""


@dataclass(slots=True, kw_only=True)
class SchedulerState:
    """Shared by the service, which answers from it, and the loop, which acts on it; on the event loop's thread only."""

    slots: int
    rules: Rules = field(default_factory=Rules)
    ignored: frozenset[str] = frozenset()
    """Names of programs whose processes do not make a GPU foreign."""
    weight_of: Callable[[str], float] = lambda _name: 1.0
    """What a second on a GPU of that name is charged."""
    backlog: Backlog = field(default_factory=Backlog)
    active: dict[int, Active] = field(default_factory=dict[int, Active])
    leases: dict[LeaseKey, Lease] = field(default_factory=dict[LeaseKey, Lease])
    ended_at: dict[str, float] = field(default_factory=dict[str, float])
    """When the last attempt on a GPU ended (time.monotonic()): only a later sample can show that the GPU is clean."""
    drained: dict[str, str] = field(default_factory=dict[str, str])
    resumed_at: dict[str, float] = field(default_factory=dict[str, float])
    """When an admin last took a GPU back into service: faults before that count no more."""
    faults: dict[str, list[GpuFault]] = field(default_factory=dict[str, list[GpuFault]])
    """What went wrong on each GPU since then, and since a job last succeeded there."""
    reservations: tuple[Reservation, ...] = ()
    plan: Plan = field(default_factory=Plan)
    ledger: Ledger = field(init=False)
    hours: Hours = field(init=False)
    history: History = field(default_factory=History)
    forecast: Forecast = field(default_factory=Forecast)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.rules.half_life_s)
        self.hours = Hours(self.rules)

    def running(self) -> list[RunningJob]:
        """What holds resources, as the policy sees it."""
        return [active.view() for active in self.active.values()]

    def standing(self, now: float) -> Standing:
        """Where everybody stands in the fair share."""
        return standing(self.ledger, self.running(), self.backlog.users, self.rules, now)

    def charge(self, active: Active, recorded: Attempt, *, well: bool) -> None:
        """Note what an attempt that has ended used, and how long it took if it ended well.

        Its times are those of the record: a daemon that starts later learns from the same ones.
        """
        view, began, ended = active.view(), recorded.started_at, recorded.ended_at
        if began is None or ended is None:  # it ended before it began, and cost nothing
            return
        self.ledger.add(view.user, view.rate, began, ended)
        self.hours.add(view.user, view.project, view.gpus, began, ended)
        if well:
            self.history.add(view.user, view.project, view.kind, max(0.0, ended - began))

    def failed_on(self, gpu_uuid: str) -> list[tuple[float, int, int]]:
        """The jobs that failed on a GPU in a row: when, whose (uid), which."""
        faults = self.faults.get(gpu_uuid, [])
        return [(one.at, one.uid or 0, one.job_id or 0) for one in faults if one.source == "job"]

    def gpu_reports(self, inventory: Inventory) -> list[GpuReport]:
        """Every GPU with its state and the sentence that says why, in the order of their indices."""
        own = {active.key: f"job {active.job.id}" for active in self.active.values()}
        held: dict[str, list[Lease]] = {}
        for lease in self.leases.values():
            held.setdefault(lease.gpu_uuid, []).append(lease)
        return [self._report(gpu, held.get(gpu.uuid, []), own) for gpu in inventory.gpus]

    def box(self, inventory: Inventory) -> Box:
        """What may be given away now."""
        reports = sorted(self.gpu_reports(inventory), key=lambda report: report.gpu.place)
        used = sum(active.slots for active in self.active.values())
        return Box(
            gpus=tuple(self._view(report) for report in reports),
            slots=self.slots,
            slots_free=max(0, self.slots - used),
            scores=_scores([report.gpu for report in reports]),
            reservations=self.reservations,
        )

    def _view(self, report: GpuReport) -> GpuView:
        gpu = report.gpu
        shared = report.state is GpuState.LEASED and report.shared_free_mib is not None
        free = shared or report.state is GpuState.FREE
        clearing = report.state is GpuState.DRAINING and not report.job_ids_live and gpu.uuid not in self.drained
        return GpuView(
            uuid=gpu.uuid,
            index=gpu.index,
            busy=None if free else report.why,
            memory_mib=gpu.memory_mib,
            shared_free_mib=report.shared_free_mib if shared else None,
            weight=self.weight_of(gpu.name),
            slice=gpu.parent is not None,
            clears_s=_CLEARS_S if clearing else None,
            closed=gpu.uuid in self.drained or gpu.mig,
        )

    def _report(self, gpu: Gpu, leases: Sequence[Lease], own: Mapping[str, str]) -> GpuReport:
        holders = {lease.key: f"job {lease.job_id}" for lease in leases}
        declared = {lease.key: lease.memory_mib for lease in leases if lease.memory_mib is not None}
        view = Viewpoint(declared=declared, ignored=self.ignored, now=time.time())
        status = state_of(gpu, holders, self.drained.get(gpu.uuid), own, view)
        return GpuReport(
            gpu=gpu,
            state=status.state,
            why=status.why or "is free",
            job_ids=tuple(lease.job_id for lease in leases),
            job_ids_live=tuple(lease.job_id for lease in leases if not lease.ended),
            shared_free_mib=(effective_free_mib(gpu, declared) or 0) if declared else None,
        )


def _scores(gpus: Sequence[Gpu]) -> Scores:
    """How near the GPUs are to each other; nothing where all are alike."""
    places = {gpu.uuid: place for place, gpu in enumerate(gpus)}
    links = {
        (place, places[link.uuid]): pair_score(link.level, link.nvlinks)
        for place, gpu in enumerate(gpus)
        for link in gpu.links
        if link.uuid in places and place < places[link.uuid]
    }
    return score_matrix(len(gpus), links) if len(set(links.values())) > 1 else ()


def waiting(job: Job) -> WaitingJob:
    """A queued job as the policy sees it."""
    spec, array = job.spec, job.array
    return WaitingJob(
        id=job.id,
        uid=job.uid,
        user=job.user,
        project=spec.project,
        priority=spec.priority,
        submitted_at=job.submitted_at,
        gpus=spec.gpus,
        gpu_mem_mib=spec.gpu_mem_mib,
        slots=spec.slots,
        time_limit_s=spec.time_limit_s,
        preemptible=spec.preemptible,
        eligible_at=job.eligible_at,
        depends=job.eligible_at is None,
        array_id=array.id if array else None,
        array_at_once=array.at_once if array else None,
        hold=spec.hold,
        not_before=spec.not_before,
        kind=kind_of(spec.command, spec.name),
        name=spec.name,
    )


def follow(moved: Settled, state: SchedulerState, events: Events, now: float) -> None:
    """Have memory follow what the end of a job did to those that waited for it."""
    for job in moved.eligible:
        state.backlog.put(waiting(job), now)
        events.publish(job_topic(job.id), JOBS)
    for job_id in moved.cancelled:
        state.backlog.drop(job_id)
        events.publish(job_topic(job_id), JOBS)
