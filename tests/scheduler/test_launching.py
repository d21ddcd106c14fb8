"""What an attempt is given: its program, its folders and its whole environment."""

import os
import socket
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from mlbox.config import JobsConfig
from mlbox.jobs import ArrayPlace, Job, JobSpec, JobState, Launcher, WarnSignal
from mlbox.scheduler.executors.base import Launch
from mlbox.scheduler.folders import Folders
from mlbox.scheduler.launching import Surroundings, offer_uv, prepare

ENVIRON = {"PATH": "/usr/bin:/bin", "HOME": "/home/ann", "LC_ALL": "C", "SECRET": "x", "MLBOX_TOKEN": "daemon's"}


def launch(
    tmp_path: Path,
    config: JobsConfig | None = None,
    gpu_uuids: tuple[str, ...] = (),
    *,
    array: ArrayPlace | None = None,
    attempt: int = 2,
    cpu_affinity: tuple[int, ...] = (),
    adopt: tuple[int, int] | None = None,
    **spec: object,
) -> Launch:
    folders = Folders(tmp_path)
    folders.prepare()
    around = Surroundings.of(config or JobsConfig(), ENVIRON, "http://127.0.0.1:8470", tmp_path / "bin")
    asked = replace(JobSpec(command="echo hi", name="first"), **spec)
    job = Job(
        id=12,
        spec=asked,
        user="ann",
        uid=1000,
        state=JobState.STARTING,
        submitted_at=0.0,
        attempt=attempt,
        array=array,
    )
    return prepare(
        job, attempt, "key", "mlbx_token", gpu_uuids, folders, around, cpu_affinity=cpu_affinity, adopt=adopt
    )


def slurm(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith("SLURM")}


def other(env: Mapping[str, str], plain: Mapping[str, str]) -> dict[str, str]:
    """What `env` has beside `plain` and what Slurm would set."""
    return {name: value for name, value in env.items() if name not in plain and not name.startswith("SLURM")}


def test_a_command_is_run_by_the_shell_in_a_fresh_folder(tmp_path: Path) -> None:
    made = launch(tmp_path, JobsConfig(shell="/bin/sh"))
    assert made.argv == ("/bin/sh", "-c", "echo hi")
    assert made.handle == "mlbox-job-12-2"
    assert made.folder == tmp_path / "jobs/12/attempt-2"
    assert made.cwd == made.folder / "work"
    assert made.cwd.is_dir()
    assert (tmp_path / "jobs/12/out").is_dir()
    assert made.code is None
    assert stat.S_IMODE(made.folder.stat().st_mode) == 0o700


def test_preparing_again_after_a_crash_is_the_same(tmp_path: Path) -> None:
    assert launch(tmp_path, command=None, script="#!/bin/sh\n") == launch(tmp_path, command=None, script="#!/bin/sh\n")


def test_a_script_is_its_own_program_when_it_names_one(tmp_path: Path) -> None:
    made = launch(tmp_path, command=None, script="#!/bin/sh\necho größer $MLBOX_JOB_ID\n")
    ran = subprocess.run(made.argv, env=made.env, cwd=made.cwd, capture_output=True, check=True)
    assert ran.stdout.decode() == "größer 12\n"
    assert stat.S_IMODE(Path(made.argv[0]).stat().st_mode) == 0o700


def test_a_script_without_a_program_is_run_by_the_shell(tmp_path: Path) -> None:
    made = launch(tmp_path, JobsConfig(shell="/bin/sh"), command=None, script="echo plain\n")
    assert made.argv == ("/bin/sh", str(made.folder / "script"))
    assert subprocess.run(made.argv, env=made.env, capture_output=True, check=True).stdout == b"plain\n"


def test_a_script_is_never_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "jobs/12/attempt-2"
    folder.mkdir(parents=True)
    (folder / "script").symlink_to(victim)
    launch(tmp_path, command=None, script="#!/bin/sh\n")
    assert victim.read_text() == "mine"


def test_workdir_and_code_are_taken_as_asked(tmp_path: Path) -> None:
    assert launch(tmp_path, workdir="/home/ann").cwd == Path("/home/ann")
    assert launch(tmp_path, code="zip").code == tmp_path / "jobs/12/code.zip"


