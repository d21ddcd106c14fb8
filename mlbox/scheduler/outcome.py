"""What an attempt's end means for its job: the recovery table and the choice between ending and trying again. Pure."""

import signal as signals
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from mlbox.jobs import RETRY_REASONS, Job, JobState, Reason
from mlbox.scheduler.executors.base import Exit, Liveness, Observation, Stopped


class Step(StrEnum):
    """What recovery does with an attempt that the database believes to be under way."""

    ADOPT = "adopt"
    FINISH = "finish"
    LOST = "lost"
    REBOOT = "reboot"
    LAUNCH = "launch"


def recover(observation: Observation) -> Step:
    """The recovery table of DESIGN section 4, row by row.

    | same boot | lock held | started | exit | then |
    |---|---|---|---|---|
    | yes | yes | any | any | ADOPT |
    | any | no | any | yes | FINISH |
    | yes | no | yes | no | LOST |
    | no | no | yes | no | REBOOT |
    | any | no | no | no | LAUNCH |
    """
    match observation.liveness:
        case Liveness.ALIVE:
            return Step.ADOPT
        case Liveness.ENDED:
            return Step.FINISH
        case Liveness.VANISHED:
            return Step.LOST if observation.same_boot else Step.REBOOT
        case Liveness.NOT_STARTED:
            return Step.LAUNCH


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an attempt ended, and where its job goes: an ended state, or QUEUED for another attempt."""

    state: JobState
    reason: Reason | None
    cause: str
    exit: Exit | None = None
    failed: bool = False
    """Whether the attempt counts against `retries`."""


def of_exit(job: Job, exit: Exit, failures: int) -> Outcome:  # noqa: A002
    """What `exit` of the current attempt means; `failures` earlier attempts counted against the job's retries."""
    state, reason, cause = _judge(job, exit)
    if reason not in RETRY_REASONS or failures >= job.spec.retries:
        return Outcome(state=state, reason=reason, cause=cause, exit=exit)
    left = job.spec.retries - failures - 1
    again = Outcome(
        state=JobState.QUEUED,
        reason=reason,
        cause=f"{cause}; it is tried again ({left} more {'try' if left == 1 else 'tries'} after that)",
        exit=exit,
        failed=True,
    )
    return again if job.cancel_requested_at is None else not_again(again)


def of_loss(job: Job, reason: Literal[Reason.LOST, Reason.REBOOT]) -> Outcome:
    """What the disappearance of an attempt means (`lost`: its supervisor died; `reboot`: the box did).

    The box failed, not the program: `requeue=true` gives such a job another attempt, `retries` does not.
    """
    cause = {
        Reason.LOST: "its supervisor died, so how it ended is unknown; what was left of it was killed",
        Reason.REBOOT: "the machine went down while it ran",
    }[reason]
    if job.cancel_requested_at is not None:
        return Outcome(state=JobState.CANCELLED, reason=Reason.USER, cause=f"cancelled; {cause}")
    if job.spec.requeue:
        return Outcome(state=JobState.QUEUED, reason=reason, cause=f"{cause}; it waits for another attempt")
    return Outcome(
        state=JobState.FAILED, reason=reason, cause=f"{cause} (requeue=true would have given it another attempt)"
    )


def not_again(end: Outcome) -> Outcome:
    """`end` for a job that somebody wants cancelled: whatever would have been tried again is cancelled."""
    if end.state is not JobState.QUEUED:
        return end
    return Outcome(
        state=JobState.CANCELLED, reason=Reason.USER, cause="cancelled, so it is not tried again", exit=end.exit
    )


def of_refusal(why: str) -> Outcome:
    """An attempt that could not be launched at all."""
    return Outcome(state=JobState.FAILED, reason=Reason.COULD_NOT_START, cause=f"it could not be started: {why}")


def _judge(job: Job, exit: Exit) -> tuple[JobState, Reason | None, str]:  # noqa: A002
    if exit.stopped is Stopped.CANCEL:
        return JobState.CANCELLED, Reason.USER, "cancelled while it ran"
    if exit.stopped is Stopped.TIME_LIMIT:
        limit = f" of {job.spec.time_limit_s:g} s" if job.spec.time_limit_s else ""
        return JobState.FAILED, Reason.TIME_LIMIT, f"stopped at its time limit{limit}"
    if exit.error is not None:
        return JobState.FAILED, Reason.COULD_NOT_START, f"it could not be started: {exit.error}"
    if exit.out_of_memory and exit.exit_code != 0:
        return JobState.FAILED, Reason.OUT_OF_MEMORY, "killed for using more memory than it may"
    if exit.signal is not None:
        return JobState.FAILED, Reason.SIGNAL, f"killed by signal {exit.signal} ({_signal_name(exit.signal)})"
    if exit.exit_code:
        return JobState.FAILED, Reason.EXIT_CODE, f"ended with exit code {exit.exit_code}"
    return JobState.SUCCEEDED, None, "ended well"


def _signal_name(number: int) -> str:
    try:
        return signals.Signals(number).name
    except ValueError:
        return "unknown"
