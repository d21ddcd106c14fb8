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


class StopWhy(StrEnum):
    """Why mlbox itself ends an attempt that nobody cancelled."""

    PREEMPTED = "preempted"
    """A job of higher priority needs its GPUs: it goes back to the queue."""
    OVER_SHARE = "over_share"
    """It used more GPU memory than it asked for, at the cost of the jobs beside it."""
    IDLE = "idle"
    """Its GPUs did nothing for so long that they are given to others."""
    GPU_FAILED = "gpu_failed"
    """A GPU under it broke."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """That mlbox itself wanted an attempt ended. `cause` is a clause for people: `it gave way to job 17`."""

    why: StopWhy
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an attempt ended, and where its job goes: an ended state, or QUEUED for another attempt."""

    state: JobState
    reason: Reason | None
    cause: str
    exit: Exit | None = None
    failed: bool = False
    """Whether the attempt counts against `retries`."""


def of_exit(job: Job, exit: Exit, failures: int, stop: Stop | None = None) -> Outcome:  # noqa: A002
    """What `exit` of the current attempt means; `failures` earlier attempts counted against the job's retries.

    `stop` is what mlbox itself wanted of the attempt. It decides what the shim's TERM brought about, since nobody can
    tell a program that the TERM ended from one that failed during its grace period; a user's wish to cancel goes first.
    """
    if stop is not None and job.cancel_requested_at is None:
        if _stop_decides(stop, exit):
            return _of_stop(job, stop, exit)
        if exit.stopped is Stopped.CANCEL:  # it has finished all the same
            return Outcome(state=JobState.SUCCEEDED, reason=None, cause=_WELL, exit=exit)
    state, reason, cause = _judge(job, exit)
    if reason not in RETRY_REASONS or failures >= job.spec.retries or exit.adopted:
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


def of_loss(job: Job, reason: Literal[Reason.LOST, Reason.REBOOT], stop: Stop | None = None) -> Outcome:
    """What the disappearance of an attempt means (`lost`: its supervisor died; `reboot`: the box did).

    The box failed, not the program: `requeue=true` gives such a job another attempt, `retries` does not. One that
    mlbox was ending anyway has ended as was wanted.
    """
    cause = {
        Reason.LOST: "its supervisor died, so how it ended is unknown; what was left of it was killed",
        Reason.REBOOT: "the machine went down while it ran",
    }[reason]
    if job.cancel_requested_at is not None:
        return Outcome(state=JobState.CANCELLED, reason=Reason.USER, cause=f"cancelled; {cause}")
    if stop is not None:
        return _of_stop(job, stop, None)
    if job.spec.requeue and not job.adopted:
        return Outcome(state=JobState.QUEUED, reason=reason, cause=f"{cause}; it waits for another attempt")
    advice = "" if job.adopted else " (requeue=true would have given it another attempt)"
    return Outcome(state=JobState.FAILED, reason=reason, cause=f"{cause}{advice}")


def before_start(job: Job, stop: Stop | None) -> Outcome:
    """What it means that an attempt is to end whose user code never ran: cancelled, or what `stop` says."""
    if stop is None or job.cancel_requested_at is not None:
        return Outcome(state=JobState.CANCELLED, reason=Reason.USER, cause="cancelled before it began")
    return _of_stop(job, stop, None)


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


def _stop_decides(stop: Stop, exit: Exit) -> bool:  # noqa: A002
    """Whether the attempt ended because mlbox wanted it to.

    Whatever ends after the TERM counts as stopped by it, as in Slurm: a program that saves its state and ends with 0
    cannot be told from one that was just done. A broken GPU may make a program fail before the TERM comes.
    """
    if stop.why is StopWhy.GPU_FAILED and exit.stopped is None:
        return exit.exit_code != 0
    return exit.stopped is Stopped.CANCEL


def _of_stop(job: Job, stop: Stop, exit: Exit | None) -> Outcome:  # noqa: A002
    """What becomes of a job whose attempt mlbox ended. It is no failure of the program: `retries` are untouched."""
    again = not job.adopted and (stop.why is StopWhy.PREEMPTED or (stop.why is StopWhy.GPU_FAILED and job.spec.requeue))
    reason = _STOP_REASONS[stop.why]
    if again:
        return Outcome(state=JobState.QUEUED, reason=reason, cause=f"{stop.cause} and waits to run again", exit=exit)
    if reason is Reason.PREEMPTED:  # what was begun outside mlbox cannot be begun again
        return Outcome(state=JobState.CANCELLED, reason=Reason.USER, cause=stop.cause, exit=exit)
    return Outcome(state=JobState.FAILED, reason=reason, cause=stop.cause, exit=exit)


_WELL = "ended well"
_STOP_REASONS = {
    StopWhy.PREEMPTED: Reason.PREEMPTED,
    StopWhy.OVER_SHARE: Reason.GPU_OUT_OF_MEMORY,
    StopWhy.IDLE: Reason.STALLED,
    StopWhy.GPU_FAILED: Reason.GPU_FAILED,
}


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
    if exit.adopted:
        return JobState.SUCCEEDED, None, "ended; it was begun outside mlbox, so its exit code is not known"
    who, others = ("", "") if exit.rank is None else (f"rank {exit.rank} ", "; the others were stopped")
    how = f"{who}ended with exit code {exit.exit_code}{others}"
    if exit.signal is not None:
        how = f"{who}{'was ' if who else ''}killed by signal {exit.signal} ({_signal_name(exit.signal)}){others}"
    if exit.gpu_out_of_memory and exit.exit_code != 0:
        return JobState.FAILED, Reason.GPU_OUT_OF_MEMORY, f"a GPU had too little memory for it: {how}"
    if exit.signal is not None:
        return JobState.FAILED, Reason.SIGNAL, how
    if exit.exit_code:
        return JobState.FAILED, Reason.EXIT_CODE, how
    return JobState.SUCCEEDED, None, _WELL


def _signal_name(number: int) -> str:
    try:
        return signals.Signals(number).name
    except ValueError:
        return "unknown"
