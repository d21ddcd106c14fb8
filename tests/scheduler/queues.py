"""Boxes, queues and running jobs for the tests of decisions. Times are whole minutes after `NOW`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hypothesis import strategies as st

from mlbox.scheduler.backfill import Plan, decide
from mlbox.scheduler.backlog import Backlog
from mlbox.scheduler.placement import Box, GpuView, Reservation, Scores
from mlbox.scheduler.policy import Ledger, Quota, Rules, RunningJob, Standing, WaitingJob, score, standing

NOW = 1_800_000_000.0
MINUTE = 60.0
MEMORY = 100
"""MiB of each GPU."""
GRACE, MIN_RUN = MINUTE, 5 * MINUTE
FOREIGN = "bob's python (pid 7) holds 642 MiB"


def waiting(number: int, *, user: str = "ann", priority: int = 0, ago: float = 0, **asked: object) -> WaitingJob:
    """A job that asks one GPU, unless it says otherwise, and came `ago` minutes ago; `limit` is minutes."""
    known: dict[str, object] = {"uid": 1000, "gpus": 1, "slots": 0, **asked}
    if known.get("gpu_mem_mib") is not None or known["slots"]:
        known["gpus"] = 0
    limit = known.pop("limit", None)
    return WaitingJob(
        id=number,
        user=user,
        priority=priority,
        submitted_at=NOW - ago * MINUTE,
        time_limit_s=None if limit is None else limit * MINUTE,  # pyright: ignore  # a number of minutes
        **known,  # pyright: ignore[reportArgumentType]  # fields by name
    )


def running(
    number: int, on: Sequence[int] = (), *, user: str = "xen", priority: int = 0, ago: float = 0, **more: object
) -> RunningJob:
    """A job that started `ago` minutes ago on the GPUs at these places; `limit` is minutes."""
    limit = more.pop("limit", None)
    return RunningJob(
        id=number,
        user=user,
        priority=priority,
        started_at=NOW - ago * MINUTE,
        gpu_uuids=tuple(f"GPU-{place}" for place in on),
        time_limit_s=None if limit is None else limit * MINUTE,  # pyright: ignore  # a number of minutes
        **more,  # pyright: ignore[reportArgumentType]  # fields by name
    )


def gpu(place: int, busy: str | None = None, **more: object) -> GpuView:
    known: dict[str, object] = {"memory_mib": MEMORY, **more}
    return GpuView(uuid=f"GPU-{place}", index=place, busy=busy, **known)  # pyright: ignore[reportArgumentType]


def box(
    gpus: int | Iterable[GpuView], *, slots: int = 4, scores: Scores = (), windows: Iterable[Reservation] = ()
) -> Box:
    views = tuple(gpu(place) for place in range(gpus)) if isinstance(gpus, int) else tuple(gpus)
    return Box(gpus=views, slots=slots, slots_free=slots, scores=scores, reservations=tuple(windows))


def window(on: Sequence[int], start: float, end: float, *, user: str | None = None) -> Reservation:
    """The GPUs at these places are kept from minute `start` to minute `end`."""
    uuids = tuple(f"GPU-{place}" for place in on)
    return Reservation(
        id=1, name="w", gpu_uuids=uuids, starts_at=NOW + start * MINUTE, ends_at=NOW + end * MINUTE, for_user=user
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that a decision looks at."""

    box: Box
    queue: Sequence[WaitingJob] = ()
    running: Sequence[RunningJob] = ()
    rules: Rules = field(default_factory=lambda: Rules(grace_s=GRACE, min_run_s=MIN_RUN))
    hours: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def standing(self) -> Standing:
        return standing(Ledger(1e6), self.running, {job.user for job in self.queue}, self.rules, NOW)

    @property
    def backlog(self) -> Backlog:
        backlog = Backlog()
        for job in self.queue:
            backlog.put(job, NOW)
        counts: dict[int, int] = {}
        for job in self.running:
            if job.array_id is not None:
                counts[job.array_id] = counts.get(job.array_id, 0) + 1
        backlog.admit(NOW, counts)
        return backlog

    def decide(self) -> Plan:
        return decide(self.backlog, self.running, self.box, self.standing, self.rules, NOW, gpu_hours=self.hours)

    def in_line(self) -> list[WaitingJob]:
        """The jobs that may start, in the order in which they are tried."""
        backlog, at = self.backlog, self.standing
        ready = [job for job in self.queue if backlog.position(job, at, self.rules.weights, NOW) is not None]
        return sorted(
            ready,
            key=lambda job: (
                -score(job.priority, at.factor(job.user), NOW - job.since, self.rules.weights), job.since, job.id
            ),
        )  # fmt: skip


