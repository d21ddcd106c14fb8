"""The backlog agrees with a plain sorted list, whatever comes, goes, waits for its time or for its array."""

import math
from collections.abc import Iterator

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mlbox.scheduler.backlog import Backlog, Line, shape_of
from mlbox.scheduler.policy import Ledger, Rules, Standing, WaitingJob, Weights, barred, score, standing

CAP = 2
NUMBERS = st.integers(1, 25)
WEIGHTS = Weights(age_max_s=10.0)


def waiting(number: int, *, user: str = "ann", priority: int = 0, since: float = 0.0, **asked: object) -> WaitingJob:
    known = {"uid": 1000, "gpus": 1, "slots": 0, **asked}
    return WaitingJob(id=number, user=user, priority=priority, submitted_at=since, **known)  # pyright: ignore[reportArgumentType]


@st.composite
def jobs(draw: st.DrawFn) -> WaitingJob:
    gpus = draw(st.integers(0, 2))
    array = draw(st.sampled_from([None, None, 100, 200]))
    return waiting(
        draw(NUMBERS),
        user=draw(st.sampled_from(["ann", "bob", "cid"])),
        project=draw(st.sampled_from(["default", "vision"])),
        priority=draw(st.integers(-1, 1)),
        since=float(draw(st.integers(0, 12))),
        gpus=gpus,
        slots=0 if gpus else draw(st.integers(1, 2)),
        time_limit_s=draw(st.sampled_from([None, 60.0])),
        hold=draw(st.sampled_from([False, False, True])),
        depends=draw(st.sampled_from([False, False, True])),
        not_before=draw(st.none() | st.integers(1, 20).map(float)),
        array_id=array,
        array_at_once=None if array is None else draw(st.sampled_from([CAP])),
    )


class BacklogBesideASortedList(RuleBasedStateMachine):
    """`lined` is what is in line by the model; of a capped array the first waiting ones come into line, and stay."""

    def __init__(self) -> None:
        super().__init__()
        self.backlog = Backlog()
        self.model: dict[int, WaitingJob] = {}
        self.in_line: set[int] = set()
        self.running: dict[int, int] = {}
        self.ledger = Ledger(1000.0)
        self.now = 0.0

    @rule(job=jobs())
    def put(self, job: WaitingJob) -> None:
        self.backlog.put(job, self.now)
        self.model[job.id] = job
        self.in_line.discard(job.id)

    @rule(number=NUMBERS)
    def drop(self, number: int) -> None:
        self.backlog.drop(number)
        self.model.pop(number, None)
        self.in_line.discard(number)

    @rule(array=st.sampled_from([100, 200]), count=st.integers(0, 2))
    def run_elements(self, array: int, count: int) -> None:
        self.running[array] = count

    @rule(seconds=st.integers(1, 5))
    def pass_time(self, seconds: int) -> None:
        self.now += seconds

    @rule(user=st.sampled_from(["ann", "bob"]), used=st.floats(0, 1e6))
    def use(self, user: str, used: float) -> None:
        self.ledger.put(user, used, self.now)

    @rule(many=st.lists(jobs(), max_size=8, unique_by=lambda job: job.id))
    def replace_all(self, many: list[WaitingJob]) -> None:
        self.backlog.replace_all(many, self.now)
        self.model = {job.id: job for job in many}
        self.in_line.clear()

    def admit(self) -> None:
        self.backlog.admit(self.now, self.running)
        may = [job for job in self.model.values() if barred(job, self.now) is None]
        for job in sorted(may, key=lambda job: (job.since, job.id)):
            if job.array_id is None:
                self.in_line.add(job.id)
            elif job.id not in self.in_line:
                same = sum(self.model[one].array_id == job.array_id for one in self.in_line)
                if same + self.running.get(job.array_id, 0) < CAP:
                    self.in_line.add(job.id)

    @invariant()
    def agrees(self) -> None:
        self.admit()
        at = standing(self.ledger, [], self.backlog.users, Rules(), self.now)
        ready = self._sorted(at, (self.model[number] for number in self.in_line))
        backlog, now = self.backlog, self.now
        assert set(backlog.jobs) == set(self.model)
        assert len(backlog) == len(self.model)
        assert set(backlog.users) == {job.user for job in self.model.values()}
        for line, mine in ((backlog.gpu_line, True), (backlog.slot_line, False)):
            expected = [job.id for job in ready if job.wants_gpu is mine]
            assert [job_id for job_id, _ in line.merged(at, WEIGHTS, now)] == expected
            assert line.size == len(expected)
            check_groups(line, backlog)
            for place, number in enumerate(expected):
                assert line.ahead(self.model[number], at, WEIGHTS, now) == place
        in_order = [job.id for job in ready]
        for place, number in enumerate(in_order, 1):
            assert backlog.position(self.model[number], at, WEIGHTS, now) == place
        everything = [job.id for job in backlog.ordered(1000, at, WEIGHTS, now)]
        assert everything[: len(in_order)] == in_order
        assert sorted(everything) == sorted(self.model)
        for limit in (0, 1, 3):
            assert [job.id for job in backlog.ordered(limit, at, WEIGHTS, now)] == everything[:limit]
        for job in self.model.values():
            may = barred(job, now) is None
            assert backlog.is_capped(job) == (may and job.id not in self.in_line)
            assert (backlog.position(job, at, WEIGHTS, now) is None) == (job.id not in self.in_line)
        due = (
            job.not_before
            for job in self.model.values()
            if barred(job, now) and not job.hold and not job.depends and job.not_before is not None
        )
        assert backlog.next_due <= min(due, default=math.inf), "nobody's time is slept through"
        assert backlog.next_due > now, "a time that has come is not waited for"

    def _sorted(self, at: Standing, some: Iterator[WaitingJob]) -> list[WaitingJob]:
        """The order, as slowly and plainly as can be."""
        return sorted(
            some,
            key=lambda job: (
                -score(job.priority, at.factor(job.user), self.now - job.since, WEIGHTS),
                job.since,
                job.id,
            ),
        )


