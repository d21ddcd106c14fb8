"""Who starts, who gives way and what is planned: checked against brute force on random boxes and queues."""

import math
import time
from itertools import chain, combinations

import pytest
from hypothesis import given, settings

from mlbox.scheduler.backfill import Plan, decide
from mlbox.scheduler.policy import Quota, Rules, RunningJob, WaitingJob
from tests.scheduler.queues import GRACE, MEMORY, MIN_RUN, MINUTE, NOW, Case, box, cases, gpu, running, waiting, window

HORIZON = 400
"""Minutes; later than any limit that is drawn, and all of them one after the other."""


class Judge:
    """What a decision may and must do, found out by trying everything. Units are places of GPUs."""

    def __init__(self, case: Case, plan: Plan) -> None:
        self.case, self.plan = case, plan
        self.jobs = {job.id: job for job in case.queue}
        self.order = [job for job in case.in_line() if job.wants_gpu]
        self.rank = {job.id: number for number, job in enumerate(self.order)}
        self.views = case.box.gpus
        self.units = range(len(self.views))
        places = {view.uuid: place for place, view in enumerate(self.views)}
        self.holders = {
            unit: [job for job in case.running if self.views[unit].uuid in job.gpu_uuids] for unit in self.units
        }
        self.starts = [start for start in plan.starts if start.gpu_uuids]
        self.taken = {start.job_id: [places[uuid] for uuid in start.gpu_uuids] for start in self.starts}
        self.reserved = plan.gpus.reserved
        self.idle = [unit for unit in self.units if self.is_idle(unit)]

    def is_idle(self, unit: int) -> bool:
        view = self.views[unit]
        return not (view.closed or view.busy or view.shared_free_mib is not None or self.holders[unit])

    def usable(self, unit: int, job: WaitingJob) -> bool:
        view = self.views[unit]
        return (
            not view.closed
            and not (job.size > 1 and view.slice)
            and not (job.gpu_mem_mib is not None and (view.memory_mib is None or view.memory_mib < job.gpu_mem_mib))
        )

    def runs_for(self, job: WaitingJob, backfilled: bool) -> float:
        limit = math.inf if job.time_limit_s is None else job.time_limit_s
        return min(limit, MIN_RUN + GRACE) if job.preemptible and backfilled else limit

    def free_at(self, unit: int, before: int, stopped: set[int], whom: WaitingJob) -> float:
        """When a unit is free for `whom` by limits, if the first `before` jobs in line have had their way."""
        view = self.views[unit]
        if view.closed:
            return math.inf
        ends = [NOW]
        staying = [one for one in self.holders[unit] if not one.stopping and one.id not in stopped]
        rank = self.rank[whom.id]
        give_way = all(self.gives_way(one, whom) for one in staying) and not self.is_started_on(unit, rank)
        for job in self.holders[unit]:
            end = math.inf if job.time_limit_s is None else max(NOW, job.started_at + job.time_limit_s)
            if job.stopping or job.id in stopped:
                end = min(end, NOW + GRACE)
            elif give_way:
                end = min(end, max(NOW, job.started_at + MIN_RUN) + GRACE)
            ends.append(end)
        if view.busy and not self.holders[unit]:
            ends.append(math.inf if view.clears_s is None else NOW + view.clears_s)
        ends += [
            NOW + self.runs_for(self.jobs[start.job_id], start.backfilled)
            for start in self.starts
            if unit in self.taken[start.job_id] and self.rank[start.job_id] < before
        ]
        return max(ends)

    def is_started_on(self, unit: int, before: int) -> bool:
        return any(unit in units for number, units in self.taken.items() if self.rank[number] < before)

    def kept(self, unit: int, job: WaitingJob, start: float, end: float) -> bool:
        """Whether a window is in the way."""
        uuid = self.views[unit].uuid
        return any(
            uuid in one.gpu_uuids
            and one.starts_at < end
            and one.ends_at > start
            and not one.admits(job.user, job.project)
            for one in self.case.box.reservations
            if one.ends_at > NOW
        )

    def pins(self, before: int) -> list[tuple[int, float, float]]:
        """What is planned for the reserved among the first jobs in line: unit, from, until."""
        return [
            (unit, math.nan if one.start is None else one.start, self.length(one.job_id))
            for one in self.reserved
            if self.rank[one.job_id] < before
            for unit in one.units
        ]

    def length(self, job_id: int) -> float:
        limit = self.jobs[job_id].time_limit_s
        return math.inf if limit is None else limit

    def slack(self, unit: int, before: int, *, but: int | None = None) -> float:
        """For how long nothing is planned on a unit. What has no time comes after any limit."""
        starts = [
            1e15 if one.start is None else one.start - NOW
            for one in self.reserved
            if unit in one.units and self.rank[one.job_id] < before and one.job_id != but
        ]
        return min(starts, default=math.inf)

    # What must hold

    def check(self) -> None:
        self.check_starts()
        self.check_quotas()
        self.check_reservations()
        self.check_nothing_idles()
        self.check_preemptions()

    def check_starts(self) -> None:
        ids = [start.job_id for start in self.plan.starts]
        assert len(ids) == len(set(ids)), "a job starts once"
        assert set(ids) <= {job.id for job in self.case.in_line()}, "only what may start does"
        whole = [u for start in self.starts if start.memory_mib is None for u in self.taken[start.job_id]]
        assert len(whole) == len(set(whole)), "no GPU is given twice"
        assert set(whole) <= set(self.idle), "none that is busy, closed, shared or held"
        shares: dict[int, int] = {}
        for start in self.starts:
            job, units = self.jobs[start.job_id], self.taken[start.job_id]
            assert all(self.usable(unit, job) for unit in units)
            limit = math.inf if job.time_limit_s is None else job.time_limit_s
            assert not any(self.kept(unit, job, NOW, NOW + limit) for unit in units), "windows are kept"
            if job.gpu_mem_mib is None:
                assert (start.memory_mib, len(units)) == (None, job.gpus)
                assert start.rate == len(units)
                continue
            assert (start.memory_mib, len(units)) == (job.gpu_mem_mib, 1)
            assert start.rate == pytest.approx(job.gpu_mem_mib / MEMORY)
            shares[units[0]] = shares.get(units[0], 0) + job.gpu_mem_mib
        assert not shares.keys() & set(whole), "whole and shares are never mixed"
        for unit, total in shares.items():
            free = self.views[unit].shared_free_mib
            assert unit in self.idle or (free is not None and not self.views[unit].closed)
            assert total <= (MEMORY if free is None else free), "memory is never exceeded"
        slots = sum(self.jobs[start.job_id].slots for start in self.plan.starts if not start.gpu_uuids)
        held = sum(job.slots for job in self.case.running)
        assert slots == 0 or slots + held <= self.case.box.slots

    def check_quotas(self) -> None:
        rules, started = self.case.rules, [self.jobs[start.job_id] for start in self.starts]
        for quota, mine in (
            (rules.quota_of_user("ann"), lambda job: job.user == "ann"),
            (rules.quota_of_project("vision") or Quota(), lambda job: job.project == "vision"),
        ):
            new = sum(job.size for job in started if mine(job))
            held = sum(job.gpus for job in self.case.running if mine(job))
            assert not new or quota.gpus is None or new + held <= quota.gpus
        over_hours = rules.quota_of_user("ann").gpu_hours is not None and self.case.hours["ann"] >= 10
        assert not over_hours or all(job.user != "ann" for job in started)
        every = [self.jobs[start.job_id] for start in self.plan.starts]
        assert sum(job.array_id is not None for job in every) <= 2, "no more of an array than may run at once"

    def over_quota(self, job: WaitingJob, before: int) -> bool:
        rules, held = self.case.rules, list(self.case.running)
        new = [self.jobs[start.job_id] for start in self.starts if self.rank[start.job_id] < before]
        for quota, key in ((rules.quota_of_user(job.user), "user"), (rules.quota_of_project(job.project), "project")):
            if quota is None:
                continue
            mine = [one for one in (*held, *new) if getattr(one, key) == getattr(job, key)]
            count = sum(one.gpus if isinstance(one, RunningJob) else one.size for one in mine)
            if quota.gpus is not None and count + job.size > quota.gpus:
                return True
            if quota.gpu_hours is not None and key == "user" and self.case.hours.get(job.user, 0) >= quota.gpu_hours:
                return True
        return False

    def stopped_before(self, rank: int) -> set[int]:
        """Who gives way for one of the jobs in line up to and with `rank`."""
        return {one.job_id for one in self.plan.preemptions if self.rank.get(one.for_job_id, math.inf) <= rank}

    def check_reservations(self) -> None:
        """Each planned start is the earliest that limits allow, and stays so with everybody behind it started."""
        if len(self.reserved) < self.case.rules.reservations and len(self.idle) > len(set(chain(*self.taken.values()))):
            blocked = [
                job for job in self.order if job.id not in self.taken and not self.over_quota(job, self.rank[job.id])
            ]
            could = [job.id for job in blocked if sum(self.usable(unit, job) for unit in self.units) >= job.size]
            assert [one.job_id for one in self.reserved] == could
        for one in self.reserved:
            rank, job = self.rank[one.job_id], self.jobs[one.job_id]
            assert one.job_id not in self.taken
            stopped = self.stopped_before(rank)
            earliest = self.earliest(job, rank, stopped)
            assert one.start == earliest
            everybody = len(self.order)
            if one.start is not None:
                assert len(set(one.units)) == job.size
                for unit in one.units:
                    assert self.free_at(unit, everybody, stopped, job) <= one.start, (
                        "it is delayed by a start behind it"
                    )
                    for other in self.reserved:
                        if other.job_id != one.job_id and unit in other.units and other.start is not None:
                            apart = one.start + self.length(one.job_id) <= other.start
                            assert apart or other.start + self.length(other.job_id) <= one.start
            for start in self.starts:
                if self.rank[start.job_id] > rank and set(one.units) & set(self.taken[start.job_id]):
                    runs_s = self.runs_for(self.jobs[start.job_id], start.backfilled)
                    assert runs_s < math.inf, "what might never end took what a blocked job needs"

    def earliest(self, job: WaitingJob, rank: int, stopped: set[int]) -> float | None:
        length = self.length(job.id)
        usable = [unit for unit in self.units if self.usable(unit, job)]
        for minute in range(HORIZON):
            at = NOW + minute * MINUTE
            ready = 0
            for unit in usable:
                planned = any(
                    (math.isnan(start) or (start < at + length and start + some > at))
                    and (not math.isnan(start) or length == math.inf)
                    for where, start, some in self.pins(rank)
                    if where == unit
                )
                free = self.free_at(unit, rank, stopped, job) <= at
                ready += free and not planned and not self.kept(unit, job, at, at + length)
            if ready >= job.size:
                return at
        return None

    def check_nothing_idles(self) -> None:
        """No job that still waits fits on what is left without being in somebody's way."""
        end = len(self.order)
        taken = {unit for units in self.taken.values() for unit in units}
        left = [unit for unit in self.idle if unit not in taken]
        room = {u: view.shared_free_mib for u, view in enumerate(self.views) if view.shared_free_mib is not None}
        room = {unit: free for unit, free in room.items() if not self.views[unit].closed}
        for start in self.starts:
            if start.memory_mib is not None:
                (unit,) = self.taken[start.job_id]
                room[unit] = room.get(unit, MEMORY) - start.memory_mib
        for job in self.order:
            if job.id in self.taken or self.over_quota(job, end):
                continue
            limit = math.inf if job.time_limit_s is None else job.time_limit_s
            short = min(limit, MIN_RUN + GRACE) if job.preemptible else limit
            fits = [
                unit
                for unit in (*left, *room)
                if self.slack(unit, end, but=job.id) >= short and not self.kept(unit, job, NOW, NOW + limit)
                and self.usable(unit, job)
            ]  # fmt: skip
            if job.gpu_mem_mib is None:
                assert sum(unit in left for unit in fits) < job.gpus, f"job {job.id} could start"
            else:
                assert not any(unit in left or room[unit] >= job.gpu_mem_mib for unit in fits), f"job {job.id} could"

    def check_preemptions(self) -> None:
        gone = [one.job_id for one in self.plan.preemptions]
        assert len(gone) == len(set(gone)), "nobody is stopped twice"
        known = {job.id: job for job in self.case.running if job.gpu_uuids}
        stopped: set[int] = set()
        for job in self.order:
            mine = {one.job_id for one in self.plan.preemptions if one.for_job_id == job.id}
            for victim in (known[number] for number in mine if number in known):
                assert victim.preemptible
                assert not victim.stopping
                assert victim.started_at + MIN_RUN <= NOW
                assert self.gives_way(victim, job)
            if any(one.job_id == job.id for one in self.reserved):
                assert len(mine & known.keys()) == self.fewest(job, stopped)
            stopped |= mine

    def gives_way(self, victim: RunningJob, job: WaitingJob) -> bool:
        let_in = victim.backfilled and job.since <= victim.started_at and victim.priority == job.priority
        return victim.preemptible and not victim.stopping and (victim.priority < job.priority or let_in)

    def fewest(self, job: WaitingJob, stopped: set[int]) -> int:
        """How many have to give way for `job` to fit, by trying every set; 0 where none suffices or none is needed."""
        rank = self.rank[job.id]
        limit = math.inf if job.time_limit_s is None else job.time_limit_s
        short = min(limit, MIN_RUN + GRACE) if job.preemptible else limit
        free, coming = 0, 0
        frees: dict[frozenset[int], int] = {}
        for unit in self.units:
            if not self.usable(unit, job) or self.is_started_on(unit, rank):
                continue
            if unit in self.idle:
                free += self.slack(unit, rank) >= short and not self.kept(unit, job, NOW, NOW + limit)
                continue
            if not self.holders[unit] or self.slack(unit, rank) < math.inf:
                continue
            if self.kept(unit, job, NOW + GRACE, NOW + GRACE + limit):
                continue
            staying = [one for one in self.holders[unit] if not one.stopping and one.id not in stopped]
            if not staying:
                coming += 1
            elif all(self.gives_way(one, job) and one.started_at + MIN_RUN <= NOW for one in staying):
                who = frozenset(one.id for one in staying)
                frees[who] = frees.get(who, 0) + 1
        missing = job.size - free - coming
        enough = [
            sum(map(len, some))
            for count in range(1, len(frees) + 1)
            for some in combinations(frees, count)
            if sum(frees[one] for one in some) >= missing
        ]
        return min(enough, default=0) if missing > 0 else 0


