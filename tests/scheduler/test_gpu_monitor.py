"""The gpu monitor as a process: real nvidia-ml-py, real /proc, a stand-in for the driver's library."""

import json
import os
import pwd
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlbox.scheduler import gpu_owners, gpu_readings
from mlbox.scheduler.gpu_owners import Processes, Stat, container_of
from tests.nvml.standin import NOT_LISTED, FakeGpu, FakeMigDevice, StandIn

pytestmark = pytest.mark.slow

ME = pwd.getpwuid(os.getuid()).pw_name
ROOT = Path(__file__).parents[2]
PATIENCE_S = 20.0


class Monitor:
    """A running gpu monitor and its lines."""

    def __init__(
        self, standin: StandIn, *, period_s: float = 0.05, retry_s: float = 0.2, devices: str = "/nonexistent"
    ) -> None:
        command = [sys.executable, "-m", "mlbox.scheduler.gpu_monitor", f"--period={period_s}", f"--retry={retry_s}"]
        command += ["--scan=0.05", f"--devices={devices}"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=standin.environment(), bufsize=0, cwd=ROOT
        )
        self._text = b""

    def line(self) -> dict[str, Any]:
        """The next line; fails when none comes."""
        assert self.process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._text:
                assert selector.select(PATIENCE_S), "the monitor says nothing"
                part = self.process.stdout.read(1 << 20)
                assert part, "the monitor ended"
                self._text += part
        line, _, self._text = self._text.partition(b"\n")
        return json.loads(line)

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first line from now on that is `wanted`."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            line = self.line()
            if wanted(line):
                return line
        pytest.fail("no such line came")

    def sample(self) -> dict[str, Any]:
        return self.until(lambda line: line["line"] == "sample")

    def fresh_sample(self) -> dict[str, Any]:
        """A sample begun after this call."""
        now = time.monotonic()
        return self.until(lambda line: line["line"] == "sample" and line["taken"] > now)

    def say(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n".encode())

    def ended(self) -> int:
        return self.process.wait(PATIENCE_S)

    def end(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.ended()


@pytest.fixture
def standin(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


@pytest.fixture
def start(standin: StandIn) -> Iterator[Callable[..., Monitor]]:
    monitors: list[Monitor] = []

    def start(of: StandIn = standin, **options: Any) -> Monitor:
        monitors.append(Monitor(of, **options))
        return monitors[-1]

    yield start
    for monitor in monitors:
        monitor.end()


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a process that sleeps; it is killed after the test, with its process group."""
    started: list[subprocess.Popen[bytes]] = []

    def spawn(*command: str, **environment: str) -> subprocess.Popen[bytes]:
        started.append(
            subprocess.Popen(
                command or ("sleep", "300"), env={"PATH": os.environ["PATH"], **environment}, process_group=0
            )
        )
        return started[-1]

    yield spawn
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()


def child_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    """The child of `process` that sleeps."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        for child in psutil.Process(process.pid).children():
            if child.name() == "sleep":
                return child
        time.sleep(0.01)
    pytest.fail("it has no child")


def test_it_names_driver_and_number_of_gpus_before_the_first_sample(standin, start):
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b"), driver="555.42.02")
    found = start().line()
    assert found == {
        "line": "found",
        "next_s": 0.05,
        "nvml": "ok",
        "driver": "555.42.02",
        "message": "NVIDIA driver 555.42.02: 2 GPUs",
    }


@pytest.mark.parametrize("old", [False, True], ids=["driver of today", "driver before R510"])
def test_a_sample_shows_what_nvml_says_of_each_gpu(tmp_path, start, old):
    (tmp_path / "box").mkdir()
    standin = StandIn(tmp_path / "box", old=old)
    pid = os.getpid()
    standin.show(
        FakeGpu(uuid="GPU-a", name="NVIDIA H200", total=143771, used=642, util=97, power=280500, temperature=61),
        FakeGpu(uuid="GPU-b", bus="00000000:C1:00.0", used=11, compute=[(pid, 10)], graphics=[(pid, 12), (1, 1)]),
    )
    before = time.monotonic()
    sample = start(standin).sample()
    assert before < sample["taken"] < time.monotonic()
    first, second = sample["gpus"]
    assert first == {
        "uuid": "GPU-a",
        "index": 0,
        "name": "NVIDIA H200",
        "bus_id": "00000000:17:00.0",
        "minor": 0,
        "parent": None,
        "links": [{"uuid": "GPU-b", "level": "SYS", "nvlinks": 0}],
        "memory_mib": 143771,
        "used_mib": 642,
        "free_mib": 143129,
        "utilization": 97,
        "power_w": 280.5,
        "temperature_c": 61,
        "mig": False,
        "processes": [],
        "cpus": [],
        "numa_node": None,
        "recovery_action": None,
        "ecc_uncorrected": None,
        "remap_failed": None,
        "xids": [],
        "error": None,
        "error_code": None,
    }
    assert (second["index"], second["bus_id"], second["minor"]) == (1, "00000000:C1:00.0", 1)
    assert [(p["pid"], p["kind"], p["memory_mib"]) for p in second["processes"]] == [(pid, "C+G", 12), (1, "G", 1)]


def test_what_nvml_cannot_tell_is_null_and_not_zero(standin, start):
    standin.show(
        FakeGpu(uuid="GPU-a", total=None, util=None, power=None, temperature=None, compute=[(1, None)]),
        FakeGpu(uuid="GPU-b", compute=NOT_LISTED, graphics=[(1, 5)]),
        FakeGpu(uuid="GPU-c", compute=[(1, 5)], graphics=NOT_LISTED, mps=NOT_LISTED),
    )
    first, second, third = start().sample()["gpus"]
    readings = ("memory_mib", "used_mib", "free_mib", "utilization", "power_w", "temperature_c")
    assert {first[name] for name in readings} == {None}
    assert [process["memory_mib"] for process in first["processes"]] == [None]
    assert first["error"] is None
    assert second["processes"] is None
    assert [process["pid"] for process in third["processes"]] == [1]


def test_a_client_of_mps_computes(standin, start):
    standin.show(FakeGpu(uuid="GPU-a", compute=[(1, 25)], mps=[(os.getpid(), 300)]))
    processes = start().sample()["gpus"][0]["processes"]
    assert {process["pid"]: process["kind"] for process in processes} == {1: "C", os.getpid(): "C"}


def test_a_foreign_process_is_shown_with_user_command_and_start(standin, start, spawn):
    process = spawn("/bin/sleep", "300")
    standin.show(FakeGpu(uuid="GPU-a", compute=[(process.pid, 642)]))
    (shown,) = start().sample()["gpus"][0]["processes"]
    began = shown.pop("started_at")
    assert abs(began - psutil.Process(process.pid).create_time()) < 2
    assert shown == {
        "pid": process.pid,
        "kind": "C",
        "memory_mib": 642,
        "uid": os.getuid(),
        "user": ME,
        "command": "sleep 300",
        "start_ticks": Stat.of(process.pid).start,
        "container": None,
        "attempt_key": None,
    }


def test_a_long_or_strange_command_line_is_shortened_and_printable(standin, start, spawn):
    process = spawn("sh", "-c", "sleep 300 #\x1b[31m\n" + "x" * 500)
    standin.show(FakeGpu(uuid="GPU-a", compute=[(process.pid, 1)]))
    command = start().sample()["gpus"][0]["processes"][0]["command"]
    assert command.startswith("sh -c sleep 300 #?[31m?xxx")
    assert len(command) == 120
    assert command.endswith("x…")


def test_a_process_of_an_attempt_carries_its_key(standin, start, spawn):
    process = spawn(MLBOX_ATTEMPT_KEY="k12")
    standin.show(FakeGpu(uuid="GPU-a", compute=[(process.pid, 1)]))
    assert start().sample()["gpus"][0]["processes"][0]["attempt_key"] == "k12"


def test_a_child_that_dropped_its_environment_belongs_to_the_attempt_of_its_parent(standin, start, spawn):
    parent = spawn("sh", "-c", "env -i sleep 300; true", MLBOX_ATTEMPT_KEY="k12")
    child = child_of(parent)
    standin.show(FakeGpu(uuid="GPU-a", compute=[(child.pid, 1)]))
    assert start().sample()["gpus"][0]["processes"][0]["attempt_key"] == "k12"


def test_a_process_that_ended_keeps_its_owner_while_the_driver_lists_it(standin, start, spawn):
    process = spawn(MLBOX_ATTEMPT_KEY="k12")
    standin.show(FakeGpu(uuid="GPU-a", compute=[(process.pid, 642)]))
    monitor = start()
    before = monitor.sample()["gpus"][0]["processes"]
    process.kill()
    process.wait()
    assert monitor.fresh_sample()["gpus"][0]["processes"] == before
    assert before[0]["attempt_key"] == "k12"


def test_a_pid_that_proc_does_not_know_is_listed_all_the_same(standin, start, spawn):
    process = spawn()
    process.kill()
    process.wait()
    standin.show(FakeGpu(uuid="GPU-a", compute=[(process.pid, 642)]))
    (shown,) = start().sample()["gpus"][0]["processes"]
    assert (shown["pid"], shown["memory_mib"], shown["user"], shown["command"]) == (process.pid, 642, None, None)


LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


@pytest.mark.skipif(os.geteuid() != 0 or not LAST_PID.exists(), reason="only root can choose a pid")
def test_a_recycled_pid_is_not_taken_for_the_process_before(standin, start, spawn):
    process = spawn(MLBOX_ATTEMPT_KEY="k12")
    standin.show(FakeGpu(uuid="GPU-a", compute=[(process.pid, 642)]))
    monitor = start()
    assert monitor.sample()["gpus"][0]["processes"][0]["attempt_key"] == "k12"
    process.kill()
    process.wait()
    for _ in range(50):
        LAST_PID.write_text(str(process.pid - 1))
        if spawn("sleep", "299").pid == process.pid:
            break
    else:
        pytest.skip("the pid was not given again")
    shown = monitor.fresh_sample()["gpus"][0]["processes"][0]
    assert (shown["command"], shown["attempt_key"]) == ("sleep 299", None)


def test_a_name_service_that_hangs_leaves_the_uid_and_does_not_hold_up_the_sample(monkeypatch, spawn):
    answer = threading.Event()
    real = pwd.getpwuid

    def slow(uid: int) -> pwd.struct_passwd:
        answer.wait(PATIENCE_S)
        return real(uid)

    monkeypatch.setattr(pwd, "getpwuid", slow)
    process = spawn(MLBOX_ATTEMPT_KEY="k12")
    processes = Processes()
    rows = [{"processes": [{"pid": process.pid}]}]
    began = time.monotonic()
    processes.describe(rows)
    assert time.monotonic() - began < 5
    shown = rows[0]["processes"][0]
    assert (shown["user"], shown["command"], shown["attempt_key"]) == (str(os.getuid()), "sleep 300", "k12")
    answer.set()
    end = time.monotonic() + PATIENCE_S
    while shown["user"] != ME and time.monotonic() < end:
        processes.describe(rows)
    assert shown["user"] == ME


def test_without_the_library_it_says_that_there_is_no_driver_and_finds_one_that_comes(standin, start):
    standin.uninstall()
    standin.show(FakeGpu(uuid="GPU-a"))
    monitor = start()
    found = monitor.line()
    assert (found["line"], found["nvml"], found["driver"], found["next_s"]) == ("found", "absent", None, 0.2)
    assert found["message"].startswith("no NVIDIA driver: libnvidia-ml.so.1: ")
    standin.install()
    assert monitor.sample()["gpus"][0]["uuid"] == "GPU-a"


def test_a_library_that_is_none_is_no_driver(standin, start):
    standin.uninstall()
    Path(standin.environment()["LD_LIBRARY_PATH"], "libnvidia-ml.so.1").write_text("half an installation")
    found = start().line()
    assert found["nvml"] == "absent"
    assert "too short" in found["message"]


def test_without_the_kernel_module_there_is_no_driver(standin, start):
    monitor = start()
    found = monitor.line()
    assert found["nvml"] == "absent"
    assert found["message"] == (
        "no NVIDIA driver: libnvidia-ml.so.1 is there, but says Driver Not Loaded (NVML error 9)"
    )
    standin.show(FakeGpu(uuid="GPU-a"))
    assert monitor.sample()["gpus"][0]["uuid"] == "GPU-a"


def test_an_nvml_that_does_not_start_is_failing_and_not_absent(standin, start):
    standin.show(init_error=18)
    monitor = start()
    found = monitor.line()
    assert found["nvml"] == "failing"
    assert "version mismatch" in found["message"]
    standin.show(FakeGpu(uuid="GPU-a"))
    assert monitor.sample()["gpus"][0]["uuid"] == "GPU-a"


@pytest.mark.parametrize(
    ("failing", "text"),
    [
        (FakeGpu(uuid="GPU-b", error=999), "Unknown Error (NVML error 999)"),
        (FakeGpu(uuid="GPU-b", error=16), "GPU requires restart (NVML error 16)"),
        (FakeGpu(uuid="GPU-b", error=26), "NVML trouble (NVML error 26)"),
        (FakeGpu(uuid="GPU-b", lost=True), "GPU is lost (NVML error 15)"),
    ],
)
def test_a_gpu_that_fails_says_so_and_does_not_hide_the_others(standin, start, failing, text):
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b"))
    monitor = start(retry_s=60)
    monitor.sample()
    standin.show(FakeGpu(uuid="GPU-a", util=50), failing)
    first, second = monitor.fresh_sample()["gpus"]
    assert (first["utilization"], first["error"]) == (50, None)
    assert (second["uuid"], second["error"]) == ("GPU-b", text)
    assert "utilization" not in second
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b", util=7))
    assert monitor.fresh_sample()["gpus"][1]["utilization"] == 7


def test_a_gpu_that_was_lost_at_the_start_is_counted_and_comes_back(standin, start):
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b", lost=True))
    monitor = start()
    sample = monitor.sample()
    assert [gpu["uuid"] for gpu in sample["gpus"]] == ["GPU-a"]
    assert sample["lost"] == [{"index": 1, "error": "GPU is lost (NVML error 15)", "error_code": 15}]
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b"))
    back = monitor.until(lambda line: line["line"] == "sample" and not line["lost"])
    assert [gpu["uuid"] for gpu in back["gpus"]] == ["GPU-a", "GPU-b"]


def test_a_gpu_more_or_less_is_noticed(standin, start):
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b"))
    monitor = start(retry_s=60)
    monitor.sample()
    standin.show(FakeGpu(uuid="GPU-b"))
    monitor.until(lambda line: line["line"] == "sample" and [gpu["uuid"] for gpu in line["gpus"]] == ["GPU-b"])
    standin.show(FakeGpu(uuid="GPU-b"), FakeGpu(uuid="GPU-c"))
    monitor.until(lambda line: line["line"] == "sample" and [gpu["uuid"] for gpu in line["gpus"]] == ["GPU-b", "GPU-c"])


PARTS = (FakeMigDevice(uuid="MIG-x", instance=7, used=642), FakeMigDevice(uuid="MIG-y", instance=9))


@pytest.mark.parametrize("lists", [True, False], ids=["own lists", "only the GPU lists"])
def test_mig_devices_are_gpus_of_their_own(standin, start, lists):
    split = FakeGpu(
        uuid="GPU-b",
        mig=True,
        util=None,
        mig_devices=PARTS,
        mig_lists=lists,
        compute=[(os.getpid(), 642, 7), (1, None, 9)],
    )
    standin.show(FakeGpu(uuid="GPU-a"), split, FakeGpu(uuid="GPU-c", mig=True))
    whole, parent, first, second, empty = start().sample()["gpus"]
    assert [gpu["parent"] for gpu in (whole, parent, empty)] == [None] * 3
    assert [(gpu["mig"], gpu["mig_devices"]) for gpu in (parent, empty)] == [(True, 2), (True, 0)]
    assert (whole["mig"], first["mig"]) == (False, False)
    assert (first["uuid"], first["index"], first["parent"], first["name"]) == (
        "MIG-x",
        200,
        "GPU-b",
        "NVIDIA RTX A6000 MIG 1g.10gb",
    )
    assert (first["memory_mib"], first["used_mib"], first["utilization"]) == (9728, 642, None)
    assert (first["minor"], first["bus_id"], first["links"]) == (1, parent["bus_id"], [])
    assert [(process["pid"], process["memory_mib"]) for process in first["processes"]] == [(os.getpid(), 642)]
    assert first["processes"][0]["user"] == ME
    assert (second["uuid"], second["index"]) == ("MIG-y", 201)
    assert [(process["pid"], process["memory_mib"]) for process in second["processes"]] == [(1, None)]


def test_mig_devices_come_and_go_between_samples(standin, start):
    standin.show(FakeGpu(uuid="GPU-a", mig=True))
    monitor = start(retry_s=60)
    assert [gpu["uuid"] for gpu in monitor.sample()["gpus"]] == ["GPU-a"]
    standin.show(FakeGpu(uuid="GPU-a", mig=True, mig_devices=PARTS))
    assert [gpu["uuid"] for gpu in monitor.fresh_sample()["gpus"]] == ["GPU-a", "MIG-x", "MIG-y"]
    standin.show(FakeGpu(uuid="GPU-a"))
    assert [gpu["uuid"] for gpu in monitor.fresh_sample()["gpus"]] == ["GPU-a"]


def test_the_cpus_near_a_gpu_are_told_and_its_mig_devices_have_the_same(standin, start):
    standin.show(
        FakeGpu(uuid="GPU-a", bus="0000ABCD:17:00.0", cpus="0-2,9", numa=1, mig=True, mig_devices=PARTS[:1]),
        FakeGpu(uuid="GPU-b"),
    )
    first, part, second = start().sample()["gpus"]
    assert (first["cpus"], first["numa_node"]) == ([0, 1, 2, 9], 1)
    assert (part["cpus"], part["numa_node"]) == ([0, 1, 2, 9], 1)
    assert second["cpus"] == []


def test_the_numa_node_is_the_kernels_where_it_tells_one(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_readings, "_PCI", tmp_path)
    device = type("Device", (), {"bus_id": "00000000:C1:00.0", "handle": None})()
    nvml = type("Nvml", (), {"NVMLError": OSError})()
    node = tmp_path / "0000:c1:00.0" / "numa_node"
    node.parent.mkdir()
    for text, expected in (("3\n", 3), ("-1\n", None)):
        node.write_text(text)
        assert gpu_readings._numa_node(nvml, device) == expected


def test_the_drivers_word_on_a_gpus_health_is_passed_on_even_when_all_else_fails(standin, start):
    standin.show(FakeGpu(uuid="GPU-a", recovery=0, ecc=0, remap_failed=False), FakeGpu(uuid="GPU-b"))
    names = ("recovery_action", "ecc_uncorrected", "remap_failed")
    monitor = start()
    first, second = monitor.sample()["gpus"]
    assert [first[name] for name in names] == [0, 0, False]
    assert [second[name] for name in names] == [None, None, None]
    standin.show(FakeGpu(uuid="GPU-a", recovery=1, ecc=2, remap_failed=True, xids=[48]), FakeGpu(uuid="GPU-b"))
    told = monitor.until(lambda line: line["gpus"][0]["xids"])["gpus"][0]
    assert [told[name] for name in names] == [1, 2, True]


def xids(line: dict[str, Any]) -> list[list[int]]:
    return [[xid["xid"] for xid in gpu["xids"]] for gpu in line["gpus"]]


def test_an_xid_is_told_once_and_at_once(standin, start):
    standin.show(FakeGpu(uuid="GPU-a", xids=[13]), FakeGpu(uuid="GPU-b", xids=None), FakeGpu(uuid="GPU-c"))
    monitor = start(period_s=3600)
    assert xids(monitor.sample()) == [[], [], []], "one from before is not known to this driver's events"
    before = time.time()
    standin.show(FakeGpu(uuid="GPU-a", xids=[13]), FakeGpu(uuid="GPU-b", xids=None), FakeGpu(uuid="GPU-c", xids=[79]))
    sample = monitor.sample()
    assert xids(sample) == [[], [], [79]]
    assert before < sample["gpus"][2]["xids"][0]["at"] < time.time()
    monitor.say("")
    assert xids(monitor.sample()) == [[], [], []]


def test_an_xid_is_told_even_when_nvml_has_to_be_initialised_anew_first(standin, start):
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b"))
    monitor = start(period_s=3600)
    monitor.sample()
    standin.show(FakeGpu(uuid="GPU-a", xids=[79]))
    assert monitor.line()["message"].endswith("1 GPU")
    assert xids(monitor.sample()) == [[79]]


def test_a_flood_of_xids_is_counted_and_brings_few_samples(standin, start):
    standin.show(FakeGpu(uuid="GPU-a"))
    monitor = start(period_s=3600)
    monitor.sample()
    began = time.monotonic()
    counted = samples = 0
    standin.show(FakeGpu(uuid="GPU-a", xids=[79] + [45] * 30))
    while counted < 31:
        counted += sum(xid["count"] for xid in monitor.sample()["gpus"][0]["xids"])
        samples += 1
    assert samples <= 2 + time.monotonic() - began


def test_an_xid_of_a_mig_device_is_no_other_ones(standin, start):
    standin.show(FakeGpu(uuid="GPU-a", mig=True, mig_devices=PARTS))
    monitor = start(period_s=3600)
    monitor.sample()
    standin.show(FakeGpu(uuid="GPU-a", mig=True, mig_devices=PARTS, xids=[(95, 9)]))
    assert xids(monitor.sample()) == [[95], [], [95]]
    standin.show(FakeGpu(uuid="GPU-a", mig=True, mig_devices=PARTS, xids=[(95, 9), 79]))
    assert xids(monitor.sample()) == [[79], [79], [79]]


def test_xids_are_told_after_nvml_was_initialised_anew(standin, start):
    standin.show(FakeGpu(uuid="GPU-a"))
    monitor = start()
    monitor.sample()
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b"))
    monitor.until(lambda line: line["line"] == "sample" and len(line["gpus"]) == 2)
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b", xids=[79]))
    monitor.until(lambda line: line["line"] == "sample" and xids(line) == [[], [79]])


@pytest.fixture
def devices(tmp_path: Path) -> str:
    """What device files begin with: ordinary files here, `nvidia0` to `nvidia2`, for a test has no GPU to open."""
    for minor in range(3):
        (tmp_path / f"nvidia{minor}").touch()
    (tmp_path / "nvidiactl").touch()
    return str(tmp_path / "nvidia")


def kinds(line: dict[str, Any], index: int = 0) -> dict[int, str]:
    return {process["pid"]: process["kind"] for process in line["gpus"][index]["processes"]}


def test_who_only_has_the_device_file_open_is_shown_until_it_closes_it(standin, start, spawn, devices):
    holder = spawn("sh", "-c", f"exec 7<{devices}1 8<{devices}ctl; sleep 300", MLBOX_ATTEMPT_KEY="k12")
    listed = spawn("sh", "-c", f"exec 7<{devices}1; exec sleep 300")
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b", compute=[(listed.pid, 642)]))
    monitor = start(devices=devices)
    child = child_of(holder)
    wanted = {holder.pid: "F", child.pid: "F", listed.pid: "C"}
    sample = monitor.until(lambda line: line["line"] == "sample" and kinds(line, 1) == wanted)
    assert kinds(sample) == {}
    shown = next(process for process in sample["gpus"][1]["processes"] if process["pid"] == child.pid)
    assert (shown["memory_mib"], shown["user"], shown["command"], shown["attempt_key"]) == (
        None,
        ME,
        "sleep 300",
        "k12",
    )
    os.killpg(holder.pid, 9)
    holder.wait()
    monitor.until(lambda line: line["line"] == "sample" and kinds(line, 1) == {listed.pid: "C"})


def test_a_gpu_whose_processes_nobody_can_list_has_no_holders_either(standin, start, spawn, devices):
    spawn("sh", "-c", f"exec 7<{devices}0 8<{devices}1; exec sleep 300")
    standin.show(FakeGpu(uuid="GPU-a", compute=NOT_LISTED), FakeGpu(uuid="GPU-b"))
    monitor = start(devices=devices)
    sample = monitor.until(lambda line: line["line"] == "sample" and bool(kinds(line, 1)))
    assert sample["gpus"][0]["processes"] is None


ID = "1a2b3c4d5e6f" + "0" * 52


@pytest.mark.parametrize(
    ("cgroup", "container"),
    [
        ("0::/user.slice/user-1000.slice/session-3.scope", None),
        (f"0::/system.slice/docker-{ID}.scope", "docker 1a2b3c4d5e6f"),
        (f"12:pids:/docker/{ID}\n0::/", "docker 1a2b3c4d5e6f"),
        (
            f"0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container",
            "podman 1a2b3c4d5e6f",
        ),
        (f"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope", "containerd 1a2b3c4d5e6f"),
        (f"0::/kubepods.slice/kubepods-pod1.slice/crio-{ID}.scope", "cri-o 1a2b3c4d5e6f"),
        (f"0::/kubepods/burstable/pod1/{ID}", "kubernetes 1a2b3c4d5e6f"),
        ("0::/lxc.payload.web/system.slice", "lxc web"),
        ("0::/lxc/web", "lxc web"),
        ("0::/machine.slice/systemd-nspawn@lab.service/payload", "nspawn lab"),
    ],
)
def test_a_container_is_known_by_its_cgroup(cgroup, container):
    assert container_of(cgroup) == container


def test_a_docker_container_is_called_by_its_name_where_docker_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_owners, "_DOCKER_CONFIG", str(tmp_path / "{}.json"))
    config = tmp_path / f"{ID}.json"
    for text in ("{", "[]", '{"Name": 7}'):
        config.write_text(text)
        assert container_of(f"/docker/{ID}") == "docker 1a2b3c4d5e6f"
    config.write_text('{"Name": "/train-bob"}')
    assert container_of(f"/docker/{ID}") == "docker train-bob"


def ticks_of(pid: int) -> int:
    stat = Stat.of(pid)
    assert stat
    return stat.start


def key_of(line: dict[str, Any]) -> str | None:
    return line["gpus"][0]["processes"][0]["attempt_key"]


def test_an_adopted_process_and_what_descends_from_it_belong_to_the_attempt_until_it_is_forgotten(
    standin, start, spawn
):
    parent = spawn("sh", "-c", "sleep 300; true", MLBOX_ATTEMPT_KEY="k3")
    child = child_of(parent)
    standin.show(FakeGpu(uuid="GPU-a", compute=[(child.pid, 1)]))
    monitor = start(period_s=3600)
    assert key_of(monitor.sample()) == "k3"
    monitor.say(f"adopt {parent.pid} {ticks_of(parent.pid)} k12")
    assert key_of(monitor.sample()) == "k12"
    os.kill(parent.pid, 9)
    parent.wait()
    monitor.say("adopt 1 1 k13")
    assert key_of(monitor.sample()) == "k12", "its parent is gone, and it is still the same process"
    monitor.say("forget k12")
    assert key_of(monitor.sample()) == "k3"


def test_another_process_of_an_adopted_pid_is_not_adopted(standin, start, spawn):
    process = spawn()
    standin.show(FakeGpu(uuid="GPU-a", compute=[(process.pid, 1)]))
    monitor = start(period_s=3600)
    monitor.sample()
    monitor.say(f"adopt {process.pid} {ticks_of(process.pid) - 1} k12")
    assert key_of(monitor.sample()) is None


@pytest.mark.parametrize("line", ["adopt", "adopt x 1 k", "adopt 1 -1 k", "forget", "what", "\0 \xff"])
def test_a_line_that_makes_no_sense_only_brings_a_sample(standin, start, line):
    standin.show(FakeGpu(uuid="GPU-a"))
    monitor = start(period_s=3600)
    monitor.sample()
    monitor.say(line)
    monitor.sample()


def test_links_count_bridges_and_switches_and_name_the_way_through_the_box(standin, start):
    standin.show(
        FakeGpu(uuid="GPU-a", nvlinks={1: 4}, topology={1: 20}),
        FakeGpu(uuid="GPU-b", nvlinks={0: 4}, topology={0: 20}),
        FakeGpu(uuid="GPU-c", nvlinks={"switch": 18}, topology={3: 40}),
        FakeGpu(uuid="GPU-d", nvlinks={"switch": 12}, topology={2: 40}),
    )
    links = {
        (gpu["uuid"], link["uuid"]): (link["level"], link["nvlinks"])
        for gpu in start().sample()["gpus"]
        for link in gpu["links"]
    }
    assert links["GPU-a", "GPU-b"] == links["GPU-b", "GPU-a"] == ("PXB", 4)
    assert links["GPU-c", "GPU-d"] == links["GPU-d", "GPU-c"] == ("NODE", 12)
    assert links["GPU-a", "GPU-c"] == ("SYS", 0)
    assert len(links) == 12


def test_a_byte_on_stdin_brings_a_sample_at_once(standin, start):
    standin.show(FakeGpu(uuid="GPU-a"))
    monitor = start(period_s=3600)
    monitor.sample()
    asked = time.monotonic()
    monitor.process.stdin.write(b"\n")
    assert monitor.sample()["taken"] > asked


def test_a_byte_on_stdin_has_a_missing_driver_tried_at_once(standin, start):
    monitor = start(retry_s=3600)
    assert monitor.line()["nvml"] == "absent"
    standin.show(FakeGpu(uuid="GPU-a"))
    monitor.process.stdin.write(b"\n")
    assert monitor.sample()["gpus"][0]["uuid"] == "GPU-a"


def test_it_ends_with_the_daemon(standin, start):
    standin.show(FakeGpu(uuid="GPU-a"))
    monitor = start(period_s=3600)
    monitor.sample()
    monitor.process.stdin.close()
    assert monitor.ended() == 0


def test_it_ends_with_the_daemon_while_it_waits_for_a_driver(standin, start):
    monitor = start(retry_s=3600)
    monitor.line()
    monitor.process.stdin.close()
    assert monitor.ended() == 0


def test_it_ends_with_the_daemon_even_while_nvml_hangs(standin, start):
    standin.show(FakeGpu(uuid="GPU-a"))
    monitor = start()
    monitor.sample()
    standin.show(FakeGpu(uuid="GPU-a", hang_s=3600))
    with pytest.raises(AssertionError, match="says nothing"):
        _drain(monitor)
    monitor.process.stdin.close()
    assert monitor.ended() == 0


def _drain(monitor: Monitor) -> None:
    """Read until nothing came for a while; fails then, as it is meant to."""
    assert monitor.process.stdout
    with selectors.DefaultSelector() as selector:
        selector.register(monitor.process.stdout, selectors.EVENT_READ)
        while True:
            assert selector.select(0.5), "says nothing"
            assert monitor.process.stdout.read(1 << 20)


def test_it_ends_when_nobody_reads_its_lines_any_more(standin, start):
    standin.show(FakeGpu(uuid="GPU-a"))
    monitor = start()
    monitor.sample()
    monitor.process.stdout.close()
    assert monitor.ended() == 0


@pytest.fixture
def unmeasured(monkeypatch):
    """Keeps coverage.py out of the processes of a test, for it weighs more than the monitor."""
    monkeypatch.delenv("COVERAGE_PROCESS_START", raising=False)
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)


@pytest.mark.usefixtures("unmeasured")
def test_it_is_light(standin, start):
    standin.show(*(FakeGpu(uuid=f"GPU-{n}", compute=[(os.getpid(), 600), (1, 5)]) for n in range(8)))
    monitor = start(period_s=0.02)
    process = psutil.Process(monitor.process.pid)
    monitor.sample()
    before = sum(process.cpu_times()[:2])
    for _ in range(50):
        monitor.sample()
    a_sample_s = (sum(process.cpu_times()[:2]) - before) / 50
    assert process.memory_info().rss < 32 << 20
    assert a_sample_s < 0.01, "at one sample every 2 s that would be 0.5 % of a core"


@pytest.mark.usefixtures("unmeasured")
def test_a_box_without_a_driver_does_not_even_load_nvidia_ml_py(standin, start):
    standin.uninstall()
    monitor = start()
    monitor.line()
    assert psutil.Process(monitor.process.pid).memory_info().rss < 18 << 20
