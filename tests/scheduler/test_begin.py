"""The times of sbatch's --begin mean what they mean to Slurm, on the clock of the box."""

import math
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlbox.scheduler.begin import begin
from mlbox.scheduler.values import Bad

NOW = datetime(2026, 3, 28, 12, 30, tzinfo=UTC).timestamp()
"""13:30 in Berlin, on the last day before its clocks go forward."""


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
        time.tzset()
        yield
    time.tzset()


def at(written: object) -> str:
    return datetime.fromtimestamp(begin(written, NOW), UTC).strftime("%Y-%m-%d %H:%M:%S")


UNDERSTOOD: list[tuple[object, str]] = [
    ("now", "2026-03-28 12:30:00"),
    ("now+90", "2026-03-28 12:31:30"),
    ("now+90minutes", "2026-03-28 14:00:00"),
    ("now+1hour", "2026-03-28 13:30:00"),
    ("now 1hour", "2026-03-28 13:30:00"),
    ("now + 1 hour", "2026-03-28 13:30:00"),
    ("NOW+3days", "2026-03-31 12:30:00"),
    ("now+1week", "2026-04-04 12:30:00"),
    ("now+90m", "2026-03-28 14:00:00"),
    ("now+1-12:00:00", "2026-03-30 00:30:00"),
    ("16:00", "2026-03-28 15:00:00"),
    ("16:00:30", "2026-03-28 15:00:30"),
    ("4:00pm", "2026-03-28 15:00:00"),
    ("12:00 AM", "2026-03-28 23:00:00"),
    ("13:30", "2026-03-29 11:30:00"),
    ("9:00", "2026-03-29 07:00:00"),
    ("today", "2026-03-27 23:00:00"),
    ("tomorrow", "2026-03-28 23:00:00"),
    ("midnight", "2026-03-28 23:00:00"),
    ("noon", "2026-03-29 10:00:00"),
    ("0401", "2026-03-31 22:00:00"),
    ("0328", "2026-03-27 23:00:00"),
    ("0101", "2026-12-31 23:00:00"),
    ("010128", "2027-12-31 23:00:00"),
    ("0229", "2028-02-28 23:00:00"),
    ("01/31/27", "2027-01-30 23:00:00"),
    ("01/31/2027", "2027-01-30 23:00:00"),
    ("4/1", "2026-03-31 22:00:00"),
    ("01.31.27", "2027-01-30 23:00:00"),
    ("2027-01-31", "2027-01-31 00:00:00"),
    ("2027-01-31T18:00", "2027-01-31 18:00:00"),
    ("2027-01-31T18:00:30", "2027-01-31 18:00:30"),
    ("2027-01-31T18:00+01:00", "2027-01-31 17:00:00"),
    ("1800000000", "2027-01-15 08:00:00"),
    (1800000000, "2027-01-15 08:00:00"),
    (1300, "1970-01-01 00:21:40"),
]


def test_a_time_is_understood() -> None:
    for written, meant in UNDERSTOOD:
        assert (at(written), written) == (meant, written)


REFUSED: list[object] = [
    *("yesterday", "", "24:00", "12:60", "13:00pm", "0:00am", "1:2", "1332", "0230", "022927", "1/32", "13/01/27"),
    *("now-1hour", "now+", "now+1fortnight", "now+99999999999hours", "now+1e9", "now+9999999999weeks", "noonish"),
    *("2027-02-30", "now+" + "9" * 5000, "9" * 5000 + ":00", "١٢:0x", "\ud800", "now\0", "1/2/0000", "1/1.27"),
    *(-1, True, None, [], {}, math.nan, math.inf, 10**400),
]


def test_what_is_no_time_is_refused(subtests: pytest.Subtests) -> None:
    for written in REFUSED:
        with subtests.test(written=repr(written)[:40] if isinstance(written, str) else type(written)):
            with pytest.raises(Bad) as refusal:
                begin(written, NOW)
            assert len(str(refusal.value)) < 300
            assert str(refusal.value).isprintable()


WORDS = st.sampled_from(["now", "+", "1", "30", "hour", "days", ":", "/", "-", ".", " ", "tomorrow", "pm", "T", "0229"])


@given(written=st.text() | st.lists(WORDS, max_size=8).map("".join), now=st.floats(0, 250_000_000_000))
def test_any_text_is_a_time_of_this_era_or_refused(written: str, now: float) -> None:
    try:
        found = begin(written, now)
    except Bad:
        return
    assert 0 <= found < 253_402_300_800


@given(now=st.integers(0, 4_000_000_000), hour=st.integers(0, 23), minute=st.integers(0, 59))
def test_a_clock_time_is_the_next_such_time(now: int, hour: int, minute: int) -> None:
    found = begin(f"{hour}:{minute:02}", now)
    # A clock that is put forward or back makes a day an hour shorter or longer, and may leave out the time.
    assert now - 3600 < found <= now + 25 * 3600
    local = datetime.fromtimestamp(found)
    assert local.minute == minute
    assert (local.hour - hour) % 24 in (0, 1)
