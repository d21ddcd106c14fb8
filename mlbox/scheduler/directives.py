"""The `#MLBOX key=value` and `#SBATCH --option=value` lines at the top of a script. Pure.

Slurm's rules (sbatch(1)): a line counts when it begins with its mark and no command comes before it, several options
may share a line, quotes and backslashes are a shell's, an unquoted `#` begins a comment, an unknown option is an
error that names its line.
"""

import difflib
import re
import shlex
from collections.abc import Iterator
from typing import cast

from mlbox.errors import FieldError, Invalid
from mlbox.scheduler.values import Bad, shown

_LENGTH_MAX = 16 * 1024
"""Characters in all directives of a script together: taking a shell's line apart is slow."""
_ERRORS_MAX = 32
_OPTIONS = {
    "--gpus": "gpus",
    "--gres": "gpus",
    "--time": "time_limit",
    "--job-name": "name",
    "--cpus-per-task": "cpus",
    "--mem": "mem",
    "--begin": "not_before",
    "--chdir": "workdir",
}
_FLAGS = {"--requeue": ("requeue", True), "--no-requeue": ("requeue", False), "--hold": ("hold", True)}
_SHORT = {
    "-J": "--job-name",
    "-t": "--time",
    "-c": "--cpus-per-task",
    "-G": "--gpus",
    "-b": "--begin",
    "-D": "--chdir",
    "-H": "--hold",
}


def read(script: str) -> dict[str, object]:
    """The fields that the directives of `script` set, by the names of the interface.

    Raises Invalid with one FieldError (`script:3`) for each bad line.
    """
    fields: dict[str, object] = {}
    errors: list[FieldError] = []
    length = 0
    for number, line in enumerate(script.split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            break
        directive = re.match(r"#(MLBOX|SBATCH)(?=\s|$)", line)
        if directive is None:
            continue
        length += len(line)
        try:
            if length > _LENGTH_MAX:
                raise Bad(f"the directives are longer than {_LENGTH_MAX} characters in all")
            take = _mlbox if directive[1] == "MLBOX" else _sbatch
            take(_words(line[directive.end() :]), fields)
        except Bad as error:
            errors.append(FieldError(f"script:{number}", str(error)))
            if length > _LENGTH_MAX or len(errors) == _ERRORS_MAX:
                break
    if errors:
        raise Invalid(
            "; ".join(f"line {error.field.removeprefix('script:')} of the script: {error.message}" for error in errors),
            tuple(errors),
        )
    return fields


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise Bad(f"{str(error).lower()} (an unmatched quote?)") from None


def _mlbox(words: list[str], fields: dict[str, object]) -> None:
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise Bad(f"{shown(word)}: write key=value")
        if key in ("command", "script", "code"):
            raise Bad(f"{key!r} cannot be set from within a script")
        if key == "env":  # several of them add up
            fields[key] = [*cast("list[str]", fields.get("env", [])), value]
        else:
            fields[key] = value


def _sbatch(words: list[str], fields: dict[str, object]) -> None:
    rest = iter(words)
    for word in rest:
        option, value = _option(word)
        if option in _FLAGS and value is None:
            field, flag = _FLAGS[option]
            fields[field] = flag
        elif option in _OPTIONS:
            fields[_OPTIONS[option]] = _value(option, value, rest)
        else:
            near = difflib.get_close_matches(option[:64], (*_OPTIONS, *_FLAGS), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join((*_OPTIONS, *_FLAGS))}"
            raise Bad(f"#SBATCH {shown(word)} is not understood; {hint}")


def _option(word: str) -> tuple[str, str | None]:
    """The long name of an option, and its value where it stands in the same word (`-Jname`, `--mem=20G`)."""
    if word[:2] in _SHORT:
        return _SHORT[word[:2]], word[2:].removeprefix("=") or None
    option, equals, value = word.partition("=")
    return option, value if equals else None


def _value(option: str, value: str | None, rest: Iterator[str]) -> str:
    """The value of `option`, written as mlbox writes it; where it is not there yet, it is the next of `rest`."""
    value = next(rest, "") if value is None else value
    if not value:
        raise Bad(f"#SBATCH {option} has no value")
    if option == "--time" and value.isdecimal():
        return f"{value}m"  # a bare number is minutes to Slurm, seconds to mlbox
    if option == "--gpus":  # [type:]count
        return value.rpartition(":")[2]
    if option == "--gres":
        gres = re.fullmatch(r"gpu(?::[^:,]*[^:,\d][^:,]*)?(?::(\d+))?", value)
        if gres is None:
            raise Bad(f"#SBATCH --gres {shown(value)}: only gpu[:type][:count] is understood")
        return gres[1] or "1"
    return value
