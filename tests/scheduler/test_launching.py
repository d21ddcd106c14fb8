"""What an attempt is given: its program, its folders and its whole environment."""

import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mlbox.config import JobsConfig
from mlbox.jobs import Job, JobSpec, JobState
from mlbox.scheduler.executors.base import Launch
from mlbox.scheduler.folders import Folders
from mlbox.scheduler.launching import Surroundings, offer_uv, prepare

ENVIRON = {"PATH": "/usr/bin:/bin", "HOME": "/home/ann", "LC_ALL": "C", "SECRET": "x", "MLBOX_TOKEN": "daemon's"}


def launch(tmp_path: Path, config: JobsConfig | None = None, gpu_uuids: tuple[str, ...] = (), **spec: object) -> Launch:
    folders = Folders(tmp_path)
    folders.prepare()
    around = Surroundings.of(config or JobsConfig(), ENVIRON, "http://127.0.0.1:8470", tmp_path / "bin")
    asked = replace(JobSpec(command="echo hi", name="first"), **spec)
    job = Job(id=12, spec=asked, user="ann", uid=1000, state=JobState.STARTING, submitted_at=0.0, attempt=2)
    return prepare(job, 2, "key", "mlbx_token", gpu_uuids, folders, around)


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
    assert env == {
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
