"""The GPUs of this box as NVML shows them.

`GpuInventory` runs the gpu monitor (a process of its own, for NVML can hang in the kernel) and keeps its latest sample.
What that means for a user of the box is decided in `gpu_state`, whose words can be had here too.
"""

import asyncio
import contextlib
import logging
import math
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import IO, cast

import msgspec

from mlbox.scheduler.gpu_state import (
    Gpu,
    GpuLink,
    GpuProcess,
    GpuState,
    GpuStatus,
    Viewpoint,
    Xid,
    effective_free_mib,
    leftovers,
    over_share,
    state_of,
)

__all__ = [
    "Gpu",
    "GpuInventory",
    "GpuLink",
    "GpuProcess",
    "GpuState",
    "GpuStatus",
    "Inventory",
    "MonitorOptions",
    "Nvml",
    "Viewpoint",
    "Xid",
    "effective_free_mib",
    "leftovers",
    "over_share",
    "state_of",
]

log = logging.getLogger(__name__)

_MONITOR = Path(__file__).with_name("gpu_monitor.py")
_ROOT = Path(__file__).parents[2]
_LINE_BYTES = 8 << 20
"""Longest line the monitor may send; eight GPUs with a thousand processes each stay below a quarter of it."""
_SILENCE_PARTS = 3
"""A daemon that itself stood still finds one wait over, however long it was, and then the lines that came meanwhile;
so a monitor is silent only when that many waits, which make up the whole patience, brought nothing."""
_KILL_S = 2.0
_STEADY_S = 60.0
"""A monitor that lived this long is not blamed for the ends of those before it."""
_LONGEST_DELAY_S = 60.0
_GAP_S = 60.0
"""After so long without a sample nobody knows any more whether a GPU was idle all the time."""
_XIDS_MAX = 32
_XIDS_S = 86400.0
"""How many kinds of errors of a GPU are remembered and for how long; a verdict on one is drawn within seconds."""


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


class _Lost(msgspec.Struct, frozen=True):
    """A GPU that NVML counts but cannot reach: not even its UUID is known."""

    index: int
    error: str
    error_code: int | None = None


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


