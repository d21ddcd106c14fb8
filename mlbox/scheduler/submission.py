"""What a user sends -> a checked `Submission`. Pure.

Every form of a submit (form fields, JSON, query, directives of a script) ends here as one mapping from field name to
value; strings are understood as well as JSON's own types. All bad fields are reported at once.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from mlbox.errors import FieldError, Invalid
from mlbox.jobs import ArraySpec, Element, JobSpec, WarnSignal
from mlbox.scheduler import arrays
from mlbox.scheduler import fields as single
from mlbox.scheduler.begin import begin
from mlbox.scheduler.values import Bad, boolean, integer, memory_mib, shown, text

NAME = single.NAME
_SCRIPT_MAX = 1 << 20
_YEAR_S = 366 * 86_400.0
_ERRORS_MAX = 32
"""More than all fields there are: further unknown ones are not even looked at, for each costs a search."""
_ARRAY_BYTES_MAX = 256 << 20
"""What the jobs of an array may take in the database: each keeps its own script and variables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What the box's configuration says of fields that a user left out."""

    grace_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Submission:
    """What a user asked for: a job, or the elements of an array that all are that job."""

    spec: JobSpec
    array: ArraySpec | None = None


def parse(fields: Mapping[str, object], defaults: Defaults, *, now: float, code: str | None = None) -> Submission:
    """Check `fields`; `code` is the format of an archive sent along, `now` is Unix seconds.

    Raises Invalid with one FieldError for each bad field.
    """
    values, errors = _checked(fields, FIELDS, now)
    errors += _together(fields, values, code)
    if errors:
        raise _refusal("the job was not accepted: ", errors)
    array = _array(values)
    for field in _OF_ARRAYS:
        values.pop(field, None)
    values.setdefault("name", _default_name(values.get("command")))
    values.setdefault("grace_s", defaults.grace_s)
    return Submission(JobSpec(code=code, **values), array)


def changes(fields: Mapping[str, object]) -> dict[str, Any]:
    """Check the fields of a PATCH: `priority`, `time_limit`, `notify`. Raises Invalid."""
    values, errors = _checked(fields, ("priority", "time_limit", "notify"), 0.0)
    if not values and not errors:
        raise Invalid("nothing to change: give priority, time_limit or notify")
    if errors:
        raise _refusal("nothing was changed: ", errors)
    return values


def unknown(field: str, known: Sequence[str]) -> str:
    """What to tell somebody who used a field that does not exist."""
    near = difflib.get_close_matches(field[:64], known, n=1, cutoff=0.5)
    return f"unknown field; did you mean {near[0]!r}?" if near else f"unknown field; known: {', '.join(sorted(known))}"


def _checked(fields: Mapping[str, object], known: Sequence[str], now: float) -> tuple[dict[str, Any], list[FieldError]]:
    """The values of the good fields by the names of JobSpec, and what is wrong with the bad ones."""
    values: dict[str, Any] = {}
    errors: list[FieldError] = []
    for field, value in fields.items():
        if value is None:
            continue
        if len(errors) == _ERRORS_MAX:
            break
        try:
            if field == "code":
                raise Bad("send the archive as a file: curl -F code=@src.tar.gz")
            if field not in known:
                raise Bad(unknown(field, known))
            take = partial(begin, now=now) if field == "not_before" else _PARSERS[field]
            values[_COLUMNS.get(field, field)] = take(value)
        except Bad as error:
            errors.append(FieldError(field if NAME.fullmatch(field) else shown(field), str(error)))
    return values, errors


