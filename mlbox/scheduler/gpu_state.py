"""What the GPUs are to the users of the box: the words, and decisions that are pure.

A GPU is known by its UUID, never by its index: that changes when another GPU is added or lost.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Literal

_MIG_INDICES = 100
"""The index of a MIG device is this many times its GPU's index + 1, plus its number on that GPU."""
_UNEXPLAINED_MIB = 2048
"""So much memory that no listed process accounts for is more than drivers keep for themselves (up to about 1 GiB)."""
_DAY_S = 86400


class GpuState(StrEnum):
    """What a GPU is to somebody who wants one. Only `free` ones are given to jobs."""

    FREE = "free"
    LEASED = "leased"
    """Held by jobs that are starting or running."""
    FOREIGN = "foreign"
    """A process that computes on it has no right to it from mlbox: somebody works around the queue."""
    DRAINING = "draining"
    """Held until something ends: processes of an attempt that is over, or a job on a GPU that is to be drained."""
    DRAINED = "drained"
    """Taken out of service: by an admin, for a fault, or because it is split into MIG devices. An admin undoes it."""
    UNKNOWN = "unknown"
    """Nobody can tell: NVML fails or hangs, the GPU is lost, or mlbox cannot judge it. Comes back by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """A process on a GPU. None is "NVML or /proc does not tell", which is not zero.

    `kind` is C for computing (also through MPS), G for graphics, F for one that only has the GPU's device file open.
    `uid` is the real one, `user` its name. `started_at` is Unix seconds; `start_ticks` is clock ticks since boot and,
    with the pid, names a process for good. `command` is shortened. `container` is its engine and name (`docker
    train-bob`). `attempt_key` is that of the job that adopted the process or an ancestor, else the MLBOX_ATTEMPT_KEY
    of the process or its nearest ancestor.
    """

    pid: int
    kind: Literal["C", "G", "C+G", "F"]
    memory_mib: int | None = None
    uid: int | None = None
    user: str | None = None
    command: str | None = None
    started_at: float | None = None
    start_ticks: int | None = None
    container: str | None = None
    attempt_key: str | None = None

    @property
    def computes(self) -> bool:
        """Whether it keeps jobs off its GPU.

        A desktop (Xorg, gnome-shell) draws and computes nothing: type G alone. An open device file (nvtop,
        nvidia-persistenced) says nothing either: type F.
        """
        return self.kind in ("C", "C+G")

    @property
    def program(self) -> str:
        """The name of its program, `process` where nobody knows."""
        words = (self.command or "").split()
        return words[0].rstrip(":") if words else "process"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuLink:
    """How near another GPU is: `level` as in `nvidia-smi topo -m` (PIX, PXB, PHB, NODE, SYS; PSB: on one board)."""

    uuid: str
    level: str | None
    nvlinks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Xid:
    """An error that the driver reported of a GPU, `count` times, the last time `at` (Unix seconds)."""

    xid: int
    at: float
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU, or a MIG device of one, as the latest sample showed it. None is "NVML does not tell", which is not zero.

    `error` says why nothing is known about it now; all readings are None then. `processes` is None where NVML cannot
    list those that compute. `mig`: it is in MIG mode and split into `mig_devices`; each of these names it as `parent`.
    `cpus` and `numa_node` are those nearest to it. `unused_since` is since when its utilization has been 0,
    `idle_since` since when a process has held memory on it all the same (Unix seconds).
    `recovery_action`, `ecc_uncorrected`, `remap_failed`, `error_code` and `xids` (those of the last day, by when each
    number came first) are for
    `gpu_faults.judge`.
    """

    uuid: str
    index: int
    name: str
    bus_id: str
    minor: int | None = None
    parent: str | None = None
    memory_mib: int | None = None
    used_mib: int | None = None
    free_mib: int | None = None
    utilization: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    mig: bool = False
    mig_devices: int = 0
    processes: tuple[GpuProcess, ...] | None = None
    links: tuple[GpuLink, ...] = ()
    cpus: tuple[int, ...] = ()
    numa_node: int | None = None
    unused_since: float | None = None
    idle_since: float | None = None
    recovery_action: int | None = None
    ecc_uncorrected: int | None = None
    remap_failed: bool | None = None
    xids: tuple[Xid, ...] = ()
    error: str | None = None
    error_code: int | None = None

    @property
    def label(self) -> str:
        """What people call it: its index, `0:1` for the second MIG device of GPU 0."""
        return label_of(self.index)

    @property
    def place(self) -> tuple[int, int]:
        """Where it comes in a list: MIG devices after their GPU."""
        if self.index < _MIG_INDICES:
            return self.index, -1
        return self.index // _MIG_INDICES - 1, self.index % _MIG_INDICES


