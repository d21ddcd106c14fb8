"""Who is behind the processes on the GPUs: what /proc says. Part of the gpu monitor's process; standard library only.

`Processes` describes the pids that NVML lists, `FileHolders` finds the processes that have a GPU's device file open,
whether NVML lists them or not.
"""

import contextlib
import json
import os
import pwd
import re
import threading
import time
from collections.abc import Iterable
from typing import Any

_LOOK_UP_S = 1.0
"""What one sample may wait for /proc and for user names; far below the daemon's patience with a silent monitor."""
_COMMAND_CHARACTERS = 120
_ANCESTORS = 64
_KEY = b"MLBOX_ATTEMPT_KEY="

_SCAN_S = 0.25
"""How long one look at all open files may take. The processes it did not get to come first in the next one."""
_SCAN_SHARE = 100
"""A look that took a while is followed by a pause this many times as long: at most 1 % of one core."""
_FILES_MAX = 4096
"""Open files looked at of one process; a GPU's is among the first, for CUDA opens it before the work begins."""

_CONTAINERS = (
    ("docker", re.compile(r"(?:/docker/|docker-)([0-9a-f]{64})\b")),
    ("podman", re.compile(r"libpod-([0-9a-f]{64})\b")),
    ("containerd", re.compile(r"(?:cri-containerd-|/k8s\.io/|/default/)([0-9a-f]{64})\b")),
    ("cri-o", re.compile(r"crio-([0-9a-f]{64})\b")),
    ("kubernetes", re.compile(r"/kubepods[^\n]*/([0-9a-f]{64})\b")),
    ("lxc", re.compile(r"/(?:lxc\.payload\.|lxc/)([^/\n]+)")),
    ("nspawn", re.compile(r"/systemd-nspawn@([^/\n]+)\.service")),
)
"""Where container engines put their processes in the cgroup tree, by both of their cgroup drivers."""
_DOCKER_CONFIG = "/var/lib/docker/containers/{}/config.v2.json"
_DOCKER_CONFIG_BYTES = 1 << 20


