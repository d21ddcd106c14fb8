"""What the scheduler knows in memory, all of it rebuilt from the database and the attempts' folders at a start."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from mlbox.jobs import Job
from mlbox.scheduler.backlog import Backlog
from mlbox.scheduler.gpus import Gpu, GpuState, Inventory, state_of
from mlbox.scheduler.placement import Box, Plan, view
from mlbox.scheduler.policy import WaitingJob
from mlbox.scheduler.queue import Lease


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
        return slots_of(self.job)

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


@dataclass(slots=True, kw_only=True)
class SchedulerState:
    """Shared by the service, which answers from it, and the loop, which acts on it; on the event loop's thread only."""

    slots: int
    backlog: Backlog = field(default_factory=Backlog)
    active: dict[int, Active] = field(default_factory=dict[int, Active])
    leases: dict[str, Lease] = field(default_factory=dict[str, Lease])
    ended_at: dict[str, float] = field(default_factory=dict[str, float])
    """When the last attempt on a GPU ended (time.monotonic()): only a later sample can show that the GPU is clean."""
    drained: dict[str, str] = field(default_factory=dict[str, str])
    plan: Plan = field(default_factory=lambda: Plan(starts=(), gpu_head=None, slot_head=None))

    def gpu_reports(self, inventory: Inventory) -> list[GpuReport]:
        """Every GPU with its state and the sentence that says why, in the order of their indices."""
        own = {active.key: f"job {active.job.id}" for active in self.active.values()}
        return [self._report(gpu, own) for gpu in inventory.gpus]

    def box(self, inventory: Inventory) -> Box:
        """What may be given away now."""
        states = [
            (report.gpu.uuid, report.gpu.index, None if report.state is GpuState.FREE else report.why)
            for report in self.gpu_reports(inventory)
        ]
        return view(states, self.slots, sum(active.slots for active in self.active.values()))

    def _report(self, gpu: Gpu, own: Mapping[str, str]) -> GpuReport:
        lease = self.leases.get(gpu.uuid)
        holders = {lease.key: f"job {lease.job_id}"} if lease else {}
        status = state_of(gpu, holders, self.drained.get(gpu.uuid), own)
        return GpuReport(
            gpu=gpu, state=status.state, why=status.why or "is free", job_ids=(lease.job_id,) if lease else ()
        )


def waiting(job: Job) -> WaitingJob:
    """A queued job as the policy sees it."""
    return WaitingJob(
        id=job.id,
        uid=job.uid,
        user=job.user,
        priority=job.spec.priority,
        submitted_at=job.submitted_at,
        gpus=job.spec.gpus,
        slots=slots_of(job),
        hold=job.spec.hold,
        not_before=job.spec.not_before,
    )


def slots_of(job: Job) -> int:
    """CPU slots that a job takes: its cores where it asks no GPU, else none."""
    return 0 if job.spec.gpus else job.spec.cpus or 1
