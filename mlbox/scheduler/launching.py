"""From a job to the `Launch` of one attempt: its folders, its program and its whole environment.

The `SLURM_*` variables are those that sbatch(1) sets for a script on one node, as far as they are true here.
"""

import fnmatch
import os
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlbox.config import JobsConfig, size_bytes
from mlbox.jobs import ArrayPlace, Job, Launcher, handle
from mlbox.scheduler.executors.base import Launch
from mlbox.scheduler.folders import Folders


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What every attempt of this daemon gets.

    `inherited` is the daemon's own environment as far as the configuration lets it through; `url` is the API's
    address; `tools` is a folder with mlbox's own `uv`, last on the PATH so that a user's own wins.
    """

    config: JobsConfig
    inherited: Mapping[str, str]
    url: str
    tools: Path

    @classmethod
    def of(cls, config: JobsConfig, environ: Mapping[str, str], url: str, tools: Path) -> "Surroundings":
        inherited = {
            name: value
            for name, value in environ.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in config.pass_env)
        }
        return cls(config=config, inherited=inherited, url=url, tools=tools)

    @property
    def shell(self) -> str:
        return self.config.shell or ("/bin/bash" if os.access("/bin/bash", os.X_OK) else "/bin/sh")


def prepare(
    job: Job,
    attempt: int,
    key: str,
    token: str,
    gpu_uuids: tuple[str, ...],
    folders: Folders,
    around: Surroundings,
    *,
    cpu_affinity: tuple[int, ...] = (),
    adopt: tuple[int, int] | None = None,
) -> Launch:
    """Make the attempt's folders and describe its launch. Blocking; may be repeated after a crash.

    `cpu_affinity` are the cores near its GPUs; `adopt` is the process (pid, start time in clock ticks) that an adopted
    job is. Raises OSError when the disk does not let it.
    """
    folder = folders.attempt(job.id, attempt)
    out = folders.out(job.id)
    for made in (folder, out):
        made.mkdir(mode=0o700, parents=True, exist_ok=True)
    work = Path(job.spec.workdir) if job.spec.workdir else folder / "work"
    if not job.spec.workdir:
        work.mkdir(mode=0o700, exist_ok=True)
    config = around.config
    head = size_bytes(config.log_head)
    cores = _cores(job, cpu_affinity)
    identity = {
        "MLBOX_JOB_ID": str(job.id),
        "MLBOX_JOB_NAME": job.spec.name,
        "MLBOX_ATTEMPT": str(attempt),
        "MLBOX_ATTEMPT_KEY": key,
        "MLBOX_URL": around.url,
        "MLBOX_TOKEN": token,
        "MLBOX_OUT": str(out),
        "MLBOX_METRICS": str(folders.metrics(job.id)),
        # UUIDs and bus order, because NVML and CUDA number GPUs differently; a job without GPUs sees none.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(gpu_uuids),
        **_place(job, cpu_affinity),
        **_slurm(job, attempt, work, cores),
    }
    return Launch(
        handle=handle(job.id, attempt),
        key=key,
        folder=folder,
        argv=() if adopt else _program(job, folder, around.shell),
        cwd=work,
        env=_environment(job, around, _hints(job, attempt, cores), identity),
        code=None if adopt else folders.code(job),
        log_head_bytes=head,
        log_tail_bytes=size_bytes(config.log_max) - head,
        time_limit_s=job.spec.time_limit_s,
        grace_s=job.spec.grace_s,
        memory_mib=job.spec.mem_mib,
        cpus=job.spec.cpus,
        cpu_affinity=cpu_affinity,
        output=_expanded(job.spec.output, job),
        error=_expanded(job.spec.error, job),
        append=attempt > 1,
        warn_signal=job.spec.warn_signal,
        ranks=_ranks(job),
        adopt=adopt,
    )


def offer_uv(tools: Path, executable: str) -> None:
    """Put a link to the `uv` that came with mlbox into `tools`. Blocking; does nothing where there is none."""
    beside = Path(executable).parent / "uv"
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        return
    tools.mkdir(mode=0o755, parents=True, exist_ok=True)
    link = tools / "uv"
    link.unlink(missing_ok=True)
    link.symlink_to(found)


def _program(job: Job, folder: Path, shell: str) -> tuple[str, ...]:
    if job.spec.script is None:
        return (shell, "-c", job.spec.command or "")
    path = folder / "script"
    path.unlink(missing_ok=True)
    path.touch(mode=0o700, exist_ok=False)
    path.write_text(job.spec.script, encoding="utf-8")
    return (str(path),) if job.spec.script.startswith("#!") else (shell, str(path))


def _environment(
    job: Job, around: Surroundings, hints: Mapping[str, str], identity: Mapping[str, str]
) -> dict[str, str]:
    """The whole environment. The user's variables beat the box's and the hints; what the job is beats all."""
    base = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}
    env = {**base, **around.inherited, **hints, **job.spec.env}
    env["PATH"] = f"{env['PATH']}:{around.tools}"
    return {**env, **identity}


def array_variables(array: ArrayPlace) -> dict[str, str]:
    """Which element of its array a job is, in our words and in Slurm's."""
    return {
        "MLBOX_ARRAY_ID": str(array.id),
        "MLBOX_ARRAY_INDEX": str(array.index),
        "MLBOX_ARRAY_SIZE": str(array.size),
        "SLURM_ARRAY_JOB_ID": str(array.id),
        "SLURM_ARRAY_TASK_ID": str(array.index),
        "SLURM_ARRAY_TASK_COUNT": str(array.size),
    }


