"""What the scheduler knows in memory, all of it rebuilt from the database and the attempts' folders at a start."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlbox.jobs import Job
from mlbox.scheduler.backlog import Backlog
from mlbox.scheduler.gpus import Gpu, GpuState, Inventory, state_of
from mlbox.scheduler.placement import Box, Plan, view
from mlbox.scheduler.policy import WaitingJob
from mlbox.scheduler.queue import Lease


@dataclass(slots=True, kw_only=True)
class Active:
    """An attempt under way. `end_fd` is watched until it says that the shim has ended."""

    job: Job
    attempt: int
    key: str
    folder: Path
    gpu_uuids: tuple[str, ...]
    end_fd: int | None = None
    stop_wanted: bool = False
    stop_sent: bool = False
    launches: int = 0
    token: str | None = None
    """The job's own token in clear, from the commit of the attempt to its launch; kept nowhere else."""

    @property
    def slots(self) -> int:
        return slots_of(self.job)


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
