"""The backlog agrees with a plain sorted list, whatever comes, goes and waits for its time."""

import math

from hypothesis import given
from hypothesis import strategies as st

from mlbox.scheduler.backlog import Backlog
from mlbox.scheduler.policy import WaitingJob, barred, rank

jobs = st.builds(
    lambda number, priority, gpus, hold, not_before: WaitingJob(
        id=number,
        uid=1000,
        user="ann",
        priority=priority,
        submitted_at=0.0,
        gpus=gpus,
        slots=0 if gpus else 1,
        hold=hold,
        not_before=not_before,
    ),
    st.integers(1, 12),
    st.integers(-2, 2),
    st.integers(0, 2),
    st.booleans(),
    st.none() | st.integers(1, 20).map(float),
)
steps = st.lists(
    st.tuples(st.just("put"), jobs)
    | st.tuples(st.just("drop"), st.integers(1, 12))
    | st.tuples(st.just("later"), st.integers(1, 5))
    | st.tuples(st.just("replace"), st.lists(jobs, max_size=6, unique_by=lambda job: job.id)),
    max_size=30,
)


def ids(jobs: "list[WaitingJob]") -> list[int]:
    return [job.id for job in jobs]


def check(backlog: Backlog, model: dict[int, WaitingJob], now: float) -> None:
    ready = sorted((job for job in model.values() if barred(job, now) is None), key=rank)
    aside = sorted((job for job in model.values() if barred(job, now)), key=lambda job: job.id)
    gpu_line, slot_line = [job for job in ready if job.gpus], [job for job in ready if not job.gpus]
    assert len(backlog) == len(model)
    assert ids(list(backlog.gpu_line())) == ids(gpu_line)
    assert ids(list(backlog.slot_line())) == ids(slot_line)
    for limit in (0, 1, 3, 100):
        assert ids(backlog.ordered(limit)) == ids([*ready, *aside])[:limit]
    for position, job in enumerate(ready, 1):
        assert backlog.position(job) == position
        assert backlog.ahead(job) == ids(gpu_line if job.gpus else slot_line).index(job.id)
    for job in aside:
        assert backlog.position(job) is None
    for number in range(1, 13):
        assert backlog.get(number) == model.get(number)
    due = [job.not_before for job in aside if not job.hold and job.not_before is not None]
    assert backlog.next_due <= min(due, default=math.inf), "nobody's time is slept through"


@given(steps)
def test_it_agrees_with_a_sorted_list(steps: list[tuple[str, object]]) -> None:
    backlog, model, now = Backlog(), dict[int, WaitingJob](), 0.0
    for step, what in steps:
        if isinstance(what, WaitingJob):
            backlog.put(what, now)
            model[what.id] = what
        elif isinstance(what, list):
            backlog.replace_all(what, now)
            model = {job.id: job for job in what}
        elif isinstance(what, int) and step == "drop":
            backlog.drop(what)
            model.pop(what, None)
        elif isinstance(what, int):
            now += what
        backlog.admit(now)
        check(backlog, model, now)


def test_a_job_comes_into_its_line_when_its_time_comes() -> None:
    backlog = Backlog()
    backlog.put(WaitingJob(id=1, uid=1, user="a", priority=0, submitted_at=0, gpus=0, slots=1, not_before=5.0), 0.0)
    assert backlog.next_due == 5.0
    backlog.admit(4.9)
    assert not list(backlog.slot_line())
    backlog.admit(5.0)
    assert ids(list(backlog.slot_line())) == [1]
    assert backlog.next_due == math.inf
