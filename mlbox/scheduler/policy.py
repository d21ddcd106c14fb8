"""In which order waiting jobs are tried: priority, decayed fair share, age, order of submit. Pure: time is a parameter.

    score = priority_weight * priority + fair_share_weight * F + age_weight * min(1, waited / age_max)

`F = 2^(-U/S)` is Slurm's classic fair-share factor (priority_multifactor): U is the user's part of all decayed usage, S
their part of the box. A charge of rate r (weighted GPUs) over [a, b] counts at time t as the integral of
`r * 2^(-(t-x)/half_life)`; running jobs are charged up to now. Only timestamps and rates are kept, so a restart or a
week of downtime changes nothing.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingJob:
    """What deciding about a waiting job needs. `slots` counts CPU slots and is 0 for a job that asks GPUs.

    `eligible_at` is since when only the queue keeps it (None: since its submit); `depends` whether it still waits for
    another job. Of an array with a cap, `array_at_once` elements may hold resources at one time.
    """

    id: int
    uid: int
    user: str
    priority: int
    submitted_at: float
    gpus: int
    slots: int
    project: str = "default"
    gpu_mem_mib: int | None = None
    time_limit_s: float | None = None
    preemptible: bool = False
    eligible_at: float | None = None
    depends: bool = False
    array_id: int | None = None
    array_at_once: int | None = None
    hold: bool = False
    not_before: float | None = None
    kind: str = ""
    """What its run time is learned under: the job's program, without its arguments."""
    name: str = ""

    @property
    def wants_gpu(self) -> bool:
        return self.gpus > 0 or self.gpu_mem_mib is not None

    @property
    def since(self) -> float:
        return self.submitted_at if self.eligible_at is None else self.eligible_at

    @property
    def size(self) -> int:
        """How many units of its pool (GPUs or CPU slots) it takes."""
        return self.slots or self.gpus or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningJob:
    """What deciding needs of a job that holds resources. `rate` is what it is charged each second.

    `backfilled`: it was started while a job before it was blocked. `stopping`: it was asked to end.
    """

    id: int
    user: str
    priority: int
    started_at: float
    project: str = "default"
    gpu_uuids: tuple[str, ...] = ()
    gpu_mem_mib: int | None = None
    slots: int = 0
    time_limit_s: float | None = None
    preemptible: bool = False
    backfilled: bool = False
    stopping: bool = False
    array_id: int | None = None
    rate: float = 0.0
    kind: str = ""
    name: str = ""

    @property
    def gpus(self) -> int:
        return len(self.gpu_uuids)


def elements_running(running: Iterable[RunningJob]) -> dict[int, int]:
    """How many elements of each array hold resources."""
    counts: dict[int, int] = {}
    for job in running:
        if job.array_id is not None:
            counts[job.array_id] = counts.get(job.array_id, 0) + 1
    return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How much the parts of a rank count. By default each step of priority beats everything after it, and age decides
    between users whose factors differ by less than a hundredth."""

    priority: float = 1000.0
    fair_share: float = 100.0
    age: float = 1.0
    age_max_s: float = 7 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """The most that a user or a project may have. None: no limit. `gpu_hours` is counted over the last `window_s`."""

    gpus: int | None = None
    waiting: int | None = None
    gpu_hours: float | None = None
    window_s: float = 7 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the configuration says about scheduling; the defaults are those of `config.SchedulerConfig`.

    `reservations` is how many blocked jobs get a planned start that nobody behind them may delay. `min_run_s` is how
    long a preemptible job runs before it may be stopped for another, `grace_s` how long one that stops may take.
    """

    weights: Weights = field(default_factory=Weights)
    half_life_s: float = 7 * 86_400.0
    shares: Mapping[str, float] = field(default_factory=dict[str, float])
    reservations: int = 8
    min_run_s: float = 300.0
    grace_s: float = 30.0
    cpu_slot_weight: float = 0.05
    user_quota: Quota = field(default_factory=Quota)
    user_quotas: Mapping[str, Quota] = field(default_factory=dict[str, Quota])
    project_quotas: Mapping[str, Quota] = field(default_factory=dict[str, Quota])

    def quota_of_user(self, user: str) -> Quota:
        return self.user_quotas.get(user, self.user_quota)

    def quota_of_project(self, project: str) -> Quota | None:
        return self.project_quotas.get(project)

    @property
    def has_quotas(self) -> bool:
        return bool(self.user_quotas or self.project_quotas) or self.user_quota != Quota()


def charge(rate: float, began: float, ended: float, now: float, half_life_s: float) -> float:
    """What `rate` over [began, ended] counts at `now`: the integral of rate * 2^(-(now-x)/half_life). Rate-seconds."""
    if ended <= began or rate <= 0:
        return 0.0
    scale = half_life_s / math.log(2)
    return rate * scale * (2.0 ** (-(now - ended) / half_life_s) - 2.0 ** (-(now - began) / half_life_s))


class Ledger:
    """Decayed usage of ended attempts by user, in weighted GPU-seconds; running ones are added by `standing`."""

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._used: dict[str, tuple[float, float]] = {}
        """By user: an amount, and the moment for which it holds."""

    @property
    def half_life_s(self) -> float:
        return self._half_life_s

    def add(self, user: str, rate: float, began: float, ended: float) -> None:
        """Charge an attempt that has ended."""
        amount, at = self._used.get(user, (0.0, ended))
        at_new = max(at, ended)
        amount *= 2.0 ** (-(at_new - at) / self._half_life_s)
        self._used[user] = (amount + charge(rate, began, ended, at_new, self._half_life_s), at_new)

    def put(self, user: str, amount: float, at: float) -> None:
        """Set what a user has used by `at`, already decayed."""
        self._used[user] = (amount, at)

    def used(self, user: str, now: float) -> float:
        amount, at = self._used.get(user, (0.0, now))
        return amount * 2.0 ** (-(now - at) / self._half_life_s)

    @property
    def users(self) -> Iterable[str]:
        return self._used.keys()

    def copy(self) -> "Ledger":
        twin = Ledger(self._half_life_s)
        twin._used = dict(self._used)
        return twin


