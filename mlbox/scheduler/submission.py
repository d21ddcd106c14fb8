"""What a user sends -> a checked `JobSpec`. Pure.

Every form of a submit (form fields, JSON, query, directives of a script) ends here as one mapping from field name to
value; strings are understood as well as JSON's own types. All bad fields are reported at once.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from mlbox.errors import FieldError, Invalid
from mlbox.jobs import JobSpec

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_INT64 = 2**63 - 1
_COMMAND_MAX = 128 * 1024 - 1
"""Linux refuses a longer single argument (MAX_ARG_STRLEN, execve(2))."""
_SCRIPT_MAX = 1 << 20
_ENV_MAX = 256 * 1024
_YEAR_S = 366 * 86_400.0
_LATER = {
    "gpu_mem": "shared GPUs",
    "depends_on": "dependencies",
    "array": "arrays",
    "matrix": "arrays",
    "preemptible": "preemption",
    "notify": "notifications",
}
"""Fields of the interface that this version cannot honour: refused, never ignored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What the box's configuration says of fields that a user left out."""

    grace_s: float = 30.0


class _Bad(ValueError):
    """One field's value is wrong; the text says what is wanted."""


def parse(fields: Mapping[str, object], defaults: Defaults, *, code: str | None = None) -> JobSpec:
    """Check `fields` and make them a JobSpec; `code` is the format of an archive sent along.

    Raises Invalid with one FieldError for each bad field.
    """
    errors: list[FieldError] = []
    values: dict[str, Any] = {}
    for field, value in fields.items():
        if value is None:
            continue
        if field in _LATER:
            errors.append(FieldError(field, f"this version of mlbox has no {_LATER[field]}: leave it out"))
        elif field not in _PARSERS:
            errors.append(FieldError(field, unknown(field, (*_PARSERS, "code"))))
        else:
            try:
                values[_COLUMNS.get(field, field)] = _PARSERS[field](value)
            except _Bad as error:
                errors.append(FieldError(field, str(error)))
    bad = {error.field for error in errors}
    errors += _together(values, code, bad)
    if errors:
        raise Invalid(
            "the job was not accepted: " + "; ".join(f"{error.field}: {error.message}" for error in errors),
            tuple(errors),
        )
    values.setdefault("name", _default_name(values.get("command")))
    values.setdefault("grace_s", defaults.grace_s)
    return JobSpec(code=code, **values)


def unknown(field: str, known: Sequence[str]) -> str:
    """What to tell somebody who used a field that does not exist."""
    near = difflib.get_close_matches(field, known, n=1, cutoff=0.5)
    return f"unknown field; did you mean {near[0]!r}?" if near else f"unknown field; known: {', '.join(sorted(known))}"


def changes(fields: Mapping[str, object]) -> dict[str, Any]:
    """Check the fields of a PATCH: `priority`, `time_limit`. Raises Invalid."""
    known = ("priority", "time_limit")
    errors = [FieldError(field, unknown(field, known)) for field in fields if field not in known]
    values: dict[str, Any] = {}
    for field in known:
        if field in fields:
            try:
                values[_COLUMNS.get(field, field)] = _PARSERS[field](fields[field])
            except _Bad as error:
                errors.append(FieldError(field, str(error)))
    if not values and not errors:
        errors.append(FieldError("", "nothing to change: give priority or time_limit"))
    if errors:
        raise Invalid("; ".join(f"{error.field}: {error.message}" for error in errors), tuple(errors))
    return values


def _together(values: Mapping[str, Any], code: str | None, bad: set[str]) -> list[FieldError]:
    """What is wrong with the fields as a set."""
    errors: list[FieldError] = []
    given = {"command", "script"} & (values.keys() | bad)
    if not given:
        errors.append(FieldError("command", "missing: give a command line, or a script"))
    elif len(given) == 2:
        errors.append(FieldError("script", "give either a command or a script, not both"))
    if code is not None and "workdir" in values:
        errors.append(FieldError("workdir", "give either code (unpacked into a fresh folder) or workdir, not both"))
    return errors


