"""Attempts that end with their test."""

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlbox.scheduler.executors import processes
from mlbox.scheduler.executors.local import LocalExecutor
from tests.scheduler.attempts import Attempt


@pytest.fixture(params=["cgroup", "tree"])
def executor(request: pytest.FixtureRequest) -> LocalExecutor:
    """The executor with cgroup v2, where this box lets us use it, and with the process tree alone."""
    if request.param == "cgroup" and processes.cgroup_for_jobs() is None:
        pytest.skip("no cgroup v2 here in which we may make cgroups")
    return LocalExecutor(cgroups=request.param == "cgroup")


@pytest.fixture
def new_attempt(tmp_path: Path, executor: LocalExecutor) -> Iterator[Callable[[], Attempt]]:
    """Makes attempts whose processes all end with the test."""
    attempts: list[Attempt] = []

    def make() -> Attempt:
        folder = tmp_path / f"attempt-{len(attempts) + 1}"
        folder.mkdir()
        attempts.append(Attempt(folder, executor))
        return attempts[-1]

    yield make
    for attempt in attempts:
        attempt.clean()


@pytest.fixture
def attempt(new_attempt: Callable[[], Attempt]) -> Attempt:
    return new_attempt()


@pytest.fixture
def archive(tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    """Makes a .tar.gz of executable files."""

    def make(files: dict[str, bytes]) -> Path:
        path = tmp_path / "code.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(content), 0o755
                tar.addfile(info, io.BytesIO(content))
        return path

    return make
