"""The queue in virtual time: the very `decide` that schedules, with a clock that jumps from event to event.

`mlbox simulate` replays a trace with it, so that a policy can be tried on paper; the forecast of waiting jobs' starts
runs it on from the present with learned run times. How long a job takes is the truth of the simulation, unknown to
the policy, which knows limits and history only.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Any

from mlbox.jobs import TRANSITIONS, Dependency, JobState, Met, met
from mlbox.scheduler import policy
from mlbox.scheduler.backfill import Quotas, Start, decide
from mlbox.scheduler.backlog import Backlog
from mlbox.scheduler.history import History
from mlbox.scheduler.placement import Box
from mlbox.scheduler.policy import Hours, Ledger, Rules, RunningJob, WaitingJob

_END, _SUBMIT, _DUE = 0, 1, 2
"""What happens at one moment happens in this order: what is freed is there for who comes."""
_PASSES_MAX = 1000
_QUOTAS_EVERY_S = 600.0
_QUOTA_LOOKS = 100
"""Hours leave the window of a quota with time alone, which is no event: so often in a window it is looked for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimJob:
    """A job of a simulation: what the policy sees of it, and the truth: `duration_s`, and whether it fails."""

    job: WaitingJob
    duration_s: float
    depends_on: tuple[Dependency, ...] = ()
    fails: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """One event: `start`, `end`, `preempt` or `cancel`; `gpus` are places in the box."""

    at: float
    event: str
    job_id: int
    gpus: tuple[int, ...]
    why: str


@dataclass(slots=True)
class Run:
    """A job that holds resources, and when it really ends."""

    job: RunningJob
    ends_at: float
    number: int


@dataclass(slots=True)
class _Known:
    sim: SimJob
    state: JobState = JobState.QUEUED
    first_start: float | None = None
    runs: int = 0
    children: list[int] = field(default_factory=list[int])
    unmet: int = 0


