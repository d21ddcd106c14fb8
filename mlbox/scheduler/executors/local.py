"""Runs attempts as this user, each under a shim that is a plain child process: single-user mode.

Nothing here outlives the daemon but the shims and their folders, and these are all that a later daemon needs. A job
can write there too: what it puts in place of the shim's files may mislead us about itself, but never hold us up.
"""

import fcntl
import json
import logging
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from mlbox.scheduler.executors import processes
from mlbox.scheduler.executors.base import CouldNotStart, Exit, Launch, Liveness, Observation, Started
from mlbox.scheduler.executors.template import Template, command, environment
from mlbox.scheduler.folders import open_plain, read_plain

_STARTED, _EXIT = "started.json", "exit.json"
_KEY = "MLBOX_ATTEMPT_KEY"
_KILL_PATIENCE_S = 0.5
"""How long `kill_remains` waits for what it killed; the kernel needs a few ms, unless a driver holds the process."""
_KILL_AGAIN_S = 0.01
_RECORD_BYTES = 1 << 16
"""The most that is read of a record; a shim writes a few hundred bytes, and what is cut off is no JSON."""
_HOLDER_TRIES = 10
_HOLDER_PAUSE_S = 0.002

_TEMPLATE_PAUSE_S = 60.0
"""How long shims are started from nothing after a template failed: for ever where a container forbids clone3(2)."""

_WRITE = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK

_log = logging.getLogger(__name__)
_Record = TypeVar("_Record", Started, Exit)


class LocalExecutor:
    """Starts and stops attempts on this box; `executors.base.Executor` is its contract. Safe to use from threads.

    `cgroups=False` does without cgroup v2 even where we could use it, `template=False` starts each shim from nothing.
    """

    def __init__(self, *, cgroups: bool = True, template: bool = True) -> None:
        self._template: Template | None = None
        self._template_from = 0.0 if template else float("inf")
        self._cgroup_parent = processes.cgroup_for_jobs() if cgroups else None
        self._children: dict[Path, int] = {}
        self._lock = threading.Lock()

    def start(self, launch: Launch) -> None:
        if not launch.key or launch.env.get(_KEY) != launch.key:
            raise ValueError(f"{launch.handle}: its key must be in its environment as {_KEY}")
        try:
            with self._lock:
                if not self._reap(launch.folder):
                    self._children[launch.folder] = self._shim(launch.folder, _text_of(launch, self._cgroup_parent))
        except OSError as error:
            raise CouldNotStart(f"{launch.handle}: cannot start a shim in {launch.folder}: {error}") from error

    def end_fd(self, folder: Path) -> int | None:
        shim = self._open_child(folder)
        return _open_holder(folder) if shim is None else shim

    def observe(self, folder: Path) -> Observation:
        with self._lock:
            alive = self._reap(folder)
        alive = alive or _held(folder)
        # Read after that: a shim that is gone by then has written all it ever will.
        started = _read(folder / _STARTED, Started)
        ended = _read(folder / _EXIT, Exit)
        if alive:
            liveness = Liveness.ALIVE
        elif ended is not None:
            liveness = Liveness.ENDED
        elif started is not None and started.adopted and started.boot_id == processes.boot_id():
            liveness = Liveness.NOT_STARTED  # it needs no shim to live: another one may watch it
        elif started is not None or any(os.path.lexists(folder / name) for name in (_STARTED, _EXIT)):
            liveness = Liveness.VANISHED  # an unreadable record is one, too: no shim would run user code again
        else:
            liveness = Liveness.NOT_STARTED
        return Observation(
            liveness=liveness,
            started=started,
            exit=None if alive else ended,
            same_boot=started is None or started.boot_id == processes.boot_id(),
        )

    def stop(self, folder: Path, *, kill: bool = False) -> None:
        shim = _open_holder(folder)  # first, since the child may be a second one that is about to refuse
        if shim is None:
            shim = self._open_child(folder)
        if shim is None:
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(shim, signal.SIGUSR1 if kill else signal.SIGTERM)
        os.close(shim)

    def processes(self, folder: Path, key: str) -> frozenset[int]:
        return frozenset(_members(folder, key)[1])

    def kill_remains(self, folder: Path, key: str) -> frozenset[int]:
        """KILL everything that is left of an attempt whose shim is gone; returns the pids still alive.

        Waits up to half a second for them to be gone. Touches nothing while a shim is alive: `stop` it.
        """
        seen = self.observe(folder)
        if seen.liveness is Liveness.ALIVE:
            return self.processes(folder, key)
        if seen.started is not None and seen.started.adopted:
            return frozenset()  # it was begun outside mlbox, and only its supervision is lost
        patience_until = time.monotonic() + _KILL_PATIENCE_S
        while True:
            cgroup = _cgroup(folder, key)
            if cgroup is not None:
                processes.kill_cgroup(cgroup)
            table, members = _members(folder, key)
            gone = not members and (cgroup is None or processes.remove_cgroup(cgroup))
            if gone or time.monotonic() > patience_until:
                return frozenset(members)
            processes.kill(table, members)
            time.sleep(_KILL_AGAIN_S)

    def _open_child(self, folder: Path) -> int | None:
        """A pidfd of the shim that we started last for this attempt, until `observe` has found that it ended."""
        with self._lock:
            child = self._children.get(folder)
            return None if child is None else os.pidfd_open(child)  # ours until we reap it: its pid is no other's

    def _shim(self, folder: Path, launch: str) -> int:
        """Start a shim; returns its pid. Raises OSError. Holds the lock.

        Should a template fail after it made a shim, there are two, and one of them refuses.
        """
        if time.monotonic() < self._template_from:
            return _spawn_shim(folder, launch)
        folder.stat()  # what is wrong with it is said here, not by a shim
        try:
            if self._template is None:
                self._template = Template()
            return self._template.shim(launch)
        except OSError as error:
            _log.warning("%s: the shim is started from nothing, since its template failed: %s", folder, error)
            self._template_from = time.monotonic() + _TEMPLATE_PAUSE_S
            if self._template is not None:
                self._template.close()
                self._template = None
            return _spawn_shim(folder, launch)

    def _reap(self, folder: Path) -> bool:
        """Whether the shim that we started last for this attempt runs. One that ended is reaped. Holds the lock."""
        child = self._children.get(folder)
        if child is None:
            return False
        with suppress(ChildProcessError):
            if os.waitpid(child, os.WNOHANG) == (0, 0):
                return True
        del self._children[folder]
        return False


