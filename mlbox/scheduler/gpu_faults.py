"""Which trouble of a GPU takes it out of service: pure.

In this order: what the driver says is to be done (NVML's recovery action), NVML's error codes, a failed repair of its
memory, and then the XIDs, by the "immediate action" of NVIDIA's catalogue
(https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html). What an application did wrong, and what the
driver merely reports, costs nobody a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mlbox.scheduler.gpu_state import Gpu, Xid

_RECOVERY = {
    1: "reset it (nvidia-smi --gpu-reset)",
    2: "reboot the box",
    3: "end all work that uses it from another GPU",
    4: "end all work that uses it from another GPU, then reset it (nvidia-smi --gpu-reset)",
    5: "recover the IMEX domain",
    6: "reset it through its PCIe bus",
    7: "reboot the box",
}
"""nvmlDeviceGpuRecoveryAction_t (nvml.h); 0 is nothing to do."""

_CODES = {
    15: "NVML cannot reach it (GPU is lost): it fell off the bus, so reboot the box",
    16: "NVML says that it must be reset (nvidia-smi --gpu-reset) before it works again",
}
"""nvmlReturn_t. Other errors may pass: such a GPU is unknown until it answers."""

_RESET = "reset it (nvidia-smi --gpu-reset)"
_REBOOT = "reboot the box"
_LINK = f"check its NVLink bridge or switch, then {_RESET}"
_DRAIN = {
    46: ("it stopped processing", _RESET),
    48: ("double-bit memory error", _RESET),
    54: ("its power cable is not connected", "connect it, then reboot the box"),
    62: ("its power management unit halted", _RESET),
    64: ("a bad row or page of its memory could not be recorded", _RESET),
    74: ("NVLink error", _LINK),
    79: ("it fell off the bus", _REBOOT),
    95: ("uncontained memory error", _RESET),
    110: ("security fault", _RESET),
    119: ("its system processor (GSP) does not answer", _RESET),
    120: ("its system processor (GSP) failed", _RESET),
    136: ("link training failed", _RESET),
    140: ("unrecovered memory error", _RESET),
    143: ("it could not be initialised", _RESET),
    **dict.fromkeys(range(144, 151), ("NVLink error", _LINK)),
    155: ("NVLink software error", _RESET),
    156: ("resource retirement", _RESET),
    158: ("fatal timeout", _RESET),
}
"""What the driver saw and what to do. Catalogue: RESET_GPU, RESTART_BM, and the workflows for memory and NVLink."""

_APPLICATION = frozenset(
    {8, 11, 13, 25, 31, 32, 39, 40, 41, 45, 60, 68, 69, 70, 71, 72, 75, 76, 77, 80, 82, 83, 84, 85, 86, 88, 89, 94}
    | {*range(96, 106), 109, *range(126, 136), 139}
)
"""Catalogue: RESTART_APP. 94 is a memory error that was contained: it ended its application and nothing else. 45 only
follows another one. 109 (context switch timeout) is RESET_GPU there, but NVIDIA's own device plugin for Kubernetes
takes it for the application's fault; a GPU that really hangs has a recovery action or other XIDs as well."""

_REPORT = frozenset({37, 38, 43, 44, 63, 66, 67, 92, 93, 106, 107, 121, 137, 141, 152, 153, 154, 157, 160, 161})
"""Catalogue: IGNORE. 63: a row of memory is replaced at the next reset, and the GPU is good until then. 154: the
recovery action has changed, which comes first here anyway."""

_SUSPECT_S = 3600.0
_SUSPECT_JOBS = 3
_SUSPECT_USERS = 2
"""One user's broken program fails anywhere; the same GPU failing several people's jobs is another matter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is wrong with a GPU. `drain`: nothing new may start on it until an admin resumes it."""

    drain: bool
    sentence: str


def judge(gpu: Gpu, since: float = 0.0) -> Verdict | None:
    """The gravest trouble of `gpu`; None: no trouble, or none that is its own.

    `since`: when an admin last put it back into service (Unix seconds). XIDs before that count no more; what the
    driver says about now counts always.
    """
    if gpu.recovery_action:
        what = _RECOVERY.get(gpu.recovery_action, f"recovery action {gpu.recovery_action}")
        return Verdict(drain=True, sentence=f"its driver says: {what}{_because(gpu, since)}")
    if gpu.error_code in _CODES:
        return Verdict(drain=True, sentence=_CODES[gpu.error_code])
    if gpu.remap_failed:
        return Verdict(drain=True, sentence="a bad row of its memory could not be replaced: it needs repair")
    if xid := _gravest(gpu, since):
        what, todo = _DRAIN[xid.xid]
        return Verdict(drain=True, sentence=f"its driver reported XID {xid.xid} ({what}): {todo}")
    unknown = [xid.xid for xid in gpu.xids if xid.at >= since and not _known(xid.xid)]
    if unknown:
        return Verdict(drain=False, sentence=f"its driver reported XID {unknown[-1]}, which mlbox does not know")
    if gpu.ecc_uncorrected:
        errors = "1 memory error" if gpu.ecc_uncorrected == 1 else f"{gpu.ecc_uncorrected} memory errors"
        return Verdict(drain=False, sentence=f"{errors} could not be corrected since its driver was loaded")
    return None


def suspect(faults: Sequence[tuple[float, int, int]], now: float) -> str | None:
    """Why a GPU is suspect after jobs failed on it, or None. `faults`: when (Unix seconds), whose (uid), which job.

    It is when three jobs of two users failed on it within an hour. Which failures count is the caller's to say: those
    that a GPU can cause, so not a wrong argument or a cancelled job.
    """
    recent = [fault for fault in faults if now - _SUSPECT_S <= fault[0] <= now]
    jobs = sorted({job for _, _, job in recent})
    users = len({uid for _, uid, _ in recent})
    if len(jobs) < _SUSPECT_JOBS or users < _SUSPECT_USERS:
        return None
    named = ", ".join(str(job) for job in jobs[:-1])
    return f"{len(jobs)} jobs of {users} users failed on it within an hour (jobs {named} and {jobs[-1]})"


def _gravest(gpu: Gpu, since: float) -> Xid | None:
    """The first error that drains: those after it are often only its consequences."""
    return next((xid for xid in gpu.xids if xid.at >= since and xid.xid in _DRAIN), None)


def _because(gpu: Gpu, since: float) -> str:
    xid = _gravest(gpu, since)
    return f" (after XID {xid.xid}, {_DRAIN[xid.xid][0]})" if xid else ""


def _known(xid: int) -> bool:
    return xid in _DRAIN or xid in _APPLICATION or xid in _REPORT