@settings(max_examples=200, deadline=None)
@given(cases())
def test_no_decision_breaks_a_rule_delays_a_plan_or_lets_a_gpu_idle(case: Case) -> None:
    Judge(case, case.decide()).check()


def started(case: Case) -> dict[int, tuple[str, ...]]:
    return {start.job_id: start.gpu_uuids for start in case.decide().starts}


def stopped(case: Case) -> list[tuple[int, int]]:
    return [(one.job_id, one.for_job_id) for one in case.decide().preemptions]


def test_the_reserved_gpus_are_those_that_come_free_last() -> None:
    holders = [running(1, [0], limit=10), running(2, [1], limit=20)]
    case = Case(box=box(3), queue=[waiting(9, gpus=2, limit=5, priority=1), waiting(10, limit=99)], running=holders)
    plan = case.decide()
    assert [(one.job_id, one.start) for one in plan.gpus.reserved] == [(9, NOW + 10 * MINUTE), (10, NOW + 15 * MINUTE)]
    limited = Case(box=box(3), queue=[case.queue[0], waiting(10, limit=10)], running=holders)
    assert started(limited) == {10: ("GPU-2",)}, "it ends just in time"


def test_a_job_of_a_high_priority_that_was_let_in_gives_way_only_to_those_it_may_have_been_let_in_before() -> None:
    let_in = running(1, [0], priority=1, ago=30, preemptible=True, backfilled=True)
    assert stopped(Case(box=box(1), queue=[waiting(9, ago=60)], running=[let_in])) == []
    assert stopped(Case(box=box(1), queue=[waiting(9, ago=60, priority=1)], running=[let_in])) == [(1, 9)]
    late = Case(box=box(1), queue=[waiting(9, ago=20, priority=1)], running=[let_in])
    assert stopped(late) == [], "it was not there when the other was let in"


