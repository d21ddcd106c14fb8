"""When a job may begin, as sbatch(1) writes `--begin`: `now+1hour`, `16:00`, `tomorrow`, `01/31/27`.

Pure but for the machine's zone: clock times and Slurm's own dates are in the local time of the daemon, as they are
to Slurm. What the interface takes everywhere means the same here: a number is Unix seconds, and `2027-01-31` or
`2027-01-31T18:00` without a zone is UTC. Only 4 or 6 digits are a date, MMDD or MMDDYY.
"""

import re
from datetime import datetime, timedelta

from mlbox.scheduler.values import YEAR_9999_S, Bad, moment, seconds, shown

_UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400, "week": 604_800}
_AFTER = re.compile(r"now(?:[\s+]+(\S.*))?")
"""A blank for the plus, too: that is what an urlencoded form makes of it."""
_SLURMS_AFTER = re.compile(r"(\d{1,10})\s*(second|minute|hour|day|week)s?")
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?(?:\s*([ap])m)?")
_DATE = re.compile(r"(\d{1,2})([/.])(\d{1,2})(?:\2(\d{2}|\d{4}))?|(\d{2})(\d{2})(\d{2})?")
_WORDS = {"midnight": (0, 0, 0), "noon": (12, 0, 0)}


def begin(value: object, now: float) -> float:
    """Unix seconds: what `moment` takes, or one of Slurm's forms, seen from `now`."""
    written = value.strip().lower() if isinstance(value, str) else ""
    try:
        found = _slurms(written, now)
    except (ValueError, OverflowError, OSError):
        raise Bad(f"there is no such time as {shown(value)}") from None
    if found is None:
        try:
            return moment(value)
        except Bad:
            raise Bad(
                "wants a time such as 2027-01-31T18:00:00Z, Unix seconds, or as sbatch writes it: now+1hour, 16:00, "
                f"tomorrow, 01/31/27; got {shown(value)}"
            ) from None
    if not 0 <= found <= YEAR_9999_S:
        raise Bad(f"there is no such time as {shown(value)}")
    return found


def _slurms(written: str, now: float) -> float | None:
    """The moment that one of Slurm's forms means; None where it is none of them."""
    if match := _AFTER.fullmatch(written):
        return now + (_after(match[1]) if match[1] else 0.0)
    here = datetime.fromtimestamp(now)
    midnight = here.replace(hour=0, minute=0, second=0, microsecond=0)
    if written in ("today", "tomorrow"):
        return (midnight + timedelta(days=int(written == "tomorrow"))).timestamp()
    if written in _WORDS:
        return _next(midnight, here, _WORDS[written])
    if match := _CLOCK.fullmatch(written):
        return _next(midnight, here, _clock(match))
    if match := _DATE.fullmatch(written):
        return _date(match, midnight).timestamp()
    return None


def _after(written: str) -> float:
    """Seconds: `1hour` and the like of Slurm, or any duration of mlbox."""
    if match := _SLURMS_AFTER.fullmatch(written):
        return float(int(match[1]) * _UNITS[match[2]])
    return seconds(written)


def _next(midnight: datetime, here: datetime, clock: tuple[int, int, int]) -> float:
    """The next time that the clock shows `clock`: today, or where that is over tomorrow."""
    hour, minute, second = clock
    time = midnight.replace(hour=hour, minute=minute, second=second)
    return (time if time > here else time + timedelta(days=1)).timestamp()


def _clock(match: re.Match[str]) -> tuple[int, int, int]:
    hour, minute, second = int(match[1]), int(match[2]), int(match[3] or 0)
    if match[4]:
        if not 1 <= hour <= 12:
            raise ValueError(hour)
        hour = hour % 12 + (12 if match[4] == "p" else 0)
    return hour, minute, second


def _date(match: re.Match[str], midnight: datetime) -> datetime:
    """A date without a year is the next such date."""
    month, day, year = (match[1], match[3], match[4]) if match[1] else (match[5], match[6], match[7])
    if year is not None:
        return datetime(int(year) + (2000 if len(year) == 2 else 0), int(month), int(day))
    for ahead in range(9):  # 29 February comes every 4 years, or 8 around a century
        try:
            date = datetime(midnight.year + ahead, int(month), int(day))
        except ValueError:
            continue
        if date >= midnight:
            return date
    raise ValueError(month)
