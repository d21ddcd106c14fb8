"""The inventory over a real gpu monitor."""

import asyncio
import contextlib
import math
import os
import pwd
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from mlbox.scheduler import gpus
from mlbox.scheduler.gpu_faults import judge
from mlbox.scheduler.gpus import (
    Gpu,
    GpuInventory,
    GpuLink,
    GpuProcess,
    GpuState,
    Inventory,
    MonitorOptions,
    Nvml,
    Viewpoint,
    Xid,
    leftovers,
    state_of,
)
from tests.nvml.standin import NOT_LISTED, FakeGpu, FakeMigDevice, StandIn

ROOT = Path(__file__).parents[2]
ME = pwd.getpwuid(os.getuid()).pw_name
PATIENCE_S = 20.0
PERIOD_S = 0.05

JOB_12 = {"k12": "job 12"}


class Box:
    """An inventory at work, and a count of its hints."""

    def __init__(self, standin: StandIn, **options: float) -> None:
        settings = {
            "period_s": PERIOD_S,
            "silence_s": 5.0,
            "start_s": 10.0,
            "retry_s": 0.2,
            "restart_s": 0.1,
            **options,
        }
        self.hints = 0
        self.inventory = GpuInventory(self._hint, MonitorOptions(environment=standin.environment(), **settings))
        self._hinted = asyncio.Event()

    def _hint(self) -> None:
        self.hints += 1
        self._hinted.set()

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        return self.inventory.current().gpus

    def errors(self) -> list[str | None]:
        return [gpu.error for gpu in self.gpus]

    async def until(self, wanted: Callable[[Inventory], bool]) -> Inventory:
        """The box when it is as `wanted`, looked at after each hint only: a change without a hint fails."""
        async with asyncio.timeout(PATIENCE_S):
            while not wanted(self.inventory.current()):
                self._hinted.clear()
                await self._hinted.wait()
        return self.inventory.current()

    async def samples(self, count: int) -> None:
        """Wait until so many more samples have come."""
        for _ in range(count):
            taken = time.monotonic() - self.inventory.sample_age_s
            async with asyncio.timeout(PATIENCE_S):
                while time.monotonic() - self.inventory.sample_age_s < taken + PERIOD_S / 2:  # noqa: ASYNC110
                    await asyncio.sleep(PERIOD_S / 5)


@pytest.fixture
def standin(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


@pytest.fixture
async def running() -> AsyncIterator[Callable[..., Box]]:
    tasks: list[asyncio.Task[None]] = []

    def running(standin: StandIn, **options: float) -> Box:
        box = Box(standin, **options)
        tasks.append(asyncio.create_task(box.inventory.run()))
        return box

    yield running
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert monitors() == []


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process of attempt k12."""
    process = subprocess.Popen(["sleep", "300"], env={"PATH": os.environ["PATH"], "MLBOX_ATTEMPT_KEY": "k12"})
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def spawned() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts processes of no attempt."""
    started: list[subprocess.Popen[bytes]] = []

    def spawned() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "300"], env={"PATH": os.environ["PATH"]}))
        return started[-1]

    yield spawned
    for process in started:
        process.kill()
        process.wait()


def ticks_of(process: subprocess.Popen[bytes]) -> int:
    """When it started, in clock ticks since boot: the 22nd field of proc_pid_stat(5)."""
    return int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])


def key_on(box: Box) -> str | None:
    """Whose the only process on the only GPU is."""
    processes = box.gpus[0].processes
    return processes[0].attempt_key if processes else None


def show(box: Box, *shown: Gpu, age_s: float = 0.0) -> None:
    """Give the inventory a sample of that age, as its monitor would."""
    box.inventory._take(gpus._Sample(next_s=2.0, taken=time.monotonic() - age_s, gpus=shown, lost=()))


def monitors(of: int | None = None) -> list[psutil.Process]:
    """The gpu monitors that process `of` (default: this one) has started."""
    found = []
    for child in psutil.Process(of).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(part.endswith("gpu_monitor.py") for part in child.cmdline()):
                found.append(child)
    return found


def all_known(box: Inventory) -> bool:
    return bool(box.gpus) and all(gpu.error is None for gpu in box.gpus)


def all_unknown(box: Inventory) -> bool:
    return bool(box.gpus) and all(gpu.error is not None and gpu.processes is None for gpu in box.gpus)


