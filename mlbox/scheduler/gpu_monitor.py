"""The gpu monitor: the one process that calls NVML; writes what it sees as JSON lines.

NVML can hang inside the kernel, so it lives in a process that the daemon can kill and start again. Its pipes:

    stdout  {"line": "found", "nvml": "ok" | "absent" | "failing", ...}        once NVML answered, or why it does not
            {"line": "sample", "taken": ..., "gpus": [...], "lost": [...]}     every period
    stdin   an empty line asks for a sample now; the end of it ends the monitor, even while NVML hangs
            adopt PID TICKS KEY     that process (by its start, clock ticks since boot) and what it starts is that
                                    attempt's from now on
            forget KEY              it is not any more

Every line says in `next_s` when the next one is due. `taken` is CLOCK_MONOTONIC, which all processes of a boot
share, read before the first question of the sample. What NVML cannot tell is null, never zero.

A GPU in MIG mode is followed by its MIG devices, each with the UUID of its `parent`. `xids` of a GPU are those that
came since the sample before, each number once. A process of kind F only has the GPU's device file open.

Standard library and nvidia-ml-py only, the latter only where the driver's library is: this process is always
there, and an idle box should not notice it.
"""

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import threading
import time
from collections.abc import Generator
from types import ModuleType
from typing import Any

from mlbox.scheduler.gpu_owners import Adoptions, FileHolders, Processes
from mlbox.scheduler.gpu_readings import (
    WHOLE_GPU,
    Device,
    MigDevice,
    ask,
    health,
    list_own_processes,
    mig_devices,
    readings,
    surroundings,
    text_of,
)

_LIBRARY = "libnvidia-ml.so.1"
_SURROUNDINGS_S = 600.0
"""Links between GPUs and the CPUs near them hardly ever change, and there are up to 36 questions to a GPU."""
_HEALTH_S = 10.0
"""How old the driver's word on the health of the GPUs may be; an XID or an error has it asked at once."""
_HOLDERS_MAX = 64
"""Processes of kind F shown of one GPU: a desktop opens it many times over."""
_EVENTS_MS = 500
"""One wait for events; NVML may be closed only between two."""
_EVENTS_END_S = 5.0
_FLOOD_S = 1.0
"""XIDs bring a sample of their own at most this often: a broken GPU reports them by the thousand."""
_DRIVER_NOT_LOADED = 9
_TIMEOUT = 10


class _NoNvml(Exception):
    """NVML cannot be used now. `state` is `absent` (a box without the driver) or `failing`."""

    def __init__(self, state: str, message: str) -> None:
        super().__init__(message)
        self.state = state


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes what NVML says about the GPUs as JSON lines.")
    parser.add_argument("--period", type=float, default=2.0, help="seconds between samples")
    parser.add_argument(
        "--retry", type=float, default=30.0, help="seconds until a missing driver or GPU is tried again"
    )
    parser.add_argument("--scan", type=float, default=10.0, help="seconds between looks at open device files")
    parser.add_argument("--devices", default="/dev/nvidia", help="what the device files of GPUs begin with")
    options = parser.parse_args()
    asked, adoptions = threading.Event(), Adoptions()
    threading.Thread(target=_listen, args=(asked, adoptions), daemon=True).start()
    proc = _Proc(Processes(adoptions), FileHolders(options.devices, options.scan))
    with contextlib.suppress(BrokenPipeError):
        _run(asked, proc, options.period, options.retry)


def _listen(asked: threading.Event, adoptions: Adoptions) -> None:
    """Take what the daemon says; end with the daemon, whatever the main thread hangs in."""
    rest = b""
    with contextlib.suppress(OSError):
        while text := os.read(0, 4096):
            *lines, rest = (rest + text).split(b"\n")
            for line in lines:
                _heard(line.decode(errors="replace").split(), adoptions)
            asked.set()
    os._exit(0)


def _heard(words: list[str], adoptions: Adoptions) -> None:
    match words:
        case ["adopt", pid, ticks, key] if pid.isdecimal() and ticks.isdecimal():
            adoptions.adopt(int(pid), int(ticks), key)
        case ["forget", key]:
            adoptions.forget(key)
        case _:  # an empty line: only a sample is wanted, as after the others
            pass