class Adoptions:
    """Runs that were started outside and are jobs now: pid and start (clock ticks since boot) of each one's root."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: dict[tuple[int, int], str] = {}
        self.version = 0
        """Grows with each change: what was found out about a process before may be wrong then."""

    def adopt(self, pid: int, ticks: int, key: str) -> None:
        with self._lock:
            self._keys[pid, ticks] = key
            self.version += 1

    def forget(self, key: str) -> None:
        with self._lock:
            self._keys = {root: other for root, other in self._keys.items() if other != key}
            self.version += 1

    def key_of(self, pid: int, ticks: int) -> str | None:
        return self._keys.get((pid, ticks))

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys.values()


class Processes:
    """What /proc says about the processes on the GPUs.

    A look-up runs on its own thread and is waited for only so long: `cmdline` and `environ` of a process that is stuck
    in the kernel can block (they take its mmap lock), and so can a name service. That must not make all GPUs unknown;
    what comes late is there in the next sample. What was found is remembered while the process is listed: a dying
    one loses its environment before its GPU memory, and the driver may go on listing one that is gone.
    """

    def __init__(self, adoptions: Adoptions | None = None) -> None:
        self._adoptions = Adoptions() if adoptions is None else adoptions
        self._version = 0
        self._owners: dict[int, _Owner] = {}
        self._users: dict[int, str] = {}

    def describe(self, rows: list[dict[str, Any]]) -> None:
        """Add user, command, start, container and attempt key to every process of `rows`."""
        until = time.monotonic() + _LOOK_UP_S
        version = self._adoptions.version
        owners: dict[int, _Owner] = {}
        for process in [process for row in rows for process in row.get("processes") or ()]:
            pid = process["pid"]
            if pid not in owners:
                owners[pid] = self._owner(pid, until, new_keys=version != self._version)
            process.update(owners[pid].found)
        self._owners, self._version = owners, version

    def _owner(self, pid: int, until: float, *, new_keys: bool) -> "_Owner":
        known = self._owners.get(pid)
        stat = Stat.of(pid)
        if known is not None and (stat is None or (stat.start == known.start and not new_keys)):
            return known
        owner = _Owner(None if stat is None else stat.start)
        if known is not None and known.start == owner.start:
            owner.remember(known, self._adoptions)
        if stat is not None:
            look_up = threading.Thread(
                target=owner.look_up, args=(pid, stat, self._users, self._adoptions), daemon=True
            )
            look_up.start()
            look_up.join(max(0.0, until - time.monotonic()))
        return owner


class Stat:
    """The fields of /proc/PID/stat that matter here (proc_pid_stat(5)); `start` is clock ticks since boot."""

    def __init__(self, text: bytes) -> None:
        end = text.rindex(b")")
        fields = text[end + 2 :].split()
        self.name = text[text.index(b"(") + 1 : end]
        self.parent = int(fields[1])
        self.start = int(fields[19])

    @classmethod
    def of(cls, pid: int) -> "Stat | None":
        try:
            return cls(_read(pid, "stat"))
        except OSError:
            return None


class _Owner:
    """Who is behind a pid. What is None in `found` is not known yet, or never will be."""

    def __init__(self, start: int | None) -> None:
        self.start = start
        self._adopted = False
        self.found: dict[str, object] = {
            "uid": None,
            "user": None,
            "command": None,
            "started_at": None,
            "start_ticks": start,
            "container": None,
            "attempt_key": None,
        }

    def remember(self, before: "_Owner", adoptions: Adoptions) -> None:
        """Keep the key found earlier: the process may be dying, or its ancestors gone. Not so one given back."""
        key = before.found["attempt_key"]
        if key in adoptions or not before._adopted:
            self.found["attempt_key"], self._adopted = key, before._adopted

    def look_up(self, pid: int, stat: Stat, users: dict[int, str], adoptions: Adoptions) -> None:
        """Ask /proc, what cannot block first. A process that ends meanwhile leaves the rest unknown."""
        up_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.found["started_at"] = time.time() - up_s + stat.start / os.sysconf("SC_CLK_TCK")
        self.found["command"] = _printable(stat.name)
        with contextlib.suppress(OSError):
            self.found["container"] = container_of(_read(pid, "cgroup").decode(errors="replace"))
        with contextlib.suppress(OSError):
            uid = _uid(pid)
            self.found["uid"], self.found["user"] = uid, users.get(uid, str(uid))
            key = _attempt_key(pid, stat, adoptions)
            if key is not None and (key in adoptions or not self._adopted):
                self.found["attempt_key"], self._adopted = key, key in adoptions
            self.found["command"] = _command(pid) or self.found["command"]
            if uid not in users:
                users[uid] = _user_name(uid)
            self.found["user"] = users[uid]


def container_of(cgroup: str) -> str | None:
    """`docker train-bob` or `podman 1a2b3c4d5e6f`, by the text of /proc/PID/cgroup; None outside of containers."""
    for engine, pattern in _CONTAINERS:
        if found := pattern.search(cgroup):
            name = found[1]
            if len(name) == 64 and engine == "docker":
                name = _docker_name(name) or name
            return f"{engine} {_printable(name[:12].encode() if len(name) == 64 else name[:64].encode())}"
    return None


def _docker_name(container: str) -> str | None:
    """The name that docker keeps beside its containers, readable by root; nothing is asked of its daemon."""
    try:
        with open(_DOCKER_CONFIG.format(container), "rb") as file:  # noqa: PTH123  # as in _read
            name = json.loads(file.read(_DOCKER_CONFIG_BYTES))["Name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name.strip("/") if isinstance(name, str) else None


class FileHolders:
    """The processes that have the device file of a GPU open (`/dev/nvidia0`), as far as we may look.

    Some hold a GPU without a row of memory in NVML's lists: in another pid namespace, or before their first
    allocation. A look at the open files of all processes costs milliseconds, so it runs on a thread of its own every
    `period_s` and nobody waits for it; `of` only makes sure that what it found is still so.
    """

    def __init__(self, prefix: str = "/dev/nvidia", period_s: float = 10.0) -> None:
        self._device = re.compile(re.escape(prefix) + r"(\d+)")
        self._prefix = prefix
        self._period_s = period_s
        self._due = 0.0
        self._thread: threading.Thread | None = None
        self._next_pid = 0
        self._files: dict[int, dict[str, int]] = {}
        """For each process one of its descriptors (`/proc/7/fd/3`) for each device file, with the minor number."""

    def look(self) -> None:
        """Begin a look at all processes if one is due."""
        now = time.monotonic()
        if now < self._due or (self._thread is not None and self._thread.is_alive()):
            return
        self._due = now + self._period_s
        self._thread = threading.Thread(target=self._scan, daemon=True)
        self._thread.start()

    def of(self, minors: Iterable[int]) -> dict[int, list[int]]:
        """For each of these minor numbers the pids that hold it still."""
        holders: dict[int, list[int]] = {minor: [] for minor in minors}
        for pid, files in list(self._files.items()):
            for file, minor in files.items():
                with contextlib.suppress(OSError):
                    if minor in holders and _target(file) == f"{self._prefix}{minor}":
                        holders[minor].append(pid)
        return holders

    def _scan(self) -> None:
        began = time.monotonic()
        own = os.getpid()
        pids = sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())  # noqa: PTH208  # as in _target
        later = [pid for pid in pids if pid >= self._next_pid]
        order = later + pids[: len(pids) - len(later)]
        files = {pid: self._files[pid] for pid in pids if pid in self._files}
        self._next_pid = 0
        for pid in order:
            if time.monotonic() - began > _SCAN_S:
                self._next_pid = pid
                break
            found = {} if pid == own else self._files_of(pid)
            files.pop(pid, None)
            if found:
                files[pid] = found
        self._files = files
        took_s = time.monotonic() - began
        self._due = max(self._due, time.monotonic() + _SCAN_SHARE * took_s)

    def _files_of(self, pid: int) -> dict[str, int]:
        found: dict[str, int] = {}
        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
            for _, entry in zip(range(_FILES_MAX), entries, strict=False):
                with contextlib.suppress(OSError):
                    device = self._device.fullmatch(_target(entry.path))
                    if device and int(device[1]) not in found.values():
                        found[entry.path] = int(device[1])
        return found


def _target(link: str) -> str:
    return os.readlink(link)  # noqa: PTH115  # there are tens of thousands, and pathlib costs more than the question


def _read(pid: int, name: str) -> bytes:
    with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:  # noqa: PTH123  # pathlib costs more than all of this
        return file.read()


def _uid(pid: int) -> int:
    """The real uid. The owner of /proc/PID would be root for a process that may not be traced."""
    lines = _read(pid, "status").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(b"Uid:"))


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _command(pid: int) -> str:
    """The command line for people: the program without its folder, shortened. Empty for a dying process."""
    program, *arguments = _read(pid, "cmdline").rstrip(b"\0").split(b"\0")
    text = _printable(b" ".join([program.rpartition(b"/")[2], *arguments]))
    return text if len(text) <= _COMMAND_CHARACTERS else text[: _COMMAND_CHARACTERS - 1] + "…"


def _printable(text: bytes) -> str:
    return "".join(c if c.isprintable() else "?" for c in text.decode(errors="replace"))


def _attempt_key(pid: int, stat: Stat, adoptions: Adoptions) -> str | None:
    """The attempt that adopted a process or an ancestor, else the one in the nearest environment that we may read."""
    key = None
    for _ in range(_ANCESTORS):
        if adopted := adoptions.key_of(pid, stat.start):
            return adopted
        if key is None:
            key = _key_in_environment(pid)
        parent = stat.parent
        above = Stat.of(parent) if parent > 1 and (key is None or adoptions) else None
        if above is None:
            break
        pid, stat = parent, above
    return key


def _key_in_environment(pid: int) -> str | None:
    with contextlib.suppress(OSError):
        for variable in _read(pid, "environ").split(b"\0"):
            if variable.startswith(_KEY):
                return _printable(variable[len(_KEY) :])
    return None
