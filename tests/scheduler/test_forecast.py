"""Estimated starts: what the scheduler itself would do if jobs took as long as their like did."""

from dataclasses import replace

import pytest
from hypothesis import given, settings

from mlbox.scheduler.forecast import Forecast, Present, forecast, with_fewer_gpus
from mlbox.scheduler.history import History
from mlbox.scheduler.policy import Ledger, Rules, WaitingJob
from tests.scheduler.queues import GRACE, MIN_RUN, MINUTE, NOW, Case, box, cases, gpu, running, waiting

HELD = {"busy": "leased"}


def history(*minutes: float, user: str = "ann") -> History:
    known = History()
    for one in minutes:
        known.add(user, "default", "", one * MINUTE)
    return known


def present(case: Case, known: History | None = None) -> Present:
    return Present(
        waiting=case.queue,
        running=case.running,
        box=case.box,
        rules=case.rules,
        ledger=Ledger(1e6),
        history=known or History(),
        now=NOW,
    )


def minutes(times: dict[int, float]) -> dict[int, float]:
    return {number: (at - NOW) / MINUTE for number, at in times.items()}


def test_limits_alone_give_the_latest_start() -> None:
    case = Case(
        box=box([gpu(0, **HELD)]), queue=[waiting(1, limit=10, ago=2), waiting(2, limit=5, ago=1)],
        running=[running(9, [0], ago=3, limit=20)],
    )  # fmt: skip
    seen = forecast(present(case))
    assert minutes(dict(seen.p50)) == minutes(dict(seen.p90)) == {1: 17, 2: 27}


def test_learned_run_times_come_before_limits_and_p90_is_later_than_p50() -> None:
    case = Case(box=box([gpu(0, **HELD)]), queue=[waiting(1)], running=[running(9, [0], user="ann", limit=600)])
    seen = forecast(present(case, history(10, 10, 10, 10, 10, 10, 10, 10, 10, 60)))
    assert minutes(dict(seen.p50)) == {1: 10}
    assert minutes(dict(seen.p90)) == {1: 60}


def test_where_nobody_can_say_there_is_no_estimate() -> None:
    case = Case(box=box([gpu(0, **HELD)]), queue=[waiting(1)], running=[running(9, [0])])
    seen = forecast(present(case))
    assert seen.p50 == {}
    assert [(bar.job_id, bar.end) for bar in seen.bars] == [(9, None)]


def test_held_and_depending_jobs_have_no_estimate_and_later_ones_start_no_sooner_than_they_may() -> None:
    queue = [waiting(1, hold=True), waiting(2, depends=True), waiting(3, not_before=NOW + 30 * MINUTE), waiting(4)]
    seen = forecast(present(Case(box=box(2), queue=queue)))
    assert minutes(dict(seen.p50)) == {3: 30, 4: 0}


def test_gpus_that_clear_soon_count_and_closed_and_foreign_ones_do_not() -> None:
    views = [gpu(0, "clearing", clears_s=5.0), gpu(1, "drained", closed=True), gpu(2, "bob's python")]
    queue = [waiting(1, limit=10, ago=2), waiting(2, limit=10, ago=1)]
    assert minutes(dict(forecast(present(Case(box=box(views), queue=queue))).p50)) == {1: 0, 2: 10}


def test_bars_show_what_runs_and_what_is_planned() -> None:
    holders = [running(9, [0], limit=20, ago=1)]
    case = Case(box=box([gpu(0, **HELD), gpu(1)]), queue=[waiting(1, gpus=2, limit=5)], running=holders)
    bars = {bar.job_id: bar for bar in forecast(present(case)).bars}
    assert (bars[9].user, bars[9].gpus, bars[9].start, bars[9].end) == ("xen", (0,), NOW - MINUTE, NOW + 19 * MINUTE)
    assert (bars[1].gpus, bars[1].start, bars[1].end) == ((0, 1), NOW + 19 * MINUTE, NOW + 24 * MINUTE)


def test_with_fewer_gpus_it_says_the_most_that_would_start_sooner() -> None:
    holders = [running(8, [0], limit=60), running(9, [1], limit=30)]
    job = waiting(1, gpus=4, limit=10)
    seen = present(Case(box=box([gpu(0, **HELD), gpu(1, **HELD), gpu(2), gpu(3)]), queue=[job], running=holders))
    start = forecast(seen).p50[1]
    assert start == NOW + 60 * MINUTE
    assert with_fewer_gpus(seen, job, start) == (3, NOW + 30 * MINUTE)
    three = replace(job, gpus=3)
    assert with_fewer_gpus(replace(seen, waiting=[three]), three, NOW + 30 * MINUTE) == (2, NOW)


def test_with_fewer_gpus_it_says_nothing_where_that_would_not_help() -> None:
    holders = [running(9, [0, 1], limit=60)]
    job: WaitingJob = waiting(1, gpus=2, limit=10)
    seen = present(Case(box=box([gpu(0, **HELD), gpu(1, **HELD)]), queue=[job], running=holders))
    assert with_fewer_gpus(seen, job, forecast(seen).p50[1]) is None


def test_an_empty_queue_has_an_empty_forecast() -> None:
    assert forecast(present(Case(box=box(1)))) == Forecast(at=NOW)


def test_a_running_job_over_its_limit_is_thought_to_end_now() -> None:
    case = Case(box=box([gpu(0, **HELD)]), queue=[waiting(1)], running=[running(9, [0], ago=30, limit=20)])
    assert minutes(dict(forecast(present(case)).p50)) == {1: 0}


@pytest.mark.parametrize("ran", [0, 5, 15])
def test_the_longer_a_job_ran_the_longer_it_is_thought_to_run(ran: float) -> None:
    case = Case(box=box([gpu(0, **HELD)]), queue=[waiting(1)], running=[running(9, [0], user="ann", ago=ran)])
    end = {0: 10, 5: 10, 15: 20}[int(ran)]
    assert minutes(dict(forecast(present(case, history(2, 10, 10, 20))).p50)) == {1: end - ran}


@settings(max_examples=30, deadline=None)
@given(cases())
def test_a_forecast_never_looks_back_and_its_p90_is_no_sooner_than_its_p50(case: Case) -> None:
    rules = Rules(grace_s=GRACE, min_run_s=MIN_RUN)
    case = replace(case, rules=rules, box=replace(case.box, reservations=()), hours={})
    seen = forecast(present(case, history(3, 7, 20)))
    known = {job.id for job in case.queue} | {job.id for job in case.running}
    assert seen.p50.keys() <= known, "one that gives way starts again"
    for number, at in seen.p90.items():
        assert at >= seen.p50.get(number, NOW) >= NOW
    for bar in seen.bars:
        assert bar.end is None or bar.end >= bar.start
