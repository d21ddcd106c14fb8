from datetime import UTC
from itertools import pairwise
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from mlbox.scheduler.timeline import Bar, Kind, Lane, Timeline
from mlbox.web import gantt
from tests.web.standins import HOUR, lab_plan

NOON = 1_800_014_400.0
"""2027-01-15 12:00:00 UTC."""


def test_the_plan_as_text() -> None:
    assert gantt.text(lab_plan(NOON), 92, UTC).splitlines() == [
        "        08:00         10:00        12:00          14:00         16:00        18:00",
        "GPU 0   █ 1 ██████·█ 5 ████████████▒▒▒▒▒▒▒▒▒░ 9 ░░░░░░░░░░░░░░░░····························",
        "GPU 1   ··██████··············█ 6 █▒▒▒▒▒░ 8 ░░░░░░░ 10 ░░░░░░░░░····························",
        "GPU 2   ··············▞ python ▞▞▞▞▞▞···░ 8 ░░░░░░░··/ maintenance /////////////////////////",
        "GPU 3   ···················█ 7 ████▒▒▒▒▒░ 12 ░░░░···········································",
        "        ························█ 11 ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒",
        "",
        "█ ran   ▒ runs until about then   ░ planned   / reserved   ▞ from outside   × drained   │ now",
    ]


def test_jobs_too_brief_to_be_seen_are_drawn_as_one() -> None:
    lanes = gantt.picture(lab_plan(NOON), UTC).lanes
    assert [span.jobs for span in lanes[1].spans] == [40, 1, 1, 1]


def test_a_plan_of_nothing_is_still_a_plan() -> None:
    empty = Timeline(now=NOON, starts_at=NOON, ends_at=NOON + HOUR, lanes=())
    assert "this box has no GPU" in gantt.text(empty, 80)
    assert gantt.picture(empty, UTC).now == 0


def some_bar(start: float, length: float, kind: Kind) -> Bar:
    ends = None if length > 19 * HOUR else NOON + start + length
    return Bar(name="x", job_id=1, starts_at=NOON + start, ends_at=ends, kind=kind)


BARS = st.builds(some_bar, st.floats(-9 * HOUR, 9 * HOUR), st.floats(0, 20 * HOUR), st.sampled_from(get_args(Kind)))


@given(st.lists(BARS, max_size=30), st.integers(40, 400), st.floats(1, 4_000_000))
def test_every_bar_lies_within_the_picture_and_on_no_other(bars: list[Bar], columns: int, length: float) -> None:
    plan = Timeline(
        now=NOON,
        starts_at=NOON - length / 3,
        ends_at=NOON + length,
        lanes=(Lane(gpu_uuid="GPU-a", index=0, label="0", bars=tuple(bars)),),
    )
    shown = gantt.picture(plan, UTC)
    assert len(shown.ticks) <= 10
    for row in range(shown.lanes[0].rows):
        spans = sorted((span for span in shown.lanes[0].spans if span.row == row), key=lambda span: span.place)
        for span in spans:
            assert 0 <= span.place <= span.place + span.width <= 100.01
        for left, right in pairwise(spans):
            assert left.place + left.width <= right.place + 0.01
    assert all(len(line) <= columns for line in gantt.text(plan, columns, UTC).splitlines()[:-2])
