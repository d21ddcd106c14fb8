"""When waiting jobs will probably start: the queue run on from now in virtual time, with learned run times. Pure.

It is the same `decide` that schedules, so the forecast knows priorities, shares, backfill and quotas. It is run twice:
with run times that half of such jobs do not exceed (p50), and with those that nine of ten do not exceed (p90).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mlbox.scheduler.history import History
from mlbox.scheduler.placement import Box
from mlbox.scheduler.policy import Ledger, Rules, RunningJob, WaitingJob
from mlbox.scheduler.simulation import SimJob, Simulation

_HORIZON_S = 366 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A job on GPUs (places in the box) from `start` to `end`, Unix seconds; end None: nobody knows."""

    job_id: int
    user: str
    gpus: tuple[int, ...]
    start: float
    end: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Estimated starts by job id, and how the GPUs are going to be used (p50)."""

    at: float = 0.0
    p50: Mapping[int, float] = field(default_factory=dict[int, float])
    p90: Mapping[int, float] = field(default_factory=dict[int, float])
    bars: tuple[Bar, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """The box and its queue as they are: `waiting` holds the first jobs in the order of rank."""

    waiting: Sequence[WaitingJob]
    running: Sequence[RunningJob]
    box: Box
    rules: Rules
    ledger: Ledger
    history: History
    now: float


def forecast(present: Present) -> Forecast:
    """Estimate when the waiting jobs of `present` start. Takes some 100 us a job."""
    likely = _run(present, 0.5)
    late = _starts(_run(present, 0.9))
    early = _starts(likely)
    return Forecast(
        at=present.now,
        p50=early,
        p90={job_id: max(at, early.get(job_id, at)) for job_id, at in late.items()},
        bars=_bars(present, likely),
    )


def with_fewer_gpus(present: Present, job: WaitingJob, start: float) -> tuple[int, float] | None:
    """The most GPUs below what `job` asks with which it would start sooner than at `start`, and when; else None."""
    for gpus in range(job.gpus - 1, 0, -1):
        others = [replace(one, gpus=gpus) if one.id == job.id else one for one in present.waiting]
        found = _starts(_run(replace(present, waiting=others), 0.5)).get(job.id)
        if found is not None and found < start - 60:
            return gpus, found
    return None


def _run(present: Present, part: float) -> Simulation:
    now = present.now
    # What jobs hold looks busy; here they are there themselves, and end.
    held = {uuid for job in present.running for uuid in job.gpu_uuids}
    gpus = tuple(
        replace(gpu, busy=None, shared_free_mib=None)
        if not gpu.closed and (gpu.uuid in held or gpu.clears_s is not None)
        else gpu
        for gpu in present.box.gpus
    )
    box = replace(present.box, gpus=gpus)
    simulation = Simulation(box, present.rules, ledger=present.ledger.copy(), history=present.history)
    for job in present.running:
        ran_s = max(0.0, now - job.started_at)
        total = present.history.quantile(job.user, job.project, job.kind, part, limit_s=job.time_limit_s, ran_s=ran_s)
        simulation.add_running(job, math.inf if total is None else max(now, job.started_at + total))
    waiting = {job.id for job in present.waiting}
    for job in present.waiting:
        if job.hold or job.depends:
            continue
        length = present.history.quantile(job.user, job.project, job.kind, part, limit_s=job.time_limit_s)
        simulation.submit(SimJob(job=job, duration_s=math.inf if length is None else length), now)
    simulation.learns = False
    simulation.run(starts_max=len(waiting), until=now + _HORIZON_S)
    return simulation


def _starts(simulation: Simulation) -> dict[int, float]:
    starts: dict[int, float] = {}
    for event in simulation.events:
        if event.event == "start":
            starts.setdefault(event.job_id, event.at)
    return starts


def _bars(present: Present, simulation: Simulation) -> tuple[Bar, ...]:
    users = {job.id: job.user for job in (*present.waiting, *present.running)}
    return tuple(
        Bar(
            job_id=run.job.id,
            user=users[run.job.id],
            gpus=simulation.places(run.job.gpu_uuids),
            start=run.job.started_at,
            end=None if run.ends_at == math.inf else run.ends_at,
        )
        for run in simulation.runs
        if run.job.gpu_uuids
    )