class Hours:
    """GPU-hours within the windows of quotas, not decayed: by user (`name`) and by project (`@name`)."""

    def __init__(self, rules: Rules) -> None:
        quotas = (rules.user_quota, *rules.user_quotas.values(), *rules.project_quotas.values())
        self._rules = rules
        self._longest_s = max((quota.window_s for quota in quotas if quota.gpu_hours is not None), default=0.0)
        self._ended: deque[tuple[str, str, int, float, float]] = deque()

    @property
    def longest_s(self) -> float:
        """The longest window of a quota of hours; 0 where there is none."""
        return self._longest_s

    def add(self, user: str, project: str, gpus: int, began: float, ended: float) -> None:
        """Note an attempt that has ended; nothing is kept where no quota asks for it."""
        if self._longest_s and gpus:
            self._ended.append((user, project, gpus, began, ended))

    def used(self, running: Iterable[RunningJob], now: float) -> Mapping[str, float]:
        """GPU-hours of everybody, each within the window of their own quota."""
        if not self._longest_s:
            return {}
        while self._ended and self._ended[0][4] < now - self._longest_s:
            self._ended.popleft()
        spans = [*self._ended, *((job.user, job.project, job.gpus, job.started_at, now) for job in running)]
        hours: dict[str, float] = {}
        for user, project, gpus, began, ended in spans:
            quota = self._rules.quota_of_project(project)
            for key, window_s in (
                (user, self._rules.quota_of_user(user).window_s),
                ("@" + project, quota.window_s if quota else 0.0),
            ):
                seconds = min(ended, now) - max(began, now - window_s)
                if seconds > 0:
                    hours[key] = hours.get(key, 0.0) + gpus * seconds / 3600
        return hours


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where everybody stands at one moment. `used` is decayed usage in weighted GPU-seconds, by user."""

    used: Mapping[str, float]
    total: float
    shares: Mapping[str, float]
    shares_total: float
    factors: dict[str, float]

    def share(self, user: str) -> float:
        """S: the user's part of the box."""
        return self.shares.get(user, 1.0) / self.shares_total if self.shares_total else 1.0

    def factor(self, user: str) -> float:
        """F = 2^(-U/S), 1 for somebody who used nothing."""
        known = self.factors.get(user)
        if known is None:
            used = self.used.get(user, 0.0)
            share = self.share(user)
            known = 1.0 if used <= 0 or self.total <= 0 else 2.0 ** -(used / self.total / share) if share > 0 else 0.0
            self.factors[user] = known
        return known


def standing(
    ledger: Ledger, running: Iterable[RunningJob], waiting_users: Iterable[str], rules: Rules, now: float
) -> Standing:
    """Everybody's decayed usage at `now`, running jobs charged up to now, and their shares of the box.

    The box is shared by those who use it, have used it lately or wait for it.
    """
    used = {user: ledger.used(user, now) for user in ledger.users}
    for job in running:
        extra = charge(job.rate, job.started_at, now, now, rules.half_life_s)
        used[job.user] = used.get(job.user, 0.0) + extra
    users = used.keys() | set(waiting_users)
    return Standing(
        used=used,
        total=math.fsum(used.values()),
        shares=rules.shares,
        shares_total=math.fsum(rules.shares.get(user, 1.0) for user in users),
        factors={},
    )


def score(priority: int, factor: float, waited_s: float, weights: Weights) -> float:
    """What a job is worth: the highest is tried first; equal ones in the order of submit."""
    age = min(1.0, max(0.0, waited_s) / weights.age_max_s) if weights.age_max_s else 0.0
    return weights.priority * priority + weights.fair_share * factor + weights.age * age


@dataclass(frozen=True, slots=True, kw_only=True)
class RankParts:
    """The parts of a job's rank, for people: usage in weighted GPU-hours, shares and factors from 0 to 1."""

    priority: int
    fair_share: float
    usage_gpu_hours: float
    usage_share: float
    share: float
    age_s: float
    age: float
    score: float
    position: int | None


def rank_parts(job: WaitingJob, at: Standing, weights: Weights, now: float, position: int | None) -> RankParts:
    """How `score` comes about for one job."""
    used = at.used.get(job.user, 0.0)
    age_s = max(0.0, now - job.since)
    return RankParts(
        priority=job.priority,
        fair_share=at.factor(job.user),
        usage_gpu_hours=used / 3600,
        usage_share=used / at.total if at.total > 0 else 0.0,
        share=at.share(job.user),
        age_s=age_s,
        age=min(1.0, age_s / weights.age_max_s) if weights.age_max_s else 0.0,
        score=score(job.priority, at.factor(job.user), age_s, weights),
        position=position,
    )


def barred(job: WaitingJob, now: float) -> str | None:
    """Why `job` may not start yet, whatever is free; None when it may."""
    if job.hold:
        return "it is held: release it when it may start"
    if job.depends:
        return "it waits for the end of the jobs that it depends on"
    if job.not_before is not None and job.not_before > now:
        return f"it may not start before {datetime.fromtimestamp(job.not_before, UTC):%Y-%m-%d %H:%M:%S} UTC"
    return None
