"""The GPUs of this box: what NVML says about them, and who holds each.

`GpuInventory` runs the gpu monitor (a process of its own, for NVML can hang in the kernel) and keeps its latest sample.
What that means for a user of the box is decided by `state_of`, which is pure. A GPU is known by its UUID, never by its
index: that changes when another GPU is added or lost.
"""

import asyncio
import contextlib
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import IO, Literal, cast

import msgspec

log = logging.getLogger(__name__)

_MONITOR = Path(__file__).with_name("gpu_monitor.py")
_LINE_BYTES = 8 << 20
"""Longest line the monitor may send; eight GPUs with a thousand processes each stay below a quarter of it."""
_SILENCE_PARTS = 3
"""A daemon that itself stood still finds one wait over, however long it was, and then the lines that came meanwhile;
so a monitor is silent only when that many waits, which make up the whole patience, brought nothing."""
_KILL_S = 2.0
_STEADY_S = 60.0
"""A monitor that lived this long is not blamed for the ends of those before it."""
_LONGEST_DELAY_S = 60.0


class GpuState(StrEnum):
    """What a GPU is to somebody who wants one. Only `free` ones are given to jobs."""

    FREE = "free"
    LEASED = "leased"
    """Held by a job that is starting or running."""
    FOREIGN = "foreign"
    """A process that computes on it has no right to it from mlbox: somebody works around the queue."""
    DRAINING = "draining"
    """Held until something ends: processes of an attempt that is over, or a job on a GPU that is to be drained."""
    DRAINED = "drained"
    """Taken out of service by an admin, who also brings it back."""
    UNKNOWN = "unknown"
    """Nobody can tell: NVML fails or hangs, the GPU is lost, or mlbox cannot judge it. Comes back by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """A process that holds GPU memory. None is "NVML or /proc does not tell", which is not zero.

    `kind` is C for computing (also through MPS), G for graphics. `started_at` is Unix seconds. `command` is shortened.
    `attempt_key` is the MLBOX_ATTEMPT_KEY of the process or its nearest ancestor.
    """

    pid: int
    kind: Literal["C", "G", "C+G"]
    memory_mib: int | None = None
    user: str | None = None
    command: str | None = None
    started_at: float | None = None
    attempt_key: str | None = None

    @property
    def computes(self) -> bool:
        """Whether it keeps jobs off its GPU. A desktop (Xorg, gnome-shell) draws and computes nothing: type G alone."""
        return self.kind != "G"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuLink:
    """How near another GPU is: `level` as in `nvidia-smi topo -m` (PIX, PXB, PHB, NODE, SYS; PSB: on one board)."""

    uuid: str
    level: str | None
    nvlinks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU as the latest sample showed it. None is "NVML does not tell", which is not zero.

    `error` says why nothing is known about it now; all readings are None then. `processes` is None where NVML cannot
    list those that compute.
    """

    uuid: str
    index: int
    name: str
    bus_id: str
    minor: int | None = None
    memory_mib: int | None = None
    used_mib: int | None = None
    free_mib: int | None = None
    utilization: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    mig: bool = False
    processes: tuple[GpuProcess, ...] | None = None
    links: tuple[GpuLink, ...] = ()
    error: str | None = None


