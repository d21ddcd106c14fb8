"""Single fields of a submit that have a form of their own: labels, variables, dependencies, addresses, signals. Pure.

Each function takes what JSON or a form may hold and gives the value meant, or raises Bad.
"""

import re
import signal
from collections.abc import Callable, Mapping
from typing import cast
from urllib.parse import urlsplit

from mlbox.jobs import After, Dependency, Launcher, WarnSignal
from mlbox.scheduler.values import ENV_NAME, INT64_MAX, Bad, json_object, seconds, shown, text

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
ARGUMENT_MAX = 128 * 1024 - 1
"""Linux refuses a longer single argument or variable (MAX_ARG_STRLEN, execve(2))."""
PATTERNS: Mapping[str, str] = {
    "%j": "the job's id",
    "%A": "the array's id",
    "%a": "the index in the array",
    "%x": "the job's name",
    "%u": "the user",
    "%N": "the host",
    "%n": "0",
    "%t": "0",
    "%%": "a percent sign",
}
"""What the name of an output file may hold (sbatch(1), filename pattern); `%4j` fills up with zeros."""
NOTIFY_ON = ("begin", "end", "fail", "requeue", "time_limit")
_ENV_MAX = 256 * 1024
_DEPENDENCIES_MAX = 1000
_ADDRESSES_MAX = 16
_LIST_MAX = 64 * 1024
"""Bytes of a list written as text: 1,000 dependencies of 32 characters, 16 addresses of 2,048."""
_URL_MAX = 2048
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_MAIL = re.compile(rf"(?!-)[A-Za-z0-9.!#$%&'*+/=?^_`{{|}}~-]{{1,64}}@{_LABEL}(?:\.{_LABEL}){{0,8}}")
"""What the HTML standard takes for an e-mail address, not beginning like an option: no header or argument breaks."""
_WARN_BEFORE_S = 60
"""What sbatch(1) sends `--signal` before the limit where no time is given."""
_WARN_BEFORE_MAX_S = 65_535
_OTHER_DEPENDENCIES = {
    "after": "mlbox has afterok, afterany and afternotok, which wait for the end of a job, not for its start",
    "aftercorr": "elements of an array wait for whole jobs or arrays here: use afterok:12_*",
    "afterburstbuffer": "this box has no burst buffer",
    "expand": "a job cannot grow another one",
    "singleton": "mlbox does not know jobs by their name: name the ids, afterany:12",
}


def name(value: object) -> str:
    """A label of a job."""
    if not isinstance(value, str) or NAME.fullmatch(value) is None:
        raise Bad(f"wants 1 to 64 of letters, digits, '.', '_' and '-', got {shown(value)}")
    return value


def model(value: object) -> str:
    """A model's name is also a folder's: no leading dot; `stats` is a path of the inference protocol."""
    label = name(value)
    if label.startswith(".") or label == "stats":
        raise Bad(f"a model cannot be called {label!r}")
    return label


def duration(low: int, high: float) -> Callable[[object], float]:
    """A parser of durations from `low` to `high` seconds."""

    def parse(value: object) -> float:
        number = seconds(value)
        if not low <= number <= high:
            raise Bad(f"wants {low} to {high:.0f} seconds, got {shown(value)}")
        return number

    return parse


def env(value: object) -> dict[str, str]:
    """Variables as a JSON object, as JSON text, or as `NAME=value` lines (one or many form fields)."""
    variables: dict[str, str] = {}
    for key, item in _pairs(value):
        if not isinstance(key, str) or ENV_NAME.fullmatch(key) is None:
            raise Bad(f"{shown(key)} cannot be a variable's name")
        if key.startswith("MLBOX_"):
            raise Bad(f"{key} is mlbox's own: variables that begin with MLBOX_ are set by mlbox")
        number = isinstance(item, (int, float)) and not isinstance(item, bool) and abs(item) <= INT64_MAX
        try:
            variables[key] = text(ARGUMENT_MAX - len(key) - 1, empty=True)(str(item) if number else item)
        except Bad as error:
            raise Bad(f"{key} {error}") from None
    if env_bytes(variables) > _ENV_MAX:
        raise Bad(f"is larger than {_ENV_MAX} bytes in all")
    return variables


