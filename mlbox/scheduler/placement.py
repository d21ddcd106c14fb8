"""Which waiting jobs start now, and on which GPUs. Pure.

First come, first served with exact GPU fit, separately for jobs with GPUs and for jobs without: the first job that
does not fit holds back those behind it that want the same resource, so that a wide job is never starved.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlbox.scheduler.policy import WaitingJob, barred


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuView:
    """One GPU as placement sees it. `busy` says in words why nothing may start on it; None: it is free."""

    uuid: str
    index: int
    busy: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """What there is to give away. `gpus` are in the order of their index; slots are for jobs without GPUs."""

    gpus: tuple[GpuView, ...]
    slots: int
    slots_free: int

    @property
    def free_gpus(self) -> tuple[GpuView, ...]:
        return tuple(gpu for gpu in self.gpus if gpu.busy is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A decision: this job starts now on these GPUs (none for a CPU job)."""

    job_id: int
    gpu_uuids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do now, and the job at the head of each line that does not fit."""

    starts: tuple[Start, ...]
    gpu_head: int | None
    slot_head: int | None


def place(gpu_line: Iterable[WaitingJob], slot_line: Iterable[WaitingJob], box: Box) -> Plan:
    """Decide who starts now. Each line holds jobs that may start, first to be tried first."""
    starts: list[Start] = []
    gpu_head: int | None = None
    slot_head: int | None = None
    free = list(box.free_gpus)
    for job in gpu_line:
        if job.gpus > len(free):
            gpu_head = job.id
            break
        taken, free = free[: job.gpus], free[job.gpus :]
        starts.append(Start(job_id=job.id, gpu_uuids=tuple(gpu.uuid for gpu in taken)))
    slots = box.slots_free
    for job in slot_line:
        if job.slots > slots:
            slot_head = job.id
            break
        slots -= job.slots
        starts.append(Start(job_id=job.id, gpu_uuids=()))
    return Plan(starts=tuple(starts), gpu_head=gpu_head, slot_head=slot_head)


def explain(job: WaitingJob, box: Box, ahead: int, head: int | None, now: float) -> str:
    """One sentence why `job` waits. `ahead` jobs of its line come before it; `head` is the first that does not fit."""
    if reason := barred(job, now):
        return reason
    wanted, noun, free, total = job.slots, "CPU slot", box.slots_free, box.slots
    if job.gpus:
        wanted, noun, free, total = job.gpus, "GPU", len(box.free_gpus), len(box.gpus)
    if ahead and head not in (None, job.id):
        return f"{_count(ahead, 'job')} before it {'waits' if ahead == 1 else 'wait'} for {noun}s, first job {head}"
    if not total:
        return f"it needs {_count(wanted, noun)}, and this box shows none now"
    if not ahead and wanted <= free:
        return "it is about to start"
    free_now = "none is free" if free == 0 else f"{free} {'is' if free == 1 else 'are'} free"
    busy = "; ".join(f"GPU {gpu.index}: {gpu.busy}" for gpu in box.gpus if job.gpus and gpu.busy is not None)
    return f"it needs {_count(wanted, noun)}, {free_now} of {total}{': ' + busy if busy else ''}"


def impossible(gpus: int, slots: int, box: Box) -> str | None:
    """Why a job of this size can never start on `box`; None when it can."""
    if gpus > len(box.gpus):
        have = f"this box has {_count(len(box.gpus), 'GPU')}" if box.gpus else "this box has no GPU that mlbox can see"
        advice = f"ask for {len(box.gpus)} or fewer" if box.gpus else "submit it with gpus=0 to run it on the CPU"
        return f"the job asks {_count(gpus, 'GPU')}; {have}: {advice}"
    if slots > box.slots:
        return f"the job asks {_count(slots, 'CPU')}; this box gives jobs {box.slots}: ask for {box.slots} or fewer"
    return None


def view(states: Sequence[tuple[str, int, str | None]], slots: int, slots_used: int) -> Box:
    """A Box from (uuid, index, why busy) of each GPU."""
    ordered = sorted(states, key=lambda state: state[1])
    return Box(
        gpus=tuple(GpuView(uuid=uuid, index=index, busy=busy) for uuid, index, busy in ordered),
        slots=slots,
        slots_free=max(0, slots - slots_used),
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
