"""The questions that the gpu monitor asks NVML of each GPU. Part of its process, the only one that calls NVML."""

import contextlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

_PCI = Path("/sys/bus/pci/devices")

_CANNOT_TELL = frozenset({3, 4, 13, 21, 25})
"""NVML's NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, NO_DATA, ARGUMENT_VERSION_MISMATCH (nvml.h, nvmlReturn_t):
this GPU or driver cannot tell. Every other code means that something is wrong with it."""
_NOT_FOUND = 6
_RECOVERY_ACTION = 230
"""NVML_FI_DEV_GET_GPU_RECOVERY_ACTION (nvml.h); older nvidia-ml-py do not name it."""
_LEVELS = {0: "PSB", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
"""nvmlGpuTopologyLevel_t in the words of `nvidia-smi topo -m`; PSB is two GPUs on one board."""
_SWITCH = 2
"""NVML_NVLINK_DEVICE_TYPE_SWITCH: the link leads to an NVSwitch, and so to every GPU on it."""
WHOLE_GPU = 0xFFFFFFFF
"""The gpuInstanceId of what is not about one MIG device."""


def text_of(error: Exception) -> str:
    return f"{error} (NVML error {getattr(error, 'value', '?')})"


def ask(nvml: ModuleType, function: str, *arguments: object) -> Any:
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


class Device:
    """What never changes of a GPU while NVML stays initialised. Raises NVMLError where it cannot be had."""

    parent: str | None = None

    def __init__(self, nvml: ModuleType, index: int) -> None:
        self.index = index
        self.handle: Any = nvml.nvmlDeviceGetHandleByIndex(index)
        self.uuid: str = nvml.nvmlDeviceGetUUID(self.handle)
        self.name: str = nvml.nvmlDeviceGetName(self.handle)
        self.bus_id: str = nvml.nvmlDeviceGetPciInfo_v3(self.handle).busId
        self.minor: int | None = ask(nvml, "nvmlDeviceGetMinorNumber", self.handle)


class MigDevice:
    """A part of a GPU in MIG mode. Raises NVMLError: NOT_FOUND where there is none of this number.

    Its index is 100 * (its GPU's + 1) + its number on that GPU: an integer of its own that no other device gets, as
    long as there are fewer than 100 GPUs, and that stays when MIG devices of other GPUs come and go.
    """

    def __init__(self, nvml: ModuleType, gpu: Device, number: int) -> None:
        self.index = 100 * (gpu.index + 1) + number
        self.handle: Any = nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu.handle, number)
        self.uuid: str = nvml.nvmlDeviceGetUUID(self.handle)
        self.name: str = nvml.nvmlDeviceGetName(self.handle)
        self.parent = gpu.uuid
        self.instance: int | None = ask(nvml, "nvmlDeviceGetGpuInstanceId", self.handle)
        self.bus_id = gpu.bus_id
        self.minor = gpu.minor


def mig_devices(nvml: ModuleType, gpu: Device) -> list[MigDevice]:
    """The MIG devices that a GPU is split into now; none where the driver does not say."""
    devices: list[MigDevice] = []
    for number in range(ask(nvml, "nvmlDeviceGetMaxMigDeviceCount", gpu.handle) or 0):
        try:
            devices.append(MigDevice(nvml, gpu, number))
        except nvml.NVMLError as error:
            if error.value != _NOT_FOUND and error.value not in _CANNOT_TELL:
                raise
    return devices