async def test_before_the_first_sample_nothing_is_known_and_no_cpu_only_box_is_assumed(standin):
    box = Box(standin)
    assert box.inventory.current().nvml is Nvml.UNASKED
    assert box.inventory.sample_age_s == math.inf
    assert not box.inventory.clean("GPU-a", "k12", after=0)
    assert await box.inventory.wait_first(0.01) is False


async def test_the_first_sample_shows_the_gpus_of_the_box_by_index(standin, running):
    standin.show(
        FakeGpu(uuid="GPU-b", used=642, util=97, compute=[(os.getpid(), 642)], topology={1: 10}),
        FakeGpu(uuid="GPU-a", topology={0: 10}),
    )
    box = running(standin)
    assert await box.inventory.wait_first(PATIENCE_S)
    found = box.inventory.current()
    assert (found.nvml, found.driver, found.message) == (Nvml.OK, "580.65.06", "NVIDIA driver 580.65.06: 2 GPUs")
    assert [(gpu.uuid, gpu.index) for gpu in found.gpus] == [("GPU-b", 0), ("GPU-a", 1)]
    gpu = found.gpus[0]
    assert (gpu.memory_mib, gpu.used_mib, gpu.free_mib, gpu.utilization) == (49140, 642, 48498, 97)
    assert gpu.links == (GpuLink(uuid="GPU-a", level="PIX", nvlinks=0),)
    assert gpu.processes
    assert (gpu.processes[0].user, gpu.processes[0].memory_mib) == (ME, 642)
    assert box.hints > 0
    assert box.inventory.sample_age_s < PATIENCE_S


async def test_a_box_without_a_driver_is_a_cpu_only_box_and_no_error(standin, running):
    standin.uninstall()
    box = running(standin)
    assert await box.inventory.wait_first(PATIENCE_S)
    found = box.inventory.current()
    assert (found.nvml, found.gpus) == (Nvml.ABSENT, ())
    assert found.message.startswith("no NVIDIA driver: libnvidia-ml.so.1: ")
    monitors()[0].kill()
    standin.install()
    standin.show(FakeGpu(uuid="GPU-a"))
    while (nvml := box.inventory.current().nvml) is not Nvml.OK:
        assert nvml is Nvml.ABSENT, "a dead monitor must not make a CPU-only box doubtful"
        await asyncio.sleep(0.01)


async def test_an_nvml_that_does_not_start_leaves_the_number_of_gpus_open(standin, running):
    standin.show(init_error=18)
    box = running(standin)
    assert await box.inventory.wait_first(PATIENCE_S)
    assert box.inventory.current().nvml is Nvml.FAILING
    standin.show(FakeGpu(uuid="GPU-a"))
    await box.until(all_known)


async def test_a_driver_that_goes_leaves_its_gpus_unknown(standin, running):
    standin.show(FakeGpu(uuid="GPU-a"))
    box = running(standin)
    await box.until(all_known)
    standin.unload()
    monitors()[0].kill()
    found = await box.until(lambda box: "no NVIDIA driver" in str(box.gpus[0].error))
    assert found.nvml is Nvml.FAILING
    standin.show(FakeGpu(uuid="GPU-a"))
    assert (await box.until(all_known)).nvml is Nvml.OK


async def test_a_process_from_outside_keeps_its_gpu_from_being_free_until_it_ends(standin, running, sleeper):
    standin.show(FakeGpu(uuid="GPU-a"))
    box = running(standin)
    await box.until(all_known)
    assert state_of(box.gpus[0], {}, None, {}).state is GpuState.FREE
    standin.show(FakeGpu(uuid="GPU-a", compute=[(sleeper.pid, None)]))
    await box.until(lambda box: bool(box.gpus[0].processes))
    status = state_of(box.gpus[0], {}, None, {})
    assert status.state is GpuState.FOREIGN
    assert status.message.startswith(
        f"GPU 0: {ME}'s sleep (pid {sleeper.pid}) holds memory, NVML does not say how much, idle since "
    )
    standin.show(FakeGpu(uuid="GPU-a"))
    await box.until(lambda box: not box.gpus[0].processes)
    assert state_of(box.gpus[0], {}, None, {}).state is GpuState.FREE


async def test_a_process_that_carries_the_key_belongs_to_its_attempt(standin, running, sleeper):
    standin.show(FakeGpu(uuid="GPU-a", compute=[(sleeper.pid, 100)]))
    box = running(standin)
    await box.until(all_known)
    assert state_of(box.gpus[0], JOB_12, None, JOB_12).state is GpuState.LEASED
    assert state_of(box.gpus[0], JOB_12, None, {}).state is GpuState.DRAINING


