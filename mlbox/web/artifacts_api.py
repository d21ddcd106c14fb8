"""`/api/jobs/12/artifacts`: what a job left, to list, to download, and to add to by the job itself."""

import asyncio
import os
from collections.abc import AsyncGenerator
from functools import partial
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from mlbox.config import size_bytes
from mlbox.errors import Denied, NotFound
from mlbox.web import artifacts, bodies
from mlbox.web.answers import Json, Text, moment, table
from mlbox.web.artifacts import Artifact
from mlbox.web.doors import Doors
from mlbox.web.live import Stream, Streams
from mlbox.web.negotiation import wants_text
from mlbox.web.problems import NoSuchRange
from mlbox.web.ranges import byte_range, content_range
from mlbox.web.routes import id_in_path, identity_of

_BLOCK_BYTES = 256 << 10
_HEADERS = {
    "Content-Security-Policy": "sandbox; default-src 'none'",
    "Accept-Ranges": "bytes",
}
"""An artifact is whatever a job wrote: it must never run in a page of ours."""


class ArtifactsApi:
    """The endpoints of artifacts."""

    def __init__(self, doors: Doors, streams: Streams) -> None:
        self._jobs = doors.jobs
        self._streams = streams
        self._body_max = size_bytes(doors.config.server.body_max)

    async def list(self, request: Request) -> Response:
        job = await self._jobs.get(identity_of(request), id_in_path(request, "job"))
        found = await asyncio.to_thread(artifacts.listing, self._jobs.out_folder(job.id))
        rows = [artifact_json(artifact) for artifact in found]
        if wants_text(request):
            return Text(table(("path", "size", "modified_at"), rows))
        return Json({"artifacts": rows})

    async def download(self, request: Request) -> Response:
        job = await self._jobs.get(identity_of(request), id_in_path(request, "job"))
        path: str = request.path_params["path"]
        fd, size = await asyncio.to_thread(artifacts.open_file, self._jobs.out_folder(job.id), path)
        try:
            asked = byte_range(request.headers.get("range"), size)
        except NoSuchRange:
            os.close(fd)
            raise
        start, end = asked or (0, size)
        name = path.rpartition("/")[2]
        headers = {
            **_HEADERS,
            "Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}",
            "Content-Length": str(end - start),
        }
        if asked:
            headers["Content-Range"] = content_range(start, end, size)
        return Stream(
            self._streams,
            _slice(fd, start, end),
            media_type="application/octet-stream",
            status=206 if asked else 200,
            headers=headers,
            close=partial(os.close, fd),
        )

    async def store(self, request: Request) -> Response:
        who, job_id = identity_of(request), id_in_path(request, "job")
        job = await self._jobs.get(who, job_id)
        if who.job_id != job.id:
            raise Denied(f"only job {job.id} itself adds to its artifacts, with its own token ($MLBOX_TOKEN)")
        path: str = request.path_params["path"]
        async with bodies.receiving(self._jobs.incoming_folder, self._body_max) as upload:
            await bodies.receive_whole(request, upload, self._body_max)
            await asyncio.to_thread(artifacts.store, self._jobs.out_folder(job.id), path, upload.path)
            return Json({"path": path, "size": upload.size}, 201)


async def _slice(fd: int, start: int, end: int) -> AsyncGenerator[bytes]:
    while start < end:
        block = await asyncio.to_thread(os.pread, fd, min(_BLOCK_BYTES, end - start), start)
        if not block:
            raise NotFound("the file became shorter while it was read")
        start += len(block)
        yield block


def artifact_json(artifact: Artifact) -> dict[str, object]:
    return {"path": artifact.path, "size": artifact.size, "modified_at": moment(artifact.modified_at)}