def test_limits_are_passed_on(tmp_path: Path) -> None:
    config = JobsConfig(log_head="1M", log_max="3M")
    made = launch(tmp_path, config, time_limit_s=5.0, grace_s=2.0, mem_mib=100, cpus=3)
    assert (made.time_limit_s, made.grace_s, made.memory_mib, made.cpus) == (5.0, 2.0, 100, 3)
    assert (made.log_head_bytes, made.log_tail_bytes) == (1 << 20, 2 << 20)


def test_the_environment_is_whole_and_holds_nothing_of_the_daemon_but_what_is_let_through(tmp_path: Path) -> None:
    env = launch(tmp_path, env={"HOME": "/elsewhere", "LR": "0.1"}).env
    assert other(env, {}) == {
        "PATH": f"/usr/bin:/bin:{tmp_path}/bin",
        "HOME": "/elsewhere",
        "LANG": "C.UTF-8",
        "LC_ALL": "C",
        "LR": "0.1",
        "PYTHONUNBUFFERED": "1",
        "MLBOX_JOB_ID": "12",
        "MLBOX_JOB_NAME": "first",
        "MLBOX_ATTEMPT": "2",
        "MLBOX_ATTEMPT_KEY": "key",
        "MLBOX_URL": "http://127.0.0.1:8470",
        "MLBOX_TOKEN": "mlbx_token",
        "MLBOX_OUT": f"{tmp_path}/jobs/12/out",
        "MLBOX_METRICS": f"{tmp_path}/jobs/12/metrics.jsonl",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "",
    }