class Nvml(StrEnum):
    """Whether the number of GPUs is known."""

    UNASKED = "unasked"
    """The gpu monitor has not answered yet."""
    OK = "ok"
    ABSENT = "absent"
    """No NVIDIA driver: a box that works with its CPUs."""
    FAILING = "failing"
    """There may be GPUs, but NVML or the gpu monitor does not work. It is tried again and again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """All GPUs of the box, by index, at one moment. `message` is a sentence about the driver, for people."""

    nvml: Nvml
    message: str
    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuStatus:
    """A GPU's state and, unless it is free, why: `bob's python (pid 4711) holds 642 MiB`."""

    index: int
    state: GpuState
    why: str | None = None

    @property
    def message(self) -> str:
        return f"GPU {self.index}: {self.why or self.state}"


def state_of(gpu: Gpu, leases: Mapping[str, str], drained: str | None, own_keys: Mapping[str, str]) -> GpuStatus:
    """What `gpu` is to its users.

    `leases`: the attempts that hold a lease on it; `own_keys`: all attempts that are starting or running, on whichever
    GPU; both from attempt key to whose it is (`job 12`). `drained`: who took it out of service, or why, else None.
    A process of a live attempt on a GPU that this attempt does not lease is as foreign as anybody's.
    """
    computing = [process for process in gpu.processes or () if process.computes]
    strangers = [process for process in computing if process.attempt_key not in leases]
    holders = " and ".join(leases.values())
    jobs = {key: f"{who}'s" for key, who in own_keys.items()}
    state, why = GpuState.FREE, None
    if trouble := gpu.error or _unjudgeable(gpu):
        state, why = GpuState.UNKNOWN, trouble
    elif over := {key: who for key, who in leases.items() if key not in own_keys}:
        state, why = GpuState.DRAINING, _leftovers(over, computing)
    elif drained is not None and leases:
        state, why = GpuState.DRAINING, f"{drained}; {holders} still runs on it"
    elif drained is not None:
        state, why = GpuState.DRAINED, drained
    elif leases:
        beside = f"; beside it {_held(strangers, jobs)}" if strangers else ""
        state, why = GpuState.LEASED, f"leased by {holders}{beside}"
    elif strangers:
        state, why = GpuState.FOREIGN, _held(strangers, jobs)
    return GpuStatus(index=gpu.index, state=state, why=why)


def _unjudgeable(gpu: Gpu) -> str | None:
    if gpu.mig:
        return "it is in MIG mode, and mlbox gives whole GPUs only: switch MIG off to use it"
    if gpu.processes is None:
        return "NVML does not list its processes, so nobody knows whether it is in use"
    return None


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
    owner = whose.get(first.attempt_key or "", f"{first.user or 'somebody'}'s")
    program = (first.command or "").split()[:1] or ["process"]
    amount = "memory, NVML does not say how much" if first.memory_mib is None else f"{first.memory_mib} MiB"
    more = len(processes) - 1
    others = f" (and {more} more process{'' if more == 1 else 'es'})" if more else ""
    return f"{owner} {program[0]} (pid {first.pid}) holds {amount}{others}"


class _Lost(msgspec.Struct, frozen=True):
    """A GPU that NVML counts but cannot reach: not even its UUID is known."""

    index: int
    error: str


class _Found(msgspec.Struct, frozen=True, tag="found", tag_field="line"):
    next_s: float
    nvml: Nvml
    driver: str | None
    message: str


class _Sample(msgspec.Struct, frozen=True, tag="sample", tag_field="line"):
    next_s: float
    taken: float
    gpus: tuple[Gpu, ...]
    lost: tuple[_Lost, ...]


_decode = msgspec.json.Decoder(_Found | _Sample).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorOptions:
    """How the gpu monitor is run.

    `silence_s` is how long one of its lines may be overdue, `start_s` the same for its first line: without persistence
    mode the driver initialises GPU after GPU, seconds each. `retry_s` is how often a missing driver or GPU is tried
    again. `restart_s` is the first wait before another monitor, `environment` None the daemon's own.
    """

    period_s: float = 2.0
    silence_s: float = 15.0
    start_s: float = 90.0
    retry_s: float = 30.0
    restart_s: float = 1.0
    environment: Mapping[str, str] | None = None


class GpuInventory:
    """The latest sample of the gpu monitor, and the monitor's life.

    Used on the event loop's thread only. `run` is a task of its own; everything else answers at once from memory.
    `on_change` is called when anything but power and temperature changed, and when a sample came that `refresh` asked
    for.
    """

    def __init__(self, on_change: Callable[[], None], options: MonitorOptions | None = None) -> None:
        self._on_change = on_change
        self._options = options or MonitorOptions()
        self._nvml = Nvml.UNASKED
        self._message = "the GPUs are not known yet: NVML has not answered"
        self._driver: str | None = None
        self._unreachable = ""
        self._known: dict[str, Gpu] = {}
        self._trouble: str | None = None
        self._taken = -math.inf
        self._asked: float | None = None
        self._answered = asyncio.Event()
        self._stdin: int | None = None

    @property
    def sample_age_s(self) -> float:
        """Seconds since the latest sample was begun; infinite before the first."""
        return time.monotonic() - self._taken

    def current(self) -> Inventory:
        """The box as far as it is known. GPUs once seen stay in it, with an error while nothing is known about them."""
        trouble = self._trouble
        if trouble is None and self.sample_age_s > self._options.period_s + self._options.silence_s:
            trouble = f"the latest sample is {self.sample_age_s:.0f} s old"
        gpus = (gpu if trouble is None else _unknown(gpu, trouble) for gpu in self._known.values())
        return Inventory(
            nvml=self._nvml,
            message=self._message + self._unreachable,
            driver=self._driver,
            gpus=tuple(sorted(gpus, key=lambda gpu: (gpu.index, gpu.uuid))),
        )

    async def wait_first(self, timeout_s: float) -> bool:
        """Wait until NVML was asked for the first time, with whatever result. False: `timeout_s` passed before."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._answered.wait()
        except TimeoutError:
            return False
        return True

    def refresh(self) -> None:
        """Have a sample taken now rather than at the next period. Costs nothing while one is under way."""
        waiting, self._asked = self._asked is not None, time.monotonic()
        if not waiting:
            self._poke()

    def clean(self, uuid: str, attempt_key: str, after: float) -> bool:
        """Whether a sample begun after `after` (time.monotonic()) shows no process of the attempt on that GPU.

        False as well where nobody knows: no such sample yet, or the GPU does not answer.
        """
        gpu = next((gpu for gpu in self.current().gpus if gpu.uuid == uuid), None)
        if gpu is None or gpu.processes is None or self._taken <= after:
            return False
        return all(process.attempt_key != attempt_key for process in gpu.processes)

    async def run(self) -> None:
        """Keep a gpu monitor running until cancelled, and then end it.

        A monitor that dies or falls silent is replaced after 1, 2, 4 ... 60 s; until then every GPU is unknown.
        """
        delay_s = self._options.restart_s
        while True:
            began = time.monotonic()
            why = await self._run_monitor()
            if time.monotonic() - began > _STEADY_S:
                delay_s = self._options.restart_s
            self._down(f"{why}; it is started again in {delay_s:g} s")
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _LONGEST_DELAY_S)

    async def _run_monitor(self) -> str:
        """Start a gpu monitor and take its lines until it must be replaced; returns why, with the monitor dead."""
        options = self._options
        command = [sys.executable, "-P", str(_MONITOR), f"--period={options.period_s}", f"--retry={options.retry_s}"]
        try:
            # -P keeps this package's `queue` and `logs` from hiding the standard library's. Its own session: Ctrl-C at
            # a terminal is for the daemon, with whose end the monitor's stdin ends.
            monitor = subprocess.Popen(  # noqa: ASYNC220  # a few ms, once
                command, stdin=-1, stdout=-1, bufsize=0, env=options.environment, start_new_session=True
            )
        except OSError as error:
            return f"the gpu monitor cannot be started: {error}"
        stdin, stdout = cast(IO[bytes], monitor.stdin), cast(IO[bytes], monitor.stdout)
        self._stdin = stdin.fileno()
        try:
            why = await self._listen(stdout)
        finally:
            self._stdin = None
            stdin.close()
            monitor.kill()
            code = await _exit_code(monitor, within_s=_KILL_S)
        if code is None:
            self._down("the gpu monitor hangs in the kernel, where it cannot be killed: the driver is stuck")
        while code is None:  # another one would hang as well
            code = await _exit_code(monitor, within_s=_KILL_S)
        return why or f"the gpu monitor ended ({f'signal {-code}' if code < 0 else f'code {code}'})"

    async def _listen(self, stdout: IO[bytes]) -> str | None:
        """Take the monitor's lines until it falls silent or talks nonsense; None: until it ended."""
        reader = asyncio.StreamReader(limit=_LINE_BYTES)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), stdout
        )
        patience_s = self._options.start_s
        try:
            while True:
                try:
                    text = await _next_line(reader, patience_s)
                    line = _decode(text) if text else None
                except (ValueError, msgspec.DecodeError) as error:
                    return f"the gpu monitor wrote what cannot be read: {error}"
                if line is None:
                    return None
                patience_s = line.next_s + self._options.silence_s
                self._take(line)
        except _Silent:
            return f"the gpu monitor was silent for {patience_s:g} s: NVML seems to hang"
        finally:
            transport.close()

    def _take(self, line: _Found | _Sample) -> None:
        before = self._notable()
        answered = False
        if isinstance(line, _Found):
            self._found(line)
        else:
            self._nvml, self._trouble, self._taken = Nvml.OK, None, line.taken
            self._known = _merged(self._known, line)
            self._unreachable = _unreachable(line, self._known)
            self._answered.set()
            if self._asked is not None and line.taken >= self._asked:
                answered, self._asked = True, None
            elif self._asked is not None:
                self._poke()
        if answered or self._notable() != before:
            self._on_change()

    def _found(self, line: _Found) -> None:
        if line.message != self._message:
            log.info("gpus: %s", line.message)
        self._message, self._driver, self._unreachable = line.message, line.driver, ""
        if line.nvml is not Nvml.OK:  # else the sample that follows tells the rest
            self._nvml = Nvml.FAILING if self._known else line.nvml
            self._trouble, self._asked = line.message, None
            self._answered.set()

    def _down(self, why: str) -> None:
        """The monitor is of no use at the moment. A box without a driver stays one."""
        log.warning("gpus: %s", why)
        before = self._notable()
        if self._nvml is not Nvml.ABSENT:
            self._nvml, self._message, self._trouble, self._unreachable = Nvml.FAILING, why, why, ""
        if self._notable() != before:
            self._on_change()

    def _notable(self) -> Inventory:
        """The box without the figures that never stand still."""
        box = self.current()
        return replace(box, gpus=tuple(replace(gpu, power_w=None, temperature_c=None) for gpu in box.gpus))

    def _poke(self) -> None:
        if self._stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._stdin, b"\n")


def _merged(known: Mapping[str, Gpu], sample: _Sample) -> dict[str, Gpu]:
    """The GPUs of a sample, and those once known that it does not show or that fail, with the reason."""
    lost = {gpu.index: gpu.error for gpu in sample.lost}
    gpus = {
        gpu.uuid: _unknown(gpu, lost.get(gpu.index, "the driver does not show it any more")) for gpu in known.values()
    }
    for gpu in sample.gpus:
        gpus[gpu.uuid] = gpu if gpu.error is None else _unknown(known.get(gpu.uuid, gpu), gpu.error)
    return gpus


def _unknown(gpu: Gpu, error: str) -> Gpu:
    """`gpu` with what is known for ever, and nothing of what changes."""
    return Gpu(
        uuid=gpu.uuid,
        index=gpu.index,
        name=gpu.name,
        bus_id=gpu.bus_id,
        minor=gpu.minor,
        memory_mib=gpu.memory_mib,
        links=gpu.links,
        error=error,
    )


def _unreachable(sample: _Sample, known: Mapping[str, Gpu]) -> str:
    """A sentence about the GPUs of which not even the UUID is known."""
    indices = {gpu.index for gpu in known.values()}
    return "".join(
        f"; GPU {gpu.index} cannot be reached: {gpu.error}" for gpu in sample.lost if gpu.index not in indices
    )


class _Silent(Exception):
    """The monitor said nothing for as long as one may wait."""


async def _next_line(reader: asyncio.StreamReader, patience_s: float) -> bytes:
    """The next whole line, empty at the end. Raises _Silent, and ValueError for a line without end."""
    for _ in range(_SILENCE_PARTS):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s / _SILENCE_PARTS):
                line = await reader.readline()
                return line if line.endswith(b"\n") else b""
    raise _Silent


async def _exit_code(monitor: subprocess.Popen[bytes], *, within_s: float) -> int | None:
    """The exit code of a process that was killed, negative for a signal; None: it does not end within `within_s`."""
    until = time.monotonic() + within_s
    while (code := monitor.poll()) is None and time.monotonic() < until:  # noqa: ASYNC110  # no child watcher
        await asyncio.sleep(0.02)
    return code
