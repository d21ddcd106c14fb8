"""Months of a lab's box, made from seeds, under FIFO, EASY backfill and mlbox: `python -m bench.month`.

Twelve people with habits: they come by day and on weekdays, send sweeps of short jobs, train for days, want two, four
or all eight GPUs, forget time limits, or give more time than they need, as people do (Mu'alem and Feitelson,
Utilization, Predictability, Workloads, and User Runtime Estimates, 2001). mlbox replays the month as
`mlbox simulate` would.

* use: the part of all GPU time between the first and the last submit that went into runs which came to their end;
  the work that a stopped job had to do again counts as idle.
* lost: the part of all GPU time that stood idle while jobs waited that asked for at least so many GPUs ("loss of
  capacity": Zhang, Franke, Moreira, Sivasubramaniam, 2000). Unlike use it does not hang on what is left at the end.
* wait: from submit to the start of the run that came to its end.
* Jain's index (Jain, Chiu, Hawe: A Quantitative Measure of Fairness, DEC-TR-301, 1984), (sum x)^2 / (n sum x^2), over
  users, of x = T/O: T is what a user got in a window of a day, O the max-min fair part of the box for what everybody
  could have used in it. The mean of all days in which more was wanted than there is.
* slowdown: mean over users of their mean bounded slowdown, max(1, (wait + length) / max(length, 10 min)).
"""

import argparse
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import baselines
from bench.baselines import Job, Ran
from mlbox import config
from mlbox.scheduler import traces
from mlbox.scheduler.policy import Rules
from mlbox.scheduler.rules import rules_of

GPUS = 8
HOUR = 3600.0
DAY = 24 * HOUR
DAYS = 30
POPULAR_H = (0.5, 1, 2, 4, 8, 12, 24, 48, 72, 96, 168)
"""Time limits that people write."""
BOUND_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Habit:
    """How somebody uses the box: `visits` a week, each with a number of jobs (least, most) of one size and kind.

    Hours are those of a median job; `spread` is the sigma of the lognormal around it within a visit and between visits.
    """

    user: str
    visits: float
    jobs: tuple[int, int]
    gpus: tuple[int, ...]
    hours: float
    spread: float = 0.5
    no_limit: float = 0.05
    preemptible: float = 0.0


HABITS = (
    Habit(user="ada", visits=4, jobs=(20, 60), gpus=(1,), hours=0.4),
    Habit(user="ben", visits=3, jobs=(30, 90), gpus=(1,), hours=0.25, spread=0.8),
    Habit(user="cai", visits=2, jobs=(10, 40), gpus=(1,), hours=1.0, preemptible=0.5),
    Habit(user="dee", visits=2, jobs=(1, 2), gpus=(1,), hours=30, spread=0.7),
    Habit(user="eva", visits=2, jobs=(1, 3), gpus=(1,), hours=20, spread=0.7, no_limit=0.3),
    Habit(user="fay", visits=1, jobs=(1, 2), gpus=(1,), hours=48, spread=0.4),
    Habit(user="gus", visits=3, jobs=(1, 4), gpus=(2,), hours=6, spread=0.7),
    Habit(user="hal", visits=3, jobs=(1, 3), gpus=(2, 4), hours=4, spread=0.8),
    Habit(user="ida", visits=2, jobs=(1, 2), gpus=(4,), hours=10, spread=0.6),
    Habit(user="jon", visits=1, jobs=(1, 2), gpus=(8,), hours=4, spread=0.6),
    Habit(user="kim", visits=8, jobs=(1, 3), gpus=(1,), hours=0.5, spread=1.0, no_limit=0.6),
    Habit(user="leo", visits=2, jobs=(10, 25), gpus=(1,), hours=3, spread=0.4, preemptible=1.0),
)


def month(seed: int) -> list[Job]:
    """All jobs of the month, in the order of submit."""
    dice = random.Random(seed)
    made = [job for habit in HABITS for job in _jobs_of(habit, dice)]
    made.sort(key=lambda job: (job["submit"], job["user"]))
    return [Job(id=number, **job) for number, job in enumerate(made, 1)]


