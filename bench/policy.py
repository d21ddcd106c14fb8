"""How long a scheduling pass takes over long queues, and `mlbox simulate` over 100,000 jobs: `python -m bench.policy`.

A pass is what the daemon does when a job ends: let in whose time has come, weigh everybody's usage, decide. Each queue
is made to be hard in its own way. Every figure is printed beside the one that the project promises.
Times are CPU times: all of this is computing on one thread, and other people's load must not count.
"""

import argparse
import cProfile
import json
import pstats
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from mlbox.scheduler import policy, traces
from mlbox.scheduler.backfill import Plan, decide
from mlbox.scheduler.backlog import Backlog
from mlbox.scheduler.placement import Box, GpuView, Reservation, pair_score, score_matrix
from mlbox.scheduler.policy import Ledger, Quota, Rules, RunningJob, WaitingJob

NOW = 1_000_000.0
HOUR = 3600.0
PASS_MS = {10_000: 20.0, 100_000: 250.0}
"""Promised for one pass, by the number of waiting jobs."""
SIMULATE_S = 60.0
LIMITS = (0.5 * HOUR, HOUR, 4 * HOUR, 12 * HOUR, 24 * HOUR, 72 * HOUR, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One queue on one box, ready to be decided about."""

    name: str
    jobs: Sequence[WaitingJob]
    running: Sequence[RunningJob]
    box: Box
    rules: Rules = field(default_factory=Rules)


def box_of(count: int, *, pairs: bool = False, windows: tuple[Reservation, ...] = ()) -> Box:
    """`count` GPUs; with `pairs` 0-1, 2-3, ... are joined by four NVLinks and each half hangs on one CPU."""
    links = {
        (a, b): pair_score("SYS" if (a < count // 2) != (b < count // 2) else "PIX", 4 if a // 2 == b // 2 else 0)
        for a in range(count)
        for b in range(a + 1, count)
    }
    return Box(
        gpus=tuple(GpuView(uuid=f"GPU-{n}", index=n, busy=None, memory_mib=81_920) for n in range(count)),
        slots=32,
        slots_free=32,
        scores=score_matrix(count, links) if pairs else (),
        reservations=windows,
    )


def waiting(number: int, dice: random.Random, *, users: int = 12, **given: object) -> WaitingJob:
    """A job like many: mostly one GPU, one of few time limits, submitted within the last days."""
    job = WaitingJob(
        id=number, uid=1000, user=f"user{dice.randrange(users)}", project=f"project{dice.randrange(3)}",
        priority=dice.choice((0, 0, 0, 0, 1, -1)), submitted_at=NOW - dice.random() * 72 * HOUR,
        gpus=dice.choices((1, 2, 4, 8), (70, 15, 10, 5))[0], slots=0, time_limit_s=dice.choice(LIMITS),
        preemptible=dice.random() < 0.2,
    )  # fmt: skip
    return replace(job, **given)  # type: ignore[arg-type]  # what each case fixes


def running(places: Sequence[int], *, limit: float | None = 24 * HOUR, **given: object) -> list[RunningJob]:
    """One job on each of these GPUs."""
    return [
        replace(
            RunningJob(
                id=10**9 + n, user=f"user{n}", priority=0, started_at=NOW - n * 600.0 - 600.0,
                gpu_uuids=(f"GPU-{n}",), time_limit_s=limit, rate=1.0,
            ),
            **given,  # type: ignore[arg-type]  # as above
        )
        for n in places
    ]  # fmt: skip


def cases(size: int) -> list[Callable[[], Case]]:
    """Makers of every queue with `size` jobs; one is in memory at a time."""
    dice = random.Random(7)

    def mixed(name: str, busy: Sequence[int], gpus: int = 8, pairs: bool = False, **given: object) -> Case:
        jobs = [waiting(n, dice, **given) for n in range(1, size + 1)]  # type: ignore[arg-type]  # as in `waiting`
        return Case(name=name, jobs=jobs, running=running(busy), box=box_of(gpus, pairs=pairs))

    def own_limits(gpus: int = 8, pairs: bool = False) -> Case:
        """Half the GPUs are idle but planned for a wide job; every other job is too long, and has its own limit."""
        rest = [waiting(n, dice, gpus=1, preemptible=False, time_limit_s=48 * HOUR + n) for n in range(2, size + 1)]
        head = waiting(1, dice, gpus=gpus, priority=5, time_limit_s=HOUR)
        what = f"half idle but reserved, own limits, {gpus} GPUs{' in pairs' if pairs else ''}"
        return Case(name=what, jobs=[head, *rest], running=running(range(gpus // 2)), box=box_of(gpus, pairs=pairs))

    def last_fits() -> Case:
        """The same, but the job of the lowest rank is the only one that fits."""
        case = own_limits()
        last = waiting(size + 1, dice, gpus=1, priority=-100, time_limit_s=60.0)
        return replace(case, name="the same, only the last one fits", jobs=[*case.jobs, last])

    def quotas() -> Case:
        case = mixed("quotas on, most users at theirs", range(4), users=200)
        rules = Rules(user_quota=Quota(gpus=1, gpu_hours=100.0), project_quotas={"project1": Quota(gpus=4)})
        return replace(case, rules=rules, running=running(range(4), user="user0", project="project1"))

    def everybody_at_quota() -> Case:
        """All but one of many users hold nothing and may hold nothing: each group has to be looked at."""
        case = mixed("quotas on, nobody may start, 1,000 users", range(1), users=1000, gpus=8)
        jobs = [replace(job, gpus=2) for job in case.jobs]
        return replace(case, jobs=jobs, rules=Rules(user_quota=Quota(gpus=1)))

    def array(cap: int | None) -> Case:
        jobs = [
            waiting(n, dice, user="user1", project="project1", priority=0, gpus=1, submitted_at=NOW - HOUR,
                    time_limit_s=None, array_id=1, array_at_once=cap, preemptible=False)
            for n in range(1, size + 1)
        ]  # fmt: skip
        what = "one array" if cap is None else f"one array, {cap} at once"
        return Case(name=what, jobs=jobs, running=running(range(4)), box=box_of(8))

    def preemptive() -> Case:
        case = mixed("all GPUs held by preemptible jobs, 16 GPUs in pairs", (), gpus=16, pairs=True)
        holders = running(range(16), preemptible=True, backfilled=True)
        head = waiting(size + 1, dice, gpus=8, priority=50, preemptible=False)
        return replace(case, jobs=[*case.jobs, head], running=holders)

    def windows() -> Case:
        window = Reservation(
            id=1, name="class", gpu_uuids=tuple(f"GPU-{n}" for n in range(4, 8)), starts_at=NOW + 60.0,
            ends_at=NOW + 8 * HOUR, for_project="project9",
        )  # fmt: skip
        case = mixed("half idle but kept by a reservation", range(4))
        return replace(case, box=box_of(8, windows=(window,)))

    def shares() -> Case:
        jobs = [waiting(n, dice, gpus=0, gpu_mem_mib=1024 * dice.randint(2, 40)) for n in range(1, size + 1)]
        return Case(name="shares of GPUs by memory", jobs=jobs, running=running(range(4)), box=box_of(8))

    return [
        lambda: mixed("mixed, all GPUs busy", range(8)),
        lambda: mixed("mixed, half the GPUs idle", range(4)),
        lambda: mixed("mixed, all GPUs idle", ()),
        lambda: mixed("mixed, half idle, 16 GPUs in pairs", range(0, 16, 2), gpus=16, pairs=True),
        lambda: mixed("mixed, all idle, 16 GPUs in pairs", (), gpus=16, pairs=True),
        own_limits,
        lambda: own_limits(16, pairs=True),
        last_fits,
        lambda: mixed("1,000 users, half the GPUs idle", range(4), users=1000),
        lambda: array(None),
        lambda: array(3),
        quotas,
        everybody_at_quota,
        preemptive,
        windows,
        shares,
    ]


def one_pass(case: Case, backlog: Backlog, ledger: Ledger) -> Plan:
    """What the daemon does for one event."""
    backlog.admit(NOW)
    standing = policy.standing(ledger, case.running, backlog.users, case.rules, NOW)
    return decide(backlog, case.running, case.box, standing, case.rules, NOW)


def filled(case: Case) -> tuple[Backlog, Ledger]:
    backlog = Backlog()
    backlog.replace_all(case.jobs, NOW)
    ledger = Ledger(case.rules.half_life_s)
    for n, user in enumerate(sorted(backlog.users)):
        ledger.put(user, (n % 17) * 10 * HOUR, NOW)
    return backlog, ledger


def report_passes(size: int, rounds: int, *, profile: bool) -> None:
    promised = PASS_MS.get(size, 250.0 * size / 100_000)
    for make in cases(size):
        case = make()
        backlog, ledger = filled(case)
        took: list[float] = []
        for _ in range(rounds):
            began = time.process_time()
            plan = one_pass(case, backlog, ledger)
            took.append(1000 * (time.process_time() - began))
        line(f"{size:,} waiting: {case.name}", f"{statistics.median(took):.2f} ms", promised, statistics.median(took),
             f"{len(plan.starts)} start, {len(plan.gpus.reserved)} planned")  # fmt: skip
        if profile:
            profiled(lambda case=case, backlog=backlog, ledger=ledger: one_pass(case, backlog, ledger))


def trace(count: int, *, at_once: bool) -> bytes:
    """`count` jobs for 8 GPUs, all there at the beginning, or coming as fast as they can be worked off."""
    dice = random.Random(11)
    jobs: list[dict[str, object]] = []
    now = 0.0
    for number in range(count):
        gpus = dice.choices((1, 2, 4, 8), (75, 12, 8, 5))[0]
        duration = round(dice.lognormvariate(7.0, 1.2), 1)
        limit = None if dice.random() < 0.1 else round(duration * dice.uniform(1.05, 6.0) / 600 + 1) * 600
        jobs.append({
            "id": number, "user": f"user{dice.randrange(12)}", "submit": 0.0 if at_once else round(now, 1),
            "gpus": gpus, "duration": duration, "time_limit": limit, "preemptible": dice.random() < 0.1,
        })  # fmt: skip
        now += duration * gpus / 8 / 0.95
    return json.dumps({"gpus": [{"memory_mib": 81_920}] * 8, "jobs": jobs}).encode()


def report_simulate(count: int, *, profile: bool) -> None:
    for at_once, what in ((False, "coming as they are worked off"), (True, "all waiting from the beginning")):
        read = traces.loads(trace(count, at_once=at_once))
        began = time.process_time()
        summary = traces.replay(read, Rules()).summary
        took = time.process_time() - began
        line(f"simulate {count:,} jobs, 8 GPUs, {what}", f"{took:.1f} s", SIMULATE_S * count / 100_000, took,
             f"{summary['gpu_busy_fraction']:.3f} of the GPU time used")  # fmt: skip
        if profile:
            profiled(lambda read=read: traces.replay(read, Rules()))


def profiled(what: Callable[[], object]) -> None:
    with cProfile.Profile() as recorder:
        what()
    pstats.Stats(recorder).sort_stats("tottime").print_stats(12)


def line(name: str, value: str, promised: float, measured: float, beside: str) -> None:
    print(f"{name:<74} {value:>11}  promised < {promised:g}, x{measured / promised:.2f}   {beside}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waiting", type=int, nargs="*", default=[10_000, 100_000], help="lengths of the queue")
    parser.add_argument("--rounds", type=int, default=7, help="passes over each queue, of which the median counts")
    parser.add_argument("--simulate", type=int, default=100_000, help="jobs of the simulated traces; 0: none")
    parser.add_argument("--profile", action="store_true", help="where the time goes, after each figure")
    options = parser.parse_args()
    for size in options.waiting:
        report_passes(size, options.rounds, profile=options.profile)
    if options.simulate:
        report_simulate(options.simulate, profile=options.profile)


if __name__ == "__main__":
    main()