def env_bytes(variables: Mapping[str, str]) -> int:
    """How much room variables take."""
    return sum(len(key) + len(item.encode()) for key, item in variables.items())


def workdir(value: object) -> str:
    """An absolute path."""
    path = text(4095)(value)
    if not path.startswith("/"):
        raise Bad(f"wants an absolute path, got {shown(value)}")
    return path


def output(value: object) -> str:
    """The path of a file, with Slurm's patterns in it."""
    path = text(4095)(value)
    if path.endswith("/") or not path.isprintable():
        raise Bad(f"wants the path of a file, got {shown(value)}")
    for digits, kind in re.findall(r"%([0-9]*)(.?)", path):
        pattern = f"%{digits}{kind}"
        if f"%{kind}" not in PATTERNS or len(digits) > 2:
            known = ", ".join(f"{known} ({meaning})" for known, meaning in PATTERNS.items())
            raise Bad(f"{shown(pattern)} is not understood in it; known: {known}")
    return path


def depends_on(value: object) -> tuple[Dependency, ...]:
    """`12`, `afterany:13`, `afterok:12:13`, `afterok:12_*` (a whole array), one or many; all of them have to be met."""
    found: dict[Dependency, None] = {}
    count = 0
    for item in _listed(value, "12 or 'afterany:13'", _DEPENDENCIES_MAX):
        some = _dependency(item)
        found.update(dict.fromkeys(some))
        count += len(some)
        if count > _DEPENDENCIES_MAX:
            raise Bad(f"names more than {_DEPENDENCIES_MAX} jobs, which is the limit")
    return tuple(found)


def notify(value: object) -> tuple[str, ...]:
    """E-mail addresses (with or without `mailto:`) and http(s) URLs."""
    return tuple(dict.fromkeys(_address(item) for item in _listed(value, "an address", _ADDRESSES_MAX)))


def notify_on(value: object) -> tuple[str, ...]:
    """Some of `begin`, `end`, `fail`, `requeue`, `time_limit`; or `all`, or `none`."""
    words = [word.lower() if isinstance(word, str) else word for word in _listed(value, "'end'", 2 * len(NOTIFY_ON))]
    if words == ["none"]:
        return ()
    for word in words:
        if word not in (*NOTIFY_ON, "all"):
            raise Bad(f"wants some of {', '.join(NOTIFY_ON)}, or all, or none, got {shown(word)}")
    return tuple(word for word in NOTIFY_ON if word in words or "all" in words)


def warn_signal(value: object) -> WarnSignal:
    """`USR1@120`: a signal by name or number, 120 s before the time limit; `B:` for the main process only."""
    written = str(value) if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 100 else value
    if not isinstance(written, str):
        raise Bad(f"wants a signal such as USR1@120, got {shown(value)}")
    match = re.fullmatch(r"\s*(?:([A-Z]{1,2}):)?(?:SIG)?([A-Z0-9+-]{1,10})(?:@(\d{1,6}))?\s*", written.upper())
    if match is None:
        raise Bad(
            f"wants a signal and the seconds before the limit, such as USR1@120 or B:USR1@120, got {shown(value)}"
        )
    flags, sign, before = match.groups()
    if flags is not None and flags != "B":
        raise Bad(f"only B: (the main process alone) may stand before the signal, got {shown(value)}")
    before_s = _WARN_BEFORE_S if before is None else int(before)
    if not 1 <= before_s <= _WARN_BEFORE_MAX_S:
        raise Bad(f"wants 1 to {_WARN_BEFORE_MAX_S} seconds before the limit, got {shown(value)}")
    return WarnSignal(number=_signal(sign), before_s=float(before_s), main_only=flags == "B")


def launch(value: object) -> Launcher:
    """`plain` or `torchrun`."""
    try:
        return Launcher(value.strip().lower() if isinstance(value, str) else "")
    except ValueError:
        raise Bad(f"wants {' or '.join(Launcher)}, got {shown(value)}") from None