async def test_a_gpu_is_clean_only_by_a_sample_begun_afterwards_that_shows_none_of_the_attempt(
    standin, running, sleeper
):
    standin.show(FakeGpu(uuid="GPU-a", compute=[(sleeper.pid, 100)]), FakeGpu(uuid="GPU-b"))
    box = running(standin, period_s=3600)
    await box.until(all_known)
    assert not box.inventory.clean("GPU-a", "k12", after=0)
    assert box.inventory.clean("GPU-a", "k13", after=0)
    assert box.inventory.clean("GPU-b", "k12", after=0)
    assert not box.inventory.clean("GPU-z", "k12", after=0)
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b", error=15))
    ended = time.monotonic()
    assert not box.inventory.clean("GPU-a", "k12", after=ended)
    box.inventory.refresh()
    await box.until(lambda _: box.inventory.clean("GPU-a", "k12", after=ended))
    assert not box.inventory.clean("GPU-b", "k12", after=ended)


async def test_a_process_that_only_has_the_device_file_open_does_not_keep_a_gpu_from_being_clean(standin):
    box = Box(standin)
    holder = GpuProcess(pid=7, kind="F", attempt_key="k12")
    show(box, Gpu(uuid="GPU-a", index=0, name="x", bus_id="y", processes=(holder,)))
    assert box.inventory.clean("GPU-a", "k12", after=0)


async def test_a_mig_device_that_is_no_more_is_forgotten_and_clean_unless_a_gpu_fails(standin, running):
    part = FakeMigDevice(uuid="MIG-x", instance=7)
    standin.show(FakeGpu(uuid="GPU-a", mig=True, mig_devices=[part]))
    box = running(standin)
    await box.until(all_known)
    assert [gpu.label for gpu in box.gpus] == ["0", "0:0"]
    assert box.gpus[1].parent == "GPU-a"
    standin.show(FakeGpu(uuid="GPU-a", error=15))
    await box.until(all_unknown)
    assert [gpu.uuid for gpu in box.gpus] == ["GPU-a", "MIG-x"]
    assert not box.inventory.clean("MIG-x", "k12", after=0)
    standin.show(FakeGpu(uuid="GPU-a"))
    await box.until(lambda box: [gpu.uuid for gpu in box.gpus] == ["GPU-a"])
    assert box.inventory.clean("MIG-x", "k12", after=0)
    standin.show(FakeGpu(uuid="GPU-a", error=15))
    await box.until(all_unknown)
    assert not box.inventory.clean("MIG-x", "k12", after=0)


async def test_a_gpu_is_idle_since_it_was_first_seen_held_and_unused(standin, running, sleeper):
    held = FakeGpu(uuid="GPU-a", util=0, compute=[(sleeper.pid, 642)])
    standin.show(replace(held, util=5))
    box = running(standin)
    await box.until(all_known)
    assert (box.gpus[0].unused_since, box.gpus[0].idle_since) == (None, None)
    before = time.time()
    standin.show(held)
    await box.until(lambda box: box.gpus[0].idle_since is not None)
    since = box.gpus[0].idle_since
    assert before < since < time.time()
    hints = box.hints
    await box.samples(3)
    assert (box.gpus[0].idle_since, box.hints) == (since, hints)
    status = state_of(box.gpus[0], {}, None, {}, Viewpoint(now=time.time()))
    assert f"holds 642 MiB, idle since {time.strftime('%H:%M', time.gmtime(since))}" in status.message
    standin.show(FakeGpu(uuid="GPU-a"))
    await box.until(lambda box: box.gpus[0].idle_since is None)
    assert box.gpus[0].unused_since == since
    standin.show(replace(held, util=None))
    await box.until(lambda box: box.gpus[0].utilization is None)
    assert (box.gpus[0].unused_since, box.gpus[0].idle_since) == (None, None)


async def test_idleness_outlives_a_monitor_but_no_long_silence(standin):
    box = Box(standin, silence_s=1000)
    gpu = Gpu(uuid="GPU-a", index=0, name="x", bus_id="y", utilization=0, processes=())
    show(box, gpu, age_s=300)
    since = box.gpus[0].unused_since
    show(box, gpu, age_s=250)
    assert box.gpus[0].unused_since == since
    show(box, gpu, age_s=180)
    assert box.gpus[0].unused_since == pytest.approx(since + 120, abs=5)


