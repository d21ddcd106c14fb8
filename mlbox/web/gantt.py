"""The plan as a picture: GPUs x time, as lengths in percent for the page and as text for a shell. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, tzinfo

from mlbox.scheduler.timeline import Bar, Kind, Lane, Timeline

_STEPS_S = (300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400, 172_800, 604_800)
"""Time from one mark of the axis to the next; the shortest that gives no more than `_TICKS_MAX` marks is taken."""
_TICKS_MAX = 9
_NARROW = 0.7
"""Percent of the width: past bars narrower than that which touch are drawn as one."""
_LABEL_COLUMNS = 8
_FILL: dict[Kind, str] = {"past": "█", "running": "▒", "planned": "░", "reserved": "/", "foreign": "▞", "drained": "×"}
_LEGEND = "█ ran   ▒ runs until about then   ░ planned   / reserved   ▞ from outside   × drained   │ now"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A mark of the time axis, `place` percent from the left."""

    at: float
    place: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A bar of the picture: from `place` on `width` percent wide, in the `row`th line of its lane.

    `done` is how many percent of it are past. `jobs` is more than 1 where bars too narrow to tell apart are one.
    """

    bar: Bar
    place: float
    width: float
    row: int
    done: float
    jobs: int = 1
    ends_at: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LanePicture:
    """One GPU, with as many lines as bars lie side by side at some time."""

    label: str
    uuid: str
    rows: int
    spans: Sequence[Span]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The whole plan; `now` is percent from the left."""

    now: float
    ticks: Sequence[Tick]
    lanes: Sequence[LanePicture]

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of bars that are there."""
        return frozenset(span.bar.kind for lane in self.lanes for span in lane.spans)


def picture(plan: Timeline, zone: tzinfo | None = None) -> Picture:
    """The plan laid out; the marks are round in `zone` (None: this machine's)."""
    return Picture(
        now=_place(plan, plan.now),
        ticks=_ticks(plan, _TICKS_MAX, zone),
        lanes=[_lane(plan, lane) for lane in plan.lanes],
    )


def text(plan: Timeline, columns: int, zone: tzinfo | None = None) -> str:
    """The plan as lines of text, `columns` wide."""
    width = columns - _LABEL_COLUMNS
    now = min(width - 1, int(_place(plan, plan.now) * width / 100))
    axis = [" "] * width
    for tick in _ticks(plan, max(2, width // 12), zone):
        at = int(tick.place * width / 100)
        if at + len(tick.label) <= width:
            axis[at : at + len(tick.label)] = tick.label
    lines = [" " * _LABEL_COLUMNS + "".join(axis).rstrip()]
    for lane in plan.lanes:
        shown = _lane(plan, lane)
        for row in range(shown.rows):
            cells = _cells([span for span in shown.spans if span.row == row], width, now)
            label = f"GPU {lane.label}" if row == 0 else ""
            lines.append(f"{label:<{_LABEL_COLUMNS}}{''.join(cells)}".rstrip())
    if not plan.lanes:
        lines.append("this box has no GPU that mlbox can see")
    return "\n".join([*lines, "", _LEGEND]) + "\n"


def _cells(spans: Sequence[Span], width: int, now: int) -> list[str]:
    cells = ["·"] * width
    cells[now] = "│"
    for span in spans:
        first = min(width - 1, int(span.place * width / 100))
        last = max(first + 1, min(width, round((span.place + span.width) * width / 100)))
        for at in range(first, last):
            kind: Kind = "past" if span.bar.kind == "running" and at < now else span.bar.kind
            cells[at] = _FILL[kind]
        named = (
            f" {span.bar.job_id} " if span.bar.job_id is not None and span.jobs == 1 else f" {_safe(span.bar.name)} "
        )
        if span.jobs == 1 and last - first >= len(named) + 2:
            cells[first + 1 : first + 1 + len(named)] = named
    return cells


def _lane(plan: Timeline, lane: Lane) -> LanePicture:
    spans: list[Span] = []
    free_from: list[float] = []
    for bar in sorted(lane.bars, key=lambda bar: (bar.starts_at, _end(bar))):
        starts, ends = max(bar.starts_at, plan.starts_at), min(_end(bar), plan.ends_at)
        if ends <= starts:
            continue
        place, width = _place(plan, starts), _place(plan, ends) - _place(plan, starts)
        if spans and _melts(spans[-1], bar, place, width):
            spans[-1] = replace(
                spans[-1], width=place + width - spans[-1].place, jobs=spans[-1].jobs + 1, ends_at=bar.ends_at
            )
            free_from[spans[-1].row] = ends
            continue
        row = next((row for row, free in enumerate(free_from) if free <= starts + 1e-6), len(free_from))
        free_from[row : row + 1] = [ends]
        done = 100 * min(1.0, max(0.0, (plan.now - starts) / (ends - starts)))
        spans.append(Span(bar=bar, place=place, width=width, row=row, done=done, ends_at=bar.ends_at))
    return LanePicture(label=lane.label, uuid=lane.gpu_uuid, rows=max(1, len(free_from)), spans=spans)


def _melts(before: Span, bar: Bar, place: float, width: float) -> bool:
    """Whether a past bar is drawn as one with the one before it: both too narrow to be seen for themselves."""
    gap = place - before.place - before.width
    narrow = width < _NARROW and (before.jobs > 1 or before.width < _NARROW)
    return bar.kind == "past" and before.bar.kind == "past" and narrow and 0 <= gap < _NARROW


def _place(plan: Timeline, at: float) -> float:
    """Percent from the left."""
    return round(100 * min(1.0, max(0.0, (at - plan.starts_at) / max(1.0, plan.ends_at - plan.starts_at))), 3)


def _ticks(plan: Timeline, most: int, zone: tzinfo | None) -> list[Tick]:
    """Round times of `zone` within the plan."""
    length = plan.ends_at - plan.starts_at
    step = next((step for step in _STEPS_S if length / step <= most), _STEPS_S[-1])
    first = datetime.fromtimestamp(plan.starts_at, UTC).astimezone(zone)
    midnight = first.replace(hour=0, minute=0, second=0, microsecond=0)
    ticks: list[Tick] = []
    for number in range(int((first - midnight).total_seconds() // step), 10_000):
        when = midnight + timedelta(seconds=number * step)
        at = when.timestamp()
        if at > plan.ends_at:
            break
        if at >= plan.starts_at:
            day = step >= 86_400 or (when.hour, when.minute) == (0, 0)
            ticks.append(Tick(at=at, place=_place(plan, at), label=f"{when:%a %d}" if day else f"{when:%H:%M}"))
    return ticks


def _end(bar: Bar) -> float:
    return math.inf if bar.ends_at is None else bar.ends_at


def _safe(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name)
