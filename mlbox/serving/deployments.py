"""From a file to a model version: what a job left, or somebody uploaded, becomes the next folder the server loads.

A version is a wish in the database first and a folder second: the wish is carried out again after a crash, and the
folder appears whole by one rename, so the inference server never sees half of it.
"""

import asyncio
import hashlib
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlbox.database import Database
from mlbox.errors import Conflict, Denied, Invalid, NotFound, Unavailable
from mlbox.events import JOBS, MODELS, Events
from mlbox.identity import Identity, Scope
from mlbox.jobs import Job
from mlbox.scheduler.submission import NAME
from mlbox.serving import queries
from mlbox.serving.client import ServedVersion
from mlbox.serving.queries import Candidate, VersionRecord

log = logging.getLogger(__name__)

_COPY_BYTES = 1 << 20
_REPAIR_S = 30.0
_EXTERNAL = (".data", "_data")
"""How exporters name external data beside `name.onnx` (torch: `.data`, onnx: `_data`); the model refers to it so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionInfo:
    """A version as users see it.

    `state` is the server's word (READY, LOADING, UNAVAILABLE ...), or `waiting`, `failed` for what never reached it,
    or `stopped` while the server does not run.
    """

    version: int
    state: str
    reason: str | None
    job_id: int | None
    sha256: str | None
    by_user: str | None
    deployed_at: float | None

    @property
    def ready(self) -> bool:
        return self.state == "READY"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model and its versions, the newest first. `reason` says what is wrong with the model as a whole."""

    name: str
    versions: tuple[VersionInfo, ...]
    reason: str | None = None

    @property
    def ready(self) -> bool:
        return any(version.ready for version in self.versions)