def _together(fields: Mapping[str, object], values: Mapping[str, Any], code: str | None) -> list[FieldError]:
    """What is wrong with the fields as a set."""
    errors: list[FieldError] = []

    def wrong(field: str, message: str) -> None:
        errors.append(FieldError(field, message))

    given = {field for field, value in fields.items() if value is not None}
    if not given & {"command", "script"}:
        wrong("command", "missing: give a command line, or a script")
    elif {"command", "script"} <= given:
        wrong("script", "give either a command or a script, not both")
    if code is not None and "workdir" in values:
        wrong("workdir", "give either code (unpacked into a fresh folder) or workdir, not both")
    gpus = values.get("gpus", 0)
    if gpus and "gpu_mem_mib" in values:
        wrong("gpu_mem", "give either gpus (whole ones) or gpu_mem (a share of one), not both")
    elif "launch" in values and not gpus and not _bad(fields, values, "gpus"):
        wrong("launch", "starts a job on whole GPUs: give gpus=1 or more, too")
    warn: WarnSignal | None = values.get("warn_signal")
    limit: float | None = values.get("time_limit_s")
    if warn is not None and limit is None and not _bad(fields, values, "time_limit"):
        wrong("signal", "is sent before the time limit: give time_limit, too")
    elif warn is not None and limit is not None and warn.before_s >= limit:
        wrong("signal", f"would be sent {warn.before_s:.0f} s before the limit, but the time limit is {limit:.0f} s")
    if {"array", "matrix"} <= given:
        wrong("matrix", "give either an array or a matrix, not both")
    elif "at_once" in values and not given & {"array", "matrix"}:
        wrong("at_once", "caps an array: give array or matrix, too")
    elif too_large := _too_large(values):
        wrong("matrix" if "matrix" in values else "array", too_large)
    return errors


def _bad(fields: Mapping[str, object], values: Mapping[str, Any], field: str) -> bool:
    """Whether `field` was given but is no value: what needs it is not at fault, then."""
    return fields.get(field) is not None and _COLUMNS.get(field, field) not in values


def _array(values: Mapping[str, Any]) -> ArraySpec | None:
    array: ArraySpec | None = values.get("array")
    if "matrix" in values:
        array = ArraySpec(elements=cast("tuple[Element, ...]", values["matrix"]))
    if array is not None and "at_once" in values:
        array = replace(array, at_once=values["at_once"])
    return array


def _too_large(values: Mapping[str, Any]) -> str | None:
    array = _array(values)
    if array is None:
        return None
    every = len((values.get("command") or values.get("script") or "").encode()) + single.env_bytes(
        values.get("env", {})
    )
    size = sum(every + single.env_bytes(element.env) for element in array.elements)
    if size <= _ARRAY_BYTES_MAX:
        return None
    return (
        f"its {len(array.elements)} elements would keep {size >> 20} MiB of script and variables, more than "
        f"{_ARRAY_BYTES_MAX >> 20} MiB: let a short script call a long one"
    )


def _refusal(what: str, errors: list[FieldError]) -> Invalid:
    return Invalid(what + "; ".join(f"{error.field}: {error.message}" for error in errors), tuple(errors))


def _default_name(command: str | None) -> str:
    """A label for a job without a name: its command line, as far as a name may hold it."""
    if command is None:
        return "script"
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", command).strip("-.")
    return words[:40].rstrip("-.") or "command"


_PARSERS: Mapping[str, Callable[[object], Any]] = {
    "command": text(single.ARGUMENT_MAX),
    "script": text(_SCRIPT_MAX),
    "workdir": single.workdir,
    "name": single.name,
    "project": single.name,
    "env": single.env,
    "gpus": integer(0, 1024),
    "gpu_mem": memory_mib,
    "cpus": integer(1, 65_536),
    "mem": memory_mib,
    "time_limit": single.duration(1, 10 * _YEAR_S),
    "grace_s": single.duration(0, 86_400),
    "signal": single.warn_signal,
    "priority": integer(-100, 100),
    "preemptible": boolean,
    "depends_on": single.depends_on,
    "array": arrays.array,
    "matrix": arrays.matrix,
    "at_once": arrays.at_once,
    "retries": integer(0, 100),
    "requeue": boolean,
    "launch": single.launch,
    "model": single.model,
    "hold": boolean,
    "output": single.output,
    "error": single.output,
    "notify": single.notify,
    "notify_on": single.notify_on,
}
_COLUMNS = {"mem": "mem_mib", "gpu_mem": "gpu_mem_mib", "time_limit": "time_limit_s", "signal": "warn_signal"}
_OF_ARRAYS = ("array", "matrix", "at_once")
FIELDS = (*_PARSERS, "not_before")
