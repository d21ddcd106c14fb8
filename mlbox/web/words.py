"""Values as people read them: sizes, durations, times, what a job is doing. Pure: time is a parameter."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime

from markupsafe import Markup

from mlbox.jobs import Job, JobState
from mlbox.scheduler.service import FewerGpus, Pending

_ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\|$)|[ -/]*[0-~])"  # CSI, OSC and other strings, rest
)
"""Escape sequences of a terminal (ECMA-48, sections 5.3 to 5.6)."""
_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]")
"""What moves a cursor, reverses the direction of reading or cannot be seen: never shown as itself."""


def visible(value: object) -> object:
    """Text with what is invisible or misleading written out as escapes; other values and markup as they are."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _HIDDEN.sub(lambda found: ascii(found[0])[1:-1], value)


def plain_log(text: str) -> str:
    """A log without colours and cursor movements: of a line that was rewritten by `\\r`, its last form."""
    text = _ESCAPES.sub("", text).replace("\r\n", "\n")
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return str(visible("\n".join(lines)))


def size(count: float | None) -> str:
    """Bytes: `512 B`, `1.4 MiB`."""
    if count is None:
        return "–"
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if count < 1024 or unit == "TiB":
            break
    return f"{count:.0f} {unit}" if count >= 100 else f"{count:.1f} {unit}"


def mebibytes(count: float | None) -> str:
    return size(None if count is None else count * 1024 * 1024)


def gibibytes(mib: float | None) -> str:
    """MiB as a bare number of GiB, for `12.3 / 80 GiB`."""
    if mib is None:
        return "?"
    return f"{mib / 1024:.0f}" if mib >= 102_400 or mib % 1024 == 0 else f"{mib / 1024:.1f}"


def duration(seconds: float | None) -> str:
    """`40 ms`, `4.2 s`, `42 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds is None:
        return "–"
    if seconds < 0.9995:
        return f"{max(0.0, seconds) * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    left = round(seconds)
    parts: list[str] = []
    for length, unit in ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, length)
        if count or parts:
            parts.append(f"{count} {unit}")
    return " ".join(part for part in parts[:2] if not part.startswith("0 "))


def ago(then: float | None, now: float) -> str:
    """`just now`, `5 min ago`; for a time to come `in 2 h`."""
    if then is None:
        return "–"
    if abs(now - then) < 10:
        return "just now"
    span = duration(abs(now - then)).split(" ")
    text = " ".join(span[:2])
    return f"{text} ago" if then <= now else f"in {text}"


def clock(then: float | None) -> str:
    if then is None:
        return "–"
    return datetime.fromtimestamp(then, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def hour(then: float | None) -> str | None:
    """A time to come as one says it: `14:10`, `Fri 14:10`, `12 Mar 14:10`, in this machine's zone."""
    if then is None:
        return None
    when = datetime.fromtimestamp(then, UTC).astimezone()
    days = (when.date() - datetime.now(UTC).astimezone().date()).days
    return f"{when:%H:%M}" if days == 0 else f"{when:%a %H:%M}" if 0 < days < 7 else f"{when:%d %b %H:%M}"


def sooner(job: Job, fewer: FewerGpus) -> str:
    """What asking fewer GPUs would bring."""
    gpus = f"{fewer.gpus} GPU{'s' * (fewer.gpus != 1)}"
    return f"With {gpus} instead of {job.spec.gpus} it would start about {hour(fewer.estimated_start)}."


def ran_for(job: Job, now: float) -> float | None:
    """Seconds for which the newest attempt has run."""
    if job.started_at is None:
        return None
    return max(0.0, (job.ended_at or now) - job.started_at)


def needs(job: Job) -> str:
    """What a job asks of the box: `2 GPUs`, `4 CPUs, 20.0 GiB`."""
    spec = job.spec
    parts = [f"{spec.gpus} GPU{'s' * (spec.gpus != 1)}"] if spec.gpus else []
    if spec.gpu_mem_mib:
        parts = [f"{mebibytes(spec.gpu_mem_mib)} of a GPU"]
    if spec.cpus or not spec.wants_gpu:
        cpus = spec.cpus or 1
        parts.append(f"{cpus} CPU{'s' * (cpus != 1)}")
    if spec.mem_mib:
        parts.append(mebibytes(spec.mem_mib))
    return ", ".join(parts)


def story(
    job: Job, pending: Pending | None, gpu_names: Sequence[str], now: float, fewer: FewerGpus | None = None
) -> str:
    """One sentence: why it waits, what it does, or how it ended."""
    where = f" on {' and '.join(gpu_names)}" if gpu_names else ""
    if job.state is JobState.QUEUED:
        why = pending.why if pending else "it is about to start"
        again = f"It will be tried again ({job.cause}). " if job.attempt and job.cause else ""
        place = f" It is number {pending.position} in the queue." if pending and pending.position else ""
        return f"{again}Waiting: {why}.{place}{f' {sooner(job, fewer)}' if fewer else ''}"
    if job.cancel_requested_at is not None and not job.ended:
        return f"Being cancelled: it was asked to end {ago(job.cancel_requested_at, now)}."
    if job.state is JobState.STARTING:
        return f"Being started{where}."
    if job.state is JobState.RUNNING:
        return f"Running{where}."
    after = "" if job.started_at is None else f" after {duration(ran_for(job, now))}"
    cause = f": {job.cause}" if job.cause and job.state is not JobState.SUCCEEDED else ""
    return f"{job.state.capitalize()}{after}{cause}."
