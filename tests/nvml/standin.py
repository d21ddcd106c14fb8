"""A box with NVIDIA GPUs for tests: builds the stand-in library from C and writes the file that drives it.

The real nvidia-ml-py loads the library where `environment()` is given to a process. `show()` changes the hardware
under running processes, in one step.
"""

import atexit
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

LIBRARY = "libnvidia-ml.so.1"
NOT_LISTED = None
"""For a list of processes: this GPU's driver does not support it."""


@dataclass(frozen=True, kw_only=True)
class FakeMigDevice:
    """A MIG device of a GPU in MIG mode."""

    uuid: str
    instance: int
    total: int = 9728
    used: int = 12


@dataclass(frozen=True, kw_only=True)
class FakeGpu:
    """One GPU as fake_nvml.c shows it. Memory in MiB, power in mW; None is N/A. Processes are (pid, memory), in a MIG
    device (pid, memory, GPU instance)."""

    uuid: str
    name: str = "NVIDIA RTX A6000"
    bus: str | None = None
    total: int | None = 49140
    used: int | None = 0
    util: int | None = 0
    power: int | None = 25000
    temperature: int | None = 35
    mig: bool = False
    mig_devices: Sequence[FakeMigDevice] = ()
    mig_lists: bool = True
    """Whether MIG devices list their processes themselves."""
    cpus: str | None = None
    numa: int | None = None
    recovery: int | None = None
    ecc: int | None = None
    remap_failed: bool | None = None
    xids: Sequence[int | tuple[int, int]] | None = ()
    """Errors so far, maybe with a GPU instance; None: the driver reports none of this GPU."""
    error: int | None = None
    lost: bool = False
    hang_s: int | None = None
    compute: Sequence[tuple[int, int | None] | tuple[int, int | None, int]] | None = ()
    graphics: Sequence[tuple[int, int | None]] | None = ()
    mps: Sequence[tuple[int, int | None]] | None = ()
    nvlinks: Mapping[int | str, int] = field(default_factory=dict)
    """Number of links by the other GPU's index, or by `switch`."""
    topology: Mapping[int, int] = field(default_factory=dict)
    """nvmlGpuTopologyLevel_t by the other GPU's index."""

    def lines(self) -> list[str]:
        lines = [f"gpu {self.uuid}", f"name {self.name}", f"memory {_na(self.total)} {_na(self.used)}"]
        lines += [f"{word} {_na(getattr(self, word))}" for word in ("util", "power", "temperature")]
        optional = {"bus": self.bus, "error": self.error, "hang": self.hang_s, "cpus": self.cpus, "numa": self.numa}
        optional |= {"recovery": self.recovery, "ecc": self.ecc}
        lines += [f"{word} {value}" for word, value in optional.items() if value is not None]
        lines += ["mig 1"] * self.mig + ["lost"] * self.lost + ["mig_lists 0"] * (not self.mig_lists)
        lines += [f"mig_device {part.uuid} {part.instance} {part.total} {part.used}" for part in self.mig_devices]
        lines += [] if self.remap_failed is None else [f"remap_failed {int(self.remap_failed)}"]
        lines += ["xid n/a"] if self.xids is None else [f"xid {_words(xid)}" for xid in self.xids]
        for word in ("compute", "graphics", "mps"):
            processes = getattr(self, word)
            lines += [f"{word} n/a"] if processes is None else [f"{word} {_words(process)}" for process in processes]
        lines += [f"nvlink {other} {count}" for other, count in self.nvlinks.items()]
        return lines + [f"topology {other} {level}" for other, level in self.topology.items()]


def _na(value: object) -> str:
    return "n/a" if value is None else str(value)


def _words(values: object) -> str:
    return " ".join(_na(value) for value in (values if isinstance(values, tuple) else (values,)))


@cache
def library(*, old: bool = False) -> Path:
    """The stand-in, built once a session; `old`: as of a driver before R510."""
    folder = tempfile.TemporaryDirectory(prefix="mlbox-nvml-")
    atexit.register(folder.cleanup)
    built = Path(folder.name, LIBRARY)
    source = Path(__file__).with_name("fake_nvml.c")
    options = ["-shared", "-fPIC", "-O1", "-std=gnu11", "-fvisibility=hidden", f"-Wl,-soname,{LIBRARY}"]
    options += ["-Wall", "-Wextra", "-Werror"] + ["-DOLD_DRIVER"] * old
    subprocess.run(["cc", *options, "-o", built, source], check=True)
    return built


class StandIn:
    """The driver and the GPUs of one test, in `folder`."""

    def __init__(self, folder: Path, *, old: bool = False) -> None:
        self._libraries = folder / "nvml"
        self._libraries.mkdir()
        self._state = self._libraries / "state"
        self._old = old
        self.install()

    def environment(self) -> dict[str, str]:
        """This process's environment, plus what makes a child of it see these GPUs."""
        return {**os.environ, "LD_LIBRARY_PATH": str(self._libraries), "MLBOX_FAKE_NVML": str(self._state)}

    def show(self, *gpus: FakeGpu, driver: str = "580.65.06", init_error: int = 0, hang_s: int = 0) -> None:
        """From now on the box is like this. `hang_s`: seconds that nvmlInit takes."""
        lines = [f"driver {driver}", f"init_error {init_error}", f"hang {hang_s}"]
        for gpu in gpus:
            lines += gpu.lines()
        new = self._state.with_suffix(".new")
        new.write_text("\n".join(lines) + "\n")
        new.replace(self._state)

    def unload(self) -> None:
        """The kernel module goes: nvmlInit says Driver Not Loaded."""
        self._state.unlink(missing_ok=True)

    def install(self) -> None:
        (self._libraries / LIBRARY).symlink_to(library(old=self._old))

    def uninstall(self) -> None:
        """The library goes, as on a box that never had the driver."""
        (self._libraries / LIBRARY).unlink()
