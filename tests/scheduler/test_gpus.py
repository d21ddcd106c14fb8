"""The inventory over a real gpu monitor, and the decision of what a GPU is to its users."""

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
from mlbox.scheduler.gpus import (
    Gpu,
    GpuInventory,
    GpuLink,
    GpuProcess,
    GpuState,
    Inventory,
    MonitorOptions,
    Nvml,
    state_of,
)
from tests.nvml.standin import NOT_LISTED, FakeGpu, StandIn

ROOT = Path(__file__).parents[2]
ME = pwd.getpwuid(os.getuid()).pw_name
PATIENCE_S = 20.0
PERIOD_S = 0.05

# What a GPU is to its users

IDLE = Gpu(uuid="GPU-c", index=2, name="NVIDIA H200", bus_id="00000000:17:00.0", memory_mib=143771, processes=())
BOBS = GpuProcess(pid=4711, kind="C", memory_mib=642, user="bob", command="python train.py")
JOB_12S = GpuProcess(pid=12, kind="C", memory_mib=900, user="alice", command="python3 a.py", attempt_key="k12")
XORG = GpuProcess(pid=99, kind="G", memory_mib=120, user="root", command="Xorg :0")
JOB_12 = {"k12": "job 12"}


def with_processes(*processes: GpuProcess) -> Gpu:
    return replace(IDLE, processes=processes)


def test_an_idle_gpu_is_free():
    status = state_of(IDLE, {}, None, JOB_12)
    assert (status.state, status.why, status.message) == (GpuState.FREE, None, "GPU 2: free")


def test_a_process_from_outside_makes_a_gpu_foreign_and_is_named():
    status = state_of(with_processes(BOBS), {}, None, JOB_12)
    assert status.state is GpuState.FOREIGN
    assert status.why == "bob's python (pid 4711) holds 642 MiB"
    assert status.message == "GPU 2: bob's python (pid 4711) holds 642 MiB"


def test_a_desktop_blocks_nothing():
    assert state_of(with_processes(XORG), {}, None, {}).state is GpuState.FREE


def test_what_draws_and_computes_blocks():
    assert state_of(with_processes(replace(XORG, kind="C+G")), {}, None, {}).state is GpuState.FOREIGN


@pytest.mark.parametrize(
    ("processes", "why"),
    [
        ((replace(BOBS, memory_mib=None),), "bob's python (pid 4711) holds memory, NVML does not say how much"),
        ((replace(BOBS, user=None, command=None),), "somebody's process (pid 4711) holds 642 MiB"),
        ((BOBS, replace(BOBS, pid=5, memory_mib=700)), "bob's python (pid 5) holds 700 MiB (and 1 more process)"),
        (
            (BOBS, replace(BOBS, pid=5, memory_mib=None), replace(BOBS, pid=6)),
            "bob's python (pid 5) holds memory, NVML does not say how much (and 2 more processes)",
        ),
        ((XORG, BOBS), "bob's python (pid 4711) holds 642 MiB"),
        ((replace(BOBS, command=" "),), "bob's process (pid 4711) holds 642 MiB"),
    ],
)
def test_the_holder_of_most_memory_is_named_and_unknown_memory_is_not_little(processes, why):
    status = state_of(with_processes(*processes), {}, None, {})
    assert (status.state, status.why) == (GpuState.FOREIGN, why)


def test_a_job_on_a_gpu_that_it_was_not_given_is_foreign_there():
    status = state_of(with_processes(JOB_12S), {}, None, JOB_12)
    assert (status.state, status.why) == (GpuState.FOREIGN, "job 12's python3 (pid 12) holds 900 MiB")


def test_leftovers_of_a_job_whose_lease_is_gone_are_foreign():
    status = state_of(with_processes(JOB_12S), {}, None, {})
    assert (status.state, status.why) == (GpuState.FOREIGN, "alice's python3 (pid 12) holds 900 MiB")


def test_a_gpu_with_its_job_is_leased():
    status = state_of(with_processes(JOB_12S, XORG), JOB_12, None, JOB_12)
    assert (status.state, status.why) == (GpuState.LEASED, "leased by job 12")


def test_a_gpu_is_leased_before_its_job_shows_up_on_it():
    assert state_of(IDLE, JOB_12, None, JOB_12).state is GpuState.LEASED


def test_a_stranger_beside_a_job_is_named():
    status = state_of(with_processes(JOB_12S, BOBS), JOB_12, None, JOB_12)
    assert status.state is GpuState.LEASED
    assert status.why == "leased by job 12; beside it bob's python (pid 4711) holds 642 MiB"


def test_a_gpu_drains_while_processes_of_an_ended_attempt_are_on_it():
    status = state_of(with_processes(BOBS, JOB_12S), JOB_12, None, {})
    assert status.state is GpuState.DRAINING
    assert status.why == "job 12 has ended, but its python3 (pid 12) holds 900 MiB"


def test_a_gpu_drains_until_the_lease_of_an_ended_attempt_is_released():
    status = state_of(IDLE, JOB_12, None, {})
    assert status.state is GpuState.DRAINING
    assert status.why == "job 12 has ended; the GPU is about to be given back"


def test_one_ended_attempt_of_two_on_a_shared_gpu_makes_it_drain():
    status = state_of(with_processes(JOB_12S), {"k11": "job 11", **JOB_12}, None, {"k11": "job 11"})
    assert status.state is GpuState.DRAINING


def test_a_drained_gpu_says_who_drained_it_and_lets_its_job_end():
    assert state_of(IDLE, {}, "drained by carol", {}).message == "GPU 2: drained by carol"
    assert state_of(with_processes(BOBS), {}, "drained by carol", {}).state is GpuState.DRAINED
    status = state_of(with_processes(JOB_12S), JOB_12, "drained by carol", JOB_12)
    assert (status.state, status.why) == (GpuState.DRAINING, "drained by carol; job 12 still runs on it")


@pytest.mark.parametrize(
    ("gpu", "why"),
    [
        (replace(IDLE, error="GPU is lost (NVML error 15)"), "GPU is lost (NVML error 15)"),
        (replace(IDLE, mig=True), "it is in MIG mode, and mlbox gives whole GPUs only: switch MIG off to use it"),
        (replace(IDLE, processes=None), "NVML does not list its processes, so nobody knows whether it is in use"),
    ],
)
@pytest.mark.parametrize("leases", [{}, JOB_12], ids=["not leased", "leased"])
@pytest.mark.parametrize("drained", [None, "drained by carol"])
def test_a_gpu_about_which_nobody_can_tell_is_unknown_whoever_holds_it(gpu, why, leases, drained):
    status = state_of(gpu, leases, drained, JOB_12)
    assert (status.state, status.why) == (GpuState.UNKNOWN, why)


# The inventory


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
    assert status.message == (f"GPU 0: {ME}'s sleep (pid {sleeper.pid}) holds memory, NVML does not say how much")
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
    assert [state_of(gpu, {}, None, {}).state for gpu in box.gpus] == [GpuState.UNKNOWN, GpuState.UNKNOWN]


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
