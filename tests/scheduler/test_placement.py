"""Who starts, on which GPUs, and what the others are told."""

import itertools
import time
from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from mlbox.scheduler.placement import Box, Start, explain, impossible, place, view
from mlbox.scheduler.policy import WaitingJob, barred, rank

NOW = 1_800_000_000.0


def waiting(
    number: int,
    *,
    gpus: int = 0,
    slots: int = 1,
    priority: int = 0,
    hold: bool = False,
    not_before: float | None = None,
) -> WaitingJob:
    return WaitingJob(
        id=number,
        uid=1000,
        user="ann",
        priority=priority,
        submitted_at=float(number),
        gpus=gpus,
        slots=0 if gpus else slots,
        hold=hold,
        not_before=not_before,
    )


def box(*busy: str | None, slots: int = 4, used: int = 0) -> Box:
    return view([(f"GPU-{index}", index, why) for index, why in enumerate(busy)], slots, used)


boxes = st.builds(
    lambda busy, slots, used: box(*busy, slots=slots, used=used),
    st.lists(st.sampled_from([None, None, "is held by job 7", "holds 642 MiB of bob's python"]), max_size=8),
    st.integers(1, 8),
    st.integers(0, 10),
)
gpu_lines = st.lists(st.integers(1, 9), max_size=12).map(
    lambda sizes: [waiting(number, gpus=size) for number, size in enumerate(sizes, 1)]
)
slot_lines = st.lists(st.integers(1, 9), max_size=12).map(
    lambda sizes: [waiting(number, slots=size) for number, size in enumerate(sizes, 101)]
)


def check_line(line: Sequence[WaitingJob], started: list[int], head: int | None, free: int, size: str) -> None:
    """A line starts from its front, as far as it fits, and the first that does not is its head."""
    sizes = [getattr(job, size) for job in line]
    fitting = list(itertools.takewhile(lambda total: total <= free, itertools.accumulate(sizes)))
    assert started == [job.id for job in line[: len(fitting)]]
    assert head == (line[len(fitting)].id if len(fitting) < len(line) else None)


@given(boxes, gpu_lines, slot_lines)
def test_lines_start_from_their_front_as_far_as_there_is_room(
    box: Box, gpu_line: list[WaitingJob], slot_line: list[WaitingJob]
) -> None:
    plan = place(gpu_line, slot_line, box)
    free = {gpu.uuid for gpu in box.free_gpus}
    given_away = [uuid for start in plan.starts for uuid in start.gpu_uuids]
    assert len(given_away) == len(set(given_away)), "no GPU is given twice"
    assert set(given_away) <= free, "none is given that is not free"
    wanted = {job.id: job.gpus for job in (*gpu_line, *slot_line)}
    assert all(len(start.gpu_uuids) == wanted[start.job_id] for start in plan.starts)
    started = [start.job_id for start in plan.starts]
    check_line(gpu_line, [job_id for job_id in started if job_id <= 100], plan.gpu_head, len(free), "gpus")
    check_line(slot_line, [job_id for job_id in started if job_id > 100], plan.slot_head, box.slots_free, "slots")


@given(boxes, gpu_lines, slot_lines, st.booleans(), st.none() | st.floats(0, 2 * NOW))
def test_every_waiting_job_has_a_reason_of_one_sentence(
    box: Box, gpu_line: list[WaitingJob], slot_line: list[WaitingJob], hold: bool, not_before: float | None
) -> None:
    plan = place(gpu_line, slot_line, box)
    for line, head in ((gpu_line, plan.gpu_head), (slot_line, plan.slot_head)):
        for ahead, job in enumerate(line):
            for known_head in (head, None):
                why = explain(job, box, ahead, known_head, NOW)
                assert why == why.strip()
                assert why.isprintable()
                assert len(why) > 10
                assert not why.endswith(".")
                assert ". " not in why
    odd = waiting(999, gpus=1, hold=hold, not_before=not_before)
    assert explain(odd, box, 0, None, NOW)
    assert (barred(odd, NOW) is not None) == (hold or (not_before is not None and not_before > NOW))


