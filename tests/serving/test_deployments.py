"""What jobs and people deploy becomes exactly one version, whatever crashes, fills up or lies in between."""

import asyncio
import contextlib
import hashlib
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from mlbox.database import Database
from mlbox.errors import Conflict, Denied, Invalid, NotFound, Unavailable
from mlbox.events import JOBS, MODELS, Events
from mlbox.identity import Identity, Role, Scope
from mlbox.jobs import Job, JobSpec, JobState
from mlbox.scheduler import queue
from mlbox.scheduler.outcome import Outcome
from mlbox.scheduler.placement import Start
from mlbox.scheduler.queue import Launching
from mlbox.serving import deployments as module
from mlbox.serving import queries
from mlbox.serving.client import ServedVersion
from mlbox.serving.deployments import Deployments, ModelInfo
from mlbox.serving.queries import VersionRecord

WHO = Identity(user="ann", uid=1000, role=Role.DEPLOYER, scopes=frozenset({Scope.DEPLOY}), how="test")


class Box:
    """A model folder, a jobs folder and a database, and the deployments between them."""

    def __init__(self, folder: Path, database: Database) -> None:
        self.models = folder / "models"
        self.jobs = folder / "jobs"
        self.staging = folder / "incoming"
        self.staging.mkdir(exist_ok=True)
        self.database = database
        self.events = Events()
        self.served: list[ServedVersion] | None = None
        self.deployments = self.restarted()

    def restarted(self) -> Deployments:
        return Deployments(
            database=self.database,
            events=self.events,
            models=self.models,
            out_folder=self.out,
            served=lambda: self.served,
        )

    def out(self, job_id: int) -> Path:
        return self.jobs / str(job_id) / "out"

    def model(self, name: str, version: int) -> Path:
        return self.models / name / str(version) / "model.onnx"

    def upload(self, content: bytes = b"weights") -> Path:
        path = self.staging / "upload"
        path.write_bytes(content)
        return path

    async def succeeded(self, model: str | None = "digits") -> Job:
        """A job that succeeded, with an empty artifacts folder."""
        job = await self.database.write(_succeeded, model)
        self.out(job.id).mkdir(parents=True)
        return job

    async def trained(self, content: bytes = b"weights") -> Job:
        """A job that succeeded and left its model."""
        job = await self.succeeded()
        (self.out(job.id) / "digits.onnx").write_bytes(content)
        return job

    async def records(self) -> list[VersionRecord]:
        return await self.database.read(queries.records)

    def halves(self) -> list[Path]:
        return list(self.models.glob("*/.*"))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The deployments' own task, from a restart on; an error in it is raised."""
        self.deployments = self.restarted()
        task = asyncio.create_task(self.deployments.run())
        try:
            yield
        finally:
            if not task.done():
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def settled(self) -> list[VersionRecord]:
        """The records once nothing is left to do."""
        async with self.running(), asyncio.timeout(20):
            while True:
                candidates = await self.database.read(queries.candidates)
                records = await self.records()
                if not candidates and all(record.deployed_at or record.failed_at for record in records):
                    return records
                await asyncio.sleep(0.01)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # a file has no event
            await asyncio.sleep(0.01)


