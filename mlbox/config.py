"""One TOML file -> frozen dataclasses. A wrong key or value is refused with its line and the nearest known key."""

import dataclasses
import difflib
import functools
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from mlbox.errors import MlboxError

EXIT_CONFIG = 78
"""Exit status for a bad configuration (EX_CONFIG in sysexits.h): systemd must not restart into it."""


_NUMBER_MAX = 10**12
"""Far above anything that can be meant, far below where an int does not become a float or a timeout overflows."""


class BadConfig(MlboxError):
    """The configuration cannot be used; the message names the file, the line and the nearest key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where the API and the page listen, and how patient they are. Port 0 picks a free one."""

    listen: str = "127.0.0.1:8470"
    socket: str = ""
    """Path of the Unix socket; empty: `<state>/mlbox.sock`."""
    hosts: tuple[str, ...] = ()
    """Names by which browsers reach this box, beside `localhost` and the bound address (the Host check)."""
    body_max: str = "1G"
    """Largest upload (code archive or model)."""
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    followers_max: int = 2000
    followers_per_user: int = 200
    session_hours: float = 12.0


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaConfig:
    """The most that somebody may have; what is left out has no limit."""

    gpus: int | None = None
    """GPUs held at once."""
    waiting: int | None = None
    """Jobs waiting at once."""
    gpu_hours: float | None = None
    """GPU-hours within the last `window_h` hours."""
    window_h: float = 168.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    cpu_slots: int = 0
    """How many jobs without a GPU run at once; 0: one for each core."""
    half_life_h: float = 168.0
    """After so long a GPU-hour counts half in the fair share."""
    priority_weight: float = 1000.0
    fair_share_weight: float = 100.0
    age_weight: float = 1.0
    """What a step of priority, the fair-share factor (0 to 1) and the age (0 to 1) count in a job's rank."""
    age_max_h: float = 168.0
    """A job that has waited so long grows no older."""
    shares: Mapping[str, float] = field(default_factory=dict[str, float])
    """What part of the box a user is due, against 1 for everybody who is not named."""
    gpu_weights: Mapping[str, float] = field(default_factory=dict[str, float])
    """What a second on a GPU is charged, by a word in its name (`H100 = 2.0`); 1 for those not named."""
    cpu_slot_weight: float = 0.05
    """What a second on a CPU slot is charged, against a GPU's 1."""
    reservations: int = 8
    """How many blocked jobs get a planned start that no job behind them may delay; 1 is EASY backfill."""
    min_run_s: float = 300.0
    """A preemptible job runs at least so long before it gives way."""
    quota: QuotaConfig = field(default_factory=QuotaConfig)
    """For each user that `users` does not name."""
    users: Mapping[str, QuotaConfig] = field(default_factory=dict[str, QuotaConfig])
    projects: Mapping[str, QuotaConfig] = field(default_factory=dict[str, QuotaConfig])
    waiting_max: int = 200_000
    """Submits beyond this many waiting jobs are refused with 429."""
    repair_s: float = 5.0
    """How often lost hints are made up for."""
    gpu_sample_s: float = 2.0
    gpu_silence_s: float = 15.0
    """A gpu monitor that is silent for so long is killed; its GPUs are `unknown` until it speaks again."""
    over_share: str = "warn"
    """What happens to a job that uses more of a shared GPU than it asked for: `warn` or `stop`."""
    over_share_s: float = 60.0
    """After how long."""
    idle_notice_s: float = 1800.0
    """Who holds GPUs that do nothing for so long is told; 0: never."""
    idle_lower_s: float = 0.0
    """After so long such a job gives way like one of the lowest priority, if it is preemptible; 0: never."""
    idle_stop_s: float = 0.0
    """After so long it is stopped; 0: never."""
    drain_suspects: bool = True
    """Drain a GPU on which three jobs of two users failed in a row."""
    ignore_processes: tuple[str, ...] = ()
    """Names of programs whose compute processes do not make a GPU `foreign` (a monitoring agent, say)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobsConfig:
    log_head: str = "64M"
    """So much of the beginning of a log is always kept."""
    log_max: str = "1G"
    """Cap of a log: its beginning and the newest rest."""
    keep_days: float = 0.0
    """Logs, code and artifacts of jobs that ended longer ago are removed; 0: never. Their rows stay."""
    keep_size: str = ""
    """Above this size in all the files of the jobs that ended first are removed, such as 500G; empty: no bound."""
    grace_s: float = 30.0
    """Default time between TERM and KILL."""
    shell: str = ""
    """What runs `command` and scripts without `#!`; empty: /bin/bash where it exists, else /bin/sh."""
    pass_env: tuple[str, ...] = (
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "LANG",
        "LC_*",
        "TZ",
        "TMPDIR",
        "XDG_*",
        "LD_LIBRARY_PATH",
        "CUDA_HOME",
        "CUDA_PATH",
        "PIP_*",
        "UV_*",
        "HF_HOME",
        "http_proxy",
        "https_proxy",
        "no_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "REQUESTS_CA_BUNDLE",
    )
    """Variables of the daemon's own environment that jobs see (single-user mode); nothing else is inherited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotifyConfig:
    sendmail: str = "/usr/sbin/sendmail -i"
    """What sends mail to the addresses that jobs name; it gets the message on its standard input. Empty: nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    enabled: bool = True
    models: str = ""
    """The model folder; empty: `<state>/models`."""
    http: str = "127.0.0.1:8000"
    name: str = "mlbox"
    """The server name in `GET /v2` (some clients' tests want `triton`)."""
    gpu: str = "never"
    """`prefer`, `require` or `never` run models on a GPU. One that holds a model is kept from jobs."""
    threads: int = 0
    """Threads of one CPU inference; 0: chosen from the cores."""
    settle_s: float = 0.5
    """How long a model folder must be quiet before it is loaded."""
    body_max: str = "256M"
    run_timeout_s: float = 60.0
    """An inference that runs longer is ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole configuration. `state` is the folder that holds everything mlbox knows."""

    state: str = ""
    server: ServerConfig = field(default_factory=ServerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    jobs: JobsConfig = field(default_factory=JobsConfig)
    notify: NotifyConfig = field(default_factory=NotifyConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)

    @property
    def state_folder(self) -> Path:
        if self.state:
            return Path(self.state).expanduser().absolute()
        base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        return Path(base).expanduser().absolute() / "mlbox"

    @property
    def socket_path(self) -> Path:
        socket = self.server.socket
        return Path(socket).expanduser().absolute() if socket else self.state_folder / "mlbox.sock"

    @property
    def models_folder(self) -> Path:
        models = self.serving.models
        return Path(models).expanduser().absolute() if models else self.state_folder / "models"


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read `path` (None: defaults) and apply `section.key=value` overrides, which win. Raises BadConfig."""
    text, name = "", "the defaults"
    if path is not None:
        name = str(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadConfig(f"{path}: cannot be read: {error}") from error
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not only TOMLDecodeError: a number of 5,000 digits, say
        raise BadConfig(f"{name}: not TOML: {error}") from error
    config: Config = _section(Config, table, _Source(name, text), ())
    for override in overrides:
        written = _override(override)
        _section(Config, written, _Source(f"--set {override}", ""), ())
        table = _merged(table, written)
        config = _section(Config, table, _Source(name, ""), ())
    if size_bytes(config.jobs.log_head) > size_bytes(config.jobs.log_max):
        raise BadConfig(f"{name}: 'jobs.log_head' is larger than 'jobs.log_max'")
    return config


def size_bytes(text: str) -> int:
    """`64M` -> 67108864; K, M, G, T are powers of 1024. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text[:60]!r} is not a size such as 512M or 1G")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def host_port(text: str) -> tuple[str, int]:
    """`127.0.0.1:8470` or `[::1]:8470` -> its parts. Raises ValueError."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\s\[\]]+)):(\d{1,5})", text)
    if match is None or int(match[3]) > 65535:
        raise ValueError(f"{text[:60]!r} is not HOST:PORT such as 127.0.0.1:8470")
    return match[1] or match[2], int(match[3])


def _positive(number: float) -> None:
    if not number > 0:
        raise ValueError(f"{number:g} makes no sense: it wants more than 0")


def _one_of(*words: str) -> Callable[[str], None]:
    def check(text: str) -> None:
        if text not in words:
            raise ValueError(f"{text[:60]!r} is not one of {', '.join(words)}")

    return check


def _path(text: str) -> None:
    if "\0" in text:
        raise ValueError("a path cannot hold a NUL character")
    try:
        Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text[:60]!r}: {error}") from error


_CHECKS: Mapping[str, Callable[[Any], object]] = {
    "state": _path,
    "server.listen": host_port,
    "server.socket": _path,
    "server.body_max": size_bytes,
    "server.header_timeout_s": _positive,
    "server.body_timeout_s": _positive,
    "server.session_hours": _positive,
    "scheduler.repair_s": _positive,
    "scheduler.half_life_h": _positive,
    "scheduler.gpu_sample_s": _positive,
    "scheduler.gpu_silence_s": _positive,
    "jobs.log_head": size_bytes,
    "jobs.log_max": size_bytes,
    "jobs.keep_size": lambda text: size_bytes(text) if text else 0,
    "jobs.shell": _path,
    "scheduler.over_share": _one_of("warn", "stop"),
    "serving.models": _path,
    "serving.http": host_port,
    "serving.gpu": _one_of("prefer", "require", "never"),
    "serving.body_max": size_bytes,
    "serving.run_timeout_s": _positive,
}
"""What no type can say of a value; each raises ValueError. Other numbers may be 0, none may be negative."""


@dataclass(frozen=True, slots=True)
class _Source:
    name: str
    text: str

    def at(self, path: tuple[str, ...]) -> str:
        """`file:line` of a key, or of the section around it, as far as it can be found."""
        section: tuple[str, ...] = ()
        for number, line in enumerate(self.text.split("\n"), 1):
            header = re.match(r"\s*\[([^\[\]]+)\]", line)
            key = re.match(r"\s*([\w.\"'-]+)\s*=", line)
            if header:
                section = _parts(header[1])
            if (header and section == path) or (key and section + _parts(key[1]) == path):
                return f"{self.name}:{number}"
        return self.at(path[:-1]) if path else self.name


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def _section(cls: type[Any], table: Mapping[str, object], source: _Source, path: tuple[str, ...]) -> Any:
    """The dataclass `cls` with the values of `table`. Raises BadConfig for the first that cannot be meant."""
    known = _known_keys(cls)
    values: dict[str, object] = {}
    for key, value in table.items():
        here = (*path, key)
        name = ".".join(here)
        where = f"{source.at(here)}: {name[:80]!r}"
        if key not in known:
            near = difflib.get_close_matches(key[:64], known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            raise BadConfig(f"{where} is an unknown key; {hint}")
        hint = known[key]
        if dataclasses.is_dataclass(hint) or typing.get_origin(hint) is Mapping:
            if not isinstance(value, dict):
                raise BadConfig(f"{where} is a section: write [{name}]")
            read = _named if typing.get_origin(hint) is Mapping else _section
            values[key] = read(cast("type[Any]", hint), cast("dict[str, object]", value), source, here)
        else:
            values[key] = _value(hint, value, name, where)
    return cls(**values)


@functools.cache
def _known_keys(cls: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _named(hint: Any, table: Mapping[str, object], source: _Source, path: tuple[str, ...]) -> Any:
    """A section whose keys are the user's own names (`[scheduler.shares]`)."""
    _, kind = typing.get_args(hint)
    values: dict[str, object] = {}
    for key, value in table.items():
        here = (*path, key)
        where = f"{source.at(here)}: {'.'.join(here)[:80]!r}"
        if not dataclasses.is_dataclass(kind):
            values[key] = _value(kind, value, ".".join(here), where)
        elif isinstance(value, dict):
            values[key] = _section(cast("type[Any]", kind), cast("dict[str, object]", value), source, here)
        else:
            raise BadConfig(f"{where} is a section: write [{'.'.join(here)}]")
    return values


def _value(hint: Any, value: object, name: str, where: str) -> object:
    """`value` as the type the key wants. Raises BadConfig that says what it wants."""
    if isinstance(hint, types.UnionType):  # int | None: TOML cannot write None, so it is the default alone
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    if isinstance(hint, types.GenericAlias):  # tuple[str, ...] is the only one
        items = cast("list[object]", value) if isinstance(value, list) else None
        if items is None or not all(isinstance(item, str) for item in items):
            raise BadConfig(f"{where} wants a list of strings, got {_shown(cast('object', value))}")
        return tuple(cast("list[str]", items))
    accepted = (int, float) if hint is float else hint
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        wanted = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}[hint]
        raise BadConfig(f"{where} wants {wanted}, got {_shown(value)}")
    if isinstance(value, (int, float)) and not 0 <= value <= _NUMBER_MAX:
        raise BadConfig(f"{where} wants 0 to {_NUMBER_MAX}, got {_shown(value)}")
    if check := _CHECKS.get(name):
        try:
            check(value)
        except ValueError as error:
            raise BadConfig(f"{where}: {error}") from error
    return float(cast("float", value)) if hint is float else cast("object", value)


def _override(override: str) -> dict[str, object]:
    """One `--set section.key=value` as a table; the value is TOML, a bare word is a string."""
    name, equals, text = override.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not all((*sections, key)):
        raise BadConfig(f"--set {override}: write it as section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    table: dict[str, object] = {key: value}
    for section in reversed(sections):
        table = {section: table}
    return table


def _merged(table: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    merged = dict(table)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merged(cast("dict[str, object]", below), cast("dict[str, object]", value)) if both else value
    return merged


def _shown(value: object) -> str:
    try:
        text = ascii(value)
    except ValueError:  # a number of more digits than Python writes
        return "a very large number"
    return text if len(text) <= 60 else text[:57] + "..."