LIMITS = st.sampled_from([None, 1, 4, 7, 10, 20, 60])


@st.composite
def boxes_with_jobs(draw: st.DrawFn) -> tuple[Box, list[RunningJob]]:
    """Each GPU is free, held whole, shared, foreign, clearing or closed."""
    views, holders, alone = [], list[RunningJob](), list[int]()

    def job(on: Sequence[int], **more: object) -> RunningJob:
        return running(
            1000 + len(holders),
            on,
            user=draw(st.sampled_from(["xen", "ann"])),
            priority=draw(st.integers(0, 2)),
            ago=draw(st.sampled_from([0, 3, 5, 30])),
            limit=draw(LIMITS),
            preemptible=draw(st.booleans()),
            backfilled=draw(st.booleans()),
            stopping=draw(st.sampled_from([False, False, False, True])),
            **more,
        )

    for place in range(draw(st.integers(1, 6))):
        state = draw(st.sampled_from(["free", "free", "held", "held", "shared", "foreign", "clearing", "closed"]))
        more = {"slice": draw(st.sampled_from([False] * 7 + [True])), "closed": state == "closed"}
        busy, shared, clears = None, None, None
        if state == "held" or (state == "closed" and draw(st.booleans())):
            alone.append(place)
            busy = draw(st.sampled_from([None, "leased"]))
        elif state == "closed":
            busy = "drained"
        elif state == "shared":
            parts = draw(st.lists(st.integers(10, 60), min_size=1, max_size=3).filter(lambda all_: sum(all_) <= MEMORY))
            holders += [job([place], gpu_mem_mib=part) for part in parts]
            shared = MEMORY - sum(parts)
        elif state != "free":
            busy, clears = FOREIGN, 60.0 if state == "clearing" else None
        views.append(gpu(place, busy, shared_free_mib=shared, clears_s=clears, **more))
    while alone:
        size = draw(st.integers(1, min(3, len(alone))))
        holders.append(job(alone[:size]))
        del alone[:size]
    for number, holder in enumerate(holders):
        holders[number] = replace(holder, id=1000 + number)
    windows = []
    if draw(st.sampled_from([False, False, True])):
        on = draw(st.lists(st.integers(0, len(views) - 1), min_size=1, unique=True))
        start = draw(st.integers(-5, 15))
        user = draw(st.sampled_from([None, "ann", "bob"]))
        windows = [window(on, start, start + draw(st.integers(6, 30)), user=user)]
    return box(views, windows=windows), holders


@st.composite
def waiting_jobs(draw: st.DrawFn) -> list[WaitingJob]:
    jobs: list[WaitingJob] = []
    for number in range(1, draw(st.integers(1, 9)) + 1):
        kind = draw(st.sampled_from(["whole", "whole", "whole", "share", "slots"]))
        asked: dict[str, object] = {
            "whole": {"gpus": draw(st.integers(1, 5))},
            "share": {"gpu_mem_mib": draw(st.integers(20, 100))},
            "slots": {"slots": draw(st.integers(1, 5))},
        }[kind]
        array = draw(st.sampled_from([None, None, None, 1]))
        jobs.append(
            waiting(
                number,
                user=draw(st.sampled_from(["ann", "bob", "cid"])),
                priority=draw(st.sampled_from([0, 0, 1, 2])),
                ago=draw(st.sampled_from([0, 1, 4, 90])),
                limit=draw(LIMITS),
                preemptible=draw(st.sampled_from([False, False, True])),
                project=draw(st.sampled_from(["default", "vision"])),
                array_id=array,
                array_at_once=None if array is None else 2,
                hold=draw(st.sampled_from([False] * 5 + [True])),
                **asked,
            )
        )
    return jobs


@st.composite
def cases(draw: st.DrawFn) -> Case:
    seen, holders = draw(boxes_with_jobs())
    few = st.none() | st.none() | st.integers(0, 4)
    quotas: dict[str, object] = {}
    if draw(st.sampled_from([False, True])):
        quotas = {
            "user_quotas": {"ann": Quota(gpus=draw(few), gpu_hours=draw(st.none() | st.just(10.0)))},
            "project_quotas": {"vision": Quota(gpus=draw(few))},
        }
    return Case(
        box=seen,
        queue=draw(waiting_jobs()),
        running=holders,
        rules=Rules(grace_s=GRACE, min_run_s=MIN_RUN, reservations=draw(st.integers(1, 4)), **quotas),  # pyright: ignore
        hours={"ann": draw(st.sampled_from([0.0, 9.0, 10.0]))},
    )
