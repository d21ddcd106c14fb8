"""Attempts with real shims and real processes, for the tests of shim, executor and log."""

import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlbox.scheduler.executors import processes
from mlbox.scheduler.executors.base import Exit, Launch, Liveness, Observation
from mlbox.scheduler.executors.local import LocalExecutor

PATIENCE_S = 20.0


def wait_until(condition: Callable[[], Any], what: str = "") -> Any:
    """The first true value of `condition`."""
    patience_until = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < patience_until, f"waited {PATIENCE_S} s in vain {what}"
        time.sleep(0.005)
    return value


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    process = processes.find(pid)
    return process is not None and process.alive


def open_files(pid: int) -> set[Path]:
    """What a process has open; nothing when it is gone."""
    found: set[Path] = set()
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with suppress(OSError):
            found.add(link.readlink())
    return found


@dataclass
class Attempt:
    """One attempt of a job, in a folder of its own; `executor` may be replaced, as by a restart of the daemon."""

    folder: Path
    executor: LocalExecutor
    key: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def launch(self, *argv: str, env: Mapping[str, str] | None = None, **settings: Any) -> Launch:
        self.work.mkdir(parents=True, exist_ok=True)
        settings.setdefault("cwd", self.work)
        environment = {"PATH": os.environ["PATH"], "MLBOX_ATTEMPT_KEY": self.key, **(env or {})}
        return Launch(handle="mlbox-job-12-1", key=self.key, folder=self.folder, argv=argv, env=environment, **settings)

    def start(self, *argv: str, **settings: Any) -> "Attempt":
        self.executor.start(self.launch(*argv, **settings))
        return self

    def python(self, program: str, *arguments: str, **settings: Any) -> "Attempt":
        return self.start(sys.executable, "-I", "-S", "-c", program, *arguments, **settings)

    def shell(self, command: str, **settings: Any) -> "Attempt":
        return self.start("/bin/sh", "-c", command, **settings)

    def observe(self) -> Observation:
        return self.executor.observe(self.folder)

    def wait_started(self) -> "Attempt":
        wait_until((self.folder / "started.json").exists, "for started.json")
        return self

    def wait_for(self, name: str) -> str:
        """What the job wrote into a file of its folder, once it is there."""
        return wait_until(lambda: (self.work / name).exists() and (self.work / name).read_text(), f"for {name}")

    def wait_liveness(self, wanted: Liveness) -> Observation:
        def seen() -> Observation | None:
            observation = self.observe()
            return observation if observation.liveness is wanted else None

        return wait_until(seen, f"for {wanted}")

    def wait_end(self) -> Exit:
        ended = self.wait_liveness(Liveness.ENDED).exit
        assert ended is not None
        return ended

    def run(self, *argv: str, **settings: Any) -> Exit:
        return self.start(*argv, **settings).wait_end()

    def log(self) -> bytes:
        return (self.folder / "log").read_bytes()

    def shims(self) -> list[int]:
        """The pids of what has this attempt's lock open, oldest first: its shim, and the job until it execs."""
        lock = self.folder / "lock"
        found = processes.descendants(processes.table(), [os.getpid()])
        return sorted(pid for pid in found if lock in open_files(pid))

    def wait_prepared(self) -> int:
        """The pid of the process that is to become the job, once it is there."""
        return wait_until(lambda: len(self.shims()) == 2 and self.shims()[1], "for the process that becomes the job")

    def processes(self) -> frozenset[int]:
        return self.executor.processes(self.folder, self.key)

    def kill_remains(self) -> None:
        wait_until(lambda: not self.executor.kill_remains(self.folder, self.key), "for what is left to end")

    def clean(self) -> None:
        self.executor.stop(self.folder, kill=True)
        wait_until(lambda: self.observe().liveness is not Liveness.ALIVE, "for the shim to end")
        self.kill_remains()