def _succeeded(connection: sqlite3.Connection, model: str | None) -> Job:
    job, _ = queue.submit(connection, JobSpec(command="x", name="n", model=model), user="ann", uid=1000, now=1.0)
    start = Start(job_id=job.id, gpu_uuids=())
    queue.start(connection, [Launching(start=start, key=f"k{job.id}", token_sha256=f"t{job.id}")], now=2.0)
    ended, _ = queue.finish(
        connection, job.id, 1, Outcome(state=JobState.SUCCEEDED, reason=None, cause="ended well"), now=3.0
    )
    assert ended is not None
    return ended


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What did not work is tried again at once."""
    monkeypatch.setattr(module, "_REPAIR_S", 0.05)
    monkeypatch.setattr(module, "_PAUSE_S", 0.0)


@pytest.fixture
def box(tmp_path: Path, database: Database) -> Box:
    return Box(tmp_path, database)


# A job's own model


async def test_a_jobs_model_becomes_the_next_version_once(box: Box) -> None:
    first = await box.trained(b"one")
    second = await box.trained(b"two")
    await box.succeeded(model=None)
    records = await box.settled()
    assert [(record.version, record.job_id, record.by_user) for record in records] == [
        (1, first.id, "ann"),
        (2, second.id, "ann"),
    ]
    assert (box.model("digits", 1).read_bytes(), box.model("digits", 2).read_bytes()) == (b"one", b"two")
    assert records[0].sha256 == hashlib.sha256(b"one").hexdigest()
    assert await box.settled() == records
    assert sorted(path.name for path in (box.models / "digits").iterdir()) == ["1", "2"]


async def test_a_job_that_ends_later_is_heard_of(box: Box) -> None:
    with box.events.subscribe(MODELS) as changes:
        async with box.running():
            await box.trained()
            box.events.publish(JOBS)
            assert await changes.take(10) == {MODELS}
    assert box.model("digits", 1).exists()


async def test_external_data_beside_the_model_comes_along(box: Box) -> None:
    job = await box.trained()
    (box.out(job.id) / "digits.onnx.data").write_bytes(b"tensors")
    (box.out(job.id) / "digits.onnx_data").write_bytes(b"more")
    (box.out(job.id) / "notes.txt").write_bytes(b"mine")
    await box.settled()
    folder = box.models / "digits" / "1"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "model.onnx": b"weights",
        "digits.onnx.data": b"tensors",
        "digits.onnx_data": b"more",
    }


async def test_the_next_version_is_above_the_folder_and_the_records(box: Box) -> None:
    (box.models / "digits" / "7").mkdir(parents=True)
    for odd in ("08", "x", "9" * 200, ".9", "99999999999"):
        (box.models / "digits" / odd).mkdir()
    await box.trained()
    assert [record.version for record in await box.settled()] == [8]
    bad = await box.succeeded()
    assert [(record.version, record.job_id) for record in await box.settled()][1:] == [(9, bad.id)]
    await box.trained()
    assert [record.version for record in await box.settled()] == [8, 9, 10]
    (box.models / "digits" / "10").rename(box.models / "digits" / "taken away")
    await box.trained()
    assert [record.version for record in await box.settled()] == [8, 9, 10, 11]


def symbolic_link(out: Path) -> None:
    (out / "secret").write_bytes(b"weights")
    (out / "digits.onnx").symlink_to("secret")


def linked_folder(out: Path) -> None:
    elsewhere = out.with_name("elsewhere")
    elsewhere.mkdir()
    (elsewhere / "digits.onnx").write_bytes(b"weights")
    out.rmdir()
    out.symlink_to(elsewhere)


def hard_link(out: Path) -> None:
    (out / "original").write_bytes(b"weights")
    (out / "digits.onnx").hardlink_to(out / "original")


def unix_socket(out: Path) -> None:
    here = Path.cwd()
    os.chdir(out)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("digits.onnx")
    os.chdir(here)


def linked_data(out: Path) -> None:
    (out / "digits.onnx").write_bytes(b"weights")
    (out / "digits.onnx.data").symlink_to("/etc/passwd")


def other_names(out: Path) -> None:
    (out / "modell.onnx").touch()
    (out / "line\nbreak").touch()
    os.close(os.open(os.fsencode(out) + b"/na\xefve.onnx", os.O_CREAT))


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda out: None, "there is no 'digits.onnx' to deploy (found: nothing)"),
    "no folder": (lambda out: out.rmdir(), "there is no 'digits.onnx' to deploy (found: nothing)"),
    "other names": (other_names, "(found: 'line\\nbreak', 'modell.onnx', 'na\\udcefve.onnx')"),
    "symbolic link": (symbolic_link, "'digits.onnx' is a symbolic link, or beneath one: copy it instead"),
    "linked folder": (linked_folder, "'digits.onnx' is a symbolic link, or beneath one: copy it instead"),
    "hard link": (hard_link, "'digits.onnx' is a hard link to a file that has another name too: copy it instead"),
    "pipe": (lambda out: os.mkfifo(out / "digits.onnx"), "'digits.onnx' is not a plain file"),
    "folder": (lambda out: (out / "digits.onnx").mkdir(), "'digits.onnx' is not a plain file"),
    "socket": (unix_socket, "'digits.onnx' cannot be read: No such device or address"),
    "empty file": (lambda out: (out / "digits.onnx").touch(), "'digits.onnx' is empty"),
    "linked data": (linked_data, "'digits.onnx.data' is a symbolic link, or beneath one: copy it instead"),
}


@pytest.mark.parametrize("what", HOSTILE)
async def test_what_cannot_be_deployed_is_recorded_with_its_cause(box: Box, what: str) -> None:
    make, cause = HOSTILE[what]
    job = await box.succeeded()
    make(box.out(job.id))
    (record,) = await box.settled()
    assert record.failed_at is not None
    assert record.deployed_at is None
    assert cause in str(record.cause)
    assert str(record.cause).isprintable()
    assert not (box.models / "digits" / "1").exists()
    assert box.halves() == []
    await box.trained()
    assert [record.deployed_at is None for record in await box.settled()] == [True, False], "others are not held up"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
async def test_a_file_that_may_not_be_read_is_recorded(box: Box) -> None:
    job = await box.trained()
    (box.out(job.id) / "digits.onnx").chmod(0)
    (record,) = await box.settled()
    assert "cannot be read: Permission denied" in str(record.cause)


async def test_trouble_of_the_box_only_delays_a_jobs_model(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    box.models.write_text("a file where the folder should be")
    await box.trained()
    async with box.running():
        await until(lambda: "is tried again" in caplog.text)
        box.models.unlink()
        await until(box.model("digits", 1).exists)
    (record,) = await box.settled()
    assert record.failed_at is None


async def test_one_models_trouble_does_not_hold_up_another(box: Box) -> None:
    box.models.mkdir()
    (box.models / "digits").write_text("a file where the model's folder should be")
    await box.trained()
    other = await box.succeeded(model="letters")
    (box.out(other.id) / "letters.onnx").write_bytes(b"weights")
    async with box.running():
        await until(box.model("letters", 1).exists)
    (box.models / "digits").unlink()
    assert all(record.deployed_at for record in await box.settled())


# Crashes

CRASH = """
import asyncio, os, signal, sys
from pathlib import Path
from mlbox.database import Database
from mlbox.events import Events
from mlbox.identity import Identity, Role, Scope
from mlbox.serving import queries
from mlbox.serving.deployments import Deployments

