"""The `#MLBOX key=value` and `#SBATCH --option=value` lines at the top of a script. Pure.

Slurm's rules (sbatch(1)): only lines before the first command count, several options may share a line, quotes and
backslashes are a shell's, an unquoted `#` begins a comment, an unknown option is an error that names its line.
"""

import shlex

from mlbox.errors import FieldError, Invalid

_LONG = {
    "gpus": "gpus",
    "time": "time_limit",
    "job-name": "name",
    "cpus-per-task": "cpus",
    "mem": "mem",
    "begin": "not_before",
    "chdir": "workdir",
}
_SHORT = {"-J": "job-name", "-t": "time", "-c": "cpus-per-task", "-G": "gpus", "-b": "begin", "-D": "chdir"}
_FLAGS = {"requeue": ("requeue", True), "no-requeue": ("requeue", False), "hold": ("hold", True), "-H": ("hold", True)}


def read(script: str) -> dict[str, object]:
    """The fields that the directives of `script` set, by the names of the interface. Raises Invalid."""
    fields: dict[str, object] = {}
    for number, line in enumerate(script.splitlines(), 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("#"):
            break
        for marker, take in (("#MLBOX", _mlbox), ("#SBATCH", _sbatch)):
            if line.startswith(marker) and line[len(marker) :][:1] in ("", " ", "\t"):
                fields |= take(_words(line[len(marker) :], number), number)
    return fields


def _words(text: str, number: int) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError as error:
        raise _wrong(number, f"{error} (unmatched quote?)") from None


def _mlbox(words: list[str], number: int) -> dict[str, object]:
    fields: dict[str, object] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise _wrong(number, f"{word!r}: write key=value")
        if key in ("command", "script", "code"):
            raise _wrong(number, f"{key!r} cannot be set from within a script")
        fields[key] = value
    return fields


def _sbatch(words: list[str], number: int) -> dict[str, object]:
    fields: dict[str, object] = {}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in _SHORT:
            name = "--" + _SHORT[name]
        elif word[:2] in _SHORT:  # -J name, -Jname
            name, equals, value = "--" + _SHORT[word[:2]], "=", word[2:]
        option = name.removeprefix("--")
        if option in _FLAGS and not equals:
            field, flag = _FLAGS[option]
            fields[field] = flag
            continue
        if option not in _LONG and option != "gres":
            raise _wrong(number, f"#SBATCH {word!r} is not understood here")
        if not equals:
            value = next(rest, "")
        if not value:
            raise _wrong(number, f"#SBATCH {word!r} has no value")
        if option == "gres":
            fields["gpus"] = _gres(value, number)
        elif option == "time":
            fields["time_limit"] = _slurm_minutes(value)
        else:
            fields[_LONG[option]] = value
    return fields


def _gres(value: str, number: int) -> str:
    """`gpu:2`, `gpu:a100:2`, `gpu` -> the count."""
    parts = value.split(":")
    if parts[0] != "gpu" or len(parts) > 3:
        raise _wrong(number, f"#SBATCH --gres={value}: only gpu[:type]:count is understood here")
    return parts[-1] if len(parts) > 1 and parts[-1].isdigit() else "1"


def _slurm_minutes(value: str) -> str:
    """A bare number is minutes to Slurm, seconds to mlbox."""
    return f"{value}m" if value.isdigit() else value


def _wrong(number: int, message: str) -> Invalid:
    return Invalid(f"line {number} of the script: {message}", (FieldError(f"script:{number}", message),))
