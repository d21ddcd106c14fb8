"""The gpu monitor: the one process that calls NVML; writes what it sees as JSON lines.

NVML can hang inside the kernel, so it lives in a process that the daemon can kill and start again. Its pipes:

    stdout  {"line": "found", "nvml": "ok" | "absent" | "failing", ...}        once NVML answered, or why it does not
            {"line": "sample", "taken": ..., "gpus": [...], "lost": [...]}     every period
    stdin   a byte asks for a sample now; the end of it ends the monitor, even while NVML hangs

Every line says in `next_s` when the next one is due. `taken` is CLOCK_MONOTONIC, which all processes of a boot
share, read before the first question of the sample. What NVML cannot tell is null, never zero.

Standard library and nvidia-ml-py only, the latter only where the driver's library is: this process is always
there, and an idle box should not notice it.
"""

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import pwd
import threading
import time
from collections.abc import Generator
from types import ModuleType
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"
_LINKS_S = 600.0
"""Links between GPUs hardly ever change, and there are up to 36 questions to a GPU."""
_LOOK_UP_S = 1.0
"""What one sample may wait for /proc and for user names; far below the daemon's patience with a silent monitor."""
_COMMAND_CHARACTERS = 120
_ANCESTORS = 64
_KEY = b"MLBOX_ATTEMPT_KEY="

