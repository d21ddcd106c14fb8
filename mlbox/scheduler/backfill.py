"""Who starts now, who gives way, and when the first blocked jobs are to start: exact backfill for each GPU. Pure.

Jobs are tried in order of rank. One that fits starts. One that does not is blocked; the first `Rules.reservations`
blocked jobs get a reservation: the earliest moment, by the time limits of what runs, at which enough GPUs are free
for as long as they may need them, and the very GPUs, those that come free last, so that idle ones stay open to
others. Any other job starts only if it has ended, by its own limit, before the next reservation on its GPUs: then it
delays nobody, by time or by space. (Slurm reserves whole nodes instead, which on one box means everything.)

A job without a time limit might never end. So it starts behind a blocked job only on GPUs that no reservation needs,
or if it is preemptible: then it gives way when that job's time has come. If what runs has no limit either, the
reservation has no time; estimates stand in for it where there are any. Guarantees rest on limits alone.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import islice

from mlbox.scheduler.backlog import Backlog, Group, Line, Place, Shape
from mlbox.scheduler.placement import Box, GpuView, Reservation, Start, choose
from mlbox.scheduler.policy import Quota, Rules, RunningJob, Standing, WaitingJob

SOMETIME = 1e15
"""The start of a reservation that has no time: later than any limit, sooner than never."""
_WALK_MAX = 1000
"""So many jobs are looked at one by one in a pass; the others by shape, of which there are fewer."""

Estimate = Callable[[RunningJob], float | None]
"""How many seconds from now a running job without a limit probably still takes; None: nobody knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preemption:
    """A decision: this running job is stopped for that waiting one, and goes back into the queue."""

    job_id: int
    for_job_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """A blocked job's planned start (None: when something without a time limit ends) and its units."""

    job_id: int
    start: float | None
    units: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPlan:
    """What was found out about one pool (GPUs or CPU slots).

    `head` is the first job that does not fit. `slack_s` is for how long each unit that is free now may be given to
    somebody who is not reserved for: infinity where no reservation needs it.
    """

    head: int | None = None
    reserved: tuple[Reserved, ...] = ()
    slack_s: Mapping[int, float] = field(default_factory=dict[int, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do now. `wake_at`: when to decide anew though nothing happens (Unix seconds)."""

    starts: tuple[Start, ...] = ()
    preemptions: tuple[Preemption, ...] = ()
    gpus: PoolPlan = field(default_factory=PoolPlan)
    slots: PoolPlan = field(default_factory=PoolPlan)
    quotas: "Quotas | None" = None
    wake_at: float = math.inf


def decide(
    backlog: Backlog,
    running: Sequence[RunningJob],
    box: Box,
    standing: Standing,
    rules: Rules,
    now: float,
    *,
    gpu_hours: Mapping[str, float] | None = None,
    estimate: Estimate | None = None,
) -> Plan:
    """One pass over the queue. `gpu_hours` is what users (`name`) and projects (`@name`) used in their window."""
    quotas = Quotas(rules, running, gpu_hours or {})
    gpus = _Pool.of_gpus(backlog, running, box, standing, rules, now, quotas, estimate)
    gpus.run()
    slots = _Pool.of_slots(backlog, running, box, standing, rules, now, quotas, estimate)
    slots.run()
    changes = [window.starts_at for window in box.reservations if window.starts_at > now]
    changes += [window.ends_at for window in box.reservations if window.ends_at > now]
    return Plan(
        starts=(*gpus.starts, *slots.starts),
        preemptions=(*gpus.preemptions, *slots.preemptions),
        gpus=gpus.plan(),
        slots=slots.plan(),
        quotas=quotas,
        wake_at=min(gpus.wake_at, slots.wake_at, *changes, math.inf),
    )


class Quotas:
    """How many GPUs users and projects hold, those that start in this pass included."""

    def __init__(self, rules: Rules, running: Iterable[RunningJob], gpu_hours: Mapping[str, float]) -> None:
        self._rules = rules
        self._hours = gpu_hours
        self._held: dict[str, int] = {}
        self._answers: dict[tuple[str, str, int], str | None] = {}
        """What was asked since somebody last took GPUs: a pass asks the same again for thousands of jobs."""
        self.active = rules.has_quotas
        if self.active:
            for job in running:
                self.take(job.user, job.project, job.gpus)

    def take(self, user: str, project: str, gpus: int) -> None:
        if self.active and gpus:
            self._answers.clear()
            self._held[user] = self._held.get(user, 0) + gpus
            self._held["@" + project] = self._held.get("@" + project, 0) + gpus

    def refusal(self, job: WaitingJob) -> str | None:
        """Why `job` may not start for now, in words."""
        return self.refuses(job.user, job.project, job.size if job.wants_gpu else 0)

    def refuses(self, user: str, project: str, gpus: int) -> str | None:
        """Why a job of this user and project on so many GPUs may not start for now, in words."""
        if not gpus or not self.active:
            return None
        asked = (user, project, gpus)
        if asked not in self._answers:
            self._answers[asked] = self._refused(user, user, self._rules.quota_of_user(user), gpus) or self._refused(
                "@" + project, f"project {project}", self._rules.quota_of_project(project), gpus
            )
        return self._answers[asked]

    def _refused(self, key: str, name: str, quota: Quota | None, gpus: int) -> str | None:
        if quota is None:
            return None
        held = self._held.get(key, 0)
        if quota.gpus is not None and held + gpus > quota.gpus:
            return f"{name} holds {held} of the {quota.gpus} GPUs allowed at once, and this job needs {gpus}"
        used = self._hours.get(key, 0.0)
        if quota.gpu_hours is not None and used >= quota.gpu_hours:
            days = quota.window_s / 86_400
            return f"{name} has used {used:.1f} of {quota.gpu_hours:g} GPU-hours allowed in {days:g} days"
        return None


class _Pool:
    """One pass over one kind of unit: GPUs, or CPU slots, which are all alike."""

    def __init__(
        self,
        *,
        line: Line,
        jobs: Mapping[int, WaitingJob],
        running: Sequence[RunningJob],
        units: int,
        standing: Standing,
        rules: Rules,
        now: float,
        quotas: Quotas,
        estimate: Estimate | None,
    ) -> None:
        self._line, self._jobs, self._running = line, jobs, running
        self._standing, self._rules, self._now, self._quotas = standing, rules, now, quotas
        self._estimate = estimate
        self.starts: list[Start] = []
        self.preemptions: list[Preemption] = []
        self.reserved: list[Reserved] = []
        self.head: int | None = None
        self.wake_at = math.inf
        self._free_at = [now] * units
        """When each unit is surely free; infinity: nobody can say."""
        self._likely_at = [now] * units
        """When it probably is."""
        self._pins: list[list[tuple[float, float]]] = [[] for _ in range(units)]
        """What is planned on each unit: (from, until)."""
        self._due = [math.inf] * units
        """When the first of it begins."""
        self._idle: list[int] = []
        self._windows: list[list[Reservation]] = [[] for _ in range(units)]
        self._has_windows = False
        self._gpus: tuple[GpuView, ...] = ()
        self._scores: Sequence[Sequence[int]] = ()
        self._shared_free: dict[int, int] = {}
        self._holders: dict[int, list[RunningJob]] = {}
        self._stopped: set[int] = set()
        """Who gives way in this pass."""
        self._started_on: set[int] = set()

    @classmethod
    def of_gpus(
        cls,
        backlog: Backlog,
        running: Sequence[RunningJob],
        box: Box,
        standing: Standing,
        rules: Rules,
        now: float,
        quotas: Quotas,
        estimate: Estimate | None,
    ) -> "_Pool":
        pool = cls(
            line=backlog.gpu_line, jobs=backlog.jobs, running=[job for job in running if job.gpu_uuids],
            units=len(box.gpus), standing=standing, rules=rules, now=now, quotas=quotas, estimate=estimate,
        )  # fmt: skip
        if not backlog.gpu_line.size:
            return pool
        places = {gpu.uuid: place for place, gpu in enumerate(box.gpus)}
        pool._gpus, pool._scores = box.gpus, box.scores
        for job in pool._running:
            for uuid in job.gpu_uuids:
                if uuid in places:
                    pool._occupy(places[uuid], job)
        for place, gpu in enumerate(box.gpus):
            if gpu.closed:
                pool._free_at[place] = pool._likely_at[place] = math.inf
                pool._holders.pop(place, None)
            elif gpu.shared_free_mib is not None and gpu.busy is None:
                pool._shared_free[place] = gpu.shared_free_mib
            elif gpu.busy is None and place not in pool._holders:
                pool._idle.append(place)
            elif place not in pool._holders:
                pool._free_at[place] = pool._likely_at[place] = math.inf if gpu.clears_s is None else now + gpu.clears_s
        for window in box.reservations:
            if window.ends_at > now:
                pool._has_windows = True
                for uuid in window.gpu_uuids:
                    if uuid in places:
                        pool._windows[places[uuid]].append(window)
        return pool

    @classmethod
    def of_slots(
        cls,
        backlog: Backlog,
        running: Sequence[RunningJob],
        box: Box,
        standing: Standing,
        rules: Rules,
        now: float,
        quotas: Quotas,
        estimate: Estimate | None,
    ) -> "_Pool":
        active = bool(backlog.slot_line.size)
        holders = [job for job in running if job.slots] if active else []
        pool = cls(
            line=backlog.slot_line, jobs=backlog.jobs, running=holders, units=box.slots if active else 0,
            standing=standing, rules=rules, now=now, quotas=quotas, estimate=estimate,
        )  # fmt: skip
        place = 0
        for job in holders:
            for _ in range(job.slots):
                if place < box.slots:
                    pool._occupy(place, job)
                    place += 1
        pool._idle = list(range(place, box.slots)) if active else []
        return pool

    def plan(self) -> PoolPlan:
        return PoolPlan(
            head=self.head, reserved=tuple(self.reserved), slack_s={unit: self._slack(unit) for unit in self._idle}
        )

    def run(self) -> None:
        """Try jobs in order, until nothing more can start and the first blocked ones are planned."""
        if not self._line.size:
            return
        skipped: set[int] = set()
        walked = self._line.merged(self._standing, self._rules.weights, self._now, skipped)
        may_preempt = self._may_preempt()
        for job_id, group in islice(walked, _WALK_MAX):
            if not self._idle and not self._shared_free and not may_preempt:
                if self.head is None:
                    self.head = job_id
                return
            job = self._jobs[job_id]
            if self._quotas.refusal(job):
                if self._quotas.refuses(job.user, job.project, 1 if job.wants_gpu else 0):
                    skipped.add(id(group))
                continue
            if self._try(job):
                continue
            if self.head is None:
                self.head = job_id
            if len(self.reserved) < self._rules.reservations:
                if may_preempt and self._preempt(job):
                    may_preempt = self._may_preempt()
                self._reserve(job)
            if len(self.reserved) >= self._rules.reservations:
                break
        self._fill(skipped)

    def _occupy(self, unit: int, job: RunningJob) -> None:
        """Note that `job` holds `unit`, and until when."""
        now, rules = self._now, self._rules
        self._holders.setdefault(unit, []).append(job)
        surely = math.inf if job.time_limit_s is None else max(job.started_at + job.time_limit_s, now)
        if job.stopping:
            surely = min(surely, now + rules.grace_s)
        likely = surely
        if surely == math.inf and self._estimate is not None:
            left = self._estimate(job)
            likely = math.inf if left is None else now + left
        self._free_at[unit] = max(self._free_at[unit], surely)
        self._likely_at[unit] = max(self._likely_at[unit], likely)

    # What fits now

    def _slack(self, unit: int) -> float:
        """For how long a unit may be given away without delaying a reservation."""
        return self._due[unit] - self._now

    def _limit(self, time_limit_s: float | None, preemptible: bool) -> float:
        """For how long a job that starts now must be let run."""
        limit = math.inf if time_limit_s is None else time_limit_s
        return min(limit, self._rules.min_run_s + self._rules.grace_s) if preemptible else limit

    def _open(self, unit: int, job: WaitingJob, limit: float) -> bool:
        """Whether no reservation or window is in the way of giving an idle unit to `job`."""
        return self._slack(unit) >= limit and not self._is_kept(unit, job, self._now)

    def _is_kept(self, unit: int, job: WaitingJob, start: float) -> bool:
        """Whether a window for others begins before `job`, started at `start`, has ended by its limit.

        That it is preemptible helps nothing: no job has to come in the window for which it would be stopped.
        """
        if not self._has_windows:
            return False
        end = math.inf if job.time_limit_s is None else start + job.time_limit_s
        return any(
            window.starts_at < end and window.ends_at > start and not window.admits(job.user, job.project)
            for window in self._windows[unit]
        )

    def _try(self, job: WaitingJob) -> bool:
        """Start `job` now if it delays nobody."""
        limit = self._limit(job.time_limit_s, job.preemptible)
        if job.gpu_mem_mib is not None:
            return self._try_share(job, job.gpu_mem_mib, limit)
        count = job.size
        if count > len(self._idle):
            return False
        units = [unit for unit in self._idle if self._open(unit, job, limit)]
        if self._gpus and count > 1:
            units = [unit for unit in units if not self._gpus[unit].slice]
        if len(units) < count:
            return False
        if self._gpus:
            # GPUs kept for this very user first, then those that soon are somebody else's.
            units.sort(key=lambda unit: (not self._is_kept_for(unit, job), self._slack(unit)))
            if self._has_windows or self.reserved:
                best = [unit for unit in units if self._key(unit, job) <= self._key(units[count - 1], job)]
                chosen = choose(best, count, self._scores, self._idle)
            else:
                chosen = choose(sorted(units), count, self._scores, self._idle)
        else:
            chosen = tuple(units[:count])
        self._start(job, chosen)
        return True

    def _key(self, unit: int, job: WaitingJob) -> tuple[bool, float]:
        return (not self._is_kept_for(unit, job), self._slack(unit))

    def _is_kept_for(self, unit: int, job: WaitingJob) -> bool:
        return any(w.starts_at <= self._now and w.admits(job.user, job.project) for w in self._windows[unit])

    def _try_share(self, job: WaitingJob, memory_mib: int, limit: float) -> bool:
        """A share of a GPU: the fullest that still has the room, else an idle one."""
        shared = [u for u, free in self._shared_free.items() if free >= memory_mib and self._open(u, job, limit)]
        if shared:
            unit = min(shared, key=lambda u: (self._shared_free[u], u))
        else:
            fits = [u for u in self._idle if self._has_memory(u, memory_mib) and self._open(u, job, limit)]
            if not fits:
                return False
            smallest = min(self._gpus[u].memory_mib or 0 for u in fits)
            alike = [u for u in fits if (self._gpus[u].memory_mib or 0) == smallest]
            unit = choose(alike, 1, self._scores, self._idle)[0]
            self._idle.remove(unit)
            self._shared_free[unit] = self._gpus[unit].memory_mib or 0
        self._shared_free[unit] -= memory_mib
        gpu = self._gpus[unit]
        part = memory_mib / gpu.memory_mib if gpu.memory_mib else 1.0
        self._begin(job, (unit,), Start(
            job_id=job.id, gpu_uuids=(gpu.uuid,), memory_mib=memory_mib, backfilled=self.head is not None,
            rate=gpu.weight * part,
        ))  # fmt: skip
        return True

    def _has_memory(self, unit: int, memory_mib: int) -> bool:
        size = self._gpus[unit].memory_mib
        return size is not None and size >= memory_mib

    def _start(self, job: WaitingJob, units: tuple[int, ...]) -> None:
        taken = set(units)
        self._idle = [unit for unit in self._idle if unit not in taken]
        gpus = tuple(self._gpus[unit] for unit in sorted(units)) if self._gpus else ()
        rate = sum(gpu.weight for gpu in gpus) if gpus else job.slots * self._rules.cpu_slot_weight
        self._begin(job, units, Start(
            job_id=job.id, gpu_uuids=tuple(gpu.uuid for gpu in gpus), backfilled=self.head is not None, rate=rate
        ))  # fmt: skip

    def _begin(self, job: WaitingJob, units: tuple[int, ...], start: Start) -> None:
        now = self._now
        until = now + self._limit(job.time_limit_s, job.preemptible and start.backfilled)
        self._started_on.update(units)
        for unit in units:
            self._free_at[unit] = max(self._free_at[unit], until)
            self._likely_at[unit] = max(self._likely_at[unit], until)
        self._quotas.take(job.user, job.project, len(start.gpu_uuids))
        self.starts.append(start)

    # Reservations

    def _reserve(self, job: WaitingJob) -> None:
        """Plan the start of a blocked job: as early as limits allow, on the units that come free last by then."""
        length = math.inf if job.time_limit_s is None else job.time_limit_s
        usable = [unit for unit in range(len(self._free_at)) if self._suits(unit, job)]
        count = job.size
        if len(usable) < count:
            return  # not before somebody opens a GPU again: what is there is not kept idle for that
        start, units = self._earliest(job, usable, count, length, self._free_for(job))
        if start is None:
            likely, units = self._earliest(job, usable, count, length, self._likely_at)
            until = likely if likely is not None else SOMETIME
            if likely is None:
                idle = set(self._idle)
                units = tuple(sorted(usable, key=lambda u: (u not in idle, self._likely_at[u], u))[:count])
            pin = (max(until, self._now), math.inf)
        else:
            pin = (start, start + length)
        for unit in units:
            self._pins[unit].append(pin)
            self._due[unit] = min(self._due[unit], pin[0])
        self.reserved.append(Reserved(job_id=job.id, start=start, units=units))

    def _earliest(
        self, job: WaitingJob, usable: Sequence[int], count: int, length: float, free_at: Sequence[float]
    ) -> tuple[float | None, tuple[int, ...]]:
        """The first moment at which `count` units are free for `length`; of these the ones that come free last.

        It is always the beginning of a gap: of a time when nothing is planned on a unit.
        """
        gaps: list[tuple[float, float, int]] = []
        for unit in usable:
            begin = free_at[unit]
            if begin == math.inf:
                continue
            for start, until in sorted(self._planned(unit, job)):
                if start - begin >= length:
                    gaps.append((begin, start, unit))
                begin = max(begin, until)
            if begin < math.inf:
                gaps.append((begin, math.inf, unit))
        gaps.sort()
        for at, (moment, _, _) in enumerate(gaps, 1):
            if at < count or (at < len(gaps) and gaps[at][0] == moment):
                continue
            free = [(-begin, unit) for begin, end, unit in gaps[:at] if moment + length <= end]
            if len(free) >= count:
                return moment, tuple(unit for _, unit in sorted(free)[:count])
        return None, ()

    def _planned(self, unit: int, job: WaitingJob) -> Sequence[tuple[float, float]]:
        """When `unit` is planned for others than `job`: (from, until)."""
        if not self._has_windows:
            return self._pins[unit]
        kept = [(w.starts_at, w.ends_at) for w in self._windows[unit] if not w.admits(job.user, job.project)]
        return self._pins[unit] + kept

    # Preemption

    def _may_preempt(self) -> bool:
        """Whether anything that runs could be stopped for somebody in line."""
        highest = max((group.priority for group in self._line.groups.values()), default=0)
        return any(
            job.preemptible and not job.stopping and job.id not in self._stopped
            and (job.backfilled or job.priority < highest)
            for job in self._running
        )  # fmt: skip

    def _gives_way(self, victim: RunningJob, job: WaitingJob) -> bool:
        """Whether `victim` may be stopped for `job`: for a higher priority, or if it was let in front of it.

        It was not let in front of a job that waited already, but had no chance to come before it.
        """
        if not victim.preemptible or victim.stopping or victim.id in self._stopped:
            return False
        weights = self._rules.weights
        ahead = weights.priority * (victim.priority - job.priority) > weights.fair_share + weights.age
        let_in = victim.backfilled and job.since <= victim.started_at and not ahead
        return victim.priority < job.priority or let_in

    def _suits(self, unit: int, job: WaitingJob) -> bool:
        """Whether `unit` is one that `job` could ever have."""
        if not self._gpus:
            return True
        gpu = self._gpus[unit]
        if gpu.closed or (job.size > 1 and gpu.slice):
            return False
        return job.gpu_mem_mib is None or self._has_memory(unit, job.gpu_mem_mib)

    def _in_the_way(self, unit: int) -> list[RunningJob]:
        """Who holds `unit` and has not been asked to stop."""
        return [one for one in self._holders[unit] if not one.stopping and one.id not in self._stopped]

    def _free_for(self, job: WaitingJob) -> Sequence[float]:
        """When each unit is surely free for `job`, for which some have to give way."""
        free_at = list(self._free_at)
        rules = self._rules
        for unit in self._holders if self._may_preempt() else ():
            others = self._in_the_way(unit)
            if others and unit not in self._started_on and all(self._gives_way(one, job) for one in others):
                last = max(max(self._now, one.started_at + rules.min_run_s) for one in others)
                free_at[unit] = min(free_at[unit], last + rules.grace_s)
        return free_at

    def _preempt(self, job: WaitingJob) -> bool:
        """Stop as few jobs as make `job` fit at once; none, and False, where that cannot be."""
        limit = self._limit(job.time_limit_s, job.preemptible)
        missing = job.size - sum(1 for u in self._idle if self._suits(u, job) and self._open(u, job, limit))
        freed: dict[tuple[int, ...], int] = {}
        for unit in self._holders:
            planned = unit in self._started_on or self._slack(unit) < math.inf
            if planned or not self._suits(unit, job) or self._is_kept(unit, job, self._now + self._rules.grace_s):
                continue
            others = self._in_the_way(unit)
            if not others:
                missing -= 1  # it comes free anyway
            elif all(self._gives_way(one, job) for one in others):
                ids = tuple(one.id for one in others)
                freed[ids] = freed.get(ids, 0) + 1
        if missing <= 0 or not freed:
            return False
        known = {one.id: one for one in self._running}
        sets = [_Victims(jobs=tuple(known[number] for number in ids), units=units) for ids, units in freed.items()]
        ready_from = {some: max(one.started_at for one in some.jobs) + self._rules.min_run_s for some in sets}
        chosen = _fewest([some for some in sets if ready_from[some] <= self._now], missing)
        if chosen is None:
            if _fewest(sets, missing) is not None:
                self.wake_at = min(self.wake_at, *(at for at in ready_from.values() if at > self._now))
            return False
        for victim in chosen:
            self._stopped.add(victim.id)
            self.preemptions.append(Preemption(job_id=victim.id, for_job_id=job.id))
        for unit, holders in self._holders.items():
            if not self._in_the_way(unit) and any(one.id in self._stopped for one in holders):
                soon = self._now + self._rules.grace_s
                self._free_at[unit], self._likely_at[unit] = min(self._free_at[unit], soon), soon
        return True

    # The rest, by shape

    def _fill(self, skipped: set[int]) -> None:
        """Start whatever else fits, in order of rank. Jobs of one shape and group stand or fall together."""
        tried = {start.job_id for start in self.starts} | {one.job_id for one in self.reserved}
        tables = self._tables()
        fronts: list[tuple[float, Place, int, Group, Shape]] = []

        def could(group: Group, shape: Shape) -> bool:
            return self._could(shape, tables[self._is_guest(group)]) and not self._refused(group, shape)

        def add(group: Group, shape: Shape, after: Place | None) -> None:
            alike = group.by_shape[shape]
            begin = 0 if after is None else bisect_right(alike, after)
            place = next((alike[at] for at in range(begin, len(alike)) if alike[at][1] not in tried), None)
            if place is not None:
                value = group.score(place, self._standing, self._rules.weights, self._now)
                heappush(fronts, (-value, place, len(fronts), group, shape))

        for group in self._line.groups.values():
            if id(group) not in skipped:
                for shape in group.by_shape:
                    if could(group, shape):
                        add(group, shape, None)
        while fronts and (self._idle or self._shared_free):
            _, place, _, group, shape = heappop(fronts)
            job = self._jobs[place[1]]
            if could(group, shape) and self._try(job):
                tables = self._tables()
                add(group, shape, place)

    def _refused(self, group: Group, shape: Shape) -> bool:
        """Whether a quota keeps jobs of this shape."""
        units = shape[0] if self._gpus else 0
        return self._quotas.active and self._quotas.refuses(group.user, group.project, units) is not None

    def _is_guest(self, group: Group) -> bool:
        """Whether a window is kept for this group."""
        return self._has_windows and any(
            window.admits(group.user, group.project) for windows in self._windows for window in windows
        )

    def _tables(self) -> Mapping[bool, Sequence[float]]:
        """For each number of units, for how long at most so many can be had now, longest first; True: by guests."""
        planned = sorted((self._slack(unit) for unit in self._idle), reverse=True)
        if not self._has_windows:
            return {False: planned}
        kept = [
            min([self._slack(unit), *(window.starts_at - self._now for window in self._windows[unit])])
            for unit in self._idle
        ]
        return {False: sorted(kept, reverse=True), True: planned}

    def _could(self, shape: Shape, table: Sequence[float]) -> bool:
        """A quick test that refuses no job that could start."""
        count, memory_mib, limit, preemptible = shape
        if preemptible:
            limit = min(limit, self._rules.min_run_s + self._rules.grace_s)
        if memory_mib:
            shared = max(self._shared_free.values(), default=0) >= memory_mib
            return shared or (bool(table) and table[0] >= limit)
        return count <= len(table) and table[count - 1] >= limit


@dataclass(frozen=True, slots=True, kw_only=True)
class _Victims:
    """Jobs that free so many units if all of them stop: one job, or all that share a GPU."""

    jobs: tuple[RunningJob, ...]
    units: int


def _fewest(sets: Sequence[_Victims], missing: int) -> list[RunningJob] | None:
    """The fewest jobs that free `missing` units; of these the least in priority, then the youngest."""
    best: dict[int, tuple[tuple[float, ...], tuple[_Victims, ...]]] = {0: ((0, -math.inf, 0, 0), ())}
    for some in sets:
        for covered, (cost, chosen) in list(best.items()):
            new_cost = (
                cost[0] + len(some.jobs),
                max(cost[1], *(one.priority for one in some.jobs)),
                cost[2] + some.units,
                cost[3] - sum(one.started_at for one in some.jobs),
            )
            now_covered = min(missing, covered + some.units)
            if now_covered not in best or new_cost < best[now_covered][0]:
                best[now_covered] = (new_cost, (*chosen, some))
    return [one for some in best[missing][1] for one in some.jobs] if missing in best else None
