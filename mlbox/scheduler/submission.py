"""What a user sends -> a checked `JobSpec`. Pure.

Every form of a submit (form fields, JSON, query, directives of a script) ends here as one mapping from field name to
value; strings are understood as well as JSON's own types. All bad fields are reported at once.
"""

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from mlbox.errors import FieldError, Invalid
from mlbox.jobs import JobSpec
from mlbox.scheduler.values import INT64_MAX, Bad, boolean, integer, memory_mib, moment, seconds, shown, text

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_ARGUMENT_MAX = 128 * 1024 - 1
"""Linux refuses a longer single argument or variable (MAX_ARG_STRLEN, execve(2))."""
_SCRIPT_MAX = 1 << 20
_ENV_MAX = 256 * 1024
_YEAR_S = 366 * 86_400.0
_ERRORS_MAX = 32
"""More than all fields there are: further unknown ones are not even looked at, for each costs a search."""
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


def parse(fields: Mapping[str, object], defaults: Defaults, *, code: str | None = None) -> JobSpec:
    """Check `fields` and make them a JobSpec; `code` is the format of an archive sent along.

    Raises Invalid with one FieldError for each bad field.
    """
    values, errors = _checked(fields, FIELDS)
    errors += _together(fields, values, code)
    if errors:
        raise _refusal("the job was not accepted: ", errors)
    values.setdefault("name", _default_name(values.get("command")))
    values.setdefault("grace_s", defaults.grace_s)
    return JobSpec(code=code, **values)


def changes(fields: Mapping[str, object]) -> dict[str, Any]:
    """Check the fields of a PATCH: `priority`, `time_limit`. Raises Invalid."""
    values, errors = _checked(fields, ("priority", "time_limit"))
    if not values and not errors:
        raise Invalid("nothing to change: give priority or time_limit")
    if errors:
        raise _refusal("nothing was changed: ", errors)
    return values


def unknown(field: str, known: Sequence[str]) -> str:
    """What to tell somebody who used a field that does not exist."""
    near = difflib.get_close_matches(field[:64], known, n=1, cutoff=0.5)
    return f"unknown field; did you mean {near[0]!r}?" if near else f"unknown field; known: {', '.join(sorted(known))}"


def _checked(fields: Mapping[str, object], known: Sequence[str]) -> tuple[dict[str, Any], list[FieldError]]:
    """The values of the good fields by the names of JobSpec, and what is wrong with the bad ones."""
    values: dict[str, Any] = {}
    errors: list[FieldError] = []
    for field, value in fields.items():
        if value is None:
            continue
        if len(errors) == _ERRORS_MAX:
            break
        try:
            if field in _LATER:
                raise Bad(f"this version of mlbox has no {_LATER[field]}: leave it out")
            if field == "code":
                raise Bad("send the archive as a file: curl -F code=@src.tar.gz")
            if field not in known:
                raise Bad(unknown(field, known))
            values[_COLUMNS.get(field, field)] = _PARSERS[field](value)
        except Bad as error:
            errors.append(FieldError(field if NAME.fullmatch(field) else shown(field), str(error)))
    return values, errors


def _together(fields: Mapping[str, object], values: Mapping[str, Any], code: str | None) -> list[FieldError]:
    """What is wrong with the fields as a set."""
    errors: list[FieldError] = []
    given = [field for field in ("command", "script") if fields.get(field) is not None]
    if not given:
        errors.append(FieldError("command", "missing: give a command line, or a script"))
    elif len(given) == 2:
        errors.append(FieldError("script", "give either a command or a script, not both"))
    if code is not None and "workdir" in values:
        errors.append(FieldError("workdir", "give either code (unpacked into a fresh folder) or workdir, not both"))
    return errors


def _refusal(what: str, errors: list[FieldError]) -> Invalid:
    return Invalid(what + "; ".join(f"{error.field}: {error.message}" for error in errors), tuple(errors))