def _pairs(value: object) -> list[tuple[object, object]]:
    """The names and values of one of the forms of `env`."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = json_object(value)
    if isinstance(value, Mapping):
        return list(cast("Mapping[object, object]", value).items())
    if not isinstance(value, (str, list)):
        raise Bad(f"wants names and values, got {shown(value)}")
    lines = value.split("\n") if isinstance(value, str) else cast("list[object]", value)
    pairs: list[tuple[object, object]] = []
    for line in lines:
        if not isinstance(line, str) or (line.strip() and "=" not in line):
            raise Bad(f"wants NAME=value, got {shown(line)}")
        key, equals, content = line.rstrip("\r").partition("=")
        if equals:
            pairs.append((key.strip(), content))
    return pairs


def _listed(value: object, such_as: str, most: int) -> list[object]:
    """The items of a list, at most `most`; text holds some, separated by commas or blanks."""
    items: list[object] = []
    for item in cast("list[object]", value) if isinstance(value, list) else [value]:
        if isinstance(item, str):
            items += [word for word in re.split(r"[\s,]+", text(_LIST_MAX, empty=True)(item)) if word]
        else:
            items.append(item)
        if len(items) > most:
            raise Bad(f"holds more than {most}, which is the limit")
    if not items and not isinstance(value, list):
        raise Bad(f"is empty: give {such_as}, or leave it out")
    return items


def _dependency(item: object) -> list[Dependency]:
    if isinstance(item, int) and not isinstance(item, bool):
        return [Dependency(job_id=_job_id(str(item) if abs(item) <= INT64_MAX else ""))]
    if not isinstance(item, str):
        raise Bad(f"wants 12 or 'afterany:13', got {shown(item)}")
    if "?" in item:
        raise Bad(f"{shown(item)}: mlbox knows no 'or': every dependency has to be met, and commas separate them")
    kind, colon, rest = item.partition(":")
    if not colon and (kind[:1].isdigit() or kind[:1] in "-+"):
        kind, rest = After.OK, item
    kind = kind.lower()
    if kind in _OTHER_DEPENDENCIES:
        raise Bad(f"{shown(item)}: {_OTHER_DEPENDENCIES[kind]}")
    if kind not in tuple(After) or not rest:
        raise Bad(f"wants 12, afterok:12, afterany:12 or afternotok:12, got {shown(item)}")
    after = After(kind)
    return [
        Dependency(job_id=_job_id(job.removesuffix("_*")), after=after, whole_array=job.endswith("_*"))
        for job in rest.split(":")
    ]


def _job_id(written: str) -> int:
    if re.fullmatch(r"[0-9]{1,19}", written) and 0 < int(written) <= INT64_MAX:
        return int(written)
    if re.fullmatch(r"[0-9]{1,19}_[0-9]{1,19}", written):
        raise Bad(f"{shown(written)}: name an element of an array by its own id, or the whole array as 12_*")
    if re.fullmatch(r"[0-9]{1,19}\+.*", written):
        raise Bad(f"{shown(written)}: mlbox waits for the end of a job, without minutes after it")
    raise Bad(f"wants the id of a job, got {shown(written)}")


def _address(item: object) -> str:
    if isinstance(item, str):
        mail = item.removeprefix("mailto:")
        if _MAIL.fullmatch(mail) and len(mail) <= 254:
            return mail
        if item.lower().startswith(("http://", "https://")) and _is_url(item):
            return item
    raise Bad(f"wants an e-mail address or an http(s) URL, got {shown(item)}")


def _is_url(written: str) -> bool:
    if len(written) > _URL_MAX or not re.fullmatch(r"[!-~]+", written):
        return False
    try:
        url = urlsplit(written)
        return bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        return False


def _signal(written: str) -> int:
    if written.isdigit() and written.isascii():
        if not 1 <= int(written) <= signal.NSIG - 1:
            raise Bad(f"there is no signal {written}: they go from 1 to {signal.NSIG - 1}")
        return int(written)
    try:
        return int(signal.Signals["SIG" + written])
    except KeyError:
        raise Bad(f"there is no signal {shown(written)}: write USR1, TERM, INT or another of kill -l") from None