class _Proc:
    """What /proc says: who is behind each process, and who has a GPU's device file open."""

    def __init__(self, processes: Processes, holders: FileHolders) -> None:
        self._processes = processes
        self._holders = holders

    def complete(self, rows: list[dict[str, Any]]) -> None:
        """Add the holders of device files to the processes of `rows`, and everybody's owner."""
        self._holders.look()
        by_minor = {row["minor"]: row for row in rows if row["parent"] is None and row["minor"] is not None}
        for minor, pids in self._holders.of(by_minor).items():
            processes = by_minor[minor].get("processes")
            if processes is not None:
                listed = {process["pid"] for process in processes}
                others = [pid for pid in pids if pid not in listed][:_HOLDERS_MAX]
                processes.extend({"pid": pid, "kind": "F", "memory_mib": None} for pid in others)
        self._processes.describe(rows)


def _run(asked: threading.Event, proc: _Proc, period_s: float, retry_s: float) -> None:
    xids: dict[tuple[str, int, int], _Xid] = {}
    while True:
        try:
            with _initialised() as nvml, _Events(nvml, asked, xids) as events:
                box = _Box(nvml, proc, events)
                _say("found", period_s, nvml="ok", driver=box.driver, message=box.summary)
                again = time.monotonic() + retry_s
                while not box.changed() and not (box.incomplete and time.monotonic() > again):
                    _say("sample", period_s, **box.sample())
                    asked.wait(period_s)
                    asked.clear()
        except _NoNvml as trouble:
            _say("found", retry_s, nvml=trouble.state, driver=None, message=str(trouble))
            asked.wait(retry_s)
            asked.clear()


def _say(line: str, next_s: float, **values: object) -> None:
    data = json.dumps({"line": line, "next_s": next_s, **values}, separators=(",", ":")).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


@contextlib.contextmanager
def _initialised() -> Generator[ModuleType]:
    """nvidia-ml-py, ready for questions. Raises _NoNvml."""
    try:
        ctypes.CDLL(_LIBRARY)  # tried by hand, for nvidia-ml-py does not pass on what the loader says is wrong
    except OSError as error:
        raise _NoNvml("absent", f"no NVIDIA driver: {error}") from None
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if error.value == _DRIVER_NOT_LOADED:
            raise _NoNvml("absent", f"no NVIDIA driver: {_LIBRARY} is there, but says {text_of(error)}") from None
        raise _NoNvml("failing", f"NVML does not start: {text_of(error)}") from None
    try:
        yield nvml
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


class _Events:
    """The XIDs that the driver reports, taken on a thread of its own; each one makes a sample wanted at once.

    A context: NVML must not be closed while somebody waits in it. `found` outlives it, for what kills NVML may be what
    the last XID was about.
    """

    def __init__(self, nvml: ModuleType, asked: threading.Event, found: "dict[tuple[str, int, int], _Xid]") -> None:
        self._nvml = nvml
        self._asked = asked
        self._found = found
        self._set: Any = None
        self._uuids: dict[int | None, str] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "_Events":
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(_EVENTS_END_S)
            if self._thread.is_alive():  # the daemon starts another monitor
                os._exit(1)
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlEventSetFree(self._set)

    def watch(self, devices: list[Device]) -> None:
        """Have the XIDs of these GPUs reported, as far as they support it (many GeForce cards do not)."""
        nvml = self._nvml
        try:
            self._set = ask(nvml, "nvmlEventSetCreate")
        except nvml.NVMLError:
            return
        for device in devices if self._set is not None else ():
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlDeviceRegisterEvents(device.handle, nvml.nvmlEventTypeXidCriticalError, self._set)
                self._uuids[_address(device.handle)] = device.uuid
        if self._uuids:
            self._thread = threading.Thread(target=self._wait, daemon=True)
            self._thread.start()

    def new(self) -> "list[_Xid]":
        """The XIDs since the last call, each number once for a GPU or a GPU instance."""
        with self._lock:
            found = list(self._found.values())
            self._found.clear()
        return found

    def _wait(self) -> None:
        told = time.monotonic()
        while not self._end.is_set():
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._set, _EVENTS_MS)
            except self._nvml.NVMLError as error:
                if error.value != _TIMEOUT:
                    self._end.wait(_EVENTS_END_S)  # a lost GPU may make every wait fail: keep the others' events
            else:
                self._take(event)
            if self._found and time.monotonic() > told:
                told = time.monotonic() + _FLOOD_S
                self._asked.set()

    def _take(self, event: Any) -> None:
        uuid = self._uuids.get(_address(event.device))
        if uuid is not None:
            with self._lock:
                key = (uuid, event.gpuInstanceId, event.eventData)
                xid = self._found.setdefault(key, _Xid(uuid, event.gpuInstanceId, event.eventData))
                xid.count += 1
                xid.at = time.time()