def test_two_blocked_jobs_never_stop_the_same_victim() -> None:
    victim = running(1, [0, 1], ago=30, preemptible=True)
    case = Case(box=box(2), queue=[waiting(8, priority=1), waiting(9, priority=1)], running=[victim])
    assert stopped(case) == [(1, 8)]


def test_all_who_share_a_gpu_give_way_together_or_none_does() -> None:
    def share(number: int, **more: object) -> RunningJob:
        return running(number, [0], ago=30, gpu_mem_mib=40, **more)

    shared = box([gpu(0, shared_free_mib=20)])
    whole = [waiting(9, priority=1)]
    both = [share(1, preemptible=True), share(2, preemptible=True)]
    assert stopped(Case(box=shared, queue=whole, running=both)) == [(1, 9), (2, 9)]
    one = [share(1, preemptible=True), share(2)]
    assert stopped(Case(box=shared, queue=whole, running=one)) == []


def test_nobody_is_stopped_for_a_gpu_that_the_job_may_not_have() -> None:
    victim = running(1, [0], ago=30, preemptible=True)
    job = waiting(9, priority=1, limit=10)
    assert stopped(Case(box=box(1), queue=[job], running=[victim])) == [(1, 9)]
    kept = box(1, windows=[window([0], 5, 20)])
    assert stopped(Case(box=kept, queue=[job], running=[victim])) == []
    sliced = box([gpu(0, slice=True), gpu(1)])
    assert stopped(Case(box=sliced, queue=[waiting(9, priority=1, gpus=2)], running=[victim])) == []
    closed = box([gpu(0, closed=True)])
    assert stopped(Case(box=closed, queue=[job], running=[victim])) == []