def test_a_job_sees_its_gpus_by_uuid_whatever_it_set_itself(tmp_path: Path) -> None:
    env = launch(tmp_path, gpu_uuids=("GPU-b", "GPU-a"), env={"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).env
    assert env["CUDA_VISIBLE_DEVICES"] == "GPU-b,GPU-a"


def test_a_script_finds_what_sbatch_would_have_told_it(tmp_path: Path) -> None:
    host = socket.gethostname()
    env = launch(tmp_path, cpus=4, mem_mib=2000, gpus=1, env={"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "7"}).env
    assert slurm(env) == {
        "SLURM_JOB_ID": "12",
        "SLURM_JOBID": "12",
        "SLURM_JOB_NAME": "first",
        "SLURM_JOB_USER": "ann",
        "SLURM_JOB_UID": "1000",
        "SLURM_SUBMIT_DIR": f"{tmp_path}/jobs/12/attempt-2/work",
        "SLURM_SUBMIT_HOST": host,
        "SLURM_JOB_NODELIST": host,
        "SLURM_NODELIST": host,
        "SLURMD_NODENAME": host,
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "1",
        "SLURM_NPROCS": "1",
        "SLURM_TASKS_PER_NODE": "1",
        "SLURM_CPUS_ON_NODE": "4",
        "SLURM_JOB_CPUS_PER_NODE": "4",
        "SLURM_CPUS_PER_TASK": "4",
        "SLURM_MEM_PER_NODE": "2000",
        "SLURM_GPUS": "1",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_RESTART_COUNT": "1",
        "SLURM_ARRAY_TASK_ID": "7",
    }


def test_what_was_not_asked_for_is_not_told(tmp_path: Path) -> None:
    env = launch(tmp_path, attempt=1, workdir="/home/ann").env
    assert env["SLURM_SUBMIT_DIR"] == "/home/ann"
    assert env["SLURM_CPUS_ON_NODE"] == "1", "it holds one slot"
    absent = ("CPUS_PER_TASK", "MEM_PER_NODE", "GPUS", "GPUS_ON_NODE", "RESTART_COUNT", "ARRAY_JOB_ID", "ARRAY_TASK_ID")
    assert not {f"SLURM_{name}" for name in absent} & set(env)
    assert not {name for name in env if name.startswith(("MLBOX_ARRAY", "MASTER", "NCCL", "WORLD"))}


def test_an_element_of_an_array_knows_its_place(tmp_path: Path) -> None:
    env = launch(tmp_path, array=ArrayPlace(id=9, index=30, size=4)).env
    assert (env["MLBOX_ARRAY_ID"], env["MLBOX_ARRAY_INDEX"], env["MLBOX_ARRAY_SIZE"]) == ("9", "30", "4")
    names = ("ARRAY_JOB_ID", "ARRAY_TASK_ID", "ARRAY_TASK_COUNT", "JOB_ID")
    assert [env[f"SLURM_{name}"] for name in names] == ["9", "30", "4", "12"]


def test_a_program_that_makes_its_own_ranks_is_told_where_they_meet(tmp_path: Path) -> None:
    made = launch(tmp_path, gpus=4)
    port = int(made.env["MASTER_PORT"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", port))
    assert made.ranks is None
    assert other(made.env, launch(tmp_path).env) == {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "4",
        "NPROC_PER_NODE": "4",
        "NNODES": "1",
        "NCCL_SOCKET_IFNAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    assert "SLURM_NTASKS" not in made.env, "Lightning would wait for ranks that nobody starts"


def test_ranks_that_mlbox_starts_are_told_as_torchrun_and_srun_do(tmp_path: Path) -> None:
    made = launch(tmp_path, gpus=2, launch=Launcher.TORCHRUN, cpus=9)
    assert made.ranks == 2
    assert (made.env["WORLD_SIZE"], made.env["OMP_NUM_THREADS"]) == ("2", "4")
    assert made.env["TORCHELASTIC_RUN_ID"] == "mlbox-job-12-2"
    assert (made.env["SLURM_NTASKS"], made.env["SLURM_NTASKS_PER_NODE"], made.env["SLURM_CPUS_PER_TASK"]) == (
        "2",
        "2",
        "4",
    )


def test_a_users_own_variables_beat_hints_but_not_what_the_job_is(tmp_path: Path) -> None:
    mine = {"NCCL_SOCKET_IFNAME": "eth0", "MASTER_PORT": "29500", "WORLD_SIZE": "9", "MLBOX_JOB_ID": "1"}
    env = launch(tmp_path, gpus=2, env=mine).env
    assert [env[name] for name in mine] == ["eth0", "29500", "2", "12"]


def test_a_job_on_a_share_and_near_some_cores_knows_them(tmp_path: Path) -> None:
    made = launch(tmp_path, gpu_uuids=("MIG-1",), gpu_mem_mib=4000, cpu_affinity=(17, 0, 1, 2, 16, 5))
    assert made.env["MLBOX_GPU_MEM_MIB"] == "4000"
    assert made.env["MLBOX_CPU_AFFINITY"] == "0-2,5,16-17"
    assert made.env["SLURM_CPUS_ON_NODE"] == "6"
    assert made.env["CUDA_VISIBLE_DEVICES"] == "MIG-1"
    assert made.cpu_affinity == (17, 0, 1, 2, 16, 5)


@pytest.mark.parametrize(
    ("pattern", "array", "name"),
    [
        ("slurm-%j.out", None, "slurm-12.out"),
        ("%A_%a.out", ArrayPlace(id=9, index=3, size=4), "9_3.out"),
        ("%A_%04a.out", ArrayPlace(id=9, index=3, size=4), "9_0003.out"),
        ("logs/%x-%u-100%%", None, "logs/a_b-ann-100%"),
        ("%j%q%", None, "12%q%"),
    ],
)
def test_names_of_copies_follow_slurms_patterns(
    tmp_path: Path, pattern: str, array: ArrayPlace | None, name: str
) -> None:
    made = launch(tmp_path, output=pattern, error=pattern, array=array, name="a/b")
    assert (made.output, made.error, made.append) == (name, name, True)
    assert not launch(tmp_path, attempt=1).append


def test_a_warning_is_passed_on(tmp_path: Path) -> None:
    warning = WarnSignal(number=10, before_s=60.0)
    assert launch(tmp_path, warn_signal=warning).warn_signal == warning


def test_what_is_adopted_has_no_program_to_run(tmp_path: Path) -> None:
    made = launch(tmp_path, adopt=(77, 1234), code="zip")
    assert (made.adopt, made.argv, made.code) == ((77, 1234), (), None)


def test_what_is_let_through_is_the_configurations_choice(tmp_path: Path) -> None:
    env = launch(tmp_path, JobsConfig(pass_env=("SEC*", "MLBOX_*"))).env
    assert env["SECRET"] == "x"
    assert env["MLBOX_TOKEN"] == "mlbx_token", "the job's own, not the daemon's"
    assert env["PATH"] == f"{os.defpath}:{tmp_path}/bin"


def test_uv_is_offered_and_offered_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    tools = tmp_path / "tools"
    offer_uv(tools, str(tmp_path / "bin" / "python"))
    assert not tools.exists(), "there is none"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "uv").touch()
    for _ in range(2):
        offer_uv(tools, str(tmp_path / "bin" / "python"))
        assert (tools / "uv").readlink() == tmp_path / "bin" / "uv"