class Simulation:
    """A box, its users and its queue in virtual time. Give it what runs and who comes, then `run`."""

    def __init__(self, box: Box, rules: Rules, *, ledger: Ledger | None = None, history: History | None = None) -> None:
        self._box = box
        self._rules = rules
        self._ledger = ledger or Ledger(rules.half_life_s)
        self.history = history or History()
        self._hours = Hours(rules)
        self._backlog = Backlog()
        self._places = {gpu.uuid: place for place, gpu in enumerate(box.gpus)}
        self._running: dict[int, Run] = {}
        self._known: dict[int, _Known] = {}
        self._later: list[tuple[float, int, int, int]] = []
        self._shared: dict[str, int] = {}
        self._due: float = math.inf
        self.events: list[Happening] = []
        self.runs: list[Run] = []
        """Every time that a job held resources, with its real end."""
        self.learns = True
        self.busy_gpu_s = 0.0
        self.waited: dict[int, float] = {}

    def add_running(self, job: RunningJob, ends_at: float, *, duration_s: float | None = None) -> None:
        """A job that runs when the simulation begins. `duration_s`: what it would take without its time limit."""
        self._known[job.id] = _Known(
            SimJob(
                job=WaitingJob(
                    id=job.id, uid=0, user=job.user, project=job.project, priority=job.priority,
                    submitted_at=job.started_at, gpus=0 if job.gpu_mem_mib else job.gpus, slots=job.slots,
                    gpu_mem_mib=job.gpu_mem_mib, time_limit_s=job.time_limit_s, preemptible=job.preemptible,
                    array_id=job.array_id, kind=job.kind,
                ),
                duration_s=ends_at - job.started_at if duration_s is None else duration_s,
            ),
            state=JobState.RUNNING,
            first_start=job.started_at,
        )  # fmt: skip
        if job.gpu_mem_mib is not None:
            self._share(job.gpu_uuids[0], job.gpu_mem_mib)
        self._hold(job, ends_at)

    def submit(self, sim: SimJob, at: float) -> None:
        """A job that comes at `at`."""
        self._known[sim.job.id] = _Known(sim)
        for parent_id in {dependency.job_id for dependency in sim.depends_on}:
            self._known[parent_id].children.append(sim.job.id)
        heappush(self._later, (at, _SUBMIT, sim.job.id, 0))

    def run(self, *, starts_max: float = math.inf, until: float = math.inf) -> None:
        """Go on until nothing more happens, or so many jobs have started, or `until` is reached."""
        started = 0
        while self._later and started < starts_max:
            now = self._later[0][0]
            if now > until:
                return
            while self._later and self._later[0][0] <= now:
                _, kind, job_id, number = heappop(self._later)
                self._happen(kind, job_id, number, now)
            started += self._decide(now)

    @property
    def left(self) -> Sequence[int]:
        """The jobs that never started."""
        return [job_id for job_id, known in self._known.items() if known.state is JobState.QUEUED]

    def _happen(self, kind: int, job_id: int, number: int, now: float) -> None:
        if kind == _SUBMIT:
            self._arrive(job_id, now)
        elif kind == _END:
            run = self._running.get(job_id)
            if run is not None and run.number == number:
                self._end(run, now)
        else:
            self._due = math.inf

    def _arrive(self, job_id: int, now: float) -> None:
        known = self._known[job_id]
        for dependency in known.sim.depends_on:
            match met(dependency.after, self._known[dependency.job_id].state):
                case Met.NOT_YET:
                    known.unmet += 1
                case Met.NEVER:
                    self._cancel(job_id, dependency.job_id, now)
                    self._settle(job_id, now)
                    return
                case Met.YES:
                    pass
        self._backlog.put(replace(known.sim.job, depends=known.unmet > 0), now)

    def _decide(self, now: float) -> int:
        """Decide and act until nothing changes; returns how many jobs started."""
        started = 0
        for _ in range(_PASSES_MAX):
            if not len(self._backlog):
                break
            running = [run.job for run in self._running.values()]
            hours = self._hours.used(running, now)
            self._backlog.admit(now, policy.elements_running(running))
            standing = policy.standing(self._ledger, running, self._backlog.users, self._rules, now)
            plan = decide(
                self._backlog, running, self._view(), standing, self._rules, now,
                gpu_hours=hours, estimate=lambda job: self.history.left_s(job, now),
            )  # fmt: skip
            for start in plan.starts:
                self._begin(start, now)
            for preemption in plan.preemptions:
                self._preempt(preemption.job_id, preemption.for_job_id, now)
            started += len(plan.starts)
            if not plan.preemptions:
                due = min(plan.wake_at, self._backlog.next_due)
                if hours and plan.quotas is not None and self._somebody_is_refused(plan.quotas):
                    due = min(due, now + max(_QUOTAS_EVERY_S, self._hours.longest_s / _QUOTA_LOOKS))
                if now < due < self._due:
                    self._due = due
                    heappush(self._later, (due, _DUE, 0, 0))
                break
        return started

    def _somebody_is_refused(self, quotas: Quotas) -> bool:
        groups = self._backlog.gpu_line.groups.values()
        return any(quotas.refuses(group.user, group.project, 1) is not None for group in groups)

    def _begin(self, start: Start, now: float) -> None:
        known = self._known[start.job_id]
        sim = known.sim
        job = sim.job
        self._backlog.drop(job.id)
        known.state = _moved(known.state, JobState.STARTING)
        known.state = _moved(known.state, JobState.RUNNING)
        known.runs += 1
        if known.first_start is None:
            known.first_start = now
            self.waited[job.id] = now - job.submitted_at
        if start.memory_mib is not None:
            self._share(start.gpu_uuids[0], start.memory_mib)
        length = sim.duration_s if job.time_limit_s is None else min(sim.duration_s, job.time_limit_s)
        held = RunningJob(
            id=job.id, user=job.user, project=job.project, priority=job.priority, started_at=now,
            gpu_uuids=start.gpu_uuids, gpu_mem_mib=start.memory_mib, slots=job.slots, time_limit_s=job.time_limit_s,
            preemptible=job.preemptible, backfilled=start.backfilled, array_id=job.array_id, rate=start.rate,
            kind=job.kind,
        )  # fmt: skip
        self._hold(held, now + length)
        why = "it fits, and delays nobody before it" if start.backfilled else "its turn"
        self._note(now, "start", job.id, start.gpu_uuids, why)

    def _hold(self, job: RunningJob, ends_at: float) -> None:
        number = self._known[job.id].runs
        run = self._running[job.id] = Run(job, ends_at, number)
        self.runs.append(run)
        heappush(self._later, (ends_at, _END, job.id, number))

    def _end(self, run: Run, now: float) -> None:
        known = self._known[run.job.id]
        self._free(run, now)
        limit = run.job.time_limit_s
        stopped = limit is not None and known.sim.duration_s > limit
        failed = stopped or known.sim.fails
        known.state = _moved(known.state, JobState.FAILED if failed else JobState.SUCCEEDED)
        if not failed and self.learns:
            self.history.add(run.job.user, run.job.project, run.job.kind, now - run.job.started_at)
        why = "stopped at its time limit" if stopped else "failed" if failed else "ended well"
        self._note(now, "end", run.job.id, run.job.gpu_uuids, why)
        self._settle(run.job.id, now)

    def _preempt(self, job_id: int, for_job_id: int, now: float) -> None:
        run = self._running[job_id]
        known = self._known[job_id]
        run.ends_at = now
        self._free(run, now)
        known.state = _moved(known.state, JobState.QUEUED)
        self._note(now, "preempt", job_id, run.job.gpu_uuids, f"it gave way to job {for_job_id}")
        self._backlog.put(known.sim.job, now)

    def _free(self, run: Run, now: float) -> None:
        job = run.job
        del self._running[job.id]
        self._ledger.add(job.user, job.rate, job.started_at, now)
        self._hours.add(job.user, job.project, job.gpus, job.started_at, now)
        if job.gpu_mem_mib is not None:
            self._share(job.gpu_uuids[0], -job.gpu_mem_mib)
        size = 1.0
        if job.gpu_mem_mib is not None:
            place = self._places.get(job.gpu_uuids[0])
            whole_mib = None if place is None else self._box.gpus[place].memory_mib
            size = job.gpu_mem_mib / (whole_mib or job.gpu_mem_mib)
        self.busy_gpu_s += size * job.gpus * (now - max(0.0, job.started_at))

    def _settle(self, job_id: int, now: float) -> None:
        """Let those that depend on an ended job go on, or end with it, and those that depend on them."""
        ended = deque([job_id])
        while ended:
            parent_id = ended.popleft()
            ended += [child for child in self._known[parent_id].children if self._follow(child, parent_id, now)]

    def _follow(self, child_id: int, parent_id: int, now: float) -> bool:
        """Tell a job that another one ended; returns whether that ended it. One that has not come yet looks itself."""
        waiting = self._backlog.get(child_id)
        if waiting is None:
            return False
        child, state = self._known[child_id], self._known[parent_id].state
        mine = [one for one in child.sim.depends_on if one.job_id == parent_id]
        if any(met(one.after, state) is Met.NEVER for one in mine):
            self._cancel(child_id, parent_id, now)
            return True
        child.unmet -= len(mine)
        if child.unmet == 0:
            child.sim = replace(child.sim, job=replace(waiting, depends=False, eligible_at=now))
            self._backlog.put(child.sim.job, now)
        return False

    def _cancel(self, job_id: int, parent_id: int, now: float) -> None:
        known = self._known[job_id]
        known.state = _moved(known.state, JobState.CANCELLED)
        self._backlog.drop(job_id)
        state = self._known[parent_id].state
        self._note(now, "cancel", job_id, (), f"dependency_failed: job {parent_id} {state}")

    def _share(self, uuid: str, memory_mib: int) -> None:
        self._shared[uuid] = self._shared.get(uuid, 0) + memory_mib
        if not self._shared[uuid]:
            del self._shared[uuid]

    def _view(self) -> Box:
        """The box as it is now: only GPUs with shares look different from an empty one."""
        if not self._shared:
            return self._box
        gpus = tuple(
            replace(gpu, shared_free_mib=max(0, (gpu.memory_mib or 0) - self._shared[gpu.uuid]))
            if gpu.uuid in self._shared
            else gpu
            for gpu in self._box.gpus
        )
        return replace(self._box, gpus=gpus)

    def _note(self, now: float, event: str, job_id: int, gpu_uuids: Iterable[str], why: str) -> None:
        self.events.append(Happening(at=now, event=event, job_id=job_id, gpus=self.places(gpu_uuids), why=why))

    def places(self, gpu_uuids: Iterable[str]) -> tuple[int, ...]:
        """Where GPUs stand in the box."""
        return tuple(sorted(self._places[uuid] for uuid in gpu_uuids if uuid in self._places))