def _place(job: Job, cpu_affinity: Sequence[int]) -> dict[str, str]:
    """Where the job runs, and which element of its array it is."""
    env: dict[str, str] = {}
    if job.array is not None:
        env |= array_variables(job.array)
    if job.spec.gpu_mem_mib is not None:
        env["MLBOX_GPU_MEM_MIB"] = str(job.spec.gpu_mem_mib)
    if cpu_affinity:
        env["MLBOX_CPU_AFFINITY"] = _ranges(cpu_affinity)
    if _distributed(job):
        processes = str(max(1, job.spec.gpus))
        env |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "NPROC_PER_NODE": processes, "NNODES": "1"}
    return env


def _hints(job: Job, attempt: int, cores: int) -> dict[str, str]:
    """What helps processes on several GPUs of one box to find each other (torch.distributed, NCCL, torchrun)."""
    if not _distributed(job):
        return {}
    env = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        # All ranks are here. Left alone, NCCL and Gloo take the first interface that looks like a network: a container
        # bridge or a VPN, on which they hang. The data itself goes by NVLink, PCIe or shared memory.
        "NCCL_SOCKET_IFNAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = _ranks(job)
    if ranks is None:
        return env
    return env | {
        # What torchrun sets beside the ranks, by which libraries know that somebody else starts the processes.
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_NAME": "default",
        "ROLE_WORLD_SIZE": str(ranks),
        "TORCHELASTIC_RUN_ID": handle(job.id, attempt),
        "TORCHELASTIC_RESTART_COUNT": str(attempt - 1),
        "TORCHELASTIC_MAX_RESTARTS": str(max(attempt - 1, job.spec.retries)),
        # Otherwise each rank starts a thread for each core of the box (torchrun gives one).
        "OMP_NUM_THREADS": str(max(1, (job.spec.cpus or ranks) // ranks)),
    }


def _slurm(job: Job, attempt: int, work: Path, cores: int) -> dict[str, str]:
    """sbatch(1), OUTPUT ENVIRONMENT VARIABLES."""
    spec, host, ranks = job.spec, socket.gethostname(), _ranks(job)
    env = {
        "SLURM_JOB_ID": str(job.id),
        "SLURM_JOBID": str(job.id),
        "SLURM_JOB_NAME": spec.name,
        "SLURM_JOB_USER": job.user,
        "SLURM_JOB_UID": str(job.uid),
        "SLURM_SUBMIT_DIR": str(work),
        "SLURM_SUBMIT_HOST": host,
        "SLURM_JOB_NODELIST": host,
        "SLURM_NODELIST": host,
        "SLURMD_NODENAME": host,
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_CPUS_ON_NODE": str(cores),
        "SLURM_JOB_CPUS_PER_NODE": str(cores),
    }
    # As sbatch, which sets it only for `--ntasks`: by SLURM_NTASKS Lightning decides that somebody else starts its
    # processes, and waits for them for ever (lightning/fabric/plugins/environments/slurm.py, `_is_srun_used`).
    if ranks is not None or spec.gpus <= 1:
        tasks = str(ranks or 1)
        env |= {"SLURM_NTASKS": tasks, "SLURM_NPROCS": tasks, "SLURM_TASKS_PER_NODE": tasks}
    if ranks is not None:
        env["SLURM_NTASKS_PER_NODE"] = str(ranks)
    if spec.cpus is not None:
        env["SLURM_CPUS_PER_TASK"] = str(max(1, spec.cpus // (ranks or 1)))
    if spec.mem_mib is not None:
        env["SLURM_MEM_PER_NODE"] = str(spec.mem_mib)
    if spec.gpus:
        env |= {"SLURM_GPUS": str(spec.gpus), "SLURM_GPUS_ON_NODE": str(spec.gpus)}
    if attempt > 1:
        env["SLURM_RESTART_COUNT"] = str(attempt - 1)
    return env


def _distributed(job: Job) -> bool:
    return job.spec.gpus > 1 or job.spec.launch is not None


def _ranks(job: Job) -> int | None:
    """How many processes mlbox itself starts; None: one, that makes others if it likes."""
    return max(1, job.spec.gpus) if job.spec.launch is Launcher.TORCHRUN else None


def _cores(job: Job, cpu_affinity: Sequence[int]) -> int:
    """How many cores the job may count on. One without GPUs holds a slot for each."""
    if job.spec.cpus is not None or not job.spec.wants_gpu:
        return job.spec.cpus or 1
    return len(cpu_affinity) or len(os.sched_getaffinity(0))


def _free_port() -> int:
    """A TCP port that nobody listens on now. Somebody may take it first: then rank 0 says so and the job fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _ranges(numbers: Sequence[int]) -> str:
    """(0, 1, 2, 8) -> `0-2,8`, the form of taskset(1)."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _expanded(pattern: str | None, job: Job) -> str | None:
    """A name for --output or --error, with what sbatch(1) calls filename patterns filled in; `%3a` pads with zeros."""
    if pattern is None:
        return None
    array = job.array
    values = {
        "%": "%",
        "j": str(job.id),
        "A": str(array.id if array else job.id),
        "a": str(array.index) if array else "0",
        "x": job.spec.name.replace("/", "_"),
        "u": job.user.replace("/", "_"),
        "N": socket.gethostname(),
        "n": "0",
        "t": "0",
    }

    def value(match: re.Match[str]) -> str:
        text = values[match[2]]
        return text.zfill(min(int(match[1] or 0), 10)) if text.isdecimal() else text  # Slurm pads to 10 at most

    return re.sub(r"%(\d*)([%jAaxuNnt])", value, pattern)