class Deployments:
    """Deploys versions and tells what is deployed. `run` is a task of its own."""

    def __init__(
        self,
        *,
        database: Database,
        events: Events,
        models: Path,
        out_folder: Callable[[int], Path],
        served: Callable[[], list[ServedVersion] | None],
    ) -> None:
        """`served` answers what the inference server last said (None: it does not run)."""
        self._database = database
        self._events = events
        self._models = models
        self._out_folder = out_folder
        self._served = served

    async def run(self) -> None:
        """Deploy what succeeded jobs left, now and whenever one ends."""
        await asyncio.to_thread(_forget_halves, self._models)
        with self._events.subscribe(JOBS) as changes:
            while True:
                try:
                    await self._carry_out()
                except (Unavailable, OSError) as error:
                    log.warning("deploying did not work now and is tried again: %s", error)
                await changes.take(_REPAIR_S)

    async def models(self) -> list[ModelInfo]:
        """Every model that is in the folder, recorded or served, by name."""
        records = await self._database.read(queries.records)
        present = await asyncio.to_thread(_present, self._models)
        served = self._served()
        names = {record.model for record in records} | present.keys() | {row.name for row in served or ()}
        return [
            _model(name, present.get(name, frozenset()), [r for r in records if r.model == name], served)
            for name in sorted(names)
        ]

    async def model(self, name: str) -> ModelInfo:
        """One model. Raises NotFound."""
        for model in await self.models():
            if model.name == name:
                return model
        raise NotFound(f"there is no model {name!r}: deploy one with PUT /api/models/{name[:64]}/versions/next")

    async def deploy_file(self, who: Identity, name: str, version: int | None, upload: Path) -> VersionInfo:
        """Deploy a staged upload as `version` (None: the next). The upload is moved away.

        Raises Denied, Invalid, Conflict, Unavailable.
        """
        _check(who, name, version)
        record = await self._wish(who.user, name, version, job_id=None, path="(upload)")
        return await self._fulfil(record, {"model.onnx": upload})

    async def deploy_job(self, who: Identity, name: str, version: int | None, job: Job, path: str) -> VersionInfo:
        """Deploy a file that `job` left in its artifacts. Raises Denied, Invalid, NotFound, Conflict, Unavailable."""
        _check(who, name, version)
        if not path or path.startswith("/") or ".." in Path(path).parts:
            raise Invalid(f"{path!r} is not a path within the artifacts of job {job.id}")
        source = self._out_folder(job.id) / path
        if not await asyncio.to_thread(source.is_file):
            raise NotFound(f"job {job.id} left no file {path!r}: see GET /api/jobs/{job.id}/artifacts")
        record = await self._wish(who.user, name, version, job_id=job.id, path=path)
        return await self._fulfil(record, _with_external_data(source))

    async def _carry_out(self) -> None:
        """Fulfil what a crash interrupted, then deploy the models of newly succeeded jobs."""
        for record in await self._database.read(queries.unfinished):
            if record.job_id is None:
                cause = "the upload was lost when mlbox stopped in the middle of it: upload it again"
                await self._database.write(queries.failed, record.id, cause, now=time.time())
            else:
                await self._deploy_own(record)
        for candidate in await self._database.read(queries.candidates):
            await self._deploy_candidate(candidate)

    async def _deploy_candidate(self, candidate: Candidate) -> None:
        above = await asyncio.to_thread(_highest, self._models / candidate.model)
        record = await self._database.write(
            queries.request,
            model=candidate.model,
            version=None,
            above=above,
            job_id=candidate.job_id,
            path=None,
            user=candidate.user,
            now=time.time(),
        )
        if record is not None:
            await self._deploy_own(record)

    async def _deploy_own(self, record: VersionRecord) -> None:
        """Deploy what a job left; what is wrong with it is recorded, for nobody waits for the answer."""
        out = self._out_folder(record.job_id or 0)
        source = out / (record.path or f"{record.model}.onnx")
        try:
            await self._fulfil(record, _with_external_data(source))
        except (Invalid, Conflict) as error:
            log.warning("model %s: version %d not deployed: %s", record.model, record.version, error)

    async def _wish(self, user: str, name: str, version: int | None, *, job_id: int | None, path: str) -> VersionRecord:
        present = await asyncio.to_thread(_numbers, self._models / name)
        record = None
        if version is None or version not in present:
            record = await self._database.write(
                queries.request,
                model=name,
                version=version,
                above=max(present, default=0),
                job_id=job_id,
                path=path,
                user=user,
                now=time.time(),
            )
        if record is None:
            raise Conflict(f"model {name!r} has a version {version} already: deploy it as 'next'")
        return record

    async def _fulfil(self, record: VersionRecord, files: dict[str, Path]) -> VersionInfo:
        """Copy `files` into the version's folder. Raises Invalid or Conflict, then also recorded."""
        try:
            sha256 = await asyncio.to_thread(_install, self._models / record.model, record.version, files)
        except (Invalid, Conflict) as error:
            await self._database.write(queries.failed, record.id, str(error), now=time.time())
            self._events.publish(MODELS)
            raise
        except OSError as error:
            raise Unavailable(f"model {record.model!r} cannot be written now: {error.strerror or error}") from error
        now = time.time()
        await self._database.write(queries.deployed, record.id, sha256, now=now)
        origin = f" from job {record.job_id}" if record.job_id else ""
        log.info("model %s: version %d deployed%s (%s)", record.model, record.version, origin, sha256[:12])
        self._events.publish(MODELS)
        return VersionInfo(
            version=record.version,
            state="LOADING",
            reason=None,
            job_id=record.job_id,
            sha256=sha256,
            by_user=record.by_user,
            deployed_at=now,
        )


def _check(who: Identity, name: str, version: int | None) -> None:
    if not who.may(Scope.DEPLOY):
        raise Denied("deploying a model needs the scope 'deploy'")
    if NAME.fullmatch(name) is None or name.startswith(".") or name == "stats":
        raise Invalid(f"a model cannot be called {name[:80]!r}: 1 to 64 of letters, digits, '.', '_' and '-'")
    if version is not None and not 0 < version < 2**31:
        raise Invalid(f"{version} cannot be a version: use 1, 2, 3 ... or 'next'")


