"""The `#MLBOX key=value` and `#SBATCH --option=value` lines at the top of a script. Pure.

Slurm's rules (sbatch(1)): a line counts when it begins with its mark and no command comes before it, several options
may share a line, quotes and backslashes are a shell's, an unquoted `#` begins a comment, an unknown option is an
error that names its line.
"""

import difflib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import cast

from mlbox.errors import FieldError, Invalid
from mlbox.scheduler.values import Bad, shown

_LENGTH_MAX = 16 * 1024
"""Characters in all directives of a script together: taking a shell's line apart is slow."""
_ERRORS_MAX = 32
_TEXTS = {
    "--array": "array",
    "--begin": "not_before",
    "--chdir": "workdir",
    "--cpus-per-task": "cpus",
    "--error": "error",
    "--job-name": "name",
    "--mail-user": "notify",
    "--output": "output",
    "--signal": "signal",
}
"""Options whose value a field takes as it is."""
_FLAGS = {"--requeue": ("requeue", True), "--no-requeue": ("requeue", False), "--hold": ("hold", True)}
_ONES = {
    "--nodes": "this is one box",
    "--ntasks": "mlbox starts one task: let the script start more, or ask for launch=torchrun",
    "--ntasks-per-node": "mlbox starts one task: let the script start more, or ask for launch=torchrun",
}
"""Options that may say what is so anyway."""
_SHORT = {
    "-D": "--chdir",
    "-G": "--gpus",
    "-H": "--hold",
    "-J": "--job-name",
    "-N": "--nodes",
    "-a": "--array",
    "-b": "--begin",
    "-c": "--cpus-per-task",
    "-d": "--dependency",
    "-e": "--error",
    "-n": "--ntasks",
    "-o": "--output",
    "-t": "--time",
    # Known to sbatch, not here: their long name is what the reason stands under.
    "-A": "--account",
    "-C": "--constraint",
    "-p": "--partition",
    "-q": "--qos",
    "-w": "--nodelist",
    "-x": "--exclude",
}
_REASONS = {
    "--account": "write #MLBOX project=NAME",
    "--constraint": "all nodes are this box",
    "--cpus-per-gpu": "write --cpus-per-task with the number for the whole job",
    "--exclude": "this is one box",
    "--exclusive": "ask for all of the box's GPUs instead",
    "--gpus-per-task": "write --gpus",
    "--mem-per-cpu": "write --mem with the memory of the whole job",
    "--mem-per-gpu": "write --mem with the memory of the whole job",
    "--nodelist": "this is one box",
    "--partition": "there is one queue here",
    "--qos": "write #MLBOX priority=N",
    "--wrap": "the script is the job",
}
"""Options of sbatch that many scripts have and nothing here answers to: what to do instead."""
_MAIL_TYPES = {
    "NONE": "none",
    "BEGIN": "begin",
    "END": "end",
    "FAIL": "fail",
    "REQUEUE": "requeue",
    "TIME_LIMIT": "time_limit",
    "ALL": "all",
}
_NO_LIMIT = ("0", "0:0", "0:00", "0:00:00", "00:00:00", "UNLIMITED", "INFINITE")
_NICE = 100
"""What sbatch(1) takes for `--nice` without a number."""


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
        if key == "env":
            _add_env(fields, value)
        else:
            fields[key] = value


def _sbatch(words: list[str], fields: dict[str, object]) -> None:
    rest = iter(words)
    for word in rest:
        option, value = _option(word)
        if option in _FLAGS and value is None:
            field, flag = _FLAGS[option]
            fields[field] = flag
        elif option == "--nice":  # its number has to stand in the same word (sbatch(1))
            fields["priority"] = _priority(value)
        elif option in _ONES:
            if _needed(option, value, rest) not in ("1", "1-1"):
                raise Bad(f"#SBATCH {option}: only 1 can be asked for: {_ONES[option]}")
        elif option in _TEXTS:
            fields[_TEXTS[option]] = _needed(option, value, rest)
        elif option in _TAKERS:
            _TAKERS[option](option, _needed(option, value, rest), fields)
        else:
            raise Bad(_not_understood(word, option))


def _option(word: str) -> tuple[str, str | None]:
    """The long name of an option, and its value where it stands in the same word (`-Jname`, `--mem=20G`)."""
    if word[:2] in _SHORT:
        return _SHORT[word[:2]], word[2:].removeprefix("=") or None
    option, equals, value = word.partition("=")
    return option, value if equals else None