def label_of(index: int) -> str:
    """What people call the GPU of this index."""
    if index < _MIG_INDICES:
        return str(index)
    return f"{index // _MIG_INDICES - 1}:{index % _MIG_INDICES}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuStatus:
    """A GPU's state and, unless it is free, why: `bob's python (pid 4711) holds 642 MiB`."""

    index: int
    state: GpuState
    why: str | None = None

    @property
    def message(self) -> str:
        return f"GPU {label_of(self.index)}: {self.why or self.state}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Viewpoint:
    """What else a GPU's state and its sentence depend on.

    `declared`: memory that attempts asked for on a GPU they share, by attempt key. `ignored`: names of programs whose
    processes make no GPU foreign. `now`: Unix seconds; without it a time of day is told with its date.
    """

    declared: Mapping[str, int] = field(default_factory=dict[str, int])
    ignored: Collection[str] = ()
    now: float | None = None


_PLAIN = Viewpoint()


def state_of(
    gpu: Gpu,
    leases: Mapping[str, str],
    drained: str | None,
    own_keys: Mapping[str, str],
    view: Viewpoint = _PLAIN,
) -> GpuStatus:
    """What `gpu` is to its users.

    `leases`: the attempts that hold a lease on it; `own_keys`: all attempts that are starting or running, on whichever
    GPU; both from attempt key to whose it is (`job 12`). `drained`: who took it out of service, or why, else None.
    A process of a live attempt on a GPU that this attempt does not lease is as foreign as anybody's.
    """
    computing = [process for process in gpu.processes or () if process.computes]
    strangers = [
        process
        for process in computing
        if process.attempt_key not in leases
        and (process.attempt_key is not None or process.program not in view.ignored)
    ]
    jobs = {key: f"{who}'s" for key, who in own_keys.items()}
    state, why = GpuState.FREE, None
    if trouble := gpu.error:
        state, why = GpuState.UNKNOWN, trouble
    elif gpu.mig:
        state, why = GpuState.DRAINED, _split(gpu)
    elif gpu.processes is None:
        state, why = GpuState.UNKNOWN, "NVML does not list its processes, so nobody knows whether it is in use"
    elif over := {key: who for key, who in leases.items() if key not in own_keys}:
        state, why = GpuState.DRAINING, _leftovers(over, computing)
    elif drained is not None and leases:
        state, why = GpuState.DRAINING, f"{drained}; {_holders(leases, view)} still {_run(leases)} on it"
    elif drained is not None:
        state, why = GpuState.DRAINED, drained
    elif leases:
        beside = f"; beside it {_held(strangers, jobs)}" if strangers else ""
        state, why = GpuState.LEASED, f"leased by {_holders(leases, view)}{beside}"
    elif strangers:
        state, why = GpuState.FOREIGN, _held(strangers, jobs) + _idle(gpu, view)
    elif hidden := _hidden(gpu, view):
        state, why = GpuState.FOREIGN, hidden
    return GpuStatus(index=gpu.index, state=state, why=why)


def effective_free_mib(gpu: Gpu, declared: Mapping[str, int]) -> int | None:
    """Memory of a shared GPU that may be promised to one more job; None where NVML does not tell.

    `declared`: what each attempt on it asked for, by attempt key. Each counts with what it asked for or really uses,
    whichever is more, and so does all that others use: undeclared memory is not there to be given away.
    """
    if gpu.used_mib is None or gpu.memory_mib is None:
        return None
    total = gpu.memory_mib if gpu.free_mib is None else gpu.used_mib + gpu.free_mib  # less what the driver reserves
    promised = explained = 0
    for key, asked in declared.items():
        used, all_known = _used(gpu, key)
        promised += max(asked, used)
        explained += used if all_known else max(asked, used)  # a use that NVML does not tell is taken to be as declared
    return max(0, total - promised - max(0, gpu.used_mib - explained))


def over_share(gpu: Gpu, declared: Mapping[str, int]) -> tuple[tuple[str, int, int], ...]:
    """The attempts that use more of a shared GPU than they asked for: key, used MiB, declared MiB."""
    uses = [(key, _used(gpu, key)[0], asked) for key, asked in declared.items()]
    return tuple(use for use in uses if use[1] > use[2])


def leftovers(gpu: Gpu, key: str) -> tuple[GpuProcess, ...]:
    """The processes of an attempt on a GPU: once it is over, all of them are to be killed, by pid and start.

    Those that only have the device file open are among them. One whose start is unknown is not: its pid alone is no
    name.
    """
    return tuple(
        process for process in gpu.processes or () if process.attempt_key == key and process.start_ticks is not None
    )