def readings(nvml: ModuleType, handle: object) -> dict[str, Any]:
    """What changes of a GPU. Raises NVMLError where it fails, not where it merely lacks a feature."""
    memory = ask(nvml, "nvmlDeviceGetMemoryInfo", handle, nvml.nvmlMemory_v2)
    if memory is None:
        memory = ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    celsius = ask(nvml, "nvmlDeviceGetTemperatureV", handle, nvml.NVML_TEMPERATURE_GPU)
    if celsius is None:
        celsius = ask(nvml, "nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU)
    milliwatts = ask(nvml, "nvmlDeviceGetPowerUsage", handle)
    rates = ask(nvml, "nvmlDeviceGetUtilizationRates", handle)
    mig = ask(nvml, "nvmlDeviceGetMigMode", handle)
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


def health(nvml: ModuleType, handle: object) -> dict[str, object]:
    """What the driver says about the state of a GPU, which it may do when it says nothing else.

    `recovery_action`: what is to be done about it (nvmlDeviceGpuRecoveryAction_t, 0: nothing; older drivers cannot
    tell). `ecc_uncorrected`: uncorrected memory errors since the driver was loaded. `remap_failed`: whether replacing
    a bad row of its memory failed.
    """
    recovery = ecc = remapped = None
    with contextlib.suppress(nvml.NVMLError):
        fields = ask(nvml, "nvmlDeviceGetFieldValues", handle, [_RECOVERY_ACTION])
        if fields is not None and fields[0].nvmlReturn == 0:
            recovery = fields[0].value.uiVal
    with contextlib.suppress(nvml.NVMLError):
        kinds = (nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
        ecc = ask(nvml, "nvmlDeviceGetTotalEccErrors", handle, *kinds)
    with contextlib.suppress(nvml.NVMLError):
        remapped = ask(nvml, "nvmlDeviceGetRemappedRows", handle)
    return {
        "recovery_action": recovery,
        "ecc_uncorrected": ecc,
        "remap_failed": None if remapped is None else bool(remapped[3]),
    }


def _running(nvml: ModuleType, handle: object) -> list[dict[str, Any]] | None:
    """The processes on a GPU, each once. None where NVML does not list those that compute: then nobody knows."""
    rows: dict[int, dict[str, Any]] = {}
    for kind, listing in (("C", "Compute"), ("C", "MPSCompute"), ("G", "Graphics")):
        found = ask(nvml, f"nvmlDeviceGet{listing}RunningProcesses_v3", handle)
        if found is None:  # drivers before R510 have the second version only
            found = ask(nvml, f"nvmlDeviceGet{listing}RunningProcesses_v2", handle)
        if found is None and listing == "Compute":
            return None
        for process in found or ():
            row = rows.setdefault(process.pid, {"pid": process.pid, "kind": kind, "memory_mib": None, "instances": []})
            if kind not in row["kind"]:
                row["kind"] = "C+G"
            if process.usedGpuMemory is not None:
                row["memory_mib"] = max(row["memory_mib"] or 0, process.usedGpuMemory >> 20)
            if process.gpuInstanceId != WHOLE_GPU and process.gpuInstanceId not in row["instances"]:
                row["instances"].append(process.gpuInstanceId)
    return list(rows.values())


def surroundings(nvml: ModuleType, devices: list[Device]) -> dict[str, dict[str, object]]:
    """For each GPU by UUID: its links to the others, the CPUs nearest to it and their NUMA node."""
    links = _links(nvml, devices)
    return {
        device.uuid: {
            "links": links.get(device.uuid, []),
            "cpus": _cpus(nvml, device),
            "numa_node": _numa_node(nvml, device),
        }
        for device in devices
    }


def _cpus(nvml: ModuleType, device: Device) -> list[int]:
    words = (os.sysconf("SC_NPROCESSORS_CONF") + 63) // 64
    with contextlib.suppress(nvml.NVMLError):
        return _set_bits(ask(nvml, "nvmlDeviceGetCpuAffinity", device.handle, words) or ())
    return []


def _numa_node(nvml: ModuleType, device: Device) -> int | None:
    """The node of the CPUs nearest to a GPU, by the kernel, else by NVML.

    nvmlDeviceGetNumaNodeId is something else: the node of the GPU's own memory, where that is one (Grace Hopper).
    """
    domain, _, rest = device.bus_id.lower().partition(":")
    with contextlib.suppress(OSError, ValueError):
        node = int((_PCI / f"{domain[-4:]}:{rest}" / "numa_node").read_text())
        return node if node >= 0 else None  # -1: a box of one node, or firmware that does not tell
    with contextlib.suppress(nvml.NVMLError):
        nodes = ask(nvml, "nvmlDeviceGetMemoryAffinity", device.handle, 4, nvml.NVML_AFFINITY_SCOPE_NODE)
        return next(iter(_set_bits(nodes or ())), None)
    return None


def _set_bits(words: Any) -> list[int]:
    """Which bits are set in words of 64, the lowest first."""
    return [64 * n + bit for n, word in enumerate(words) for bit in range(64) if word >> bit & 1]


def _links(nvml: ModuleType, devices: list[Device]) -> dict[str, list[dict[str, object]]]:
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


def _nvlinks(nvml: ModuleType, device: Device) -> dict[str, int]:
    """How many active NVLinks lead to each PCI bus id, and to `switch`."""
    counts: dict[str, int] = {}
    with contextlib.suppress(nvml.NVMLError):  # INVALID_ARGUMENT ends the list, NOT_SUPPORTED says there is none
        for link in range(nvml.NVML_NVLINK_MAX_LINKS):
            if not nvml.nvmlDeviceGetNvLinkState(device.handle, link):
                continue
            if ask(nvml, "nvmlDeviceGetNvLinkRemoteDeviceType", device.handle, link) == _SWITCH:
                to = "switch"
            else:
                to = nvml.nvmlDeviceGetNvLinkRemotePciInfo(device.handle, link).busId
            counts[to] = counts.get(to, 0) + 1
    return counts


def list_own_processes(row: dict[str, Any], part: MigDevice, gpu: dict[str, Any]) -> None:
    """Where a MIG device does not list its processes, take those that its GPU lists with its GPU instance."""
    if row["error"] is None and row["processes"] is None and gpu["processes"] is not None:
        row["processes"] = [dict(process) for process in gpu["processes"] if part.instance in process["instances"]]
