"""Why a waiting job waits, in one sentence, from the plan that decided so. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile

from mlbox.jobs import After, Dependency
from mlbox.scheduler.backfill import SOMETIME, Plan, PoolPlan, Reserved
from mlbox.scheduler.gpu_state import label_of
from mlbox.scheduler.placement import Box, GpuView
from mlbox.scheduler.policy import Rules, WaitingJob, barred

_DAY_S = 86_400.0
_AFTER = {After.OK: "to succeed", After.ANY: "to end", After.NOT_OK: "to fail"}
_PARENTS_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What an explanation may look at besides the job: `ahead` counts the jobs of its line before it."""

    box: Box
    plan: Plan
    rules: Rules
    ahead: int
    now: float
    capped: bool = False
    depends_on: Sequence[Dependency] = ()


def explain(job: WaitingJob, around: Around) -> str:
    """One sentence, without a full stop."""
    if job.depends and around.depends_on:
        return _depends(around.depends_on)
    if reason := barred(job, around.now):
        return reason
    if around.capped:
        return f"of its array no more than {job.array_at_once} may run at once"
    if around.plan.quotas is not None and (reason := around.plan.quotas.refusal(job)):
        return reason
    pool = around.plan.gpus if job.wants_gpu else around.plan.slots
    if reason := _would_delay(job, around, pool):
        return reason
    own = next((one for one in pool.reserved if one.job_id == job.id), None)
    if own is not None:
        return _lacks(job, around) + _planned(own, around.now)
    if around.ahead and pool.head not in (None, job.id):
        jobs = f"{around.ahead} job{'' if around.ahead == 1 else 's'}"
        noun = "GPUs" if job.wants_gpu else "CPU slots"
        return f"{jobs} before it {'waits' if around.ahead == 1 else 'wait'} for {noun}, first job {pool.head}"
    return _lacks(job, around)


def clock(moment: float, now: float) -> str:
    """`14:10`, with the date where that is not today or tomorrow morning. UTC."""
    at = datetime.fromtimestamp(moment, UTC)
    return f"{at:%H:%M}" if abs(moment - now) < _DAY_S / 2 else f"{at:%Y-%m-%d %H:%M}"


def _depends(dependencies: Sequence[Dependency]) -> str:
    shown = [f"job {one.job_id} {_AFTER[one.after]}" for one in dependencies[:_PARENTS_SHOWN]]
    more = len(dependencies) - len(shown)
    return f"it waits for {' and '.join(shown)}{f' and {more} more' if more > 0 else ''}"


def _planned(own: Reserved, now: float) -> str:
    if own.start is None:
        return ""
    return "" if own.start <= now else f"; by time limits it is planned for {clock(own.start, now)} UTC"


def _would_delay(job: WaitingJob, around: Around, pool: PoolPlan) -> str | None:
    """Whom `job` would delay, where there are enough free units and that is all that keeps it."""
    units = [unit for unit in pool.slack_s if not job.wants_gpu or _suits(around.box.gpus[unit], job)]
    if len(units) < job.size:
        return None
    before = list(takewhile(lambda one: one.job_id != job.id, pool.reserved))
    nexts: list[tuple[float, int, Reserved | None]] = []
    for unit in units:
        planned = [
            (SOMETIME if one.start is None else one.start, at) for at, one in enumerate(before) if unit in one.units
        ]
        start, at = min(planned, default=(math.inf, -1))
        nexts.append((-start, at, before[at] if at >= 0 else None))
    nexts.sort(key=lambda item: item[:2])
    start, first = -nexts[job.size - 1][0], nexts[job.size - 1][2]
    limit = math.inf if job.time_limit_s is None else job.time_limit_s
    if job.preemptible:
        limit = min(limit, around.rules.min_run_s + around.rules.grace_s)
    if first is None or start - around.now >= limit:
        return _kept(job, around)
    when = "" if first.start is None else f", which is to start at {clock(first.start, around.now)} UTC"
    if job.time_limit_s is None:
        return f"it has no time limit, so it could delay job {first.job_id}{when}: one with a limit may go before it"
    return f"it would delay job {first.job_id}{when} on the same {'GPUs' if job.wants_gpu else 'CPU slots'}"


def _kept(job: WaitingJob, around: Around) -> str | None:
    """For whom the free GPUs are kept, where a window is in the way."""
    limit = math.inf if job.time_limit_s is None else job.time_limit_s
    names = {gpu.uuid: label_of(gpu.index) for gpu in around.box.gpus}
    for window in around.box.reservations:
        over = window.ends_at <= around.now or window.starts_at >= around.now + limit
        if over or window.admits(job.user, job.project) or not job.wants_gpu:
            continue
        gpus = ", ".join(names[uuid] for uuid in window.gpu_uuids if uuid in names)
        whom = window.for_user or (f"project {window.for_project}" if window.for_project else "maintenance")
        span = f"{clock(window.starts_at, around.now)} to {clock(window.ends_at, around.now)} UTC"
        return f"GPU {gpus} is kept for {whom} from {span} ({window.name})"
    return None


def _suits(gpu: GpuView, job: WaitingJob) -> bool:
    """Whether `gpu` is of a kind that `job` can have; how much memory it has may be unknown."""
    if job.gpu_mem_mib is not None:
        return gpu.memory_mib is not None and gpu.memory_mib >= job.gpu_mem_mib
    return job.gpus == 1 or not gpu.slice


def _lacks(job: WaitingJob, around: Around) -> str:
    """What is missing for the job to start."""
    box = around.box
    if job.gpu_mem_mib is not None:
        busy = "; ".join(
            f"GPU {label_of(gpu.index)}: {gpu.busy or f'{gpu.shared_free_mib} MiB left for shares'}"
            for gpu in box.gpus
            if gpu.busy is not None or gpu.shared_free_mib is not None
        )
        known = any(_suits(gpu, job) for gpu in box.gpus)
        otherwise = ", and is about to start" if known else ", and no GPU here is known to have so much"
        return f"it needs {job.gpu_mem_mib} MiB of one GPU{': ' + busy if busy else otherwise}"
    wanted, noun, free, total = job.slots, "CPU slot", box.slots_free, box.slots
    if job.wants_gpu:
        whole = [gpu for gpu in box.gpus if _suits(gpu, job)]
        wanted, noun, total = job.gpus, "GPU", len(whole)
        free = sum(gpu in whole for gpu in box.free_gpus)
    needs = f"{wanted} {noun}{'' if wanted == 1 else 's'}"
    if not total:
        only = " but MIG devices, of which a job gets one" if job.wants_gpu and box.gpus else ""
        return f"it needs {needs}, and this box shows none now{only}"
    if wanted <= free:
        return "it is about to start"
    free_now = "none is free" if free == 0 else f"{free} {'is' if free == 1 else 'are'} free"
    taken = [gpu for gpu in box.gpus if job.wants_gpu and gpu.busy is not None]
    busy = "; ".join(f"GPU {label_of(gpu.index)}: {gpu.busy}" for gpu in taken)
    return f"it needs {needs}, {free_now} of {total}{': ' + busy if busy else ''}"