def _default_name(command: str | None) -> str:
    """A label for a job without a name: its command line, as far as a name may hold it."""
    if command is None:
        return "script"
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", command).strip("-.")
    return words[:40].rstrip("-.") or "command"


def _text(limit: int, *, empty: bool = False) -> Callable[[object], str]:
    def parse_text(value: object) -> str:
        if not isinstance(value, str):
            raise _Bad(f"wants text, got {_shown(value)}")
        if "\0" in value:
            raise _Bad("holds a NUL character, which no program can be given")
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise _Bad("is not valid Unicode (it holds half of a surrogate pair)") from None
        if size > limit:
            raise _Bad(f"is {size} bytes long; at most {limit} fit")
        if not empty and not value.strip():
            raise _Bad("is empty")
        return value

    return parse_text


def _name(value: object) -> str:
    if not isinstance(value, str) or NAME.fullmatch(value) is None:
        raise _Bad(f"wants 1 to 64 of letters, digits, '.', '_' and '-', got {_shown(value)}")
    return value


def _model(value: object) -> str:
    """A model's name is also a folder's: no leading dot; `stats` is a path of the inference protocol."""
    name = _name(value)
    if name.startswith(".") or name == "stats":
        raise _Bad(f"a model cannot be called {name!r}")
    return name


def _integer(low: int, high: int) -> Callable[[object], int]:
    def parse_integer(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,19}\s*", value):
            value = int(value)
        if isinstance(value, float) and value.is_integer() and abs(value) < _INT64:
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise _Bad(f"wants a whole number, got {_shown(value)}")
        if not low <= value <= high:
            raise _Bad(f"wants {low} to {high}, got {_shown(value)}")
        return value

    return parse_integer


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    text = str(value).strip().lower() if isinstance(value, (str, int)) else ""
    if text not in words:
        raise _Bad(f"wants true or false, got {_shown(value)}")
    return words[text]


def seconds(value: object) -> float:
    """A duration in seconds: a number, `90m`, `2h`, `1d12h`, or Slurm's `[days-]hours:minutes[:seconds]`."""
    number: float | None = None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value) if abs(value) < _INT64 else math.inf
    elif isinstance(value, str):
        number = _written_seconds(value.strip().lower())
    if number is None or not math.isfinite(number):
        raise _Bad(f"wants a duration such as 90, 90m, 2h or 1-12:00:00, got {_shown(value)}")
    return number


def _written_seconds(text: str) -> float | None:
    if re.fullmatch(r"\d{1,12}(\.\d{1,9})?", text):
        return float(text)
    if re.fullmatch(r"(\d{1,9}(\.\d{1,6})?(d|h|m|s|min)\s*)+", text):
        units = {"d": 86_400, "h": 3600, "m": 60, "min": 60, "s": 1}
        return sum(float(n) * units[unit] for n, _, unit in re.findall(r"(\d+(\.\d+)?)(d|h|min|m|s)", text))
    if match := re.fullmatch(r"(?:(\d{1,5})-)?(\d{1,5}):(\d{1,5})(?::(\d{1,5}))?", text):
        days, first, second, third = (int(part) if part else 0 for part in match.groups())
        if match[1] is None and match[4] is None:  # Slurm reads a:b as minutes:seconds, d-a:b as hours:minutes
            return first * 60.0 + second
        return days * 86_400.0 + first * 3600.0 + second * 60.0 + third
    if match := re.fullmatch(r"(\d{1,5})-(\d{1,5})", text):
        return int(match[1]) * 86_400.0 + int(match[2]) * 3600.0
    return None


def _duration(low: float, high: float) -> Callable[[object], float]:
    def parse_duration(value: object) -> float:
        number = seconds(value)
        if not low <= number <= high:
            raise _Bad(f"wants {low:g} to {high:g} seconds, got {_shown(value)}")
        return number

    return parse_duration