def _default_name(command: str | None) -> str:
    """A label for a job without a name: its command line, as far as a name may hold it."""
    if command is None:
        return "script"
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", command).strip("-.")
    return words[:40].rstrip("-.") or "command"


def _name(value: object) -> str:
    if not isinstance(value, str) or NAME.fullmatch(value) is None:
        raise Bad(f"wants 1 to 64 of letters, digits, '.', '_' and '-', got {shown(value)}")
    return value


def _model(value: object) -> str:
    """A model's name is also a folder's: no leading dot; `stats` is a path of the inference protocol."""
    name = _name(value)
    if name.startswith(".") or name == "stats":
        raise Bad(f"a model cannot be called {name!r}")
    return name


def _duration(low: int, high: float) -> Callable[[object], float]:
    def parse_duration(value: object) -> float:
        number = seconds(value)
        if not low <= number <= high:
            raise Bad(f"wants {low} to {high:.0f} seconds, got {shown(value)}")
        return number

    return parse_duration


def _env(value: object) -> dict[str, str]:
    """Variables as a JSON object, as JSON text, or as `NAME=value` lines (one or many form fields)."""
    variables: dict[str, str] = {}
    for name, item in _pairs(value):
        if not isinstance(name, str) or _ENV_NAME.fullmatch(name) is None:
            raise Bad(f"{shown(name)} cannot be a variable's name")
        if name.startswith("MLBOX_"):
            raise Bad(f"{name} is mlbox's own: variables that begin with MLBOX_ are set by mlbox")
        number = isinstance(item, (int, float)) and not isinstance(item, bool) and abs(item) <= INT64_MAX
        try:
            variables[name] = text(_ARGUMENT_MAX - len(name) - 1, empty=True)(str(item) if number else item)
        except Bad as error:
            raise Bad(f"{name} {error}") from None
    if sum(len(name) + len(item.encode()) for name, item in variables.items()) > _ENV_MAX:
        raise Bad(f"is larger than {_ENV_MAX} bytes in all")
    return variables


def _pairs(value: object) -> list[tuple[object, object]]:
    """The names and values of one of the forms of `env`."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = cast("object", json.loads(value))
        except (ValueError, RecursionError):
            raise Bad("begins like a JSON object but is none") from None
    if isinstance(value, Mapping):
        return list(cast("Mapping[object, object]", value).items())
    if not isinstance(value, (str, list)):
        raise Bad(f"wants names and values, got {shown(value)}")
    lines = value.split("\n") if isinstance(value, str) else cast("list[object]", value)
    pairs: list[tuple[object, object]] = []
    for line in lines:
        if not isinstance(line, str) or (line.strip() and "=" not in line):
            raise Bad(f"wants NAME=value, got {shown(line)}")
        name, equals, content = line.rstrip("\r").partition("=")
        if equals:
            pairs.append((name.strip(), content))
    return pairs


def _workdir(value: object) -> str:
    path = text(4095)(value)
    if not path.startswith("/"):
        raise Bad(f"wants an absolute path, got {shown(value)}")
    return path


_PARSERS: Mapping[str, Callable[[object], Any]] = {
    "command": text(_ARGUMENT_MAX),
    "script": text(_SCRIPT_MAX),
    "workdir": _workdir,
    "name": _name,
    "project": _name,
    "env": _env,
    "gpus": integer(0, 1024),
    "cpus": integer(1, 65_536),
    "mem": memory_mib,
    "time_limit": _duration(1, 10 * _YEAR_S),
    "grace_s": _duration(0, 86_400),
    "priority": integer(-100, 100),
    "retries": integer(0, 100),
    "requeue": boolean,
    "model": _model,
    "hold": boolean,
    "not_before": moment,
}
_COLUMNS = {"mem": "mem_mib", "time_limit": "time_limit_s"}
FIELDS = tuple(_PARSERS)