folder, what, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
steps = 0

def step(event, args):
    global steps
    if event == "open" or event.startswith("os."):
        if any(str(folder / "models") in str(arg) for arg in args):
            steps += 1
            if steps == last:
                os.kill(os.getpid(), signal.SIGKILL)

async def main():
    database = await Database.open(folder / "mlbox.db")
    deployments = Deployments(
        database=database, events=Events(), models=folder / "models",
        out_folder=lambda job_id: folder / "jobs" / str(job_id) / "out", served=lambda: None,
    )
    who = Identity(user="ann", uid=1, role=Role.DEPLOYER, scopes=frozenset({Scope.DEPLOY}), how="test")
    sys.addaudithook(step)
    if what == "upload":
        await deployments.deploy_file(who, "digits", None, folder / "incoming" / "upload")
    else:
        running = asyncio.create_task(deployments.run())
        while await database.read(queries.candidates) or await database.read(queries.unfinished):
            await asyncio.sleep(0.01)
        running.cancel()
    await database.close()

asyncio.run(main())
"""


def crash(folder: Path, what: str, step: int) -> bool:
    """Deploy in another process that is killed before its n-th step in the model folder; False: it had fewer."""
    died = subprocess.run([sys.executable, "-c", CRASH, str(folder), what, str(step)], capture_output=True, timeout=30)
    assert died.returncode in (0, -9), died.stderr.decode()
    return died.returncode == -9


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    """One fresh folder after the other."""
    return (fresh for number in range(1, 100) if not (fresh := tmp_path / f"life-{number}").mkdir())


@contextlib.asynccontextmanager
async def boxed(folder: Path) -> AsyncIterator[Box]:
    database = await Database.open(folder / "mlbox.db")
    yield Box(folder, database)
    await database.close()


@pytest.mark.slow
async def test_a_jobs_model_is_deployed_once_whatever_step_is_the_last(folders: Iterator[Path]) -> None:
    steps = 0
    for steps, folder in enumerate(folders, 1):
        async with boxed(folder) as box:
            await box.trained()
        if not await asyncio.to_thread(crash, folder, "job", steps):
            break
        await asyncio.to_thread(crash, folder, "job", 3)  # and once more, while that is repaired
        async with boxed(folder) as box:
            (record,) = await box.settled()
            assert record.deployed_at is not None, f"step {steps}"
            assert [path.name for path in (box.models / "digits").iterdir()] == ["1"]
            assert box.model("digits", 1).read_bytes() == b"weights"
            assert record.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert steps > 6, "it died at every step there is"


@pytest.mark.slow
async def test_an_upload_is_whole_or_marked_failed_whatever_step_is_the_last(folders: Iterator[Path]) -> None:
    steps, outcomes = 0, set[bool]()
    for steps, folder in enumerate(folders, 1):
        async with boxed(folder) as box:
            box.upload()
        if not await asyncio.to_thread(crash, folder, "upload", steps):
            break
        async with boxed(folder) as box:
            records = await box.settled()
            whole = box.model("digits", 1).exists()
            assert all((record.deployed_at is not None) == whole for record in records), f"step {steps}"
            assert whole or all("upload it again" in str(record.cause) for record in records)
            assert box.halves() == []
            info = await box.deployments.deploy_file(WHO, "digits", None, box.upload(b"again"))
            assert info.version == len(records) + 1
            assert box.model("digits", info.version).read_bytes() == b"again"
        outcomes.add(whole)
    assert steps > 6, "it died at every step there is"
    assert outcomes == {True, False}


# By hand


async def test_an_upload_becomes_the_version_that_was_asked_for(box: Box) -> None:
    info = await box.deployments.deploy_file(WHO, "digits", 5, box.upload())
    assert (info.version, info.state, info.by_user, info.job_id) == (5, "LOADING", "ann", None)
    assert info.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert box.model("digits", 5).read_bytes() == b"weights"
    assert (await box.deployments.deploy_file(WHO, "digits", None, box.upload())).version == 6
    with pytest.raises(Conflict, match="version 5 of model 'digits' is taken"):
        await box.deployments.deploy_file(WHO, "digits", 5, box.upload())
    (box.models / "digits" / "9").mkdir()
    with pytest.raises(Conflict, match="version 9"):
        await box.deployments.deploy_file(WHO, "digits", 9, box.upload())


async def test_uploads_at_one_time_get_versions_of_their_own(box: Box) -> None:
    async with box.running():
        infos = await asyncio.gather(*(box.deployments.deploy_file(WHO, "m", None, box.upload()) for _ in range(20)))
    assert sorted(info.version for info in infos) == list(range(1, 21))
    assert all(record.deployed_at for record in await box.records())


async def test_an_artifact_of_a_job_can_be_deployed_by_its_path(box: Box) -> None:
    job = await box.succeeded(model=None)
    (box.out(job.id) / "best").mkdir()
    (box.out(job.id) / "best" / "epoch 7.onnx").write_bytes(b"weights")
    info = await box.deployments.deploy_job(WHO, "digits", None, job, "best/epoch 7.onnx")
    assert (info.version, info.job_id) == (1, job.id)
    assert box.model("digits", 1).read_bytes() == b"weights"
    again = await box.deployments.deploy_job(WHO, "letters", None, job, "./best/epoch 7.onnx")
    assert again.version == 1


@pytest.mark.parametrize(
    "path", ["", ".", "..", "../1/out/x.onnx", "/etc/passwd", "a/../../b", "a\0b", "\ud800", "x" * 5000], ids=range(9)
)
async def test_a_path_that_leads_out_is_refused(box: Box, path: str) -> None:
    job = await box.trained()
    with pytest.raises(Invalid):
        await box.deployments.deploy_job(WHO, "m", None, job, path)
    assert await box.records() == []


async def test_an_artifact_that_is_not_there_is_not_found(box: Box) -> None:
    job = await box.trained()
    for path in ("missing.onnx", "digits.onnx/x", "x" * 300, "missing/x.onnx"):
        with pytest.raises(NotFound, match="left no file"):
            await box.deployments.deploy_job(WHO, "m", None, job, path)
    assert await box.records() == []


async def test_a_link_on_the_way_to_an_artifact_is_not_followed(box: Box, tmp_path: Path) -> None:
    job = await box.trained()
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "x.onnx").write_bytes(b"secret")
    (box.out(job.id) / "link").symlink_to(tmp_path / "private")
    with pytest.raises(Invalid, match="symbolic link"):
        await box.deployments.deploy_job(WHO, "m", None, job, "link/x.onnx")
    assert not box.model("m", 1).exists()


@pytest.mark.parametrize(
    ("name", "version"),
    [("..", 1), (".x", 1), ("a/b", 1), ("", 1), ("stats", 1), ("x" * 65, 1), ("m", 0), ("m", -1), ("m", 2**31)],
)
async def test_names_and_versions_that_cannot_be_are_refused(box: Box, name: str, version: int) -> None:
    with pytest.raises(Invalid):
        await box.deployments.deploy_file(WHO, name, version, box.upload())
    assert await box.records() == []


async def test_the_highest_version_has_no_next(box: Box) -> None:
    (box.models / "digits" / str(2**31 - 1)).mkdir(parents=True)
    with pytest.raises(Conflict, match="highest version"):
        await box.deployments.deploy_file(WHO, "digits", None, box.upload())
    await box.trained()
    async with box.running():
        other = await box.succeeded(model="letters")
        (box.out(other.id) / "letters.onnx").write_bytes(b"weights")
        box.events.publish(JOBS)
        await until(box.model("letters", 1).exists)


async def test_deploying_needs_the_scope(box: Box) -> None:
    reader = Identity(user="eve", uid=1, role=Role.USER, scopes=frozenset({Scope.READ, Scope.SUBMIT}), how="test")
    job = await box.trained()
    with pytest.raises(Denied):
        await box.deployments.deploy_file(reader, "m", None, box.upload())
    with pytest.raises(Denied):
        await box.deployments.deploy_job(reader, "m", None, job, "digits.onnx")


async def test_an_upload_the_box_cannot_take_now_is_over_and_says_so(box: Box) -> None:
    box.models.mkdir()
    (box.models / "m").write_text("a file where the model's folder should be")
    with pytest.raises(Unavailable, match="cannot be used now"):
        await box.deployments.deploy_file(WHO, "m", None, box.upload())
    (box.models / "m").unlink()
    (record,) = await box.settled()
    assert "cannot be used now" in str(record.cause)
    assert not box.model("m", 1).exists()
    assert (await box.deployments.deploy_file(WHO, "m", None, box.upload())).version == 2


async def test_what_was_asked_by_hand_is_not_done_later_behind_ones_back(box: Box) -> None:
    job = await box.trained()
    await box.settled()
    (box.models / "m").write_text("a file where the model's folder should be")
    with pytest.raises(Unavailable, match="cannot be used now"):
        await box.deployments.deploy_job(WHO, "m", None, job, "digits.onnx")
    (box.models / "m").unlink()
    assert [record.deployed_at is None for record in await box.settled()] == [False, True]
    assert not (box.models / "m").exists()


async def test_an_upload_whose_sender_went_away_is_finished_all_the_same(box: Box) -> None:
    upload = box.upload()
    os.truncate(upload, 16 << 20)
    deploying = asyncio.create_task(box.deployments.deploy_file(WHO, "m", None, upload))
    await until(lambda: bool(box.halves()))
    deploying.cancel()
    assert (await box.deployments.deploy_file(WHO, "m", None, upload)).version == 2
    assert all(record.deployed_at for record in await box.records())
    assert box.halves() == []


async def test_an_upload_under_way_is_not_taken_for_an_interrupted_one(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_REPAIR_S", 0.0)
    upload = box.upload()
    os.truncate(upload, 64 << 20)  # enough for many repairs while it is copied
    async with box.running():
        info = await box.deployments.deploy_file(WHO, "m", None, upload)
    (record,) = await box.records()
    assert (record.deployed_at, record.failed_at) == (info.deployed_at, None)


async def test_an_empty_upload_is_refused_and_recorded(box: Box) -> None:
    with pytest.raises(Invalid, match="is empty"):
        await box.deployments.deploy_file(WHO, "m", None, box.upload(b""))
    (record,) = await box.records()
    assert "is empty" in str(record.cause)


# What is deployed


def states(model: ModelInfo) -> dict[int, tuple[str, str | None]]:
    return {version.version: (version.state, version.reason) for version in model.versions}


async def test_models_tell_what_the_server_the_folder_and_the_records_say(box: Box) -> None:
    await box.trained(b"one")
    await box.succeeded()
    await box.trained(b"three")
    await box.settled()
    for version in ("5", "6"):
        (box.models / "digits" / version).mkdir()
    await box.database.write(
        queries.request, model="digits", version=7, above=0, job_id=None, path="(upload)", user="ann", now=1.0
    )
    (box.models / "digits" / "1" / "model.onnx").unlink()
    (box.models / "digits" / "1").rmdir()
    (box.models / ".hidden").mkdir()
    (box.models / "not a name!").mkdir()
    (box.models / "bare").mkdir()
    stopped = await box.deployments.model("digits")
    assert {number: state for number, (state, _) in states(stopped).items()} == {
        7: "waiting",
        6: "stopped",
        5: "stopped",
        3: "stopped",
        2: "failed",
        1: "removed",
    }
    box.served = [
        ServedVersion(name="digits", version=3, state="READY", reason=""),
        ServedVersion(name="digits", version=5, state="UNAVAILABLE", reason="truncated"),
        ServedVersion(name="letters", version=1, state="READY", reason=""),
        ServedVersion(name="broken", version=None, state="UNAVAILABLE", reason="bad config.pbtxt"),
    ]
    found = {model.name: model for model in await box.deployments.models()}
    assert sorted(found) == ["bare", "broken", "digits", "letters"]
    assert states(found["digits"])[3] == ("READY", None)
    assert states(found["digits"])[5] == ("UNAVAILABLE", "truncated")
    assert states(found["digits"])[6][0] == "waiting"
    assert [version.version for version in found["digits"].versions] == [7, 6, 5, 3, 2, 1]
    assert found["digits"].ready
    assert found["digits"].versions[3].job_id == 3
    assert not found["bare"].ready
    assert found["broken"].reason == "bad config.pbtxt"


async def test_a_model_nobody_knows_is_not_found(box: Box) -> None:
    assert await box.deployments.models() == []
    with pytest.raises(NotFound, match="there is no model 'x'"):
        await box.deployments.model("x")