def _not_understood(word: str, option: str) -> str:
    if option in _REASONS:
        return f"#SBATCH {option} has no meaning here: {_REASONS[option]}"
    near = difflib.get_close_matches(option[:64], OPTIONS, n=1)
    hint = f"did you mean {near[0]}?" if near else "docs/submitting.md lists the options that mlbox reads"
    return f"#SBATCH {shown(word)} is not understood; {hint}"


def _needed(option: str, value: str | None, rest: Iterator[str]) -> str:
    """The value of `option`; where it is not there yet, it is the next of `rest`."""
    value = next(rest, "") if value is None else value
    if not value:
        raise Bad(f"#SBATCH {option} has no value")
    return value


def _priority(value: str | None) -> int:
    """What is nice to others has a low priority; a negative number asks for a high one, which is for admins."""
    if value is None:
        return -_NICE
    if not re.fullmatch(r"[+-]?[0-9]{1,10}", value):
        raise Bad(f"#SBATCH --nice wants a whole number, got {shown(value)}")
    return max(-100, min(-int(value), 100))


def _gpus(option: str, value: str, fields: dict[str, object]) -> None:
    """`[type:]count`."""
    match = re.fullmatch(r"(?:[^:,]+:)?([0-9]+)", value)
    if match is None:
        raise Bad(f"#SBATCH {option} {shown(value)}: only [type:]count is understood")
    fields["gpus"] = match[1]


def _gres(option: str, value: str, fields: dict[str, object]) -> None:
    match = re.fullmatch(r"gpu(?::[^:,]*[^:,\d][^:,]*)?(?::([0-9]+))?", value)
    if match is None:
        raise Bad(f"#SBATCH {option} {shown(value)}: only gpu[:type][:count] is understood")
    fields["gpus"] = match[1] or "1"


def _time(_: str, value: str, fields: dict[str, object]) -> None:
    """A bare number is minutes to Slurm and seconds to mlbox; 0 is no limit (sbatch(1), --time)."""
    if value.upper() in _NO_LIMIT:
        fields.pop("time_limit", None)
    else:
        fields["time_limit"] = f"{value}m" if value.isdecimal() else value


def _mem(_: str, value: str, fields: dict[str, object]) -> None:
    """0 is all memory of the node to Slurm: no limit."""
    if re.fullmatch(r"0+[KMGT]?", value, re.IGNORECASE):
        fields.pop("mem", None)
    else:
        fields["mem"] = value


def _dependency(_: str, value: str, fields: dict[str, object]) -> None:
    """The id of an array means all of it to Slurm, and only its first job to mlbox, which writes `12_*` for all."""
    fields["depends_on"] = re.sub(r"(?<![\w+])([0-9]+)(?![\w+])", r"\1_*", value)


def _mail_type(option: str, value: str, fields: dict[str, object]) -> None:
    words = [word for word in value.upper().split(",") if word]
    unknown = [word for word in words if word not in _MAIL_TYPES]
    if unknown or not words:
        raise Bad(f"#SBATCH {option} {shown(','.join(unknown))}: known here: {', '.join(_MAIL_TYPES)}")
    if "NONE" in words:  # it beats the others (sbatch(1))
        words = ["NONE"]
    fields["notify_on"] = [_MAIL_TYPES[word] for word in words]


def _export(option: str, value: str, fields: dict[str, object]) -> None:
    """Variables of the job. No environment of a submitter reaches mlbox, with ALL (sbatch's default) as with NONE."""
    for word in value.split(","):
        name, equals, _ = word.partition("=")
        if equals and name:
            _add_env(fields, word)
        elif word not in ("ALL", "NONE", "NIL"):
            raise Bad(
                f"#SBATCH {option} {shown(word)}: mlbox does not see the variables of your shell: "
                "write NAME=value (#MLBOX env='NAME=value' where it holds a comma)"
            )


def _add_env(fields: dict[str, object], line: str) -> None:
    """Several variables add up."""
    fields["env"] = [*cast("list[str]", fields.get("env", [])), line]


def _nothing(option: str, value: str, fields: dict[str, object]) -> None:
    """A remark for people that changes nothing of how the job runs."""


_TAKERS: Mapping[str, Callable[[str, str, dict[str, object]], None]] = {
    "--comment": _nothing,
    "--dependency": _dependency,
    "--export": _export,
    "--gpus": _gpus,
    "--gpus-per-node": _gpus,
    "--gres": _gres,
    "--mail-type": _mail_type,
    "--mem": _mem,
    "--time": _time,
}
OPTIONS = (*_TEXTS, *_TAKERS, *_FLAGS, *_ONES, "--nice")
"""The options of sbatch that mean something here."""