async def test_nobody_is_idle_for_longer_than_it_has_existed(standin):
    box = Box(standin, silence_s=1000)
    began = time.time() - 10
    process = GpuProcess(pid=7, kind="C", started_at=began)
    gpu = Gpu(uuid="GPU-a", index=0, name="x", bus_id="y", utilization=0, processes=(process,))
    show(box, gpu, age_s=60)
    show(box, replace(gpu, processes=(replace(process, started_at=None),)), age_s=30)
    assert box.gpus[0].idle_since == pytest.approx(time.time() - 60, abs=5)
    show(box, gpu, age_s=1)
    assert box.gpus[0].idle_since == began


async def test_an_adoption_lasts_until_it_is_forgotten_whatever_becomes_of_the_monitor(standin, running, spawned):
    process = spawned()
    ticks = ticks_of(process)
    standin.show(FakeGpu(uuid="GPU-a", compute=[(process.pid, 642)]))
    box = running(standin)
    await box.until(all_known)
    assert key_on(box) is None
    box.inventory.adopt(process.pid, ticks, "k12")
    await box.until(lambda _: key_on(box) == "k12")
    assert leftovers(box.gpus[0], "k12")[0].start_ticks == ticks
    monitors()[0].kill()
    await box.until(all_unknown)
    await box.until(all_known)
    await box.until(lambda _: key_on(box) == "k12")
    box.inventory.forget("k12")
    box.inventory.forget("k99")
    await box.until(lambda _: key_on(box) is None)


async def test_an_adoption_is_taken_before_a_monitor_runs(standin, running, spawned):
    process = spawned()
    ticks = ticks_of(process)
    standin.show(FakeGpu(uuid="GPU-a", compute=[(process.pid, 642)]))
    box = running(standin)
    box.inventory.adopt(process.pid, ticks, "k12")
    await box.until(all_known)
    await box.until(lambda _: key_on(box) == "k12")


async def test_a_stopped_monitor_never_blocks_the_daemon_that_talks_to_it(standin, running):
    standin.show(FakeGpu(uuid="GPU-a"))
    box = running(standin, silence_s=30)
    await box.until(all_known)
    (monitor,) = monitors()
    monitor.suspend()
    for pid in range(10_000):
        box.inventory.adopt(pid, pid, f"k{pid}")
    monitor.resume()


async def test_xids_stay_with_a_gpu_that_is_lost_after_them(standin, running):
    standin.show(FakeGpu(uuid="GPU-a"))
    box = running(standin)
    await box.until(all_known)
    standin.show(FakeGpu(uuid="GPU-a", xids=[79]))
    await box.until(lambda box: bool(box.gpus[0].xids))
    standin.show(FakeGpu(uuid="GPU-a", xids=[79], error=15))
    await box.until(all_unknown)
    (xid,) = box.gpus[0].xids
    assert (xid.xid, box.gpus[0].error_code) == (79, 15)
    verdict = judge(box.gpus[0])
    assert verdict is not None
    assert verdict.drain
    assert judge(replace(box.gpus[0], error_code=None), since=xid.at + 1) is None


async def test_old_xids_and_all_but_the_newest_are_forgotten(standin):
    box = Box(standin)
    gpu = Gpu(uuid="GPU-a", index=0, name="x", bus_id="y", processes=())
    now = time.time()
    show(box, replace(gpu, xids=(Xid(xid=48, at=now - 90_000), Xid(xid=13, at=now - 9, count=2))))
    show(box, replace(gpu, xids=(Xid(xid=45, at=now), Xid(xid=13, at=now))))
    assert box.gpus[0].xids == (Xid(xid=13, at=now, count=3), Xid(xid=45, at=now))
    show(box, replace(gpu, xids=tuple(Xid(xid=number, at=now) for number in range(100, 140))))
    assert [xid.xid for xid in box.gpus[0].xids] == list(range(108, 140))


async def test_a_refresh_is_answered_by_a_hint_even_when_nothing_changed(standin, running):
    standin.show(FakeGpu(uuid="GPU-a"))
    box = running(standin, period_s=3600)
    await box.until(all_known)
    for _ in range(3):
        asked, hints = time.monotonic(), box.hints
        box.inventory.refresh()
        await box.until(lambda _, asked=asked: box.inventory.clean("GPU-a", "k12", after=asked))
        assert box.hints == hints + 1


async def test_many_refreshes_at_once_cost_one_sample(standin, running):
    standin.show(FakeGpu(uuid="GPU-a"))
    box = running(standin, period_s=3600)
    await box.until(all_known)
    hints = box.hints
    for _ in range(1000):
        box.inventory.refresh()
    asked = time.monotonic()
    await box.until(lambda _: box.inventory.clean("GPU-a", "k12", after=asked))
    assert box.hints == hints + 1


