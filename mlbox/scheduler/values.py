"""How single values of a submit are written: text, numbers, durations, memory, times. Pure.

Each function takes what JSON or a form may hold and gives the value meant, or raises Bad.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeGuard, cast

INT64_MAX = 2**63 - 1
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
"""What a variable may be called."""
YEAR_9999_S = 253_402_300_799.0
"""The end of the year 9999 in Unix seconds, where RFC 3339 ends."""
_WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_UNITS = {"d": 86_400, "h": 3600, "min": 60, "m": 60, "s": 1}
_WITH_UNIT = r"(\d{1,9}(?:\.\d{1,6})?)\s*(d|h|min|m|s)\s*"
_MEMORY = re.compile(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*(?:([kmgt])i?b?)?\s*", re.IGNORECASE)
_MEMORY_MAX_MIB = 2**40


class Bad(ValueError):
    """A value is wrong; the text says on one short line what is wanted and what was given."""


def text(limit: int, *, empty: bool = False) -> Callable[[object], str]:
    """A parser of text that a program can be given, of at most `limit` bytes."""

    def parse(value: object) -> str:
        if not isinstance(value, str):
            raise Bad(f"wants text, got {shown(value)}")
        if "\0" in value:
            raise Bad("holds a NUL character, which no program can be given")
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise Bad("is not valid Unicode (it holds half of a surrogate pair)") from None
        if size > limit:
            raise Bad(f"is {size} bytes long; at most {limit} fit")
        if not empty and not value.strip():
            raise Bad("is empty")
        return value

    return parse


def integer(low: int, high: int) -> Callable[[object], int]:
    """A parser of whole numbers from `low` to `high`."""

    def parse(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,19}\s*", value):
            value = int(value)
        if isinstance(value, float) and value.is_integer() and abs(value) < INT64_MAX:
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise Bad(f"wants a whole number, got {shown(value)}")
        if not low <= value <= high:
            raise Bad(f"wants {low} to {high}, got {shown(value)}")
        return value

    return parse


def boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = value.strip().lower() if isinstance(value, str) else str(value) if value in (0, 1) else ""
    if word not in _WORDS:
        raise Bad(f"wants true or false, got {shown(value)}")
    return _WORDS[word]


def seconds(value: object) -> float:
    """A duration: a number of seconds, `90m`, `2h`, `1d 12h`, or as Slurm writes it, `1-12:00:00`."""
    number: float | None = None
    if isinstance(value, str):
        number = _written_seconds(value.strip().lower())
    elif _is_number(value):
        number = float(value)
    if number is None:
        raise Bad(f"wants a duration such as 90, 90m, 2h or 1-12:00:00, got {shown(value)}")
    return number


def memory_mib(value: object) -> int:
    """MiB, rounded up: a number of them, or `20G`, `512M`, `1.5T`."""
    number: float | None = None
    if isinstance(value, str):
        if match := _MEMORY.fullmatch(value):
            number = float(match[1]) * 1024.0 ** ("kmgt".index((match[2] or "m").lower()) - 1)
    elif _is_number(value):
        number = float(value)
    if number is None or not 1 <= number <= _MEMORY_MAX_MIB:
        raise Bad(f"wants memory such as 20G or 512M (a plain number is MiB), got {shown(value)}")
    return math.ceil(number)


def moment(value: object) -> float:
    """Unix seconds: a number of them, or an RFC 3339 time (UTC where it names no zone)."""
    number: float | None = None
    if isinstance(value, str):
        number = _written_moment(value.strip())
    elif _is_number(value):
        number = float(value)
    if number is None or not 0 <= number <= YEAR_9999_S:
        raise Bad(f"wants a time such as 2027-01-31T18:00:00Z or Unix seconds, got {shown(value)}")
    return number


def json_object(written: str) -> dict[str, Any]:
    """The object that JSON text holds, in which no name is there twice."""
    try:
        found: object = _DECODER.decode(written)
    except Bad:
        raise
    except RecursionError:
        raise Bad("is nested too deeply") from None
    except ValueError as error:  # also a number of more digits than int() takes
        wrong = error.msg if isinstance(error, json.JSONDecodeError) else "a number is too long"
        raise Bad(f"begins like a JSON object but is none: {wrong.lower()}") from None
    if not isinstance(found, dict):
        raise Bad(f"wants a JSON object, got {shown(found)}")
    return cast("dict[str, Any]", found)


def shown(value: object) -> str:
    """A value for an error message: short, on one line, never able to break the text it stands in."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() if abs(value) > INT64_MAX:
            return "a number beyond 64 bits"
        case int() | float():
            return str(value)
        case str():
            quoted = ascii(value[:61])
            return quoted if len(quoted) <= 62 else quoted[:57] + "..."
        case list():
            return "a list"
        case Mapping():
            return "an object"
        case _:
            return type(value).__name__


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Bad("has a name twice: which one is meant?")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs)


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether a JSON value is a number that a float holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= INT64_MAX


def _written_seconds(written: str) -> float | None:
    if re.fullmatch(r"\d{1,12}(\.\d{1,9})?", written):
        return float(written)
    if re.fullmatch(f"(?:{_WITH_UNIT}){{1,5}}", written):
        return sum(float(count) * _UNITS[unit] for count, unit in re.findall(_WITH_UNIT, written))
    # sbatch(1), --time: minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds]
    if match := re.fullmatch(r"(?:(\d{1,5})-)?(\d{1,7})(?::(\d{1,5}))?(?::(\d{1,5}))?", written):
        days, *clock = match.groups()
        parts = [int(part) for part in clock if part is not None]
        units = (60, 1) if days is None and len(parts) == 2 else (3600, 60, 1)
        return int(days or 0) * 86_400.0 + sum(part * unit for part, unit in zip(parts, units, strict=False))
    return None


def _written_moment(written: str) -> float | None:
    if re.fullmatch(r"\d{1,12}(\.\d{1,9})?", written):
        return float(written)
    try:
        time = datetime.fromisoformat(written)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
