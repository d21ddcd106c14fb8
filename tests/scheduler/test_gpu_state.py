"""What a GPU is to its users, by its sample alone."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlbox.scheduler.gpu_state import (
    Gpu,
    GpuProcess,
    GpuState,
    Viewpoint,
    described,
    effective_free_mib,
    leftovers,
    over_share,
    state_of,
)

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
        (replace(IDLE, processes=None), "NVML does not list its processes, so nobody knows whether it is in use"),
    ],
)
@pytest.mark.parametrize("leases", [{}, JOB_12], ids=["not leased", "leased"])
@pytest.mark.parametrize("drained", [None, "drained by carol"])
def test_a_gpu_about_which_nobody_can_tell_is_unknown_whoever_holds_it(gpu, why, leases, drained):
    status = state_of(gpu, leases, drained, JOB_12)
    assert (status.state, status.why) == (GpuState.UNKNOWN, why)


# Split into MIG devices


@pytest.mark.parametrize(
    ("devices", "why"),
    [
        (1, "it is split into 1 MIG device, which is given to jobs instead"),
        (3, "it is split into 3 MIG devices, which are given to jobs instead"),
        (
            0,
            "it is in MIG mode without a MIG device, so there is nothing to run on: create some "
            "(nvidia-smi mig -cgi ... -C) or switch MIG mode off",
        ),
    ],
)
def test_a_gpu_in_mig_mode_is_not_given_and_says_what_is(devices, why):
    status = state_of(replace(with_processes(BOBS), mig=True, mig_devices=devices), {}, None, {})
    assert (status.state, status.why) == (GpuState.DRAINED, why)


def test_a_mig_device_is_called_by_its_gpu_and_number():
    part = replace(IDLE, uuid="MIG-a", index=101, parent="GPU-a")
    assert part.label == "0:1"
    assert state_of(part, {}, "drained by carol", {}).message == "GPU 0:1: drained by carol"
    parts = [replace(IDLE, index=index) for index in (201, 100, 1, 0, 200, 101)]
    assert [gpu.label for gpu in sorted(parts, key=lambda gpu: gpu.place)] == ["0", "0:0", "0:1", "1", "1:0", "1:1"]


# Who is on it

NVTOP = GpuProcess(pid=77, kind="F", user="bob", command="nvtop", started_at=50.0)
NOON = 1_750_000_000.0  # 2025-06-15 15:06:40 UTC


def test_an_open_device_file_blocks_nothing():
    assert state_of(replace(with_processes(NVTOP), used_mib=600), {}, None, {}).state is GpuState.FREE


def test_memory_that_no_listed_process_holds_and_an_open_device_file_are_a_process_from_outside():
    hidden = replace(NVTOP, pid=88, user="root", command="python x.py", started_at=90.0, container="docker web")
    gpu = replace(with_processes(NVTOP, hidden), used_mib=30_000)
    status = state_of(gpu, {}, None, {})
    assert status.state is GpuState.FOREIGN
    assert status.why == (
        "30000 MiB are held by no process that NVML lists; root's python (pid 88 in docker web) has the GPU open"
    )
    assert state_of(replace(gpu, processes=()), {}, None, {}).state is GpuState.FREE
    ignored = Viewpoint(ignored=("nvtop", "python"))
    assert state_of(gpu, {}, None, {}, ignored).state is GpuState.FREE


def test_ignored_programs_make_no_gpu_foreign():
    agent = replace(BOBS, command="nv-hostengine -n", user="root")
    view = Viewpoint(ignored=("nv-hostengine",))
    assert state_of(with_processes(agent), {}, None, {}, view).state is GpuState.FREE
    assert state_of(with_processes(agent), {}, None, {}).state is GpuState.FOREIGN
    assert state_of(with_processes(agent, BOBS), {}, None, {}, view).why == "bob's python (pid 4711) holds 642 MiB"


def test_a_job_is_not_ignored_by_giving_its_program_another_name():
    stray = replace(JOB_12S, command="nv-hostengine")
    view = Viewpoint(ignored=("nv-hostengine",))
    assert state_of(with_processes(stray), {}, None, JOB_12, view).state is GpuState.FOREIGN


@pytest.mark.parametrize(
    ("now", "text"),
    [
        (NOON + 60, "idle since 15:06"),
        (NOON + 86_399, "idle since 15:06"),
        (NOON + 86_400, "idle since 2025-06-15 15:06"),
        (None, "idle since 2025-06-15 15:06"),
    ],
)
def test_an_idle_holder_is_told_with_the_time_and_an_old_one_with_the_date(now, text):
    gpu = replace(with_processes(BOBS), idle_since=NOON)
    status = state_of(gpu, {}, None, {}, Viewpoint(now=now))
    assert status.why == f"bob's python (pid 4711) holds 642 MiB, {text}"


def test_a_container_is_named():
    status = state_of(with_processes(replace(BOBS, container="docker train")), {}, None, {})
    assert status.why == "bob's python (pid 4711 in docker train) holds 642 MiB"


# Shared

JOB_13S = replace(JOB_12S, pid=13, attempt_key="k13", memory_mib=300)
BOTH = {"k12": "job 12", "k13": "job 13"}
DECLARED = {"k12": 800, "k13": 1000}
SHARED = replace(IDLE, memory_mib=10_000, used_mib=1300, free_mib=8600, processes=(JOB_12S, JOB_13S))


def test_a_shared_gpu_names_its_jobs_and_what_they_asked_for():
    status = state_of(SHARED, BOTH, None, BOTH, Viewpoint(declared=DECLARED))
    assert (status.state, status.why) == (GpuState.LEASED, "leased by job 12 (800 MiB) and job 13 (1000 MiB)")
    status = state_of(SHARED, BOTH, "drained by carol", BOTH)
    assert status.why == "drained by carol; job 12 and job 13 still run on it"


def test_each_job_counts_with_what_it_asked_for_or_uses_and_strangers_with_all():
    # 9900 can be used; job 12 uses 900 of 800, job 13 300 of 1000, and 100 belong to nobody
    assert effective_free_mib(SHARED, DECLARED) == 9900 - 900 - 1000 - 100
    assert effective_free_mib(SHARED, {}) == 8600


def test_memory_that_nvml_does_not_tell_is_not_zero():
    gpu = replace(SHARED, processes=(replace(JOB_12S, memory_mib=None), JOB_13S))
    # of 1300, 300 are job 13's, up to 800 job 12's, and 200 belong to nobody
    assert effective_free_mib(gpu, DECLARED) == 9900 - 800 - 1000 - 200
    assert over_share(gpu, DECLARED) == ()
    assert effective_free_mib(replace(SHARED, used_mib=None), DECLARED) is None
    assert effective_free_mib(replace(SHARED, memory_mib=None), DECLARED) is None


def test_a_job_over_its_share_is_told_with_both_figures():
    assert over_share(SHARED, DECLARED) == (("k12", 900, 800),)


memory = st.integers(0, 5000)


@given(
    st.lists(st.tuples(st.sampled_from(["k1", "k2", "k3", None]), st.none() | memory), max_size=6),
    st.dictionaries(st.sampled_from(["k1", "k2", "k3"]), memory),
    memory,
    memory,
)
def test_never_is_more_promised_than_is_free_now(uses, declared, used, free):
    processes = tuple(
        GpuProcess(pid=pid, kind="C", memory_mib=mib, attempt_key=key) for pid, (key, mib) in enumerate(uses)
    )
    gpu = replace(IDLE, memory_mib=used + free, used_mib=used, free_mib=free, processes=processes)
    left = effective_free_mib(gpu, declared)
    assert left is not None
    assert 0 <= left <= free
    assert left <= max(0, used + free - sum(declared.values()))


# Leftovers


def test_what_an_attempt_left_is_to_be_killed_by_pid_and_start():
    mine = replace(JOB_12S, start_ticks=5)
    file = replace(mine, pid=14, kind="F")
    gone = replace(mine, pid=15, start_ticks=None)
    assert leftovers(with_processes(mine, replace(JOB_13S, start_ticks=6), file, gone, BOBS), "k12") == (mine, file)
    assert leftovers(replace(IDLE, processes=None), "k12") == ()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, ""),
        (1, "python3 (pid 0)"),
        (2, "python3 (pid 0) and python3 (pid 1)"),
        (3, "python3 (pid 0), python3 (pid 1) and python3 (pid 2)"),
        (5, "python3 (pid 0), python3 (pid 1) and 3 more"),
    ],
)
def test_leftovers_are_named_in_a_sentence(count, text):
    assert described([replace(JOB_12S, pid=pid) for pid in range(count)]) == text