def _jobs_of(habit: Habit, dice: random.Random) -> Iterator[dict[str, Any]]:
    for _ in range(round(habit.visits * DAYS / 7)):
        at = _moment(dice)
        gpus = dice.choice(habit.gpus)
        hours = habit.hours * dice.lognormvariate(0, habit.spread)
        has_limit = dice.random() >= habit.no_limit
        preemptible = dice.random() < habit.preemptible
        factor = dice.choice((1.1, 1.5, 2.0, 3.0, 5.0, 10.0))
        for _ in range(dice.randint(*habit.jobs)):
            length = hours * HOUR * dice.lognormvariate(0, habit.spread / 3)
            limit = next((h * HOUR for h in POPULAR_H if h >= factor * hours), POPULAR_H[-1] * HOUR)
            limit = limit if has_limit else math.inf
            at += dice.expovariate(1 / 5.0)
            yield {
                "user": habit.user, "submit": round(at), "gpus": gpus, "limit_s": limit, "preemptible": preemptible,
                "length_s": min(max(30.0, round(length)), limit),
            }  # fmt: skip


def _moment(dice: random.Random) -> float:
    """When somebody sits down: by day, seldom at night, and less at weekends."""
    while True:
        at = dice.random() * DAYS * DAY
        hour = at % DAY / HOUR
        likely = 1.0 if 9 <= hour < 19 else 0.4 if 19 <= hour < 23 else 0.05
        if int(at // DAY) % 7 >= 5:
            likely *= 0.3
        if dice.random() < likely:
            return at


def as_trace(jobs: Sequence[Job]) -> bytes:
    """The month as `mlbox simulate` reads it. Jobs of one visit bear one name: their run times are learned."""
    return json.dumps({
        "gpus": [{"memory_mib": 81_920}] * GPUS,
        "jobs": [
            {"id": job.id, "user": job.user, "submit": job.submit, "gpus": job.gpus, "duration": job.length_s,
             "time_limit": None if job.limit_s == math.inf else job.limit_s, "preemptible": job.preemptible,
             "name": f"{job.user}-{job.gpus}"}
            for job in jobs
        ],
    }).encode()  # fmt: skip


def by_mlbox(jobs: Sequence[Job], rules: Rules) -> tuple[list[Ran], int]:
    """The runs that came to their end, and how many were stopped for another job."""
    known = {job.id: job for job in jobs}
    began: dict[int, float] = {}
    ran: list[Ran] = []
    stopped = 0
    for event in traces.replay(traces.loads(as_trace(jobs)), rules).events:
        match event["event"]:
            case "start":
                began[event["job"]] = event["t"]
            case "end":
                ran.append(Ran(job=known[event["job"]], start=began[event["job"]], end=event["t"]))
            case _:
                stopped += 1
    return ran, stopped


def use(ran: Sequence[Ran], until: float) -> float:
    return sum(one.job.gpus * max(0.0, min(one.end, until) - min(one.start, until)) for one in ran) / (GPUS * until)


def lost(ran: Sequence[Ran], until: float) -> float:
    """Idle GPUs, as far as waiting jobs ask for so many, over all GPU time."""
    changes: list[tuple[float, int, int]] = []
    for one in ran:
        size = one.job.gpus
        changes += [(one.job.submit, 0, size), (one.start, size, -size), (one.end, -size, 0)]
    changes.sort()
    busy = wanted = 0
    idle_s = before = 0.0
    for at, held, asked in changes:
        idle_s += min(GPUS - busy, wanted) * (min(at, until) - min(before, until))
        busy, wanted, before = busy + held, wanted + asked, at
    return idle_s / (GPUS * until)


def jain(parts: Sequence[float]) -> float:
    squares = sum(part * part for part in parts)
    return sum(parts) ** 2 / (len(parts) * squares) if squares else 1.0


def fairness(ran: Sequence[Ran], until: float) -> float:
    """Jain's index of the days in which more was wanted than there is, as the head of this file says."""
    days: list[float] = []
    for day in range(math.ceil(until / DAY)):
        begin, end = day * DAY, (day + 1) * DAY
        got: dict[str, float] = {}
        wanted: dict[str, float] = {}
        for one in ran:
            job = one.job
            if job.submit >= end or one.end <= begin:
                continue
            left = job.length_s - max(0.0, begin - one.start) if one.start < begin else job.length_s
            could = min(left, end - max(begin, job.submit))
            wanted[job.user] = wanted.get(job.user, 0.0) + job.gpus * could
            held = max(0.0, min(one.end, end) - max(one.start, begin))
            got[job.user] = got.get(job.user, 0.0) + job.gpus * held
        if sum(wanted.values()) > GPUS * DAY:
            fair = max_min(wanted, GPUS * DAY)
            days.append(jain([got[user] / fair[user] for user in wanted]))
    return statistics.mean(days) if days else 1.0


def max_min(wanted: Mapping[str, float], capacity: float) -> dict[str, float]:
    """Everybody gets what they want, or as much as anybody who gets less than they want."""
    fair: dict[str, float] = {}
    for place, user in enumerate(sorted(wanted, key=wanted.__getitem__)):
        fair[user] = min(wanted[user], capacity / (len(wanted) - place))
        capacity -= fair[user]
    return fair


def p95(values: Sequence[float]) -> float:
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def measured(ran: Sequence[Ran], stopped: int, until: float) -> dict[str, float]:
    waits = [one.start - one.job.submit for one in ran]
    slowdowns: dict[str, list[float]] = {}
    for one, wait in zip(ran, waits, strict=True):
        slow = max(1.0, (wait + one.job.length_s) / max(one.job.length_s, BOUND_S))
        slowdowns.setdefault(one.job.user, []).append(slow)
    return {
        "use": use(ran, until),
        "lost": lost(ran, until),
        "wait mean, h": statistics.mean(waits) / HOUR,
        "wait p95, h": p95(waits) / HOUR,
        "Jain": fairness(ran, until),
        "slowdown": statistics.mean(statistics.mean(values) for values in slowdowns.values()),
        "makespan, d": max(one.end for one in ran) / DAY,
        "stopped": stopped,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=2026, help="of the first month; the next ones have the next seeds")
    parser.add_argument("--months", type=int, default=36)
    parser.add_argument("--config", type=Path, help="mlbox's configuration (default: its defaults)")
    parser.add_argument("--trace", type=Path, help="write the first month as a trace for `mlbox simulate`, and end")
    options = parser.parse_args()
    if options.trace:
        options.trace.write_bytes(as_trace(month(options.seed)))
        return
    rules = rules_of(config.load(options.config))
    report([month(seed) for seed in range(options.seed, options.seed + options.months)], rules)


def report(months: Sequence[Sequence[Job]], rules: Rules) -> None:
    """One table: means over the months, and in how many of them mlbox is better than EASY."""
    policies: dict[str, Callable[[Sequence[Job]], tuple[list[Ran], int]]] = {
        "FIFO": lambda jobs: (baselines.replay(jobs, GPUS, baselines.fifo), 0),
        "EASY": lambda jobs: (baselines.replay(jobs, GPUS, baselines.easy), 0),
        "mlbox": lambda jobs: by_mlbox(jobs, rules),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in policies}
    needed: list[float] = []
    for jobs in months:
        until = max(job.submit for job in jobs)
        needed.append(sum(job.gpus * job.length_s for job in jobs) / (GPUS * until))
        for name, run in policies.items():
            found[name].append(measured(*run(jobs), until))
    count = sum(len(jobs) for jobs in months)
    print(f"{len(months)} months, {count} jobs that need {statistics.mean(needed):.2f} of the box's time")
    print("| | " + " | ".join(found) + " | mlbox/FIFO | mlbox/EASY | better than EASY in |")
    print("|---|" + "---|" * (len(found) + 3))
    for measure in found["mlbox"][0]:
        values = [statistics.mean(one[measure] for one in ones) for ones in found.values()]
        ratios = [f"{values[-1] / value:.2f}" if value else "" for value in values[:-1]]
        pairs = [(ours[measure], easy[measure]) for ours, easy in zip(found["mlbox"], found["EASY"], strict=True)]
        better = sum(ours > easy if measure in ("use", "Jain") else ours < easy for ours, easy in pairs)
        cells = [*(f"{value:.3f}" for value in values), *ratios, f"{better} of {len(months)}"]
        print(f"| {measure} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
