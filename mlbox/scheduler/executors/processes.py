"""Processes and control groups of this box, read from /proc and cgroup v2 (proc(5), the kernel's cgroup-v2.rst).

A pid alone means nothing: it may have been given to another process since it was read. Whatever is signalled here
is pinned by a pidfd first and then recognised by its start time.
"""

import os
import signal
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A line of the process table. `ticks` is the start time in clock ticks since boot."""

    pid: int
    parent: int
    group: int
    ticks: int
    alive: bool
    """False for a zombie, which runs no more and holds nothing but its pid."""


def boot_id() -> str:
    """What names the current boot of the box. MLBOX_BOOT_ID_PATH puts another file in the kernel's place."""
    path = Path(os.environ.get("MLBOX_BOOT_ID_PATH", "/proc/sys/kernel/random/boot_id"))
    return path.read_text(encoding="ascii").strip()


def find(pid: int) -> Process | None:
    """The process that has this pid now."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()  # the name before it may hold spaces and brackets
    state, parent, group, threads, ticks = (fields[0], *(int(fields[i]) for i in (1, 2, 17, 19)))
    # A main thread that called pthread_exit(3) is a zombie in a process that lives on in its other threads.
    alive = state not in (b"Z", b"X") or threads > 1
    return Process(pid=pid, parent=parent, group=group, ticks=ticks, alive=alive)


def table() -> dict[int, Process]:
    """All processes of the box, by pid."""
    found = (find(int(entry.name)) for entry in os.scandir("/proc") if entry.name.isdigit())
    return {process.pid: process for process in found if process is not None}


def descendants(processes: Mapping[int, Process], ancestors: Iterable[int]) -> set[int]:
    """The pids below `ancestors`, these not included."""
    children: dict[int, list[int]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process.pid)
    found: set[int] = set()
    parents = list(ancestors)
    while parents:
        below = set(children.get(parents.pop(), ())) - found
        found |= below
        parents.extend(below)
    return found


def carrying(processes: Iterable[int], variable: str, value: str) -> set[int]:
    """Those of `processes` that were started with `variable=value` in their environment and that we may look at."""
    wanted = f"\0{variable}={value}\0".encode()
    found: set[int] = set()
    for pid in processes:
        with suppress(OSError):
            if wanted in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                found.add(pid)
    return found


def open_process(pid: int, ticks: int) -> int | None:
    """A pidfd of the process that began at `ticks`; None when it is gone, whoever may have its pid by now."""
    try:
        process = os.pidfd_open(pid)
    except (OSError, OverflowError):  # the number may be one that a job made up
        return None
    found = find(pid)
    if found is None or found.ticks != ticks:
        os.close(process)
        return None
    return process


def kill(processes: Mapping[int, Process], pids: Iterable[int]) -> None:
    """KILL `pids`, all of which are in the table `processes`.

    A process group that holds nobody else is killed as a whole, since only that is atomic against fork(2).
    """
    pids = set(pids)
    groups: dict[int, set[int]] = {}
    for process in processes.values():
        groups.setdefault(process.group, set()).add(process.pid)
    for pid in pids:
        process = processes[pid]
        pidfd = open_process(pid, process.ticks)
        if pidfd is None:
            continue
        with suppress(OSError):  # gone, or of another user
            if groups[process.group] <= pids:
                os.killpg(process.group, signal.SIGKILL)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)


def cgroup_for_jobs() -> Path | None:
    """Our own cgroup v2, if we may make cgroups below it; there the memory and cpu controllers are on if possible."""
    own = _own_cgroup()
    if own is None or not os.access(own / "cgroup.procs", os.W_OK):
        return None
    probe = own / f"mlbox-probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return None
    for controller in ("memory", "cpu"):
        with suppress(OSError):  # EBUSY: a cgroup with processes of its own cannot hand controllers down
            (own / "cgroup.subtree_control").write_text(f"+{controller}", encoding="ascii")
    return own


def cgroup_pids(cgroup: Path) -> set[int]:
    """The pids in a cgroup and all those below it; none when it does not exist."""
    found: set[int] = set()
    for folder, _, _ in os.walk(cgroup):
        with suppress(OSError):
            found.update(map(int, Path(folder, "cgroup.procs").read_text(encoding="ascii").split()))
    return found


def kill_cgroup(cgroup: Path) -> None:
    """KILL everything in a cgroup at once, forks in flight included (Linux 5.14); no error where that is not so."""
    with suppress(OSError):
        (cgroup / "cgroup.kill").write_text("1", encoding="ascii")


def remove_cgroup(cgroup: Path) -> bool:
    """Remove an empty cgroup with all below it; False when it is still there, as just after its last process."""
    for folder, _, _ in os.walk(cgroup, topdown=False):
        with suppress(OSError):
            Path(folder).rmdir()
    return not cgroup.exists()


def is_cgroup(folder: Path) -> bool:
    """Whether a path leads into a cgroup v2 hierarchy, where nobody can put links, pipes or files of their own."""
    return ".." not in folder.parts and any(folder.is_relative_to(mount_point) for _, mount_point in _cgroup_mounts())


def _own_cgroup() -> Path | None:
    """Where our cgroup of the v2 hierarchy is mounted (cgroups(7))."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    own = next((Path(line.removeprefix("0::")) for line in lines if line.startswith("0::")), None)
    if own is None:
        return None
    for root, mount_point in _cgroup_mounts():
        if own.is_relative_to(root):
            folder = Path(mount_point) / own.relative_to(root)
            if folder.is_dir():
                return folder
    return None


def _cgroup_mounts() -> list[tuple[str, str]]:
    """(root within the hierarchy, mount point) of each mount of cgroup v2 (proc_pid_mountinfo(5))."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    split = [mount.partition(" - ") for mount in mounts]
    places = [place.split()[3:5] for place, _, kind in split if kind.startswith("cgroup2 ")]
    return [(root, mount_point) for root, mount_point in places]
