"""From a file to a model version: what a job left, or somebody uploaded, becomes the next folder the server loads.

A version is a wish in the database first and a folder second: the wish is carried out again after a crash, and the
folder appears whole by one rename, so the inference server never sees half of it.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import ParamSpec, TypeVar

from mlbox.database import Database
from mlbox.errors import Conflict, Denied, Invalid, NotFound, Unavailable
from mlbox.events import JOBS, MODELS, Events
from mlbox.identity import Identity, Scope
from mlbox.jobs import Job
from mlbox.scheduler.values import Bad, text
from mlbox.serving import queries
from mlbox.serving.client import ServedVersion
from mlbox.serving.install import Source, discard, install, installed
from mlbox.serving.queries import VersionRecord
from mlbox.serving.repository import VERSION_MAX, Repository, check_name, scan, version_numbers

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)

_REPAIR_S = 30.0
"""How often what could not be deployed is tried again, and a lost hint made up for."""
_PAUSE_S = 0.2
"""At least so long between two looks at ended jobs: a thousand of them a second must not keep us busy."""
_UPLOAD = "(upload)"


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionInfo:
    """A version as users see it.

    `state` is the server's word (READY, LOADING, UNAVAILABLE ...); or `waiting`, `failed` or `removed` for what the
    server does not have; or `stopped` while it does not run.
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
    """Deploys versions and tells what is deployed. `run` is a task of its own.

    One deployment at a time: so a wish that is found unfinished was really interrupted.
    """

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
        self._turn = asyncio.Lock()
        self._later: set[int] = set()
        """Jobs whose model not even a wish could be noted for: looked at again with the next repair."""

    async def run(self) -> None:
        """Deploy what succeeded jobs left, now and whenever one ends."""
        repair_at = 0.0
        with self._events.subscribe(JOBS) as changes:
            while True:
                try:
                    if time.monotonic() >= repair_at:
                        repair_at = time.monotonic() + _REPAIR_S
                        await self._repair()
                    await self._carry_out()
                except Unavailable as error:
                    log.warning("deploying did not work now and is tried again: %s", error)
                await asyncio.sleep(_PAUSE_S)
                await changes.take(_REPAIR_S)

    async def models(self) -> list[ModelInfo]:
        """Every model that is in the folder, recorded or served, by name. Raises Unavailable."""
        present = (await _on_disk(_scan, self._models)).models
        records: dict[str, dict[int, VersionRecord]] = {}
        for record in await self._database.read(queries.records):
            records.setdefault(record.model, {})[record.version] = record
        served = self._served()
        rows: dict[str, dict[int | None, ServedVersion]] = {}
        for row in served or ():
            rows.setdefault(row.name, {})[row.version] = row
        return [
            _model(name, present.get(name, frozenset()), records.get(name, {}), rows.get(name, {}), served is not None)
            for name in sorted(records.keys() | present.keys() | rows.keys())
        ]

    async def model(self, name: str) -> ModelInfo:
        """One model. Raises NotFound, Unavailable."""
        for model in await self.models():
            if model.name == name:
                return model
        raise NotFound(f"there is no model {name[:64]!r}: deploy one with PUT /api/models/NAME/versions/next")

    async def deploy_file(self, who: Identity, name: str, version: int | None, upload: Path) -> VersionInfo:
        """Deploy a copy of a staged upload as `version` (None: the next).

        Raises Denied, Invalid, Conflict, Unavailable.
        """
        _check(who, name, version)
        source = Source(upload.parent, PurePath(upload.name))
        return await self._asked(who.user, name, version, source, job_id=None, path=_UPLOAD)

    async def deploy_job(self, who: Identity, name: str, version: int | None, job: Job, path: str) -> VersionInfo:
        """Deploy a file that `job` left in its artifacts. Raises Denied, Invalid, NotFound, Conflict, Unavailable."""
        _check(who, name, version)
        try:
            relative = PurePath(text(4095)(path))
        except Bad as error:
            raise Invalid(f"the path {error}") from None
        if relative.is_absolute() or not relative.parts or ".." in relative.parts:
            raise Invalid(f"{path[:80]!r} is not a path within the artifacts of job {job.id}")
        if not await asyncio.to_thread(os.path.isfile, self._out_folder(job.id) / relative):
            raise NotFound(f"job {job.id} left no file {path[:80]!r}: see GET /api/jobs/{job.id}/artifacts")
        source = Source(self._out_folder(job.id), relative)
        return await self._asked(who.user, name, version, source, job_id=job.id, path=str(relative))

    async def _asked(
        self, user: str, name: str, version: int | None, source: Source, *, job_id: int | None, path: str
    ) -> VersionInfo:
        """Deploy what somebody asked for by hand, and waits for; once begun it is finished though they go away."""

        async def deploy() -> VersionInfo:
            async with self._turn:
                record = await self._wish(user, name, version, job_id=job_id, path=path)
                return await self._fulfil(record, source)

        return await asyncio.shield(asyncio.create_task(deploy(), name=f"deploy {name}"))

    async def _repair(self) -> None:
        """Fulfil what a crash, or the box's own trouble, interrupted."""
        self._later.clear()
        async with self._turn:
            for record in await self._database.read(queries.unfinished):
                sha256 = await _on_disk(installed, self._models, record.model, record.version)
                if sha256 is not None:
                    await self._deployed(record, sha256)
                elif record.job_id is not None:
                    await self._deploy_own(record, record.job_id)
                else:
                    await _on_disk(discard, self._models, record.model, record.version)
                    await self._failed(record, "the upload was interrupted before it was in place: upload it again")

    async def _carry_out(self) -> None:
        """Deploy the models of jobs that succeeded."""
        async with self._turn:
            for job in await self._database.read(queries.candidates):
                if job.job_id in self._later:
                    continue
                try:
                    record = await self._wish(job.user, job.model, None, job_id=job.job_id, path=None)
                except (Conflict, Unavailable) as error:
                    log.warning("job %d: its model cannot be deployed now: %s", job.job_id, error)
                    self._later.add(job.job_id)
                else:
                    await self._deploy_own(record, job.job_id)

    async def _deploy_own(self, record: VersionRecord, job_id: int) -> None:
        """Deploy what a job left; nobody waits for the answer, so what is wrong stands in the record and the log."""
        try:
            await self._fulfil(record, self._source(job_id, record))
        except (Invalid, Conflict) as error:
            log.warning("model %s: version %d not deployed: %s", record.model, record.version, error)
        except Unavailable as error:
            log.warning("model %s: version %d is tried again: %s", record.model, record.version, error)

    def _source(self, job_id: int, record: VersionRecord) -> Source:
        return Source(self._out_folder(job_id), PurePath(record.path or f"{record.model}.onnx"))

    async def _wish(
        self, user: str, name: str, version: int | None, *, job_id: int | None, path: str | None
    ) -> VersionRecord:
        """Note that a version is to be deployed, before anything is done about it. Raises Conflict, Unavailable."""
        present = await _on_disk(version_numbers, self._models / name)
        record = None
        if version not in present and (version is not None or max(present, default=0) < VERSION_MAX):
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
            wanted = f"version {version}" if version else "the highest version there can be"
            raise Conflict(f"{wanted} of model {name!r} is taken, and none is used twice: deploy it as 'next'")
        return record

    async def _fulfil(self, record: VersionRecord, source: Source) -> VersionInfo:
        """Put the version in place. Raises Invalid, Conflict, Unavailable.

        A job's own model that the box cannot take now stays a wish and is tried again; whoever asked by hand is told.
        """
        try:
            sha256 = await _on_disk(install, source, self._models, record.model, record.version)
        except (Invalid, Conflict) as error:
            await self._failed(record, str(error))
            raise
        except Unavailable as error:
            if record.path is not None:
                await self._failed(record, str(error))
            raise
        return await self._deployed(record, sha256)

    async def _deployed(self, record: VersionRecord, sha256: str) -> VersionInfo:
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

    async def _failed(self, record: VersionRecord, cause: str) -> None:
        await self._database.write(queries.failed, record.id, cause, now=time.time())
        self._events.publish(MODELS)


def _check(who: Identity, name: str, version: int | None) -> None:
    if not who.may(Scope.DEPLOY):
        raise Denied("deploying a model needs the scope 'deploy'")
    check_name(name)
    if version is not None and not 0 < version <= VERSION_MAX:
        raise Invalid(f"{version} cannot be a version: use 1, 2, 3 ... or 'next'")


async def _on_disk(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work on files. What the box cannot do now is raised as Unavailable."""
    try:
        return await asyncio.to_thread(function, *args, **kwargs)
    except OSError as error:
        raise Unavailable(f"the model folder cannot be used now: {error}") from error


def _scan(models: Path) -> Repository:
    return scan(models) if models.is_dir() else Repository()


def _model(
    name: str,
    present: frozenset[int],
    records: dict[int, VersionRecord],
    rows: dict[int | None, ServedVersion],
    running: bool,
) -> ModelInfo:
    numbers = present | records.keys() | {version for version in rows if version is not None}
    general = rows.get(None)
    return ModelInfo(
        name=name,
        versions=tuple(
            _version(number, number in present, records.get(number), rows.get(number), running)
            for number in sorted(numbers, reverse=True)
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
    elif record is not None and record.deployed_at is None:
        state, reason = "waiting", "it is being put in place"
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
