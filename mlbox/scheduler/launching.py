"""From a job to the `Launch` of one attempt: its folders, its program and its whole environment."""

import fnmatch
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlbox.config import JobsConfig, size_bytes
from mlbox.jobs import Job, handle
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
    job: Job, attempt: int, key: str, token: str, gpu_uuids: tuple[str, ...], folders: Folders, around: Surroundings
) -> Launch:
    """Make the attempt's folders and describe its launch. Blocking; may be repeated after a crash.

    Raises OSError when the disk does not let it.
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
    return Launch(
        handle=handle(job.id, attempt),
        key=key,
        folder=folder,
        argv=_program(job, folder, around.shell),
        cwd=work,
        env=_environment(job, attempt, key, token, gpu_uuids, folders, around),
        code=folders.code(job),
        log_head_bytes=head,
        log_tail_bytes=size_bytes(config.log_max) - head,
        time_limit_s=job.spec.time_limit_s,
        grace_s=job.spec.grace_s,
        memory_mib=job.spec.mem_mib,
        cpus=job.spec.cpus,
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
    job: Job,
    attempt: int,
    key: str,
    token: str,
    gpu_uuids: tuple[str, ...],
    folders: Folders,
    around: Surroundings,
) -> dict[str, str]:
    """The whole environment. The user's variables beat the box's; mlbox's own beat both."""
    env = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1", **around.inherited, **job.spec.env}
    env["PATH"] = f"{env['PATH']}:{around.tools}"
    return env | {
        "MLBOX_JOB_ID": str(job.id),
        "MLBOX_JOB_NAME": job.spec.name,
        "MLBOX_ATTEMPT": str(attempt),
        "MLBOX_ATTEMPT_KEY": key,
        "MLBOX_URL": around.url,
        "MLBOX_TOKEN": token,
        "MLBOX_OUT": str(folders.out(job.id)),
        "MLBOX_METRICS": str(folders.metrics(job.id)),
        # UUIDs and bus order, because NVML and CUDA number GPUs differently; a job without GPUs sees none.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(gpu_uuids),
    }