def check_groups(line: Line, backlog: Backlog) -> None:
    """No group is empty, and the same jobs stand in its order and by shape."""
    for key, group in line.groups.items():
        assert group.order
        assert group.order == sorted(group.order)
        assert sorted(place for some in group.by_shape.values() for place in some) == group.order
        for shape, places in group.by_shape.items():
            assert places == sorted(places)
            for _, number in places:
                job = backlog.jobs[number]
                assert (job.user, job.project, job.priority) == key
                assert shape_of(job) == shape


TestBacklogBesideASortedList = BacklogBesideASortedList.TestCase
TestBacklogBesideASortedList.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


def plain(now: float = 0.0) -> Standing:
    return standing(Ledger(1000.0), [], [], Rules(), now)


def in_line(backlog: Backlog, now: float = 0.0) -> list[int]:
    return [job_id for job_id, _ in backlog.gpu_line.merged(plain(now), WEIGHTS, now)]


def test_a_job_comes_into_its_line_when_its_time_comes() -> None:
    backlog = Backlog()
    backlog.put(waiting(1, not_before=5.0), 0.0)
    assert backlog.next_due == 5.0
    backlog.admit(4.9)
    assert in_line(backlog) == []
    backlog.admit(5.0)
    assert in_line(backlog) == [1]
    assert backlog.next_due == math.inf


def test_of_an_array_as_many_come_into_line_as_may_run_beside_those_that_do() -> None:
    backlog = Backlog()
    for number in range(1, 8):
        backlog.put(waiting(number, array_id=1, array_at_once=3), 0.0)
    assert in_line(backlog) == []
    backlog.admit(0.0, {1: 1})
    assert in_line(backlog) == [1, 2]
    backlog.admit(0.0, {1: 1})
    assert in_line(backlog) == [1, 2], "asking again lets no more in"
    backlog.drop(1)
    backlog.drop(2)
    backlog.admit(0.0, {1: 3})
    assert in_line(backlog) == []
    backlog.admit(0.0, {1: 0})
    assert in_line(backlog) == [3, 4, 5]


def test_a_preempted_element_comes_back_to_the_front_of_its_array() -> None:
    backlog = Backlog()
    for number in range(1, 5):
        backlog.put(waiting(number, array_id=1, array_at_once=1), 0.0)
    backlog.admit(0.0)
    backlog.drop(1)
    backlog.put(waiting(1, array_id=1, array_at_once=1), 0.0)
    backlog.admit(0.0, {})
    assert in_line(backlog) == [1]


def test_an_empty_backlog_keeps_nothing_of_what_was_there() -> None:
    backlog = Backlog()
    for number in range(1, 5):
        backlog.put(waiting(number, array_id=1, array_at_once=2), 0.0)
    backlog.admit(0.0)
    for number in (4, 1, 3, 2, 2):
        backlog.drop(number)
    assert len(backlog) == 0
    assert not list(backlog.users)
    assert not backlog.gpu_line.groups
    backlog.admit(0.0)
    assert backlog.ordered(10, plain(), WEIGHTS, 0.0) == []


def test_old_jobs_of_many_users_are_merged_by_score_and_equal_ones_by_submit() -> None:
    backlog = Backlog()
    for number, user in enumerate(["cid", "ann", "bob", "ann", "cid"], 1):
        backlog.put(waiting(number, user=user, since=float(number)), 0.0)
    assert in_line(backlog, now=1e6) == [1, 2, 3, 4, 5], "all have reached the highest age"


def test_a_job_that_was_due_waits_again_when_the_clock_is_set_back() -> None:
    backlog = Backlog()
    backlog.put(waiting(1, gpus=1, not_before=50.0), 100.0)
    backlog.admit(100.0)
    assert backlog.gpu_line.size + backlog.slot_line.size == 1
    backlog.admit(40.0)
    assert backlog.gpu_line.size + backlog.slot_line.size == 0
    assert backlog.next_due == 50.0
    backlog.admit(50.0)
    assert backlog.gpu_line.size + backlog.slot_line.size == 1