async def test_a_refresh_while_a_sample_is_under_way_brings_another_one(standin, running):
    standin.show(FakeGpu(uuid="GPU-a"))
    box = running(standin, period_s=3600)
    await box.until(all_known)
    for step in range(40):
        box.inventory.refresh()
        await asyncio.sleep(step / 10_000)  # up to 4 ms: before, in and after the sample that this brings
        asked = time.monotonic()
        box.inventory.refresh()
        await box.until(lambda _, asked=asked: box.inventory.clean("GPU-a", "k12", after=asked))


async def test_nobody_is_told_when_only_power_and_temperature_change(standin, running):
    standin.show(FakeGpu(uuid="GPU-a"))
    box = running(standin)
    await box.until(all_known)
    hints = box.hints
    standin.show(FakeGpu(uuid="GPU-a", power=99000, temperature=55))
    await box.samples(3)
    assert (box.gpus[0].power_w, box.gpus[0].temperature_c) == (99.0, 55)
    assert box.hints == hints


async def test_a_gpu_that_fails_is_unknown_alone_and_comes_back(standin, running):
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b", total=24000))
    box = running(standin)
    await box.until(all_known)
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b", error=15))
    await box.until(lambda box: box.gpus[1].error == "GPU is lost (NVML error 15)")
    assert box.gpus[0].error is None
    assert (box.gpus[1].memory_mib, box.gpus[1].utilization, box.gpus[1].processes) == (24000, None, None)
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b", total=24000))
    await box.until(all_known)


async def test_a_gpu_that_vanishes_is_kept_as_unknown(standin, running):
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b"))
    box = running(standin)
    await box.until(all_known)
    standin.show(FakeGpu(uuid="GPU-a"))
    await box.until(lambda box: box.gpus[1].error == "the driver does not show it any more")
    assert box.errors()[0] is None


async def test_a_gpu_that_is_lost_even_to_a_new_monitor_keeps_its_identity(standin, running):
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b"))
    box = running(standin)
    await box.until(all_known)
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b", lost=True))
    monitors()[0].kill()
    await box.until(lambda box: box.gpus[0].error is None and box.gpus[1].error == "GPU is lost (NVML error 15)")
    assert box.gpus[1].uuid == "GPU-b"


async def test_a_gpu_that_was_lost_before_the_daemon_started_is_spoken_of(standin, running):
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b", lost=True))
    box = running(standin)
    found = await box.until(all_known)
    assert found.message == ("NVIDIA driver 580.65.06: 2 GPUs; GPU 1 cannot be reached: GPU is lost (NVML error 15)")
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b"))
    await box.until(lambda box: len(box.gpus) == 2 and box.message == "NVIDIA driver 580.65.06: 2 GPUs")


async def test_mig_mode_and_missing_process_lists_never_make_a_gpu_free(standin, running):
    standin.show(FakeGpu(uuid="GPU-a", mig=True), FakeGpu(uuid="GPU-b", compute=NOT_LISTED))
    box = running(standin)
    await box.until(all_known)
    assert [state_of(gpu, {}, None, {}).state for gpu in box.gpus] == [GpuState.DRAINED, GpuState.UNKNOWN]


async def test_a_killed_monitor_makes_all_gpus_unknown_until_another_one_is_there(standin, running):
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b"))
    box = running(standin)
    await box.until(all_known)
    (monitor,) = monitors()
    monitor.kill()
    found = await box.until(all_unknown)
    assert found.nvml is Nvml.FAILING
    assert box.errors()[0] == "the gpu monitor ended (signal 9); it is started again in 0.1 s"
    assert (await box.until(all_known)).nvml is Nvml.OK
    assert [process.pid for process in monitors()] != [monitor.pid]


@pytest.mark.parametrize("where", ["hanging NVML", "stopped process"])
async def test_a_silent_monitor_is_killed_and_replaced(standin, running, where):
    standin.show(FakeGpu(uuid="GPU-a"))
    box = running(standin, silence_s=0.6)
    await box.until(all_known)
    (monitor,) = monitors()
    if where == "hanging NVML":
        standin.show(FakeGpu(uuid="GPU-a", hang_s=3600))
    else:
        monitor.suspend()
    await box.until(all_unknown)
    assert not monitor.is_running()
    standin.show(FakeGpu(uuid="GPU-a"))
    await box.until(all_known)


