"""What ended attempts mean: the recovery table, and ending against trying again."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlbox.jobs import Job, JobSpec, JobState, Reason
from mlbox.scheduler.executors.base import Exit, Liveness, Observation, Stopped
from mlbox.scheduler.outcome import (
    Outcome,
    Step,
    Stop,
    StopWhy,
    before_start,
    not_again,
    of_exit,
    of_loss,
    of_refusal,
    recover,
)

EXIT = Exit(exit_code=0, started_at=1.0, ended_at=2.0, cpu_seconds=0.5, max_rss_mib=10.0, log_bytes=3)


def job(*, cancel: bool = False, retries: int = 0, requeue: bool = False, limit: float | None = None) -> Job:
    return Job(
        id=1,
        spec=JobSpec(command="x", name="n", retries=retries, requeue=requeue, time_limit_s=limit),
        user="ann",
        uid=1000,
        state=JobState.RUNNING,
        submitted_at=0.0,
        attempt=1,
        cancel_requested_at=1.0 if cancel else None,
    )


def ended(
    exit_code: int | None = None,
    *,
    signal: int | None = None,
    error: str | None = None,
    stopped: Stopped | None = None,
    out_of_memory: bool = False,
) -> Exit:
    return replace(EXIT, exit_code=exit_code, signal=signal, error=error, stopped=stopped, out_of_memory=out_of_memory)


# Recovery, row by row: same boot, lock held, started.json, exit.json


@pytest.mark.parametrize(
    ("observation", "step"),
    [
        pytest.param(Observation(liveness=Liveness.ALIVE), Step.ADOPT, id="same boot, lock held"),
        pytest.param(Observation(liveness=Liveness.ENDED, exit=EXIT), Step.FINISH, id="same boot, exit there"),
        pytest.param(Observation(liveness=Liveness.VANISHED), Step.LOST, id="same boot, started, no exit"),
        pytest.param(Observation(liveness=Liveness.NOT_STARTED), Step.LAUNCH, id="same boot, never started"),
        pytest.param(
            Observation(liveness=Liveness.ENDED, exit=EXIT, same_boot=False), Step.FINISH, id="other boot, exit there"
        ),
        pytest.param(
            Observation(liveness=Liveness.VANISHED, same_boot=False), Step.REBOOT, id="other boot, started, no exit"
        ),
        pytest.param(
            Observation(liveness=Liveness.NOT_STARTED, same_boot=False), Step.LAUNCH, id="other boot, never started"
        ),
    ],
)
def test_the_recovery_table_holds(observation: Observation, step: Step) -> None:
    assert recover(observation) is step


# Ends


@pytest.mark.parametrize(
    ("how", "state", "reason", "says"),
    [
        (ended(exit_code=0), JobState.SUCCEEDED, None, "ended well"),
        (ended(exit_code=3), JobState.FAILED, Reason.EXIT_CODE, "exit code 3"),
        (ended(signal=11), JobState.FAILED, Reason.SIGNAL, "signal 11 (SIGSEGV)"),
        (ended(signal=99), JobState.FAILED, Reason.SIGNAL, "signal 99 (unknown)"),
        (ended(error="no such file"), JobState.FAILED, Reason.COULD_NOT_START, "could not be started: no such file"),
        (ended(signal=9, out_of_memory=True), JobState.FAILED, Reason.OUT_OF_MEMORY, "more memory"),
        (ended(exit_code=1, out_of_memory=True), JobState.FAILED, Reason.OUT_OF_MEMORY, "more memory"),
        (ended(exit_code=0, out_of_memory=True), JobState.SUCCEEDED, None, "ended well"),
        (ended(signal=15, stopped=Stopped.TIME_LIMIT), JobState.FAILED, Reason.TIME_LIMIT, "time limit of 60 s"),
        (ended(exit_code=0, stopped=Stopped.TIME_LIMIT), JobState.FAILED, Reason.TIME_LIMIT, "time limit of 60 s"),
        (ended(signal=15, stopped=Stopped.CANCEL), JobState.CANCELLED, Reason.USER, "cancelled while it ran"),
        (ended(exit_code=0, stopped=Stopped.CANCEL), JobState.CANCELLED, Reason.USER, "cancelled while it ran"),
        (ended(error="never ran", stopped=Stopped.CANCEL), JobState.CANCELLED, Reason.USER, "cancelled"),
        (
            replace(ended(exit_code=1), rank=2),
            JobState.FAILED,
            Reason.EXIT_CODE,
            "rank 2 ended with exit code 1; the others were stopped",
        ),
        (
            replace(ended(signal=9), rank=0),
            JobState.FAILED,
            Reason.SIGNAL,
            "rank 0 was killed by signal 9 (SIGKILL); the others were stopped",
        ),
        (
            replace(ended(exit_code=1), gpu_out_of_memory=True, rank=3),
            JobState.FAILED,
            Reason.GPU_OUT_OF_MEMORY,
            "a GPU had too little memory for it: rank 3 ended with exit code 1",
        ),
        (
            replace(ended(exit_code=0), adopted=True),
            JobState.SUCCEEDED,
            None,
            "ended; it was begun outside mlbox, so its exit code is not known",
        ),
    ],
    ids=str,
)
def test_an_end_is_judged_by_its_first_cause(how: Exit, state: JobState, reason: Reason | None, says: str) -> None:
    outcome = of_exit(job(limit=60.0), how, 0)
    assert (outcome.state, outcome.reason, outcome.exit, outcome.failed) == (state, reason, how, False)
    assert says in outcome.cause


@pytest.mark.parametrize("how", [ended(exit_code=1), ended(signal=11)], ids=["exit code", "signal"])
def test_a_failed_program_is_tried_again_as_often_as_was_asked(how: Exit) -> None:
    states = [of_exit(job(retries=2), how, failures).state for failures in range(4)]
    assert states == [JobState.QUEUED, JobState.QUEUED, JobState.FAILED, JobState.FAILED]
    first = of_exit(job(retries=2), how, 0)
    assert first.failed
    assert first.cause.endswith("it is tried again (1 more try after that)")


@pytest.mark.parametrize(
    "how",
    [
        ended(exit_code=0),
        ended(error="no such file"),
        ended(signal=9, out_of_memory=True),
        replace(ended(exit_code=1), gpu_out_of_memory=True),
        ended(signal=15, stopped=Stopped.TIME_LIMIT),
        ended(signal=15, stopped=Stopped.CANCEL),
    ],
    ids=["success", "could not start", "out of memory", "GPU out of memory", "time limit", "cancel"],
)
def test_retries_are_not_for_what_another_try_cannot_mend(how: Exit) -> None:
    outcome = of_exit(job(retries=9, requeue=True), how, 0)
    assert outcome.state is not JobState.QUEUED
    assert not outcome.failed


def test_who_asked_to_cancel_gets_no_other_attempt() -> None:
    again = of_exit(job(retries=9, cancel=True), ended(exit_code=1), 0)
    assert (again.state, again.reason, again.failed) == (JobState.CANCELLED, Reason.USER, False)
    assert again.exit is not None
    for reason in (Reason.LOST, Reason.REBOOT):
        gone = of_loss(job(requeue=True, cancel=True), reason)
        assert (gone.state, gone.reason) == (JobState.CANCELLED, Reason.USER)


def test_a_lost_attempt_is_repeated_only_when_the_job_asked() -> None:
    for reason in (Reason.LOST, Reason.REBOOT):
        asked, silent = of_loss(job(requeue=True), reason), of_loss(job(retries=9), reason)
        assert (asked.state, asked.reason, asked.failed) == (JobState.QUEUED, reason, False)
        assert (silent.state, silent.reason) == (JobState.FAILED, reason)
        assert "requeue=true" in silent.cause


# Ends that mlbox itself wanted

GAVE_WAY = Stop(why=StopWhy.PREEMPTED, cause="it gave way to job 17")
BROKEN = Stop(why=StopWhy.GPU_FAILED, cause="GPU 3 fell off the bus")
ANY_END_BUT_0 = [
    ended(exit_code=143, stopped=Stopped.CANCEL),
    ended(signal=15, stopped=Stopped.CANCEL),
    ended(signal=9, stopped=Stopped.CANCEL, out_of_memory=True),
    ended(error="it was stopped before user code ran", stopped=Stopped.CANCEL),
]


@pytest.mark.parametrize("how", ANY_END_BUT_0, ids=str)
def test_who_gave_way_waits_again_with_its_retries_untouched(how: Exit) -> None:
    outcome = of_exit(job(retries=1), how, 1, GAVE_WAY)
    assert outcome == Outcome(
        state=JobState.QUEUED,
        reason=Reason.PREEMPTED,
        cause="it gave way to job 17 and waits to run again",
        exit=how,
        failed=False,
    )


def test_who_finished_before_the_term_came_is_done() -> None:
    assert of_exit(job(), ended(exit_code=0), 0, GAVE_WAY).state is JobState.SUCCEEDED


def test_who_saved_on_term_and_ended_well_waits_to_go_on() -> None:
    end = of_exit(job(), ended(exit_code=0, stopped=Stopped.CANCEL), 0, GAVE_WAY)
    assert (end.state, end.reason, end.failed) == (JobState.QUEUED, Reason.PREEMPTED, False)


def test_who_was_to_give_way_but_failed_before_is_judged_as_ever() -> None:
    assert of_exit(job(), ended(exit_code=3), 0, GAVE_WAY).reason is Reason.EXIT_CODE
    assert of_exit(job(retries=1), ended(exit_code=3), 0, GAVE_WAY).failed
    assert of_exit(job(), ended(signal=15, stopped=Stopped.TIME_LIMIT), 0, GAVE_WAY).reason is Reason.TIME_LIMIT


@pytest.mark.parametrize("stop", [Stop(why=why, cause="so it was") for why in StopWhy], ids=str)
def test_a_cancel_goes_before_what_mlbox_wanted(stop: Stop) -> None:
    for how in ANY_END_BUT_0:
        assert of_exit(job(cancel=True), how, 0, stop).state is JobState.CANCELLED
    assert of_loss(job(cancel=True), Reason.LOST, stop).state is JobState.CANCELLED
    assert before_start(job(cancel=True), stop).state is JobState.CANCELLED


@pytest.mark.parametrize(
    ("why", "reason"), [(StopWhy.OVER_SHARE, Reason.GPU_OUT_OF_MEMORY), (StopWhy.IDLE, Reason.STALLED)]
)
def test_who_took_too_much_or_did_nothing_has_failed_and_is_not_tried_again(why: StopWhy, reason: Reason) -> None:
    stop = Stop(why=why, cause="it held 9 GiB and asked for 4")
    for how in [*ANY_END_BUT_0, ended(exit_code=0, stopped=Stopped.CANCEL)]:
        outcome = of_exit(job(retries=9, requeue=True), how, 0, stop)
        assert (outcome.state, outcome.reason, outcome.cause) == (JobState.FAILED, reason, stop.cause)


@pytest.mark.parametrize("how", [*ANY_END_BUT_0, ended(exit_code=1), ended(signal=7)], ids=str)
def test_a_broken_gpu_is_not_the_programs_failure(how: Exit) -> None:
    failed, again = of_exit(job(retries=9), how, 0, BROKEN), of_exit(job(requeue=True), how, 0, BROKEN)
    assert (failed.state, failed.reason, failed.cause) == (JobState.FAILED, Reason.GPU_FAILED, BROKEN.cause)
    assert (again.state, again.reason, again.failed) == (JobState.QUEUED, Reason.GPU_FAILED, False)


def test_who_finished_on_a_gpu_that_broke_is_done() -> None:
    assert of_exit(job(), ended(exit_code=0), 0, BROKEN).state is JobState.SUCCEEDED


def test_a_stop_decides_as_well_when_the_attempt_is_lost_or_never_began() -> None:
    for outcome in (
        of_loss(job(), Reason.LOST, GAVE_WAY),
        of_loss(job(), Reason.REBOOT, GAVE_WAY),
        before_start(job(), GAVE_WAY),
    ):
        assert (outcome.state, outcome.reason) == (JobState.QUEUED, Reason.PREEMPTED)
    assert before_start(job(), None).state is JobState.CANCELLED


def test_what_was_begun_outside_is_never_begun_again() -> None:
    adopted = replace(job(requeue=True, retries=9), adopted=True)
    ends = [
        of_exit(adopted, replace(ended(signal=15, stopped=Stopped.CANCEL), adopted=True), 0, stop)
        for stop in (GAVE_WAY, BROKEN)
    ]
    ends += [of_loss(adopted, Reason.LOST), of_loss(adopted, Reason.REBOOT), of_loss(adopted, Reason.LOST, GAVE_WAY)]
    assert all(outcome.state in {JobState.FAILED, JobState.CANCELLED} for outcome in ends)


def test_what_cannot_be_launched_fails_with_the_reason() -> None:
    outcome = of_refusal("its supervisor ended 3 times")
    assert (outcome.state, outcome.reason) == (JobState.FAILED, Reason.COULD_NOT_START)
    assert "its supervisor ended 3 times" in outcome.cause


exits = st.builds(
    lambda how, stopped, out_of_memory: ended(**how, stopped=stopped, out_of_memory=out_of_memory),
    st.sampled_from([{"exit_code": 0}, {"exit_code": 7}, {"signal": 9}, {"error": "no such file"}]),
    st.none() | st.sampled_from(Stopped),
    st.booleans(),
)
all_jobs = st.builds(
    lambda cancel, retries, requeue: job(cancel=cancel, retries=retries, requeue=requeue),
    st.booleans(),
    st.integers(0, 3),
    st.booleans(),
)


stops = st.none() | st.builds(Stop, why=st.sampled_from(StopWhy), cause=st.just("so it was"))


@given(all_jobs, exits, st.integers(0, 4), stops)
def test_every_end_is_final_or_another_attempt_that_was_asked_for(
    one: Job, how: Exit, failures: int, stop: Stop | None
) -> None:
    outcomes = [of_exit(one, how, failures, stop), of_loss(one, Reason.LOST, stop), of_loss(one, Reason.REBOOT, stop)]
    for outcome in outcomes:
        assert outcome.state in {JobState.QUEUED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
        assert (outcome.reason is None) == (outcome.state is JobState.SUCCEEDED)
        assert outcome.cause
        assert not_again(outcome).state is not JobState.QUEUED
        if outcome.state is JobState.QUEUED:
            assert one.cancel_requested_at is None
            preempted = outcome.reason is Reason.PREEMPTED
            assert preempted or one.spec.requeue or (outcome.failed and failures < one.spec.retries)
            assert not preempted or (stop is not None and stop.why is StopWhy.PREEMPTED)
        else:
            assert not_again(outcome) == outcome


def test_an_end_that_is_final_stays_as_it_is() -> None:
    final = Outcome(state=JobState.FAILED, reason=Reason.LOST, cause="gone")
    assert not_again(final) is final