def _moved(old: JobState, new: JobState) -> JobState:
    """`new`, if the state machine allows the move."""
    if new not in TRANSITIONS[old]:
        raise ValueError(f"a job cannot go from {old} to {new}")
    return new


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `mlbox simulate` prints: every event, and figures over all of them."""

    events: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]


def summary(
    simulation: Simulation, users: Mapping[int, str], gpus: int, names: Mapping[int, str | int]
) -> dict[str, Any]:
    """Makespan, use and waits, in seconds; `users` and `names` are by job id."""
    ends = [event.at for event in simulation.events if event.event in ("end", "preempt")]
    makespan = max(ends, default=0.0)
    by_user: dict[str, dict[str, Any]] = {}
    waits: dict[str, list[float]] = {}
    for job_id, waited in simulation.waited.items():
        waits.setdefault(users[job_id], []).append(waited)
    held = _held_gpu_hours(simulation.events, users)
    for user in sorted({*users.values()}):
        mine = waits.get(user, [])
        by_user[user] = {
            "jobs": len(mine),
            "gpu_hours": round(held.get(user, 0.0), 6),
            "wait_mean_s": _mean(mine),
            "wait_p95_s": _p95(mine),
        }
    every = list(simulation.waited.values())
    return {
        "makespan_s": makespan,
        "gpu_busy_fraction": simulation.busy_gpu_s / (gpus * makespan) if gpus and makespan else 0.0,
        "wait_mean_s": _mean(every),
        "wait_p95_s": _p95(every),
        "jobs": len(every),
        "never_started": [names[job_id] for job_id in simulation.left],
        "by_user": by_user,
    }


def _held_gpu_hours(events: Iterable[Happening], users: Mapping[int, str]) -> dict[str, float]:
    began: dict[int, float] = {}
    held: dict[str, float] = {}
    for event in events:
        if event.event == "start":
            began[event.job_id] = event.at
        elif event.event in ("end", "preempt"):
            hours = len(event.gpus) * (event.at - max(0.0, began.pop(event.job_id, 0.0))) / 3600
            held[users[event.job_id]] = held.get(users[event.job_id], 0.0) + hours
    return held


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _p95(values: Sequence[float]) -> float:
    """The smallest value that 95 of 100 do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(0.95 * len(values)) - 1)] if values else 0.0
