"""What ended attempts mean: the recovery table, and ending against trying again."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlbox.jobs import Job, JobSpec, JobState, Reason
from mlbox.scheduler.executors.base import Exit, Liveness, Observation, Stopped
from mlbox.scheduler.outcome import Outcome, Step, not_again, of_exit, of_loss, of_refusal, recover

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
        ended(signal=15, stopped=Stopped.TIME_LIMIT),
        ended(signal=15, stopped=Stopped.CANCEL),
    ],
    ids=["success", "could not start", "out of memory", "time limit", "cancel"],
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


@given(all_jobs, exits, st.integers(0, 4))
def test_every_end_is_final_or_another_attempt_that_was_asked_for(one: Job, how: Exit, failures: int) -> None:
    outcomes = [of_exit(one, how, failures), of_loss(one, Reason.LOST), of_loss(one, Reason.REBOOT)]
    for outcome in outcomes:
        assert outcome.state in {JobState.QUEUED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
        assert (outcome.reason is None) == (outcome.state is JobState.SUCCEEDED)
        assert outcome.cause
        assert not_again(outcome).state is not JobState.QUEUED
        if outcome.state is JobState.QUEUED:
            assert one.cancel_requested_at is None
            assert one.spec.requeue if outcome.exit is None else failures < one.spec.retries
        else:
            assert not_again(outcome) == outcome


def test_an_end_that_is_final_stays_as_it_is() -> None:
    final = Outcome(state=JobState.FAILED, reason=Reason.LOST, cause="gone")
    assert not_again(final) is final
