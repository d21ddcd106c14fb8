"""Runs attempts as this user, each under a shim that is a plain child process: single-user mode.

Nothing here outlives the daemon but the shims and their folders, and these are all that a later daemon needs. A job
can write there too: what it puts in place of the shim's files may mislead us about itself, but never hold us up.
"""

import fcntl
import json
import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from mlbox.scheduler.executors import processes
from mlbox.scheduler.executors.base import CouldNotStart, Exit, Launch, Liveness, Observation, Started
from mlbox.scheduler.folders import open_plain, read_plain

_SHIM = Path(__file__).parents[1] / "shim.py"
_RUN_SHIM = (
    "import sys; from importlib.machinery import SourceFileLoader as Loader; "
    "exec(Loader('__main__', sys.argv[1]).get_code('__main__'))"
)
"""What `python shim.py` does, with the bytecode cache that scripts do without: 5 ms faster."""
_STARTED, _EXIT = "started.json", "exit.json"
_KEY = "MLBOX_ATTEMPT_KEY"
_KILL_PATIENCE_S = 0.5
"""How long `kill_remains` waits for what it killed; the kernel needs a few ms, unless a driver holds the process."""
_KILL_AGAIN_S = 0.01
_RECORD_BYTES = 1 << 16
"""The most that is read of a record; a shim writes a few hundred bytes, and what is cut off is no JSON."""
_HOLDER_TRIES = 10
_HOLDER_PAUSE_S = 0.002

_WRITE = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK

_log = logging.getLogger(__name__)
_Record = TypeVar("_Record", Started, Exit)


class LocalExecutor:
    """Starts and stops attempts on this box; `executors.base.Executor` is its contract. Safe to use from threads.

    `cgroups=False` does without cgroup v2 even where we could use it.
    """

    def __init__(self, *, cgroups: bool = True) -> None:
        self._cgroup_parent = processes.cgroup_for_jobs() if cgroups else None
        self._children: dict[Path, int] = {}
        self._lock = threading.Lock()

    def start(self, launch: Launch) -> None:
        if not launch.key or launch.env.get(_KEY) != launch.key:
            raise ValueError(f"{launch.handle}: its key must be in its environment as {_KEY}")
        try:
            with self._lock:
                if not self._reap(launch.folder):
                    _write_launch(launch, self._cgroup_parent)
                    self._children[launch.folder] = _spawn_shim(launch.folder)
        except OSError as error:
            raise CouldNotStart(f"{launch.handle}: cannot start a shim in {launch.folder}: {error}") from error

    def end_fd(self, folder: Path) -> int | None:
        shim = _open_holder(folder)
        if shim is None:
            with self._lock:
                child = self._children.get(folder)
                if child is not None:
                    return os.pidfd_open(child)  # ours until we reap it, so its pid cannot be another's
        return shim

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
        shim = self.end_fd(folder)
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
        if self.observe(folder).liveness is Liveness.ALIVE:
            return self.processes(folder, key)
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


def _write_launch(launch: Launch, cgroup_parent: Path | None) -> None:
    """Write `launch.json` whole or not at all, for its owner's eyes only: `env` may hold secrets."""
    values = {
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
        "boot_id": processes.boot_id(),
        "cgroup_parent": None if cgroup_parent is None else str(cgroup_parent),
    }
    draft = launch.folder / f"launch.json.{os.getpid()}-{threading.get_ident()}"
    file = os.open(draft, os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | _WRITE, 0o600)
    with os.fdopen(file, "w", encoding="ascii") as opened:
        json.dump(values, opened)
    draft.rename(launch.folder / "launch.json")


def _spawn_shim(folder: Path) -> int:
    """Start a shim; returns its pid. Raises OSError.

    posix_spawn(3) does not copy the daemon's page tables; the shim closes what descriptors it may inherit.
    """
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-S", "-E", "-c", _RUN_SHIM, str(_SHIM), str(folder)],
        {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
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
