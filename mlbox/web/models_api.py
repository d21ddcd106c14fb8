"""`/api/models`: what is deployed, and deploying a version from a file or from what a job left."""

from starlette.requests import Request
from starlette.responses import Response

from mlbox.config import size_bytes
from mlbox.errors import FieldError, Invalid
from mlbox.identity import Identity
from mlbox.scheduler import values
from mlbox.serving.deployments import VersionInfo
from mlbox.web import bodies
from mlbox.web.answers import Json, Text, model_json, table, version_json
from mlbox.web.doors import Doors
from mlbox.web.negotiation import wants_text
from mlbox.web.routes import identity_of

_COLUMNS = ("name", "version", "state", "job", "deployed_at", "reason")


class ModelsApi:
    """The endpoints of models."""

    def __init__(self, doors: Doors) -> None:
        self._deployments = doors.deployments
        self._jobs = doors.jobs
        self._body_max = size_bytes(doors.config.server.body_max)

    async def list(self, request: Request) -> Response:
        models = [model_json(model) for model in await self._deployments.models()]
        if wants_text(request):
            rows = [
                {**version_json(version), "name": model.name}
                for model in await self._deployments.models()
                for version in model.versions
            ]
            return Text(table(_COLUMNS, rows))
        return Json({"models": models})

    async def show(self, request: Request) -> Response:
        return Json(model_json(await self._deployments.model(request.path_params["name"])))

    async def deploy(self, request: Request) -> Response:
        name: str = request.path_params["name"]
        version = _version(request.path_params["version"])
        who = identity_of(request)
        if bodies.media_type_of(request) == bodies.JSON:
            info = await self._from_job(request, who, name, version)
        else:
            async with bodies.receiving(self._jobs.incoming_folder, self._body_max) as upload:
                await bodies.receive_whole(request, upload, self._body_max)
                info = await self._deployments.deploy_file(who, name, version, upload.path)
        if wants_text(request):
            return Text(f"{name} {info.version}\n", 201, _location(name))
        return Json(version_json(info), 201, _location(name))

    async def _from_job(self, request: Request, who: Identity, name: str, version: int | None) -> VersionInfo:
        fields = await bodies.fields_of(request)
        bodies.known_only(fields, ("job", "path"))
        path = fields.get("path", f"{name}.onnx")
        try:
            job_id = values.integer(1, values.INT64_MAX)(fields.get("job"))
        except values.Bad as error:
            raise Invalid(f"job: {error}", (FieldError("job", str(error)),)) from None
        if not isinstance(path, str) or "\0" in path:
            raise Invalid("path: wants the path of an artifact", (FieldError("path", "wants a path"),))
        job = await self._jobs.get(who, job_id)
        return await self._deployments.deploy_job(who, name, version, job, path)


def _version(text: str) -> int | None:
    if text == "next":
        return None
    if text.isascii() and text.isdigit() and len(text) <= 10:
        return int(text)
    raise Invalid(f"{text[:40]!r} is no version: use a number, or 'next'")


def _location(name: str) -> dict[str, str]:
    return {"Location": f"/api/models/{name}"}