def described(processes: Sequence[GpuProcess]) -> str:
    """Processes for a message: `python (pid 4711), python (pid 4712) and 3 more`."""
    names = [f"{process.program} (pid {process.pid})" for process in processes]
    if len(names) > 3:
        names[2:] = [f"{len(names) - 2} more"]
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def _used(gpu: Gpu, key: str) -> tuple[int, bool]:
    """What is known to be used by an attempt, and whether that is all."""
    amounts = [
        process.memory_mib for process in gpu.processes or () if process.attempt_key == key and process.kind != "F"
    ]
    return sum(amount or 0 for amount in amounts), None not in amounts


def _split(gpu: Gpu) -> str:
    if gpu.mig_devices == 0:
        return (
            "it is in MIG mode without a MIG device, so there is nothing to run on: create some "
            "(nvidia-smi mig -cgi ... -C) or switch MIG mode off"
        )
    devices = "1 MIG device" if gpu.mig_devices == 1 else f"{gpu.mig_devices} MIG devices"
    return f"it is split into {devices}, which {'is' if gpu.mig_devices == 1 else 'are'} given to jobs instead"


def _holders(leases: Mapping[str, str], view: Viewpoint) -> str:
    """`job 12`, or on a shared GPU `job 12 (8192 MiB) and job 13 (4096 MiB)`."""
    return " and ".join(
        f"{who} ({view.declared[key]} MiB)" if key in view.declared else who for key, who in leases.items()
    )


def _run(leases: Mapping[str, str]) -> str:
    return "runs" if len(leases) == 1 else "run"


def _leftovers(over: Mapping[str, str], computing: Sequence[GpuProcess]) -> str:
    """Whose memory is still on a GPU whose attempts are over."""
    ended = f"{' and '.join(over.values())} {'has' if len(over) == 1 else 'have'} ended"
    left = [process for process in computing if process.attempt_key in over]
    if not left:
        return f"{ended}; the GPU is about to be given back"
    return f"{ended}, but {_held(left, dict.fromkeys(over, 'its'))}"


def _held(processes: Sequence[GpuProcess], whose: Mapping[str, str]) -> str:
    """`bob's python (pid 4711) holds 642 MiB`, about the process that holds most; one of unknown size may be that.

    `whose`: attempt key to `job 12's`, for processes that are not to be called by their user.
    """
    first = max(processes, key=lambda process: math.inf if process.memory_mib is None else process.memory_mib)
    amount = "memory, NVML does not say how much" if first.memory_mib is None else f"{first.memory_mib} MiB"
    more = len(processes) - 1
    others = f" (and {more} more process{'' if more == 1 else 'es'})" if more else ""
    return f"{_named(first, whose)} holds {amount}{others}"


def _named(process: GpuProcess, whose: Mapping[str, str]) -> str:
    owner = whose.get(process.attempt_key or "", f"{process.user or 'somebody'}'s")
    where = f" in {process.container}" if process.container else ""
    return f"{owner} {process.program} (pid {process.pid}{where})"


def _hidden(gpu: Gpu, view: Viewpoint) -> str | None:
    """Who probably holds memory that NVML shows no process for: somebody in another pid namespace, say.

    Only with both signs is a GPU taken for foreign: much memory that nobody accounts for, and a program that has its
    device file open. One alone is a monitor, or the driver's own share.
    """
    listed = [process for process in gpu.processes or () if process.kind != "F"]
    holders = [
        process for process in gpu.processes or () if process.kind == "F" and process.program not in view.ignored
    ]
    if gpu.used_mib is None or not holders or any(process.memory_mib is None for process in listed):
        return None
    unexplained = gpu.used_mib - sum(process.memory_mib or 0 for process in listed)
    if unexplained < _UNEXPLAINED_MIB:
        return None
    newest = max(holders, key=lambda process: process.started_at or 0.0)  # monitors are older than runs
    return f"{unexplained} MiB are held by no process that NVML lists; {_named(newest, {})} has the GPU open"


def _idle(gpu: Gpu, view: Viewpoint) -> str:
    """`, idle since 14:02` (UTC), with the date unless that is less than a day ago."""
    if gpu.idle_since is None:
        return ""
    recent = view.now is not None and view.now - gpu.idle_since < _DAY_S
    moment = datetime.fromtimestamp(gpu.idle_since, UTC)
    return f", idle since {moment:%H:%M}" if recent else f", idle since {moment:%Y-%m-%d %H:%M}"