class _Xid:
    """An error that was reported `count` times of a GPU or one GPU instance of it, the last time `at` (Unix s)."""

    def __init__(self, uuid: str, instance: int, number: int) -> None:
        self.uuid = uuid
        self.instance = instance
        self.number = number
        self.count = 0
        self.at = 0.0

    def row(self) -> dict[str, object]:
        return {"xid": self.number, "at": self.at, "count": self.count}


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value


class _Box:
    """All GPUs of the box, as one initialisation of NVML sees them."""

    def __init__(self, nvml: ModuleType, proc: _Proc, events: _Events) -> None:
        self._nvml = nvml
        self._proc = proc
        self._events = events
        self._devices: list[Device] = []
        self._lost: list[dict[str, object]] = []
        self._surroundings: dict[str, dict[str, object]] = {}
        self._surroundings_due = 0.0
        self._health: dict[str, dict[str, object]] = {}
        self._health_due = 0.0
        self._failing = False
        self.driver: str = self._answer("nvmlSystemGetDriverVersion")
        self._count: int = self._answer("nvmlDeviceGetCount")
        for index in range(self._count):
            try:
                self._devices.append(Device(nvml, index))
            except nvml.NVMLError as error:
                self._lost.append({"index": index, "error": text_of(error), "error_code": error.value})
        events.watch(self._devices)

    @property
    def summary(self) -> str:
        return f"NVIDIA driver {self.driver}: {self._count} GPU{'' if self._count == 1 else 's'}"

    @property
    def incomplete(self) -> bool:
        """Whether some GPU does not answer; one that comes back may do so only in a new initialisation."""
        return self._failing or bool(self._lost)

    def changed(self) -> bool:
        """Whether there are more or fewer GPUs than at the start."""
        return self._answer("nvmlDeviceGetCount") != self._count

    def sample(self) -> dict[str, object]:
        taken = time.monotonic()
        if taken >= self._surroundings_due:
            self._surroundings = surroundings(self._nvml, self._devices)
            self._surroundings_due = taken + _SURROUNDINGS_S
        xids = self._events.new()
        if xids or self._failing or taken >= self._health_due:
            self._health = {device.uuid: health(self._nvml, device.handle) for device in self._devices}
            self._health_due = taken + _HEALTH_S
        rows = [row for device in self._devices for row in self._rows(device, xids)]
        self._failing = any(row["error"] is not None for row in rows)
        for process in [process for row in rows for process in row.get("processes") or ()]:
            del process["instances"]
        self._proc.complete(rows)
        return {"taken": taken, "gpus": rows, "lost": self._lost}

    def _answer(self, function: str) -> Any:
        try:
            return getattr(self._nvml, function)()
        except self._nvml.NVMLError as error:
            raise _NoNvml("failing", f"NVML does not answer: {text_of(error)}") from None

    def _rows(self, device: Device, xids: list[_Xid]) -> list[dict[str, Any]]:
        """The row of a GPU and those of its MIG devices, which share its faults."""
        nvml = self._nvml
        mine = [xid for xid in xids if xid.uuid == device.uuid]
        row = self._row(device, mine)
        rows = [row]
        if row.get("mig"):
            try:
                parts = mig_devices(nvml, device)
            except nvml.NVMLError as error:
                return [{**row, "error": text_of(error), "error_code": error.value}]
            row["mig_devices"] = len(parts)
            for part in parts:
                theirs = [xid for xid in mine if xid.instance in (WHOLE_GPU, part.instance)]
                rows.append({**self._row(part, theirs, device), "parent": device.uuid})
                list_own_processes(rows[-1], part, row)
        return rows

    def _row(self, device: Device | MigDevice, xids: list[_Xid], gpu: Device | None = None) -> dict[str, Any]:
        """`gpu`: the one whose part `device` is."""
        identity = {key: getattr(device, key) for key in ("uuid", "index", "name", "bus_id", "minor", "parent")}
        around = self._surroundings.get((gpu or device).uuid, {})
        identity |= {"links": [], "cpus": [], "numa_node": None, **around}
        identity |= {"links": []} if gpu else {}
        identity |= {"xids": [xid.row() for xid in xids], **self._health.get((gpu or device).uuid, {})}
        try:
            return {**identity, **readings(self._nvml, device.handle), "error": None, "error_code": None}
        except self._nvml.NVMLError as error:
            return {**identity, "error": text_of(error), "error_code": error.value}


if __name__ == "__main__":
    main()