def test_a_window_is_kept_free_also_from_preemptible_jobs_and_given_to_its_guests() -> None:
    kept = box(1, windows=[window([0], 10, 20, user="bob")])
    assert started(Case(box=kept, queue=[waiting(1, preemptible=True)])) == {}
    assert started(Case(box=kept, queue=[waiting(1, limit=10)])) == {1: ("GPU-0",)}
    assert started(Case(box=kept, queue=[waiting(1, limit=11)])) == {}
    assert started(Case(box=kept, queue=[waiting(1, user="bob")])) == {1: ("GPU-0",)}
    assert Case(box=kept).decide().wake_at == NOW + 10 * MINUTE


def test_what_needs_more_gpus_than_are_open_keeps_none_of_them_idle() -> None:
    drained = box([gpu(0), gpu(1, closed=True, busy="drained")])
    assert started(Case(box=drained, queue=[waiting(1, gpus=2, priority=5), waiting(2)])) == {2: ("GPU-0",)}


def test_a_job_of_a_lower_priority_in_the_way_counts_as_free_when_it_may_be_stopped() -> None:
    """Else a job with a long limit would be let in before it, and delay it by that."""
    holders = [running(1, [0], limit=10), running(2, [1], ago=30, preemptible=True)]
    case = Case(box=box(3), queue=[waiting(8, gpus=3, priority=1), waiting(9, limit=60)], running=holders)
    (first, _) = case.decide().gpus.reserved
    assert first.start == NOW + 10 * MINUTE
    assert started(case) == {}