def _install(folder: Path, version: int, files: dict[str, Path]) -> str:
    """Make `<folder>/<version>` with `files` in one rename; returns the SHA-256 of model.onnx. Blocking.

    Done before is done: a folder with the same model in it counts as installed.
    """
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    half = folder / f".half-{os.urandom(8).hex()}"
    half.mkdir(mode=0o755)
    try:
        digests = {name: _copy(source, half / name) for name, source in files.items()}
        target = folder / str(version)
        if target.exists():
            if _digest(target / "model.onnx") == digests["model.onnx"]:
                return digests["model.onnx"]
            raise Conflict(f"{target} is there already, with another model in it")
        half.rename(target)
        return digests["model.onnx"]
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _copy(source: Path, target: Path) -> str:
    """Copy a regular file through its descriptor, never through a link; returns its SHA-256. Raises Invalid."""
    try:
        fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        found = sorted(path.name for path in source.parent.iterdir()) if source.parent.is_dir() else []
        raise Invalid(f"there is no {source.name} to deploy (found: {', '.join(found[:10]) or 'nothing'})") from None
    except OSError as error:
        raise Invalid(f"{source.name} cannot be deployed: {error.strerror}") from error
    with os.fdopen(fd, "rb") as file, target.open("xb") as copy:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1:
            raise Invalid(f"{source.name} is not a plain file of its own (a device, a folder or a second name)")
        digest = hashlib.sha256()
        while block := file.read(_COPY_BYTES):
            digest.update(block)
            copy.write(block)
        copy.flush()
        os.fsync(copy.fileno())
        if copy.tell() == 0:
            raise Invalid(f"{source.name} is empty")
    return digest.hexdigest()


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _with_external_data(source: Path) -> dict[str, Path]:
    beside = (source.with_name(source.name + suffix) for suffix in _EXTERNAL)
    return {"model.onnx": source} | {path.name: path for path in beside if path.is_file()}


def _numbers(folder: Path) -> frozenset[int]:
    """The version numbers in a model's folder."""
    if not folder.is_dir():
        return frozenset()
    return frozenset(int(entry.name) for entry in folder.iterdir() if entry.name.isascii() and entry.name.isdigit())


def _highest(folder: Path) -> int:
    return max(_numbers(folder), default=0)


def _present(models: Path) -> dict[str, frozenset[int]]:
    """The version numbers of each model in the model folder."""
    if not models.is_dir():
        return {}
    return {
        folder.name: _numbers(folder)
        for folder in models.iterdir()
        if NAME.fullmatch(folder.name) and not folder.name.startswith(".") and folder.is_dir()
    }


def _forget_halves(models: Path) -> None:
    """Remove what a crash left of copies that never got their name."""
    if models.is_dir():
        for half in models.glob("*/.half-*"):
            shutil.rmtree(half, ignore_errors=True)


def _model(
    name: str, present: frozenset[int], records: list[VersionRecord], served: list[ServedVersion] | None
) -> ModelInfo:
    of_server = {row.version: row for row in served or () if row.name == name}
    of_record = {record.version: record for record in reversed(records)}
    versions = present | of_record.keys() | {version for version in of_server if version is not None}
    general = of_server.get(None)
    return ModelInfo(
        name=name,
        versions=tuple(
            _version(number, number in present, of_record.get(number), of_server.get(number), served is not None)
            for number in sorted(versions, reverse=True)
        ),
        reason=general.reason or None if general else None,
    )


def _version(
    number: int, present: bool, record: VersionRecord | None, row: ServedVersion | None, running: bool
) -> VersionInfo:
    if row is not None:
        state, reason = row.state, row.reason or None
    elif record is not None and record.failed_at is not None:
        state, reason = "failed", record.cause
    elif not present:
        state, reason = "removed", "its folder is gone"
    elif running:
        state, reason = "waiting", "not loaded: an older version than the policy keeps, or not looked at yet"
    else:
        state, reason = "stopped", "the inference server does not run"
    return VersionInfo(
        version=number,
        state=state,
        reason=reason,
        job_id=record.job_id if record else None,
        sha256=record.sha256 if record else None,
        by_user=record.by_user if record else None,
        deployed_at=record.deployed_at if record else None,
    )