def _text_of(launch: Launch, cgroup_parent: Path | None) -> str:
    """What a shim is told, in JSON."""
    warning = launch.warn_signal
    values = {
        "folder": str(launch.folder),
        "handle": launch.handle,
        "key": launch.key,
        "argv": launch.argv,
        "cwd": str(launch.cwd),
        "env": dict(launch.env),
        "code": None if launch.code is None else str(launch.code),
        "log_head_bytes": launch.log_head_bytes,
        "log_tail_bytes": launch.log_tail_bytes,
        "time_limit_s": launch.time_limit_s,
        "grace_s": launch.grace_s,
        "memory_mib": launch.memory_mib,
        "cpus": launch.cpus,
        "cpu_affinity": launch.cpu_affinity,
        "output": launch.output,
        "error": launch.error,
        "append": launch.append,
        "warn_signal": None if warning is None else (warning.number, warning.before_s, warning.main_only),
        "ranks": launch.ranks,
        "adopt": launch.adopt,
        "boot_id": processes.boot_id(),
        "cgroup_parent": None if cgroup_parent is None else str(cgroup_parent),
    }
    return json.dumps(values)


def _spawn_shim(folder: Path, launch: str) -> int:
    """Start a shim from nothing; returns its pid. Raises OSError.

    `launch.json` is written whole or not at all, for its owner's eyes only: it may hold secrets. posix_spawn(3) does
    not copy the daemon's page tables; the shim closes what descriptors it may inherit.
    """
    draft = folder / f"launch.json.{os.getpid()}-{threading.get_ident()}"
    file = os.open(draft, os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | _WRITE, 0o600)
    with os.fdopen(file, "w", encoding="ascii") as opened:
        opened.write(launch)
    draft.rename(folder / "launch.json")
    arguments = command(str(folder))
    return os.posix_spawn(
        arguments[0],
        arguments,
        environment(),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
            (os.POSIX_SPAWN_DUP2, 0, 1),
            (os.POSIX_SPAWN_OPEN, 2, folder / "shim.log", os.O_CREAT | os.O_APPEND | _WRITE, 0o600),
        ],
        setsid=True,
    )


def _held(folder: Path) -> bool:
    """Whether a shim holds the attempt's lock. Asking takes the lock, shared, for microseconds: shims allow for it."""
    try:
        lock = open_plain(folder / "lock")
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _holder(folder: Path) -> tuple[int, int] | None:
    """Pid and start time of the shim that wrote itself into the lock last."""
    with suppress(OSError, ValueError):
        pid, ticks = read_plain(folder / "lock", _RECORD_BYTES).split()
        return int(pid), int(ticks)
    return None


def _open_holder(folder: Path) -> int | None:
    """A pidfd of the shim that holds the lock; None when nobody does.

    What the lock's file says may be of an earlier launch, as long as the shim that took the lock just now has not
    written itself down: then no process has that pid and start time, and we look again.
    """
    for _ in range(_HOLDER_TRIES):
        if not _held(folder):
            return None
        holder = _holder(folder)
        shim = processes.open_process(*holder) if holder else None
        if shim is not None:
            return shim
        time.sleep(_HOLDER_PAUSE_S)
    return None


def _members(folder: Path, key: str) -> tuple[dict[int, processes.Process], set[int]]:
    """The process table, and which of it belongs to the attempt and is alive."""
    table = processes.table()
    found = processes.carrying(table, _KEY, key)
    cgroup = _cgroup(folder, key)
    if cgroup is not None:
        found |= processes.cgroup_pids(cgroup)
    started = _read(folder / _STARTED, Started)
    if started is not None and started.boot_id == processes.boot_id():
        main = table.get(started.pid)
        if main is not None and main.ticks == started.start_ticks:
            found.add(main.pid)
    holder = _holder(folder) if _held(folder) else None
    shim = {pid for pid, ticks in ([holder] if holder else []) if pid in table and table[pid].ticks == ticks}
    found |= processes.descendants(table, found | shim)
    return table, {pid for pid in found if pid in table and table[pid].alive}


def _cgroup(folder: Path, key: str) -> Path | None:
    """The attempt's own cgroup, which has its key in its name."""
    started = _read(folder / _STARTED, Started)
    if started is None or started.cgroup is None or not started.cgroup.endswith(f".{key}"):
        return None
    cgroup = Path(started.cgroup)
    return cgroup if processes.is_cgroup(cgroup) else None


def _read(path: Path, kind: type[_Record]) -> _Record | None:
    try:
        return msgspec.json.decode(read_plain(path, _RECORD_BYTES), type=kind)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, RecursionError) as error:
        _log.warning("%s: not a record that a shim wrote, taken as missing: %s", path, error)
        return None