async def test_a_monitor_whose_nvml_never_starts_is_replaced_too(standin, running, caplog):
    standin.show(FakeGpu(uuid="GPU-a"), hang_s=3600)
    box = running(standin, start_s=0.6)
    await box.until(lambda box: box.nvml is Nvml.FAILING)
    assert "was silent for 0.6 s" in caplog.text
    assert not await box.inventory.wait_first(0.01)
    standin.show(FakeGpu(uuid="GPU-a"))
    await box.until(all_known)


async def test_a_daemon_that_stood_still_does_not_blame_its_monitor(standin, running):
    standin.show(FakeGpu(uuid="GPU-a"))
    box = running(standin, silence_s=1.0)
    await box.until(all_known)
    (monitor,) = monitors()
    time.sleep(2)  # noqa: ASYNC251  # the whole daemon stands still, as under SIGSTOP
    assert all_unknown(box.inventory.current()), "a sample that old says nothing about now"
    await box.samples(3)
    assert box.errors() == [None]
    assert monitor.is_running()


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("print('Traceback: something')", "the gpu monitor wrote what cannot be read: "),
        ('print(\'{"line":"sample"}\')', "missing required field"),
        ('print(\'{"line":"xid"}\')', "Invalid value 'xid'"),
        ("import sys\nwhile True: sys.stdout.write('x' * 65536)", "the gpu monitor wrote what cannot be read: "),
        ("raise SystemExit(3)", "the gpu monitor ended (code 3)"),
        ("import os; os.write(1, b'half a li'); os.kill(os.getpid(), 11)", "the gpu monitor ended (signal 11)"),
        ("import os, time; os.close(1); time.sleep(300)", "the gpu monitor ended (signal 9)"),
    ],
)
async def test_a_monitor_that_goes_mad_is_replaced(standin, running, monkeypatch, tmp_path, caplog, program, why):
    mad = tmp_path / "gpu_monitor.py"
    mad.write_text(program)
    monkeypatch.setattr(gpus, "_MONITOR", mad)
    box = running(standin)
    await box.until(lambda box: box.nvml is Nvml.FAILING)
    assert why in box.inventory.current().message
    assert why in caplog.text
    monkeypatch.undo()
    standin.show(FakeGpu(uuid="GPU-a"))
    await box.until(all_known)


async def test_a_monitor_that_cannot_be_started_is_tried_again(standin, running, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    box = running(standin)
    found = await box.until(lambda box: box.nvml is Nvml.FAILING)
    assert "cannot be started" in found.message
    monkeypatch.undo()
    standin.show(FakeGpu(uuid="GPU-a"))
    await box.until(all_known)


async def test_the_waits_between_monitors_grow(standin, running, monkeypatch, tmp_path, caplog):
    mad = tmp_path / "gpu_monitor.py"
    mad.write_text("raise SystemExit(3)")
    monkeypatch.setattr(gpus, "_MONITOR", mad)
    box = running(standin)
    await box.until(lambda box: "in 0.4 s" in box.message)
    waits = [record.getMessage().split("again in ")[1] for record in caplog.records]
    assert waits == ["0.1 s", "0.2 s", "0.4 s"]


DAEMON = """
    import asyncio, sys
    from mlbox.scheduler.gpus import GpuInventory, MonitorOptions

    async def main():
        inventory = GpuInventory(lambda: None, MonitorOptions(period_s=0.05))
        task = asyncio.create_task(inventory.run())
        await inventory.wait_first(20)
        print([gpu.uuid for gpu in inventory.current().gpus], flush=True)
        await task

    if sys.argv[1] == "uvloop":
        import uvloop
        uvloop.run(main())
    else:
        asyncio.run(main())
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("signal", [9, 2], ids=["killed", "interrupted"])
async def test_the_monitor_never_outlives_the_daemon(standin, tmp_path, loop, signal):
    standin.show(FakeGpu(uuid="GPU-a"))
    program = tmp_path / "daemon.py"
    program.write_text(textwrap.dedent(DAEMON))
    daemon = subprocess.Popen(  # noqa: ASYNC220  # it is another daemon's loop that matters
        [sys.executable, program, loop],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**standin.environment(), "PYTHONPATH": str(ROOT)},
    )
    with daemon:
        assert daemon.stdout
        try:
            assert daemon.stdout.readline() == b"['GPU-a']\n"
            (monitor,) = monitors(daemon.pid)
            daemon.send_signal(signal)
            daemon.wait(PATIENCE_S)
            monitor.wait(PATIENCE_S)
        finally:
            daemon.kill()