def test_the_lowest_free_gpus_are_taken_in_the_order_of_the_queue() -> None:
    plan = place([waiting(1, gpus=2), waiting(2, gpus=1)], [], box(None, "leased by job 9", None, None))
    assert plan.starts == (
        Start(job_id=1, gpu_uuids=("GPU-0", "GPU-2")),
        Start(job_id=2, gpu_uuids=("GPU-3",)),
    )


def test_a_wide_job_is_never_overtaken_by_narrow_ones_behind_it() -> None:
    plan = place([waiting(1, gpus=2), waiting(2, gpus=1)], [waiting(3)], box(None, "leased by job 9"))
    assert plan.starts == (Start(job_id=3, gpu_uuids=()),)
    assert (plan.gpu_head, plan.slot_head) == (1, None)


def test_reasons_say_what_is_needed_what_is_there_and_who_has_it() -> None:
    full = box("leased by job 9", "bob's python (pid 7)", slots=4, used=4)
    assert explain(waiting(1, gpus=1), full, 0, 1, NOW) == (
        "it needs 1 GPU, none is free of 2: GPU 0: leased by job 9; GPU 1: bob's python (pid 7)"
    )
    assert explain(waiting(2, gpus=1), full, 1, 1, NOW) == "1 job before it waits for GPUs, first job 1"
    assert explain(waiting(3, gpus=2), full, 2, 1, NOW) == "2 jobs before it wait for GPUs, first job 1"
    assert explain(waiting(4), full, 0, 4, NOW) == "it needs 1 CPU slot, none is free of 4"
    assert explain(waiting(5), full, 3, 4, NOW) == "3 jobs before it wait for CPU slots, first job 4"
    assert explain(waiting(6), box(), 0, None, NOW) == "it is about to start"
    assert explain(waiting(7, gpus=1), box(), 0, 7, NOW) == "it needs 1 GPU, and this box shows none now"
    assert explain(waiting(8, hold=True), box(), 0, None, NOW) == "it is held: release it when it may start"
    later = waiting(9, not_before=NOW + 60)
    assert explain(later, box(), 0, None, NOW) == "it may not start before 2027-01-15 08:01:00 UTC"


def test_what_can_never_start_is_said_with_what_to_ask_for() -> None:
    assert impossible(2, 0, box(None, "leased by job 9")) is None
    assert impossible(0, 4, box(slots=4)) is None
    assert impossible(9, 0, box(None, None)) == "the job asks 9 GPUs; this box has 2 GPUs: ask for 2 or fewer"
    assert "gpus=0" in str(impossible(1, 0, box()))
    assert impossible(0, 5, box(slots=4)) == "the job asks 5 CPUs; this box gives jobs 4: ask for 4 or fewer"


def test_more_work_than_there_are_slots_leaves_none_free() -> None:
    assert box(slots=2, used=5).slots_free == 0


def test_higher_priority_comes_first_then_the_earlier_submit() -> None:
    jobs = [waiting(1), waiting(2, priority=5), waiting(3, priority=-5), waiting(4, priority=5)]
    assert [job.id for job in sorted(jobs, key=rank)] == [2, 4, 1, 3]


def test_placing_does_not_look_at_jobs_that_cannot_start() -> None:
    def line() -> Iterator[WaitingJob]:
        yield waiting(1, gpus=1)
        yield waiting(2, gpus=1)
        raise AssertionError("looked behind the head of the line")

    assert place(line(), [], box(None)).gpu_head == 2


def test_a_hundred_thousand_waiting_jobs_cost_nothing() -> None:
    many = [waiting(number, gpus=1) for number in range(100_000)]
    began = time.perf_counter()
    for _ in range(100):
        place(iter(many), iter([]), box(*[None] * 8))
    assert (time.perf_counter() - began) / 100 < 0.005