def test_thousands_of_jobs_that_a_quota_keeps_hide_nobody_behind_them() -> None:
    many = [waiting(number, user="ann", priority=1) for number in range(1, 3001)]
    rules = Rules(grace_s=GRACE, min_run_s=MIN_RUN, user_quotas={"ann": Quota(gpus=0)})
    queue = [*many, waiting(5000, user="bob", gpus=2), waiting(5001, user="cid")]
    plan = Case(box=box(2), queue=queue, running=[running(1, [0])], rules=rules).decide()
    assert [one.job_id for one in plan.gpus.reserved] == [5000, 5001]
    assert plan.starts == ()


def test_estimates_stand_in_where_limits_say_nothing_but_promise_nothing() -> None:
    case = Case(box=box(2), queue=[waiting(8, gpus=2, priority=1), waiting(9, limit=30)], running=[running(1, [0])])

    def decided(left_s: float | None) -> Plan:
        return decide(
            case.backlog, case.running, case.box, case.standing, case.rules, NOW, estimate=lambda _job: left_s
        )

    assert [one.start for one in decided(10 * MINUTE).gpus.reserved] == [None, None]
    assert [start.job_id for start in decided(10 * MINUTE).starts] == []
    assert [start.job_id for start in decided(30 * MINUTE).starts] == [9]
    assert [start.job_id for start in decided(None).starts] == [9]


def test_cpu_jobs_are_planned_like_gpus() -> None:
    holders = [running(1, slots=3, limit=10)]
    queue = [waiting(8, slots=4, priority=1), waiting(9, slots=1, limit=10), waiting(10, slots=1, limit=11)]
    plan = Case(box=box(0, slots=4), queue=queue, running=holders).decide()
    assert [start.job_id for start in plan.starts] == [9]
    assert plan.slots.head == 8
    assert plan.slots.reserved[0].start == NOW + 10 * MINUTE
    assert plan.starts[0].rate == Rules().cpu_slot_weight


def test_a_pass_over_thousands_of_shapes_stays_within_a_moment() -> None:
    queue = [waiting(n, user=f"u{n % 50}", priority=n % 5, gpus=1 + n % 8, limit=1 + n % 90) for n in range(1, 10_001)]
    case = Case(box=box(8), queue=queue, running=[running(20_000, range(4), limit=30)])
    backlog, at = case.backlog, case.standing
    began = time.perf_counter()
    decide(backlog, case.running, case.box, at, case.rules, NOW)
    assert time.perf_counter() - began < 1, "the benchmark has the exact figure"