_CANNOT_TELL = frozenset({3, 4, 13, 21, 25})
"""NVML's NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, NO_DATA, ARGUMENT_VERSION_MISMATCH (nvml.h, nvmlReturn_t):
this GPU or driver cannot tell. Every other code means that something is wrong with it."""
_DRIVER_NOT_LOADED = 9
_LEVELS = {0: "PSB", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
"""nvmlGpuTopologyLevel_t in the words of `nvidia-smi topo -m`; PSB is two GPUs on one board."""
_SWITCH = 2
"""NVML_NVLINK_DEVICE_TYPE_SWITCH: the link leads to an NVSwitch, and so to every GPU on it."""


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
    options = parser.parse_args()
    asked = threading.Event()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    with contextlib.suppress(BrokenPipeError):
        _run(asked, options.period, options.retry)


def _listen(asked: threading.Event) -> None:
    """Pass on the daemon's wish for a sample; end with the daemon, whatever the main thread hangs in."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            asked.set()
    os._exit(0)


def _run(asked: threading.Event, period_s: float, retry_s: float) -> None:
    processes = _Processes()
    while True:
        try:
            with _initialised() as nvml:
                box = _Box(nvml, processes)
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
            raise _NoNvml("absent", f"no NVIDIA driver: {_LIBRARY} is there, but says {_text(error)}") from None
        raise _NoNvml("failing", f"NVML does not start: {_text(error)}") from None
    try:
        yield nvml
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _text(error: Exception) -> str:
    return f"{error} (NVML error {getattr(error, 'value', '?')})"


def _ask(nvml: ModuleType, function: str, *arguments: object) -> Any:
    """NVML's answer, or None where this GPU, driver or nvidia-ml-py cannot tell. Raises NVMLError for real trouble."""
    question = getattr(nvml, function, None)
    if question is None:  # deprecated ones will go from a newer nvidia-ml-py
        return None
    try:
        return question(*arguments)
    except nvml.NVMLError as error:
        if error.value in _CANNOT_TELL:
            return None
        raise


class _Device:
    """What never changes of a GPU while NVML stays initialised. Raises NVMLError where it cannot be had."""

    def __init__(self, nvml: ModuleType, index: int) -> None:
        self.index = index
        self.handle: object = nvml.nvmlDeviceGetHandleByIndex(index)
        self.uuid: str = nvml.nvmlDeviceGetUUID(self.handle)
        self.name: str = nvml.nvmlDeviceGetName(self.handle)
        self.bus_id: str = nvml.nvmlDeviceGetPciInfo_v3(self.handle).busId
        self.minor: int | None = _ask(nvml, "nvmlDeviceGetMinorNumber", self.handle)


class _Box:
    """All GPUs of the box, as one initialisation of NVML sees them."""

    def __init__(self, nvml: ModuleType, processes: "_Processes") -> None:
        self._nvml = nvml
        self._processes = processes
        self._devices: list[_Device] = []
        self._lost: list[dict[str, object]] = []
        self._links: dict[str, list[dict[str, object]]] = {}
        self._links_due = 0.0
        self._failing = False
        self.driver: str = self._answer("nvmlSystemGetDriverVersion")
        self._count: int = self._answer("nvmlDeviceGetCount")
        for index in range(self._count):
            try:
                self._devices.append(_Device(nvml, index))
            except nvml.NVMLError as error:
                self._lost.append({"index": index, "error": _text(error)})

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
        if taken >= self._links_due:
            self._links = _links(self._nvml, self._devices)
            self._links_due = taken + _LINKS_S
        rows = [self._row(device) for device in self._devices]
        self._failing = any(row["error"] is not None for row in rows)
        self._processes.describe(rows)
        return {"taken": taken, "gpus": rows, "lost": self._lost}

    def _answer(self, function: str) -> Any:
        try:
            return getattr(self._nvml, function)()
        except self._nvml.NVMLError as error:
            raise _NoNvml("failing", f"NVML does not answer: {_text(error)}") from None

    def _row(self, device: _Device) -> dict[str, Any]:
        identity = {key: getattr(device, key) for key in ("uuid", "index", "name", "bus_id", "minor")}
        identity["links"] = self._links.get(device.uuid, [])
        try:
            return {**identity, **_readings(self._nvml, device.handle), "error": None}
        except self._nvml.NVMLError as error:
            return {**identity, "error": _text(error)}


def _readings(nvml: ModuleType, handle: object) -> dict[str, Any]:
    """What changes of a GPU. Raises NVMLError where it fails, not where it merely lacks a feature."""
    memory = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle, nvml.nvmlMemory_v2)
    if memory is None:
        memory = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    celsius = _ask(nvml, "nvmlDeviceGetTemperatureV", handle, nvml.NVML_TEMPERATURE_GPU)
    if celsius is None:
        celsius = _ask(nvml, "nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU)
    milliwatts = _ask(nvml, "nvmlDeviceGetPowerUsage", handle)
    rates = _ask(nvml, "nvmlDeviceGetUtilizationRates", handle)
    mig = _ask(nvml, "nvmlDeviceGetMigMode", handle)
    return {
        "memory_mib": memory and memory.total >> 20,
        "used_mib": memory and memory.used >> 20,
        "free_mib": memory and memory.free >> 20,
        "utilization": rates and rates.gpu,
        "power_w": milliwatts and milliwatts / 1000,
        "temperature_c": celsius,
        "mig": bool(mig and mig[0]),
        "processes": _running(nvml, handle),
    }


def _running(nvml: ModuleType, handle: object) -> list[dict[str, Any]] | None:
    """The processes on a GPU, each once. None where NVML does not list those that compute: then nobody knows."""
    rows: dict[int, dict[str, Any]] = {}
    for kind, listing in (("C", "Compute"), ("C", "MPSCompute"), ("G", "Graphics")):
        found = _ask(nvml, f"nvmlDeviceGet{listing}RunningProcesses_v3", handle)
        if found is None:  # drivers before R510 have the second version only
            found = _ask(nvml, f"nvmlDeviceGet{listing}RunningProcesses_v2", handle)
        if found is None and listing == "Compute":
            return None
        for process in found or ():
            row = rows.setdefault(process.pid, {"pid": process.pid, "kind": kind, "memory_mib": None})
            if kind not in row["kind"]:
                row["kind"] = "C+G"
            if process.usedGpuMemory is not None:
                row["memory_mib"] = max(row["memory_mib"] or 0, process.usedGpuMemory >> 20)
    return list(rows.values())


def _links(nvml: ModuleType, devices: list[_Device]) -> dict[str, list[dict[str, object]]]:
    """For each GPU how near every other one is, by UUID. GPUs that do not answer have no links."""
    nvlinks = {device.uuid: _nvlinks(nvml, device) for device in devices}
    links: dict[str, list[dict[str, object]]] = {}
    for device in devices:
        for other in devices:
            if other is device:
                continue
            mine, theirs = nvlinks[device.uuid], nvlinks[other.uuid]
            count = mine.get(other.bus_id, 0) + min(mine.get("switch", 0), theirs.get("switch", 0))
            level: int | None = None
            with contextlib.suppress(nvml.NVMLError):
                level = nvml.nvmlDeviceGetTopologyCommonAncestor(device.handle, other.handle)
            row: dict[str, object] = {
                "uuid": other.uuid,
                "level": None if level is None else _LEVELS.get(level),
                "nvlinks": count,
            }
            links.setdefault(device.uuid, []).append(row)
    return links


def _nvlinks(nvml: ModuleType, device: _Device) -> dict[str, int]:
    """How many active NVLinks lead to each PCI bus id, and to `switch`."""
    counts: dict[str, int] = {}
    with contextlib.suppress(nvml.NVMLError):  # INVALID_ARGUMENT ends the list, NOT_SUPPORTED says there is none
        for link in range(nvml.NVML_NVLINK_MAX_LINKS):
            if not nvml.nvmlDeviceGetNvLinkState(device.handle, link):
                continue
            if _ask(nvml, "nvmlDeviceGetNvLinkRemoteDeviceType", device.handle, link) == _SWITCH:
                to = "switch"
            else:
                to = nvml.nvmlDeviceGetNvLinkRemotePciInfo(device.handle, link).busId
            counts[to] = counts.get(to, 0) + 1
    return counts


class _Processes:
    """What /proc says about the processes that NVML lists.

    A look-up runs on its own thread and is waited for only so long: `cmdline` and `environ` of a process that is stuck
    in the kernel can block (they take its mmap lock), and so can a name service. That must not make all GPUs unknown;
    what comes late is there in the next sample. What was found is remembered while NVML lists the process: a dying
    one loses its environment before its GPU memory, and the driver may go on listing one that is gone.
    """

    def __init__(self) -> None:
        self._owners: dict[int, _Owner] = {}
        self._users: dict[int, str] = {}

    def describe(self, rows: list[dict[str, Any]]) -> None:
        """Add user, command, start and attempt key to every process of `rows`."""
        until = time.monotonic() + _LOOK_UP_S
        owners: dict[int, _Owner] = {}
        for process in [process for row in rows for process in row.get("processes") or ()]:
            pid = process["pid"]
            if pid not in owners:
                owners[pid] = self._owner(pid, until)
            process.update(owners[pid].found)
        self._owners = owners

    def _owner(self, pid: int, until: float) -> "_Owner":
        known = self._owners.get(pid)
        stat = _Stat.of(pid)
        if known is not None and (stat is None or stat.start == known.start):
            return known
        owner = _Owner(None if stat is None else stat.start)
        if stat is not None:
            look_up = threading.Thread(target=owner.look_up, args=(pid, stat, self._users), daemon=True)
            look_up.start()
            look_up.join(max(0.0, until - time.monotonic()))
        return owner


class _Stat:
    """The fields of /proc/PID/stat that matter here (proc_pid_stat(5)); `start` is clock ticks since boot."""

    def __init__(self, text: bytes) -> None:
        end = text.rindex(b")")
        fields = text[end + 2 :].split()
        self.name = text[text.index(b"(") + 1 : end]
        self.parent = int(fields[1])
        self.start = int(fields[19])

    @classmethod
    def of(cls, pid: int) -> "_Stat | None":
        try:
            return cls(_read(pid, "stat"))
        except OSError:
            return None


class _Owner:
    """Who is behind a pid. What is None in `found` is not known yet, or never will be."""

    def __init__(self, start: int | None) -> None:
        self.start = start
        self.found: dict[str, object] = {"user": None, "command": None, "started_at": None, "attempt_key": None}

    def look_up(self, pid: int, stat: _Stat, users: dict[int, str]) -> None:
        """Ask /proc, what cannot block first. A process that ends meanwhile leaves the rest unknown."""
        up_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.found["started_at"] = time.time() - up_s + stat.start / os.sysconf("SC_CLK_TCK")
        self.found["command"] = _printable(stat.name)
        with contextlib.suppress(OSError):
            uid = _uid(pid)
            self.found["user"] = users.get(uid, str(uid))
            self.found["attempt_key"] = _attempt_key(pid)
            self.found["command"] = _command(pid) or self.found["command"]
            if uid not in users:
                users[uid] = _user_name(uid)
            self.found["user"] = users[uid]


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


def _attempt_key(pid: int) -> str | None:
    """The MLBOX_ATTEMPT_KEY of a process, else of its nearest ancestor that has one we may read."""
    for _ in range(_ANCESTORS):
        with contextlib.suppress(OSError):
            for variable in _read(pid, "environ").split(b"\0"):
                if variable.startswith(_KEY):
                    return _printable(variable[len(_KEY) :])
        stat = _Stat.of(pid)
        if stat is None or stat.parent <= 1:
            return None
        pid = stat.parent
    return None


if __name__ == "__main__":
    main()