def _memory_mib(value: object) -> int:
    """MiB: a number, or `20G`, `512M`, `1.5T`."""
    mib: float | None = None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        mib = float(value) if abs(value) < _INT64 else None
    elif isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*([kmgt]?)(?:i?b)?\s*", value, re.IGNORECASE)
        if match:
            factor = {"": 1.0, "k": 1 / 1024, "m": 1.0, "g": 1024.0, "t": 1024.0**2}[match[2].lower()]
            mib = float(match[1]) * factor
    if mib is None or not 1 <= mib <= 2**40:
        raise _Bad(f"wants memory such as 20G or 512M (a plain number is MiB), got {_shown(value)}")
    return math.ceil(mib)


def _moment(value: object) -> float:
    """Unix seconds: a number, or an RFC 3339 time (UTC where it names no zone)."""
    number: float | None = None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _INT64:
        number = float(value)
    elif isinstance(value, str):
        try:
            number = float(value) if re.fullmatch(r"\d{1,12}(\.\d{1,9})?", value) else _read_time(value)
        except (ValueError, OverflowError):
            number = None
    if number is None or not 0 <= number <= 253_402_300_799:  # the end of the year 9999, where RFC 3339 ends
        raise _Bad(f"wants a time such as 2027-01-31T18:00:00Z or Unix seconds, got {_shown(value)}")
    return number


def _read_time(text: str) -> float:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _env(value: object) -> dict[str, str]:
    """Variables as a JSON object, as JSON text, or as `NAME=value` lines (one or many form fields)."""
    pairs: list[tuple[object, object]]
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = cast("object", json.loads(value))
        except (ValueError, RecursionError):
            raise _Bad("begins like a JSON object but is none") from None
    if isinstance(value, Mapping):
        pairs = list(cast("Mapping[object, object]", value).items())
    else:
        lines = value.splitlines() if isinstance(value, str) else value
        if not isinstance(lines, list):
            raise _Bad(f"wants names and values, got {_shown(value)}")
        pairs = []
        for line in cast("list[object]", lines):
            name, equals, text = str(line).partition("=")
            if not equals:
                raise _Bad(f"wants NAME=value, got {_shown(line)}")
            pairs.append((name.strip(), text))
    variables: dict[str, str] = {}
    text_of = _text(_COMMAND_MAX, empty=True)
    for name, item in pairs:
        if not isinstance(name, str) or _ENV_NAME.fullmatch(name) is None:
            raise _Bad(f"{_shown(name)} cannot be a variable's name")
        if name.startswith("MLBOX_"):
            raise _Bad(f"{name} is mlbox's own: variables that begin with MLBOX_ are set by mlbox")
        text = str(item) if isinstance(item, (int, float)) and not isinstance(item, bool) else item
        variables[name] = text_of(text)
    if sum(len(name) + len(text.encode()) for name, text in variables.items()) > _ENV_MAX:
        raise _Bad(f"is larger than {_ENV_MAX} bytes in all")
    return variables


def _workdir(value: object) -> str:
    path = _text(4095)(value)
    if not path.startswith("/"):
        raise _Bad(f"wants an absolute path, got {_shown(value)}")
    return path


def _shown(value: object) -> str:
    """A value for an error message: short, on one line, never able to break the text it stands in."""
    text = ascii(value) if isinstance(value, (str, bool, float)) else type(value).__name__
    if isinstance(value, int) and not isinstance(value, bool):
        text = str(value) if abs(value) <= _INT64 else "a number beyond 64 bits"
    return text if len(text) <= 60 else text[:57] + "..."


_PARSERS: Mapping[str, Callable[[object], Any]] = {
    "command": _text(_COMMAND_MAX),
    "script": _text(_SCRIPT_MAX),
    "workdir": _workdir,
    "name": _name,
    "project": _name,
    "env": _env,
    "gpus": _integer(0, 1024),
    "cpus": _integer(1, 65_536),
    "mem": _memory_mib,
    "time_limit": _duration(1, 10 * _YEAR_S),
    "grace_s": _duration(0, 86_400),
    "priority": _integer(-100, 100),
    "retries": _integer(0, 100),
    "requeue": _boolean,
    "model": _model,
    "hold": _boolean,
    "not_before": _moment,
}
_COLUMNS = {"mem": "mem_mib", "time_limit": "time_limit_s"}
FIELDS = tuple(_PARSERS)