@dataclass(frozen=True, slots=True)
class _Quiet:
    """Since when a GPU has not been used, and not been used though held (Unix seconds); seen last in the sample."""

    unused_since: float | None
    idle_since: float | None
    seen: float


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
        self._quiet: dict[str, _Quiet] = {}
        self._adopted: dict[str, tuple[int, int]] = {}
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
            gpus=tuple(sorted(gpus, key=lambda gpu: (*gpu.place, gpu.uuid))),
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

        False as well where nobody knows: no such sample yet, or the GPU does not answer. A process that only has the
        GPU's device file open holds none of it. A MIG device that no GPU has any more is clean: it is removed only
        while nothing runs on it.
        """
        gpus = {gpu.uuid: gpu for gpu in self.current().gpus}
        gpu = gpus.get(uuid)
        if self._taken <= after:
            return False
        if gpu is None:
            return uuid.startswith("MIG-") and not self._unreachable and all(gpu.error is None for gpu in gpus.values())
        if gpu.processes is None:
            return False
        return all(process.attempt_key != attempt_key or process.kind == "F" for process in gpu.processes)

    def adopt(self, pid: int, ticks: int, key: str) -> None:
        """From now on the process `pid` that started at `ticks` (clock ticks since boot), and what descends from it,
        belongs to the attempt `key`; the next sample shows it. Lasts until `forget`, whatever the monitor does."""
        self._adopted[key] = (pid, ticks)
        self._tell_adopted(key)

    def forget(self, key: str) -> None:
        """The adopted run is over. Nothing happens for a key that was never adopted."""
        if self._adopted.pop(key, None) is not None:
            self._tell(f"forget {key}")

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
        environment = dict(os.environ if options.environment is None else options.environment)
        if str(_ROOT) != sysconfig.get_path("purelib"):  # not installed: the monitor would not find this package
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), environment.get("PYTHONPATH"))))
        try:
            # -P keeps this package's `queue` and `logs` from hiding the standard library's. Its own session: Ctrl-C at
            # a terminal is for the daemon, with whose end the monitor's stdin ends.
            monitor = subprocess.Popen(  # noqa: ASYNC220  # a few ms, once
                command, stdin=-1, stdout=-1, bufsize=0, env=environment, start_new_session=True
            )
        except OSError as error:
            return f"the gpu monitor cannot be started: {error}"
        stdin, stdout = cast(IO[bytes], monitor.stdin), cast(IO[bytes], monitor.stdout)
        self._stdin = stdin.fileno()
        os.set_blocking(self._stdin, False)  # a monitor that stands still must not make the daemon stand still
        for key in self._adopted:
            self._tell_adopted(key)
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
            self._known = _merged(self._known, self._with_memory(line))
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

    def _with_memory(self, sample: _Sample) -> _Sample:
        """The sample with what only samples before it tell: since when each GPU is idle, and its earlier XIDs."""
        moment = time.time() - (time.monotonic() - sample.taken)
        gpus: list[Gpu] = []
        for gpu in sample.gpus:
            before = self._known.get(gpu.uuid)
            xids = {xid.xid: xid for xid in before.xids if moment - xid.at < _XIDS_S} if before else {}
            for xid in gpu.xids:
                if xid.xid not in xids:
                    log.warning("gpus: GPU %s: the driver reports XID %d", gpu.label, xid.xid)
                earlier = xids[xid.xid].count if xid.xid in xids else 0
                xids[xid.xid] = replace(xid, count=earlier + xid.count)
            new = replace(gpu, xids=tuple(xids.values())[-_XIDS_MAX:])
            if gpu.error is None:
                quiet = _quiet(gpu, self._quiet.get(gpu.uuid), sample.taken, moment)
                self._quiet[gpu.uuid] = quiet
                new = replace(new, unused_since=quiet.unused_since, idle_since=_idle_since(gpu, quiet))
            gpus.append(new)
        return msgspec.structs.replace(sample, gpus=tuple(gpus))

    def _poke(self) -> None:
        self._tell("")

    def _tell_adopted(self, key: str) -> None:
        pid, ticks = self._adopted[key]
        self._tell(f"adopt {pid} {ticks} {key}")

    def _tell(self, line: str) -> None:
        """Write to the monitor; lost where it does not read, and then another one is started and told everything."""
        if self._stdin is not None:
            with contextlib.suppress(BrokenPipeError, BlockingIOError):
                os.write(self._stdin, f"{line}\n".encode())


def _quiet(gpu: Gpu, before: _Quiet | None, taken: float, moment: float) -> _Quiet:
    """Since when `gpu` is idle, by its sample and what was known `before`."""
    if before is None or taken - before.seen > _GAP_S:
        before = _Quiet(None, None, taken)
    unused = gpu.utilization == 0
    held = any(process.computes for process in gpu.processes or ())
    return _Quiet(
        unused_since=(before.unused_since or moment) if unused else None,
        idle_since=(before.idle_since or moment) if unused and held else None,
        seen=taken,
    )


def _idle_since(gpu: Gpu, quiet: _Quiet) -> float | None:
    """Nobody has been idle on a GPU for longer than the oldest process on it has existed."""
    starts = [process.started_at for process in gpu.processes or () if process.computes]
    known = [start for start in starts if start is not None]
    if quiet.idle_since is None or not known or len(known) < len(starts):
        return quiet.idle_since
    return max(quiet.idle_since, min(known))


def _merged(known: Mapping[str, Gpu], sample: _Sample) -> dict[str, Gpu]:
    """The GPUs of a sample, and those once known that it does not show or that fail, with the reason.

    MIG devices that a GPU which answers does not have any more are forgotten.
    """
    lost = {gpu.index: gpu for gpu in sample.lost}
    answering = {gpu.uuid for gpu in sample.gpus if gpu.error is None}
    gpus: dict[str, Gpu] = {}
    for gpu in known.values():
        if gpu.parent in answering:
            continue
        error, code = "the driver does not show it any more", None
        if gpu.index in lost:
            error, code = lost[gpu.index].error, lost[gpu.index].error_code
        gpus[gpu.uuid] = _unknown(gpu, error, code)
    for gpu in sample.gpus:
        if gpu.error is None:
            gpus[gpu.uuid] = gpu
        else:
            failing = replace(known.get(gpu.uuid, gpu), xids=gpu.xids, recovery_action=gpu.recovery_action)
            gpus[gpu.uuid] = _unknown(failing, gpu.error, gpu.error_code)
    return gpus


def _unknown(gpu: Gpu, error: str, code: int | None = None) -> Gpu:
    """`gpu` with what is known for ever and what was wrong with it, and nothing of what changes."""
    return Gpu(
        uuid=gpu.uuid,
        index=gpu.index,
        name=gpu.name,
        bus_id=gpu.bus_id,
        minor=gpu.minor,
        parent=gpu.parent,
        memory_mib=gpu.memory_mib,
        links=gpu.links,
        cpus=gpu.cpus,
        numa_node=gpu.numa_node,
        recovery_action=gpu.recovery_action,
        xids=gpu.xids,
        error=error,
        error_code=code,
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
